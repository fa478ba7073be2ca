"""The linear probe (Sec. 5.2, A.2): how well does a linear classifier read the class off v_t?

    python probe.py                     the newest run at t = 0, 100, ..., 900, 999
    python probe.py --t 400             one t; --t 100,400 two
    python probe.py --run mnist --data glyphs       the features of another set (transfer)
    python probe.py --norm none         the paper's stated protocol: features as they are

Each image is encoded once for each t (features.py); then the heads of all t are trained in one
batched product (heads.py). `top1` is the accuracy on the test set, `held_out` on training images
that a head did not see. t is chosen by `held_out`, which never looks at a test label; the paper
reports the best t on the test set, which stands here as `oracle`.

probe.json: rows [{t, top1, top5, knn, held_out}] (top5 null for 10 classes or fewer; top1_std with
--seeds), chosen_t, test_top1, oracle_t, oracle_top1, floors {pixels, untrained, random}, n_test,
protocol, run. Accuracies in percent. Other protocols write probe-SUFFIX.json.

Shapes: N images, B batch, V = 1024, K classes, S number of t.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from data import Split, load
from diffusion import T
from features import encode, moments, raw_pixels, standardise, to_channels
from files import written_whole
from heads import FEW, WARMUP, WEIGHT_DECAY, Task, binomial_interval, choose, make_folds
from parallel import (
    ALONE,
    World,
    ending_together,
    first_alone,
    join,
    share_from_first,
    world_from_environment,
)
from runs import (
    BASELINES,
    DIER,
    Method,
    Parser,
    count,
    fail,
    find_run,
    pick_amp,
    pick_device,
    positive,
    read_checkpoint,
    require_method,
    restore_model,
    run_main,
    whole,
)

TIMES = [*range(0, T, 100), T - 1]  # Sec. A.2: "11 times at intervals of 100 ... from 0 to 999"
FLOORS = ("untrained", "random")


# ---------------------------------------------------------------------------- floors


def untrained_encoder(settings: dict[str, Any], random: bool, method: Method = DIER) -> nn.Module:
    """The encoder as initialised; with `random` its zero convolutions are redrawn by PyTorch's
    default, since as initialised its residual branches are off."""
    torch.manual_seed(settings["seed"])
    encoder = method.build(settings).encoder
    if random:
        for layer in encoder.zero_initialised():
            layer.reset_parameters()
    return encoder


# ---------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its unit and default."""
    p = Parser(description="Linear probe of a DiER run.")
    p.add_argument("--t", help="times in 0..999, such as 400 or 100,400 (0, 100, ..., 900, 999)")
    p.add_argument("--run", help="name or path of a run (the newest)")
    p.add_argument("--data", help="another set than the run's: transfer")
    p.add_argument("--data-dir", type=Path, help="sets live here (the run's)")
    p.add_argument(
        "--norm",
        choices=["std", "none"],
        default="std",
        help="standardise features by the training set, or not, as the paper says (std)",
    )
    p.add_argument("--weights", choices=["ema", "raw"], default="ema", help="which weights (ema)")
    p.add_argument("--epochs", type=whole, default=100, help="epochs of the heads (100)")
    p.add_argument("--lr", type=positive, help="peak learning rate (2 x the paper's: 2e-4 or 2e-5)")
    p.add_argument("--batch-size", type=whole, default=256, help="of the heads (256)")
    p.add_argument("--seeds", type=whole, default=1, help="average over N seeds of the heads (1)")
    p.add_argument(
        "--limit",
        type=count,
        default=0,
        help="N training and N test images, equal over the classes (0 = all)",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    p.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="precision of the encoder (auto)",
    )
    p.add_argument(
        "--export",
        type=Path,
        metavar="FILE.npz",
        help="save features (S, N, V), labels, split (0 train, 1 test), t, mean, std, run",
    )
    return p  # fmt: skip


def parse_times(text: str | None) -> list[int]:
    """ "100,400" -> [100, 400]; None -> the eleven of the paper."""
    if text is None:
        return TIMES
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < T for part in parts):
        fail(f"--t {text}: give whole numbers in 0..{T - 1}, such as --t 100,400")
    return sorted({int(part) for part in parts})


def main(argv: list[str] | None = None) -> None:
    """Find DiER's run, probe it."""
    args = build_parser().parse_args(argv)
    run = find_run(args.run)
    state = read_checkpoint(run)
    require_method(run, state["settings"], DIER, f"{BASELINES} --probe")
    probe_run(run, state, args, DIER)


