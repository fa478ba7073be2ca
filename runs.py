"""What the commands share: settings out of flags and presets, the folder of a run, messages.

A run is a folder runs/NAME/ with config.json (every resolved flag), checkpoint.pt (tensors and
plain values), log.jsonl, probe.json and pictures. Bad input ends in `fail`: one line, status 2.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from files import DataError
from model import PRESETS, DiER, ModelConfig, Preset, count_parameters
from sets import INFOS, describe

RUNS = Path("runs")
BASELINES = "-m appendix.baselines"  # trains and probes all other methods
HIDDEN = ("model", "row", "method", "launch")  # settings that are not printed among the others
# A resumed run keeps these from its checkpoint; the others may change.
FIXED = ["data", "preset", "seed", "batch_size", "lr", "ema", "clip", "flip", "size", "limit"]
FIXED += ["model"]


def fail(message: str) -> NoReturn:
    """Print one line and leave with status 2: the way every command reports bad input."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Method:
    """What is trained and probed: DiER, or what appendix/baselines.py compares it with.

    `build` makes a module out of settings. Its `encoder` takes (x0, t) and gives v; `timed` says
    whether v depends on t. Its forward is (x_t, t, x0) -> eps, or, where it does not denoise, its
    own loss: (x0, index) -> (B,), `index` being the images' places in the set that it prepared for.
    """

    name: str
    build: Callable[[dict[str, Any]], nn.Module]
    presets: dict[str, dict[int | str, Preset]]
    denoises: bool = True
    timed: bool = True
    recomputes: bool = False  # knows --checkpoint-activations
    train: str = "train.py"  # the commands that the messages name
    probe: str = "probe.py"
    prepare: Callable[[nn.Module, Any], None] = lambda model, split: None


def build_dier(settings: dict[str, Any]) -> DiER:
    """DiER in the sizes of the settings."""
    return DiER(model_config(settings))


DIER = Method("dier", build_dier, PRESETS, recomputes=True)


def pick_device(name: str) -> torch.device:
    """The device of that name, "auto" being cuda if there is one; exits where it does not work."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} does not work here ({str(error).splitlines()[0]}); use --device cpu")
    return device


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for fp32 throughout.

    "auto" is bf16 where the hardware multiplies it natively (emulated bf16 is up to a hundred times
    slower than fp32 on a CPU), else fp16 on CUDA and fp32 on a CPU.
    """
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    native = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
    return torch.bfloat16 if native else None


def parse_model(text: str, default: Any) -> dict[str, Any]:
    """ "hidden=128,mult=1,2,4" -> {"hidden": 128, "mult": (1, 2, 4)}: a part without = belongs to
    the key before it. `default` holds the preset's sizes, which say what is a list."""
    values: dict[str, list[int]] = {}
    key = None
    for part in filter(None, text.split(",")):
        name, equals, number = part.rpartition("=")
        key = name if equals else key
        known = asdict(default).keys() - {"size", "channels", "dropout"}
        if key not in known:
            fail(f"--model {text}: {key or part!r} is not one of {', '.join(sorted(known))}")
        if not number.isdecimal() or int(number) == 0:
            fail(f"--model {text}: {number!r} is not a whole number above 0")
        values.setdefault(key, []).append(int(number))
    lists = {key for key, value in asdict(default).items() if isinstance(value, tuple)}
    for key, numbers in values.items():
        if key not in lists and len(numbers) > 1:
            fail(f"--model {text}: {key} takes one number")
    return {k: tuple(n) if k in lists else n[0] for k, n in values.items()}


def resolve(args: argparse.Namespace, method: Method = DIER) -> dict[str, Any]:
    """Every setting of a run as plain values: what the user gave, else the preset's value."""
    info = describe(args.data)
    device = pick_device(args.device)
    name = args.preset
    if name == "auto":
        name = "paper" if device.type == "cuda" else "cpu"
    rows = method.presets[name]
    preset = rows.get(info.name, rows[info.side])
    given = {"size": args.size, "dropout": args.dropout, **parse_model(args.model, preset.model)}
    given = {k: v for k, v in given.items() if v is not None}
    if "dropout" in given and not hasattr(preset.model, "dropout"):
        fail(f"--dropout {args.dropout}: {method.name} has none")
    try:
        model = replace(preset.model, channels=info.channels, **given)
    except ValueError as error:
        fail(str(error))
    epochs, minutes = args.epochs, args.minutes
    if epochs is None and minutes is None:
        epochs, minutes = preset.epochs, preset.minutes
    amp = pick_amp(args.amp, device)
    return {
        "method": method.name,
        "data": args.data,
        "data_dir": str(args.data_dir),
        "channels": info.channels,
        "classes": info.classes,
        "size": model.size,
        "preset": name,
        "row": info.side,
        "model": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(model).items()},
        "batch_size": args.batch_size or preset.batch_size,
        "lr": preset.lr if args.lr is None else args.lr,
        "epochs": epochs,
        "minutes": minutes,
        "ema": preset.ema if args.ema is None else args.ema,
        "clip": preset.clip if args.clip is None else args.clip,
        "flip": info.flip if args.flip is None else args.flip,
        "limit": args.limit,
        "seed": args.seed,
        "device": str(device),
        "amp": "off" if amp is None else "bf16" if amp == torch.bfloat16 else "fp16",
        "compile": args.compile,
        "accum": args.accum,
        "checkpoint_activations": args.checkpoint_activations,
        "launch": os.environ.get("TORCHELASTIC_RUN_ID"),  # by which a restarted process knows it
    }


def resolve_resume(
    args: argparse.Namespace, saved: dict[str, Any], method: Method = DIER
) -> dict[str, Any]:
    """The settings of a resumed run: the checkpoint's, with what may change taken from args."""
    if args.data is None:
        args.data = saved["data"]
    if args.seed is None:
        args.seed = saved["seed"]
    given = {k: getattr(args, k) for k in FIXED if k != "model"}
    if args.model:
        given["model"] = {**saved["model"], **resolve(args, method)["model"]}
    given["dropout"] = args.dropout
    for key, value in given.items():
        old = saved["model"].get("dropout") if key == "dropout" else saved[key]
        if value not in (None, "auto", old) and not (key == "limit" and value == 0):
            fail(
                f"--{key.replace('_', '-')} {value} differs from the checkpoint's {old}; leave it "
                f"out to go on, or start a new run without --resume"
            )
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)
    now = {"device": str(device), "data_dir": str(args.data_dir), "compile": args.compile}
    now |= {"accum": args.accum, "checkpoint_activations": args.checkpoint_activations}
    now["launch"] = os.environ.get("TORCHELASTIC_RUN_ID")
    now["amp"] = "off" if amp is None else "bf16" if amp == torch.bfloat16 else "fp16"
    if args.epochs is not None or args.minutes is not None:
        now |= {"epochs": args.epochs, "minutes": args.minutes}
    return {**saved, **now}


def model_config(settings: dict[str, Any], kind: type = ModelConfig) -> Any:
    """The sizes, of dataclass `kind`, that config.json and checkpoints hold as plain values."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings["model"].items()})


def parameter_counts(settings: dict[str, Any], method: Method = DIER) -> dict[str, int]:
    """Trainable parameters of each part, {encoder, dit} for DiER, counted on the meta device:
    nothing is allocated."""
    try:
        with torch.device("meta"):
            model = method.build(settings)
    except ValueError as error:  # sizes that do not fit each other
        fail(str(error))
    return {name: count_parameters(part) for name, part in model.named_children()}


def describe_run(settings: dict, counts: dict[str, int], run: Path, auto: bool) -> None:
    """Print what will be trained, every resolved value included."""
    total = sum(counts.values()) / 1e6
    why = "no GPU: " if auto and settings["preset"] == "cpu" else ""
    more = "; --preset paper for Table 4" if settings["preset"] == "cpu" else ""
    print(f"{why}preset {settings['preset']}, {total:.1f}M parameters{more}")
    parts = ", ".join(f"{name} {n / 1e6:.2f}M" for name, n in counts.items())
    print(f"{parts.replace('dit', 'DiT')}, run {run}")
    model = " ".join(
        f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}"
        for k, v in settings["model"].items()
    )
    rest = {k: v for k, v in settings.items() if k not in HIDDEN}
    print(f"model: {model}")
    print("train: " + " ".join(f"{k}={v}" for k, v in rest.items()))
    values = settings["model"].get("patch", 0) ** 2 * settings["channels"]  # of a patch's noise
    if "dit" in counts and (lost := 1 - settings["model"]["hidden"] / values) > 0:
        print(
            f"a patch's {values} values do not fit a token of {settings['model']['hidden']}: "
            f"{lost:.0%} of the noise stays in the loss; use --model with a smaller patch"
        )


# ---------------------------------------------------------------------------- runs on disk


def run_path(name: str) -> Path:
    """A run's folder from --run: a path where it has a separator or exists, else runs/NAME."""
    path = Path(name)
    return path if path.name != name or (path / "checkpoint.pt").exists() else RUNS / name


def new_run(data: str) -> Path:
    """The first free one of runs/mnist, runs/mnist-2, ..."""
    stem = Path(data).name or "run"
    names = (stem if n == 1 else f"{stem}-{n}" for n in range(1, 10_000))
    return next(RUNS / name for name in names if not (RUNS / name).exists())


def find_run(name: str | None, method: Method = DIER) -> Path:
    """The run that --run names, or the newest of `method`; exits where there is none."""
    if name is not None:
        path = run_path(name)
        if not (path / "checkpoint.pt").exists():
            fail(f"no checkpoint in {path}: start with python {method.train} --run {name}")
        return path
    path = newest_run(method)
    if path is None:
        fail(f"no run in {RUNS}/: start with python {method.train}")
    return path