def probe_run(
    run: Path, state: dict[str, Any], args: argparse.Namespace, method: Method
) -> dict[str, Any] | None:
    """Probe the encoder of a run's checkpoint, and the floors; returns what probe.json holds."""
    settings, world = state["settings"], world_from_environment()
    if args.t and not method.timed:
        fail(f"--t {args.t}: the features of {method.name} do not depend on t; leave it out")
    times = parse_times(args.t) if method.timed else [None]
    if world.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, one process speaks for all
    model = restore_model(state, method, args.weights)
    floors = {
        kind: untrained_encoder(settings, kind == "random", method)
        for kind in FLOORS
        if kind != "random" or hasattr(model.encoder, "zero_initialised")
    }
    with ending_together(world, run):
        return probe(model.encoder, floors, times, args, settings, state["step"], run, world)


def probe(
    encoder: nn.Module,
    floors: dict[str, nn.Module],
    times: list[int | None],
    args: argparse.Namespace,
    settings: dict[str, Any],
    step: int,
    run: Path,
    world: World = ALONE,
) -> dict[str, Any] | None:
    """Encode, train the heads, print the table, write probe.json: the whole protocol for encoder
    and floors, each (B, C, H, W), (B,) -> (B, V), without time at [None]; returns probe.json."""
    device = join(world, pick_device(args.device))
    amp = pick_amp(args.amp, device)
    name = args.data or settings["data"]
    data_dir = args.data_dir or Path(settings["data_dir"])
    with first_alone(world):
        splits = [load(name, s, settings["size"], data_dir, args.limit) for s in ("train", "test")]
    if splits[0].labels is None:
        fail(f"{name} has no classes, and a probe needs them: lay it out as CLASS/* (see README)")
    images = [to_channels(split, settings["channels"]) for split in splits]
    task, protocol = make_task(splits, args, settings, device, step)

    def encode_both(encoder: nn.Module, at: list[int | None], what: str) -> list[Tensor]:
        """Features of the training and the test images."""
        encoder.to(device)
        parts = zip(images, ("train", "test"))
        return [encode(encoder, x, at, device, amp, f"{s}, {what}", run, world) for x, s in parts]

    n_train, n_test = len(task.y_train), len(task.y_test)
    print(f"run {run}, step {step:,}: {name}, {n_train:,} + {n_test:,} images, {device}")
    values, rows, path = encode_both(encoder, times, "v_t"), [], result_path(run, args)
    if world.rank == 0:
        if args.export:
            export(args.export, values, times, task, run)
        if args.norm == "std":
            standardise(*values)
        rows = merge_rows(path, task.rows(*values, times), protocol)
    del values
    both = [choose(rows, key) for key in ("held_out", "top1")] if rows else None
    chosen, oracle = share_from_first(world, both)
    sources = {"pixels": [raw_pixels(x) for x in images]}
    for kind, untrained in floors.items():
        sources[kind] = encode_both(untrained, [chosen["t"]], kind)
    if world.rank:
        return None
    scores = {}
    for kind, both in sources.items():
        if args.norm == "std":
            standardise(*both)
        scores[kind] = task.evaluate(*both)[0]["top1"]
    result = {
        "rows": rows, "chosen_t": chosen["t"], "test_top1": chosen["top1"],
        "oracle_t": oracle["t"], "oracle_top1": oracle["top1"], "floors": scores,
        "n_test": n_test, "protocol": protocol, "run": str(run),
    }  # fmt: skip
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result, n_train, path)
    return result


def make_task(
    splits: list[Split],
    args: argparse.Namespace,
    settings: dict[str, Any],
    device: torch.device,
    step: int,
) -> tuple[Task, dict[str, Any]]:
    """The task of the heads, and the protocol as probe.json states it."""
    y_train, y_test = (torch.from_numpy(split.labels).to(device) for split in splits)
    folds = torch.from_numpy(make_folds(len(y_train), splits[0].groups, 0)).to(device)
    lr, classes = args.lr or (2e-5 if settings["row"] == 256 else 2e-4), splits[0].class_names
    task = Task(y_train, y_test, folds, len(classes), args.epochs, lr, args.batch_size, args.seeds)
    return task, {
        "epochs": args.epochs, "lr": lr, "batch_size": args.batch_size, "seeds": args.seeds,
        "norm": args.norm, "weights": args.weights, "data": args.data or settings["data"],
        "limit": args.limit, "held_out": "a tenth" if len(y_train) >= FEW else "5-fold",
        "step": step,
    }  # fmt: skip


def export(path: Path, features: list[Tensor], times: list[int], task: Task, run: Path) -> None:
    """Write the features as they come from the encoder, in half precision, train before test, with
    the mean and std (S, V) of the training part."""
    mean, std = (x[:, 0] for x in moments(features[0]))
    arrays = {
        "features": torch.cat(features).transpose(0, 1),
        "labels": torch.cat([task.y_train, task.y_test]),
        "split": torch.arange(2).repeat_interleave(
            torch.tensor([len(task.y_train), len(task.y_test)])
        ),
        "t": torch.tensor([-1 if t is None else t for t in times]),  # -1: without time
        "mean": mean, "std": std,
    }  # fmt: skip

    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, run=str(run), **{k: v.cpu().numpy() for k, v in arrays.items()})
    print(f"features: {path}")


def result_path(run: Path, args: argparse.Namespace) -> Path:
    """probe.json for the standard protocol, else probe-SUFFIX.json."""
    suffix = [Path(args.data).name] if args.data else []
    suffix += ["none"] if args.norm == "none" else []
    suffix += ["raw"] if args.weights == "raw" else []
    suffix += [f"limit{args.limit}"] if args.limit else []
    suffix += [f"epochs{args.epochs}"] if args.epochs != 100 else []
    suffix += [f"lr{args.lr:g}"] if args.lr else []
    suffix += [f"batch{args.batch_size}"] if args.batch_size != 256 else []
    suffix += [f"seeds{args.seeds}"] if args.seeds > 1 else []
    return run / ("-".join(["probe", *suffix]) + ".json")


def merge_rows(path: Path, rows: list[dict], protocol: dict) -> list[dict]:
    """Old rows of other t join where checkpoint and protocol are the same; else the old file is
    kept as probe-STEP.json."""
    if not path.exists():
        return rows
    old = json.loads(path.read_text())
    if old["protocol"] != protocol:
        path.replace(path.with_name(f"{path.stem}-{old['protocol']['step']}.json"))
        return rows
    merged = {row["t"]: row for row in old["rows"] + rows}
    return [merged[t] for t in sorted(merged)]


def print_table(result: dict[str, Any], n_train: int, path: Path) -> None:
    """The table: a row and a bar for each t, the choice, the oracle, the floors, the protocol."""
    top5 = result["rows"][0]["top5"] is not None
    print(f"\n   t  held-out   top-1{'   top-5' if top5 else ''}     kNN")
    low = min(row["top1"] for row in result["rows"]) - 1
    high = max(row["top1"] for row in result["rows"])
    for row in result["rows"]:
        bar = "#" * round(30 * (row["top1"] - low) / (high - low))
        spread = f" +- {row['top1_std']:.2f}" if "top1_std" in row else ""
        five = f"{row['top5']:8.2f}" if top5 else ""
        t = "-" if row["t"] is None else row["t"]
        print(
            f"{t:>4}  {row['held_out']:8.2f}{row['top1']:8.2f}{five}{row['knn']:8.2f}  "
            f"{bar}{spread}"
        )
    n, best = result["n_test"], result["test_top1"]
    lower, upper = binomial_interval(best, n)
    timed = result["chosen_t"] is not None
    chosen = f"chosen t = {result['chosen_t']} (by held-out training images): " if timed else ""
    print(f"\n{chosen}test top-1 {best:.2f}%")
    print(f"  95% interval {lower:.2f} to {upper:.2f} ({n:,} test images)")
    if timed:
        print(f"oracle t = {result['oracle_t']} (best on the test set, as the paper reports): "
              f"{result['oracle_top1']:.2f}%")  # fmt: skip
    floors = ", ".join(f"{kind} {top1:.2f}" for kind, top1 in result["floors"].items())
    print(f"floors: {floors}")
    p = result["protocol"]
    print(
        f"protocol: {p['weights']} weights at step {p['step']:,}, features norm {p['norm']}, AdamW "
        f"lr {p['lr']:g} decay {WEIGHT_DECAY}, batch {p['batch_size']}, {p['epochs']} epochs "
        f"(warm-up {WARMUP}, linear to 0), {n_train:,} training images, held-out {p['held_out']}, "
        f"{p['seeds']} seed(s); bars from {low:.1f}%"
    )
    print(f"saved: {path}")


if __name__ == "__main__":
    run_main(main)