def newest_run(method: Method) -> Path | None:
    """The run of `method` in runs/ whose checkpoint was written last, if there is one."""
    found = []
    for checkpoint in RUNS.glob("*/checkpoint.pt"):
        config = checkpoint.with_name("config.json")
        if config.exists() and json.loads(config.read_text()).get("method") == method.name:
            found.append(checkpoint)
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest and newest.parent


def restore_model(state: dict[str, Any], method: Method = DIER, weights: str = "ema") -> nn.Module:
    """The module of a checkpoint with its "ema" or "raw" weights."""
    model = method.build(state["settings"])
    model.load_state_dict(state["ema" if weights == "ema" else "model"])
    return model


def require_method(run: Path, settings: dict[str, Any], method: Method, command: str) -> None:
    """Exit where the run is another method's, and name the command that takes it."""
    if settings["method"] != method.name:
        fail(f"{run} is a run of {settings['method']}: python {command} --run {run}")


def read_checkpoint(run: Path) -> dict[str, Any]:
    """The checkpoint of a run, on the CPU; exits with one line where it cannot be read."""
    path = run / "checkpoint.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on a damaged file
        reason = str(error).splitlines()[0][:120]
        fail(f"{path} cannot be read ({reason}): delete the folder {run} and train again")


# ---------------------------------------------------------------------------- messages and flags


def _number(kind: type, low: float, high: float, what: str):
    """An argparse type: a number of `kind` with low <= value <= high."""

    def parse(text: str):
        """The number, or argparse's own error."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return parse


whole = _number(int, 1, math.inf, "a whole number above 0")
count = _number(int, 0, math.inf, "a whole number, 0 or more")
positive = _number(float, 1e-12, math.inf, "a number above 0")
not_negative = _number(float, 0, math.inf, "a number, 0 or more")
fraction = _number(float, 0, 1 - 1e-9, "in [0, 1)")


def run_main(main) -> None:
    """Run a script's main: data errors become one line and status 2, Ctrl-C status 130."""
    try:
        main()
    except DataError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("stopped; nothing was changed", file=sys.stderr)
        raise SystemExit(130) from None


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; --help lists the flags")


def build_parser(doc: str = "") -> argparse.ArgumentParser:
    """The flags of train.py, each with its unit and default; `resolve` turns them into settings.
    `doc` is the script's docstring, whose commands --help repeats."""
    p = Parser(
        description="Train DiER. Defaults come from the preset; --dry-run shows them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=doc.partition("\n\n")[2].partition("\n\n")[0],
    )
    add = p.add_argument
    add("--data", help=f"{', '.join(INFOS)}, or a folder of images (default glyphs)")
    add("--data-dir", type=Path, default=Path("data"), help="sets live here (data)")
    add("--preset", choices=["auto", *PRESETS], default="auto", help="paper: Table 4; cpu: minutes "
        "on two cores; auto: paper with CUDA, else cpu")  # fmt: skip
    add("--epochs", type=positive, help="passes over the training set (paper: 200)")
    add("--minutes", type=positive, help="wall time from the first step, of this call (cpu: 30; "
        "glyphs 4); with --epochs, the first reached stops")  # fmt: skip
    add("--batch-size", type=whole, help="images a step, of all processes together")
    add("--lr", type=positive, help="constant learning rate of Adam")
    add("--ema", type=fraction, help="decay of the weight average (0.9999)")
    add("--clip", type=not_negative, help="largest gradient norm, 0 = off (1.0)")
    add("--dropout", type=fraction, help="in the encoder's blocks")
    add("--flip", action=argparse.BooleanOptionalAction,
        help="random horizontal flips (default: on, but off for digits)")  # fmt: skip
    add("--size", type=whole, help="pixels: images are resized to size x size")
    add("--model", default="", metavar="KEY=VALUE,...",
        help="sizes of Table 4, such as hidden=128,depth=4,mult=1,2,4")  # fmt: skip
    add("--seed", type=count, help="of weights, batches, t, eps and dropout (0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (auto: cuda if any)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
        help="mixed precision (auto: where the hardware multiplies it natively)")  # fmt: skip
    add("--accum", type=whole, default=1, metavar="N",
        help="put the batch through in N pieces: less memory, the same gradients (1)")  # fmt: skip
    add("--checkpoint-activations", action="store_true", help="compute activations again in "
        "backward: less memory, a third more time (off)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile both networks (off)")
    add("--limit", type=count, default=0,
        help="train on a sample of N images, equal over the classes (0 = all)")  # fmt: skip
    add("--run", help="name or path of the run (default: after the data set)")
    add("--resume", action="store_true", help="go on from the checkpoint of --run")
    add("--dry-run", action="store_true", help="print the settings, train nothing")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return p
