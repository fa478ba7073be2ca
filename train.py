"""Train DiER: predict the noise in x_t, helped by a vector of the clean image. No labels.

    python train.py                           digits drawn here: 8 minutes, top-1 88 to 92%
    python train.py --data mnist              MNIST: 18 minutes, 97.0% at t = 200
    python train.py --data cifar10 --preset paper
    python train.py --name mnist --resume     go on after Ctrl-C or a crash, bit for bit
    python train.py --data mnist --dry-run    show every resolved value, train nothing
    torchrun --nproc_per_node=8 train.py --data oct2017 --preset paper          eight GPUs

(Glyphs on two cores of an Intel Xeon with AMX, MNIST on one of an AMD EPYC without; seed 0;
accuracies of the linear probe, probe.py.)

One step (Eq. 4.6): draw t and eps, make x_t, predict eps from x_t, t and v_t = Encoder(x_0, t),
take the squared error, clip the gradient, step Adam, update the EMA of the weights. `draw` and
`dier_loss` are the first half, the loop of `train` is the rest; run folders, flags, main follow.

What a run leaves in runs/NAME/:
- config.json: every setting;
- checkpoint.pt: weights, their EMA, optimizer, counters; tensors and plain values only;
- log.jsonl: step, epoch, images, seconds, loss, loss_by_t (10 numbers, the mean loss for each tenth
  of t, null where none was drawn), grad_norm, skipped (steps that fp16 skipped), images_per_s;
- preview.png: x_0, x_t and the one-step estimate of x_0 by the EMA weights, four images, five t.

Shapes: B batch, C channels, H W pixels.
"""

import argparse
import copy
import ctypes
import errno
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
from data import batch_index, clock, fail, get_batch, mix_seed, on_device, replace_file, status
from diffusion import T, alphas_cumprod, eps_loss, predict_x0, q_sample
from model import COLUMNS, PRESETS, DiER, ModelConfig, table_row

RUNS = Path("runs")
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SAVE_SECONDS = 60.0  # between two checkpoints; many processes save at the next row
SAVE_SHARE = 0.05  # of the time at most: Table 4's largest checkpoint has 5.7 GB
PREVIEW_SECONDS = 150.0  # between two previews, which on a CPU can cost as much as steps do
ROW_STEPS = 20  # a row of the log for each of the first 20 steps, then for every 20th
# Layout of the sums that training keeps on the device: 0-9 loss and 10-19 images, by tenth of t,
# then gradient norm, steps where it was finite, steps where it was not, votes to stop.
NORM, FINITE, SKIPPED, STOP = 20, 21, 22, 23
SUMS = 24  # their number
# What torchrun tells each process: who it is, and where they all meet.
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")

# ---------------------------------------------------------------------------- the step


def draw(
    seed: int, step: int, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """t (B,), flips (B,) and eps `shape` of the global batch: a pure function of (seed, step)."""
    generator = torch.Generator(device).manual_seed(mix_seed(seed, step))
    t = torch.randint(T, shape[:1], generator=generator, device=device)
    flips = torch.rand(shape[:1], generator=generator, device=device) < 0.5
    eps = torch.randn(shape, generator=generator, device=device)
    return t, flips, eps


def dier_loss(net: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Eq. 4.6 for each image: x0, eps (B, C, H, W), t (B,) -> (B,)."""
    x_t = q_sample(x0, t, eps, abar)
    return eps_loss(net(x_t, t, x0), eps)


# ---------------------------------------------------------------------------- the loop


def train(
    net: nn.Module,
    loss_fn: Callable[..., Tensor],
    images: np.ndarray,
    settings: dict,
    folder: Path,
    saved: dict | None = None,
) -> tuple[int, float, int]:
    """Train net on uint8 images (N, C, S, S), from the checkpoint `saved` if given. Stops and saves
    when epochs or minutes are over or a signal has come, after a step (torchrun: at a log row).
    loss_fn(net, x0, t, eps, abar) -> (B,). Returns (step reached, seconds, the signal or 0)."""
    # What stays: settings, images and schedule on the device.
    seed, batch, accum, amp = (settings[key] for key in ("seed", "batch_size", "accum", "amp"))
    rank, processes, _ = ranks()
    device = pick_device(settings["device"])
    images = on_device(images, device)
    abar = alphas_cumprod().float().to(device)
    mine = slice(rank, batch, processes)  # this process's images of a batch
    last = math.ceil(settings["epochs"] * len(images) / batch)
    # State, new or from the checkpoint. Rank 0 takes the saved sums: a row adds those of all ranks.
    parts = make_parts(net.to(device).train(), settings, device, saved)
    ema, optimizer, scaler = parts["ema"], parts["optimizer"], parts["scaler"]
    params, ema_params = list(net.parameters()), list(ema.parameters())
    model = net if processes == 1 else DistributedDataParallel(net)
    counters = saved or {"step": 0, "row_step": 0, "log_size": 0, "seconds": 0.0}
    first, row_step, earlier = (counters[key] for key in ("step", "row_step", "seconds"))
    step = first
    sums = saved["sums"].to(device) if saved and rank == 0 else torch.zeros(SUMS, device=device)
    log = open_log(folder, counters["log_size"], rank)
    signals = catch_signals(finish_step=True)
    start = row_time = time.monotonic()
    deadline = start + (60 * settings["minutes"] or math.inf)
    save_at = shown_at = drawn_at = -math.inf
    stop = step >= last
    while not stop:
        # t, flips and eps depend on (seed, step) alone, for the global batch: any number of ranks
        # sees the same data, a resumed run continues exactly. (Dropout depends on the rank too.)
        torch.manual_seed(mix_seed(seed, step, rank))  # dropout draws from the default generators
        t, flips, eps = (x[mine] for x in draw(seed, step, (batch, *images.shape[1:]), device))
        index = batch_index(len(images), step, batch, seed, images.device)[mine]
        x0 = get_batch(images, index, device, flips if settings["flip"] else None)

        # Forward and backward in `accum` pieces, whose gradients add up; after the last one they
        # are averaged over the processes. The scaler keeps fp16's small gradients above zero.
        losses = []
        for k, piece in enumerate(zip(x0.chunk(accum), t.chunk(accum), eps.chunk(accum))):
            model.require_backward_grad_sync = k == accum - 1  # DDP's switch
            with torch.autocast(device.type, AMP[amp], enabled=amp != "off"):
                loss = loss_fn(model, *piece, abar)
            scaler.scale(loss.mean() / accum).backward()
            losses.append(loss.detach())

        # Clip; Adam; EMA. Its decay warms up from 0.18, so the initial weights soon fade from it.
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(params, settings["clip"] or math.inf, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        decay = min(settings["ema"], (1 + step) / (10 + step))
        with torch.no_grad():  # ema <- decay * ema + (1 - decay) * params, all in one call
            torch._foreach_lerp_(ema_params, params, 1 - decay)

        # The sums stay on the device, so that no step waits for it. They are read at a row: each
        # of the first steps, every 20th and the last. A single process checks after every step
        # whether to stop; many decide at a row, where one all-reduce adds up sums and votes.
        add_sums(sums, torch.cat(losses), t, norm)
        now = time.monotonic()
        at_row = step <= ROW_STEPS or step % ROW_STEPS == 0 or step == last
        decides = at_row or processes == 1
        stop = decides and (step == last or bool(signals) or now >= deadline)
        if at_row:
            sums[STOP] = stop
            if processes > 1:
                dist.all_reduce(sums)
            values = read_finite(sums, settings, row_step + 1, step, folder)
            row = {"step": step, "epoch": step * batch / len(images), "images": step * batch}
            row |= {"seconds": earlier + now - start, **means(values)}
            row["images_per_s"] = (step - max(row_step, first)) * batch / (now - row_time)
            write_row(log, row)
            stop = values[STOP] > 0
            row_step, row_time = step, now
            sums.zero_()

        # Save at the first row, every minute (less often where it takes long) and at the end.
        if rank == 0 and decides and (stop or now > save_at):
            read_finite(sums, settings, row_step + 1, step, folder)  # no NaN is saved
            counters = {"step": step, "row_step": row_step, "log_size": log.tell()}
            counters |= {"seconds": earlier + now - start, "sums": sums.cpu(), "settings": settings}
            save(folder, parts, counters)
            if loss_fn is dier_loss and (stop or now - drawn_at > PREVIEW_SECONDS):
                preview(ema, images, settings, abar, folder / "preview.png")
                drawn_at = now
            save_at = now + max(SAVE_SECONDS, (time.monotonic() - now) / SAVE_SHARE)
        if at_row and (sys.stdout.isatty() or now - shown_at > 10 or stop):  # may fail: a pipe
            show_row(row, last, first, now - start, deadline - now, again=shown_at > 0)
            shown_at = now
    log.close()
    catch_signals()  # from here on a first Ctrl-C ends the program
    return step, time.monotonic() - start, signals[0] if signals else 0


# ---------------------------------------------------------------------------- beside the loop


def ranks() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun says, else (0, 1, 0); exits
    where another program has set only some of it."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return 0, 1, 0
    try:
        told = [os.environ[key] for key in WORLD]
        rank, processes, local, _ = (int(number) for number in told[:4])
        if not 0 <= rank < processes:
            raise ValueError
    except (KeyError, ValueError):
        os.environ["LOCAL_RANK"] = "0"  # whichever process it is, it says so
        fail(f"{', '.join(WORLD)} are not set as by torchrun: start with it, or unset them")
    return rank, processes, local


def make_parts(net: nn.Module, settings: dict, device: torch.device, saved: dict | None) -> dict:
    """What training changes, and so what a checkpoint holds: the weights, their average, Adam's
    moments, the factor of fp16's scaler; new, or taken out of `saved`."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
        net.encoder.to(memory_format=torch.channels_last)  # what tensor cores read
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=settings["lr"], fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=settings["amp"] == "fp16")
    parts = {"raw": net, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    if saved:
        for name, part in parts.items():
            state = saved.pop(name)  # else it would lie in memory twice
            if part is not scaler or state:  # {} where the run was not in fp16 until now
                restore(part, state)
    # A checkpoint of a GPU run has the encoder's moments in channels_last. Fused Adam assumes that
    # moments and weights share a layout and does not check, so give them the weights' layout here.
    for p, moments in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = torch.empty_like(p).copy_(moments[key])
    if settings["compile"]:
        net.compile()
    return parts


def add_sums(sums: Tensor, loss: Tensor, t: Tensor, norm: Tensor) -> None:
    """Add a step to the sums, on the device: loss and images by tenth of t (loss, t (B,)), the
    gradient norm, and how many steps had a finite one and how many not. The norm is that of all
    processes, so that rank 0 alone adds it."""
    tenth = t * 10 // T
    finite = norm.isfinite()
    sums[:10].index_add_(0, tenth, loss)
    sums[10:20].index_add_(0, tenth, torch.ones_like(loss))
    if ranks()[0]:
        return
    sums[NORM] += torch.where(finite, norm, 0.0)
    sums[FINITE] += finite
    sums[SKIPPED] += ~finite


def means(values: list[float]) -> dict:
    """The sums, read, as means; None where nothing was drawn."""
    loss, images = values[:10], values[10:20]
    return {
        "loss": sum(loss) / max(1, sum(images)),
        "loss_by_t": [s / n if n else None for s, n in zip(loss, images)],
        "grad_norm": values[NORM] / max(1, values[FINITE]),
        "skipped": int(values[SKIPPED]),
    }


class NotFinite(SystemExit):
    """A run ended because its loss or its gradient was not finite; status 2."""


def read_finite(sums: Tensor, settings: dict, since: int, step: int, folder: Path) -> list[float]:
    """The sums as numbers; waits for the device. Ends the run where a loss or a gradient norm since
    step `since` was not finite; the last good checkpoint stays. Steps that fp16's scaler skips are
    no error."""
    values = sums.tolist()
    tenths = [k for k, loss in enumerate(values[:10]) if not math.isfinite(loss)]
    if tenths or (values[SKIPPED] and settings["amp"] != "fp16"):
        what = "loss" if tenths else "gradient"
        where = ", ".join(f"{100 * k}-{100 * k + 99}" for k in tenths) or "any"
        path = folder / "checkpoint.pt"
        kept = f"; {path} is the last good one" if path.exists() else ""
        catch_signals()  # as `train` does at its end: an appendix may go on
        fail(
            f"the {what} is not finite (steps {since} to {step}, t in {where}, lr "
            f"{settings['lr']:g}, amp {settings['amp']}): try a smaller --lr, or --amp off{kept}",
            NotFinite,
        )
    return values


@contextmanager
def claim(folder: Path, rank: int = 0) -> Iterator[None]:
    """Lock a run for as long as rank 0 trains it; exits where another process does. The lock is on
    log.jsonl and ends with the process, however that ends; Windows has none."""
    if rank or not fcntl:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process is training {folder}: wait for it, or stop it")
        except OSError:  # a file system without locks
            pass
        yield


def written_at(folder: Path) -> int | None:
    """When the checkpoint of a run was written, in ns; None where there is none."""
    with suppress(OSError):
        return (folder / "checkpoint.pt").stat().st_mtime_ns
    return None


def open_log(folder: Path, size: int, rank: int) -> Any:
    """log.jsonl, cut to the `size` bytes that a checkpoint knows of, so that no row is there twice
    after a crash; only rank 0 has one."""
    if rank:
        return open(os.devnull, "ab", buffering=0)
    path = folder / "log.jsonl"
    path.touch()
    os.truncate(path, min(size, path.stat().st_size))
    return path.open("ab", buffering=0)


def write_row(log: Any, row: dict) -> None:
    """Append a row to the log. Raises OSError where the disk takes only a part of it."""
    line = json.dumps(row).encode() + b"\n"
    if log.write(line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), log.name)


def show_row(row: dict, last: int, first: int, spent: float, remaining: float, again: bool) -> None:
    """The progress line of a row of the log. The time left is known from the twentieth step on of a
    call that began at step `first`, `spent` seconds ago; it may last `remaining` seconds more."""
    done = row["step"] - first
    left = min((last - row["step"]) * spent / done, remaining)
    more = f", {clock(left)} left" if done >= 20 else ""
    text = f"step {row['step']:,} of {last:,}, epoch {row['epoch']:.2f}, loss {row['loss']:.4f}, "
    status(f"{text}{row['images_per_s']:,.0f} images/s{more}", again)


def save(folder: Path, parts: dict, counters: dict) -> None:
    """Write checkpoint.pt, whole or not at all: the state of each part, and the counters."""
    state = {name: part.state_dict() for name, part in parts.items()} | counters

    def write(path: Path) -> None:
        try:
            torch.save(state, path)
        except RuntimeError:  # torch's own writer says nothing that helps
            raise OSError(errno.ENOSPC, "cannot be written: is the disk full?", str(path)) from None

    replace_file(folder / "checkpoint.pt", write)


@torch.no_grad()
def preview(ema: nn.Module, images: Tensor, settings: dict, abar: Tensor, path: Path) -> None:
    """Show what is being learned: for four training images and five t, one row a t, x_0, x_t and
    the one-step estimate of x_0 by the average weights. Draws from a generator of its own."""
    x0 = data.to_float(images[:4].to(abar.device))
    generator = torch.Generator().manual_seed(mix_seed(settings["seed"], -1))
    rows = []
    for t in (100, 300, 500, 700, 900):
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        times = torch.full((len(x0),), t, device=x0.device)
        x_t = q_sample(x0, times, eps, abar)
        x0_hat = predict_x0(x_t, abar[t], ema(x_t, times, x0), clip=True)
        triples = torch.stack([x0, x_t, x0_hat], dim=1).flatten(0, 1)  # (12, C, S, S)
        rows.append(torch.cat(list(triples), dim=2))  # (C, S, 12 S)
    page = data.to_uint8(torch.cat(rows, dim=1)).permute(1, 2, 0).cpu().numpy()  # (5 S, 12 S, C)
    scale = max(1, 64 // x0.shape[-1])
    page = page.repeat(scale, 0).repeat(scale, 1).squeeze()
    replace_file(path, lambda to: Image.fromarray(page).save(to, format="PNG"))


def catch_signals(finish_step: bool = False) -> list[int]:
    """Let Ctrl-C and SIGTERM end the program with status 130 and 143. With finish_step the first of
    them is only noted in the list returned, for a loop that looks at it; a second one ends it."""
    noted: list[int] = []

    def handler(number: int, _: Any) -> None:
        if noted or not finish_step:
            raise SystemExit(128 + number)
        noted.append(number)
        # Not print, which the signal may have interrupted. Ctrl-C may have ended a pipe's reader.
        with suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), b"\nstopping after this step; again to stop at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return noted


# ---------------------------------------------------------------------------- runs on disk


def read_config(folder: Path) -> dict:
    """config.json of a run; {} where there is none that can be read."""
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text())
        if isinstance(config, dict):
            return config
    return {}


def run_folder(name: str) -> Path:
    """runs/NAME; exits where that would not be a folder below runs/."""
    if not Path(name).name or Path(name).is_absolute() or ".." in Path(name).parts:
        fail(f"--name {name}: give the name of a folder in {RUNS}/")
    return RUNS / name


def find_run(name: str | None = None) -> Path:
    """runs/NAME, else the DiER run right below runs/ whose checkpoint was written last; exits where
    there is none."""
    if name is not None:
        folder = run_folder(name)
        if not (folder / "checkpoint.pt").exists():
            fail(f"no checkpoint in {folder}: train that run first, with its --data and --name")
        return folder
    paths = RUNS.glob("*/checkpoint.pt")
    paths = [path for path in paths if read_config(path.parent).get("method") == "dier"]
    if not paths:
        fail(f"no run in {RUNS}/: start with python train.py")
    return max(paths, key=lambda path: path.stat().st_mtime).parent


def read_checkpoint(folder: Path, dier: bool = False) -> dict:
    """The checkpoint of a run, on the CPU; exits with one line where it cannot be read, and with
    `dier` where it is of a baseline."""
    path = folder / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on a damaged or foreign file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in data.DISK:
            raise  # a fault of the machine and not of the file
        reason = textwrap.shorten(str(error), 100) or "it is empty"
        if isinstance(error, KeyError):  # torch's answer to a text
            reason = "it is no checkpoint"
        fail(f"{path} cannot be read ({reason}): delete {folder} and train again")
    keys = {"settings", "step", "row_step", "log_size", "seconds", "sums"}
    keys |= {"raw", "ema", "optimizer", "scaler"}
    known = {*DEFAULTS, *COLUMNS, "channels"}
    ours = isinstance(saved, dict) and keys <= saved.keys()
    if not ours or not isinstance(saved["settings"], dict) or not known <= saved["settings"].keys():
        fail(f"{path} is not of this version of train.py: train anew under another --name")
    method = saved["settings"]["method"]
    if dier and method != "dier":
        fail(f"{folder} is a run of {method}: see appendix.baselines")
    return saved


def load_model(
    folder: Path, build: Callable[[dict], nn.Module] | None = None, weights: str = "ema"
) -> tuple[nn.Module, dict]:
    """The module of a run with its "ema" or "raw" weights, in eval mode, and its checkpoint; exits
    where the run is not of DiER and `build` does not say what its settings make."""
    saved = read_checkpoint(folder, dier=build is None)
    model = (build or build_dier)(saved["settings"])
    restore(model, saved[weights])
    return model.eval(), saved


def restore(part: Any, state: dict) -> None:
    """part.load_state_dict(state); exits where a checkpoint's weights have other sizes."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 100)
        fail(f"the checkpoint does not fit its own settings ({reason}): train anew")


def build_dier(settings: dict) -> DiER:
    """DiER in the sizes of the settings."""
    return DiER(model_config(settings))


def parameter_counts(settings: dict) -> dict[str, int]:
    """Parameters of {encoder, dit}, counted on the meta device, where nothing is allocated."""
    with torch.device("meta"):
        parts = build_dier(settings).named_children()
    return {part: sum(p.numel() for p in net.parameters()) for part, net in parts}


def origin(command: list[str], device_name: str) -> dict:
    """Where a result comes from: the command, the commit of this code ("" outside git; "-dirty"
    with changes), versions, and the machine in words."""
    commit = ""
    with suppress(OSError, subprocess.SubprocessError):
        ask = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        here = Path(__file__).parent
        answer = subprocess.run(ask, cwd=here, capture_output=True, text=True, timeout=10)
        commit = answer.stdout.strip()
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {"numpy": np.__version__, "pillow": Image.__version__}
    flags = cpu_capabilities()
    known = [name for name in ("avx2", "avx512_bf16", "amx_bf16") if flags.get(name)]
    kind = ", ".join(known) or platform.machine()
    machine = f"{torch.get_num_threads()} CPU threads ({kind})"
    device = pick_device(device_name)
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    shown = shlex.join(["python", *command])
    return {"command": shown, "commit": commit, "versions": versions, "machine": machine}


# ---------------------------------------------------------------------------- settings

DEFAULTS = {
    "method": "dier",
    "data": "glyphs",
    "data_dir": "data",
    "preset": "auto",
    "seed": 0,
    "minutes": 0,
    "ema": 0.9999,
    "clip": 1.0,
    "limit": 0,
    "device": "auto",
    "amp": "auto",
    "accum": 1,
    "compile": False,
}
# What a resumed run may change; all else is as in its checkpoint.
MAY_CHANGE = ("epochs", "minutes", "device", "amp", "compile", "accum", "data_dir")


def number(kind: type, fits: Callable[[float], bool], what: str, text: str) -> Any:
    """The number of that kind in a flag's text; raises argparse's error, with `what` it has to be,
    where fits(number) does not hold. With `partial` an argparse type."""
    with suppress(ValueError, OverflowError):
        value = kind(text)
        if math.isfinite(value) and fits(value):
            return value
    raise argparse.ArgumentTypeError(f"{text[:40]} is not {what}")


positive_int = partial(number, int, lambda n: 0 < n < 2**31, "a whole number above 0, below 2^31")
natural = partial(number, int, lambda n: 0 <= n < 2**63, "a whole number, 0 or more, below 2^63")
positive = partial(number, float, lambda x: 0 < x < 1e12, "a number above 0, below 1e12")
not_negative = partial(number, float, lambda x: x >= 0, "a number, 0 or more")
fraction = partial(number, float, lambda x: 0 <= x < 1, "in [0, 1)")


def new_file(text: str) -> Path:
    """The path of a file that a command writes; argparse's error where that is a folder."""
    path = Path(text)
    if not path.name or path.is_dir() or text.endswith(os.sep):
        raise argparse.ArgumentTypeError(f"{text!r} names no file: give one, such as a/b.json")
    return path


def data_name(text: str) -> str:
    """--data as a run keeps it: a set's name, or a folder's path without "./" before it and a slash
    behind it, so that two spellings are one."""
    plain = str(Path(text))
    return plain if text and plain not in data.SETS else text


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line; a flag that was not typed is not in the result."""

    def __init__(self, doc: str, **more: Any):
        summary, commands, *_ = doc.split("\n\n")
        more |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        more |= {"argument_default": argparse.SUPPRESS}
        super().__init__(description=summary, epilog=commands, **more)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; --help lists the flags")


def build_parser() -> Parser:
    """Every flag, with its unit and default; every size and the recipe are flags too."""
    p = Parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--data", type=data_name, help=f"{', '.join(data.SETS)}, or a folder of images (glyphs)")
    add("--data-dir", help="sets live here (data)")
    add("--name", help="the run's folder is runs/NAME (the set's name)")
    add("--resume", action="store_true", help="go on with --name, --data's run or the newest")
    add("--dry-run", action="store_true", help="print the settings, train nothing")
    preset = "paper: Table 4; cpu: minutes to an hour (auto: paper with CUDA, else cpu)"
    add("--preset", choices=["auto", *PRESETS], help=preset)
    add("--minutes", type=not_negative, help="limit of one call, from its first step (0 = none)")
    add("--seed", type=natural, help="of weights, batches, t, eps and dropout (0)")
    add("--limit", type=natural, help="a sample of N images, equal over the classes (0 = all)")
    add("--flip", action=switch, help="random horizontal flips (on; off for digits)")
    add("--ema", type=fraction, help="decay of the weight average (0.9999)")
    add("--clip", type=not_negative, help="largest gradient norm, 0 = off (1.0)")
    add("--device", help="auto, cpu, cuda, cuda:1 (auto: cuda if any)")
    amp = "mixed precision (auto: where the hardware has it; off is fp32, on a GPU with TF32)"
    add("--amp", choices=["auto", *AMP], help=amp)
    add("--accum", type=positive_int, help="accumulate gradients over N passes: less memory (1)")
    add("--compile", action=switch, help="torch.compile both networks (off)")
    add = p.add_argument_group("sizes, as in Table 4, and recipe (the preset's)").add_argument
    add("--size", type=positive_int, help="pixels: images are resized to size x size")
    add("--patch", type=positive_int, help="pixels of a token's side")
    add("--hidden", type=positive_int, help="width of the DiT")
    add("--depth", type=positive_int, help="blocks of the DiT")
    add("--heads", type=positive_int, help="attention heads of the DiT")
    add("--base", type=positive_int, help="width of the encoder, times mult")
    add("--blocks", type=positive_int, help="ResBlocks a level of the encoder")
    add("--mult", type=positive_int, nargs="+", help="widths of the encoder's levels, times base")
    add("--attention", type=positive_int, nargs="+", help="resolutions with self-attention")
    add("--enc-heads", type=positive_int, help="attention heads of the encoder")
    add("--dropout", type=fraction, help="in the encoder's ResBlocks")
    add("--batch-size", type=positive_int, help="images a step, of all processes together")
    add("--lr", type=positive, help="constant learning rate of Adam")
    add("--epochs", type=positive, help="passes over the training set")
    return p


def pick_device(name: str) -> torch.device:
    """The device of that name, "auto" being cuda if there is one; a GPU becomes the current one.
    Exits where it does not work, and for other kinds than cpu and cuda: Apple's mps has no float64,
    which `sinusoid` needs."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type in ("cpu", "cuda"):
            device = torch.ones(1, device=name).device  # a kernel, as not all GPUs have ours
            if device.type == "cuda":
                torch.cuda.set_device(device)
            return device
        reason = "cpu and cuda alone do"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    fail(f"--device {name} does not work here ({reason}); use --device cpu")


def cpu_capabilities() -> dict:
    """What the instructions of this CPU can do, such as amx_bf16; {} before torch 2.11, which is
    the first to tell."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def pick_amp(name: str, device: torch.device) -> str:
    """The precision of autocast: off, bf16 or fp16. "auto" is bf16 where the hardware multiplies it
    (emulated it is up to a hundred times slower than fp32), else fp16 on CUDA and off on a CPU."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpu = cpu_capabilities()
    return "bf16" if cpu.get("amx_bf16") or cpu.get("avx512_bf16") else "off"


def model_config(settings: dict) -> ModelConfig:
    """The sizes among the settings; exits where they do not fit each other."""
    try:
        return ModelConfig(**{field.name: settings[field.name] for field in fields(ModelConfig)})
    except ValueError as error:
        fail(str(error))


def resolve(typed: dict) -> dict:
    """Every setting of a new run as plain values: what was typed, else the preset's."""
    chosen = DEFAULTS | typed
    device = pick_device(chosen["device"])
    if chosen["device"] == "auto":
        chosen["device"] = device.type
    if chosen["preset"] == "auto":
        chosen["preset"] = "paper" if device.type == "cuda" else "cpu"
    chosen["amp"] = pick_amp(chosen["amp"], device)
    facts = data.set_facts(chosen["data"])._asdict()
    known = chosen["data"] if chosen["data"] in data.SETS else ""  # a folder may be named "32"
    row = table_row(chosen["preset"], known, facts["row"])
    settings = {**facts, **row, **chosen}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}  # as JSON


def resolve_resumed(typed: dict, saved: dict) -> dict:
    """The settings of a resumed run: the checkpoint's, with what may change as typed."""
    typed = {key: value for key, value in typed.items() if value != "auto"}
    for key, value in typed.items():
        moved = key == "data" and not {value, saved[key]} & set(data.SETS)  # a folder, elsewhere
        if value != saved[key] and key not in MAY_CHANGE and not moved:
            flag = f"--{key.replace('_', '-')} {value}"
            fail(f"{flag} differs from the checkpoint's {saved[key]}: leave it out to go on")
    pick_device(typed.get("device", saved["device"]))  # exits where it does not work here
    return {**saved, **typed}


def describe(settings: dict, counts: dict[str, int], folder: Path, auto: bool) -> None:
    """Print what will be trained, every resolved value included."""
    small = settings["preset"] == "cpu"
    why = "no GPU: " if auto and small and not torch.cuda.is_available() else ""
    other = "paper for Table 4" if small else "cpu for the small network of README's ladder"
    more = f"; --preset {other}" if auto else ""
    total, encoder = sum(counts.values()) / 1e6, counts["encoder"] / 1e6
    networks = f"{total:.1f}M parameters, of which the encoder has {encoder:.2f}M"
    print(f"{why}preset {settings['preset']}, {networks}{more}")
    hidden_keys = ("class_names", "launch", "origin", "row")
    shown = {k: v for k, v in settings.items() if k not in hidden_keys}
    shown |= {k: str(v).replace(" ", "") for k, v in shown.items() if isinstance(v, list)}
    pairs = (f"{key}={value}" for key, value in shown.items())
    print(textwrap.fill(f"{folder}: {' '.join(pairs)}", 100, subsequent_indent="  "))
    hidden, values = settings["hidden"], settings["patch"] ** 2 * settings["channels"]
    if hidden < values:
        lost = f"{1 - hidden / values:.0%} of the noise of a patch stays in the loss"
        print(f"{values} values do not fit a token of {hidden}: {lost}; give a smaller --patch")
    sides = [settings["size"] >> level for level in range(len(settings["mult"]))]
    for side in sorted({*settings["attention"]} - {*sides}):
        print(f"--attention {side} has no effect: the sides of the encoder's levels are {sides}")


# ---------------------------------------------------------------------------- command line


def join_processes(device: str) -> None:
    """Meet the other processes of torchrun: NCCL between GPUs, gloo on CPUs. Each GPU process uses
    the GPU of its number on this machine; rank 0 alone prints."""
    rank, processes, local = ranks()
    if processes == 1:
        return
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        gpus, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if wanted > gpus:
            fail(f"{wanted} processes, but {gpus} GPU(s) here: give --nproc_per_node={gpus}")
        if device not in ("auto", "cuda"):
            fail(f"each process takes its own GPU, not {device}: give --device cuda")
        torch.cuda.set_device(local)
    # torchrun's store keeps the addresses of dead processes over a restart: a prefix hides them.
    hour = timedelta(hours=1)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(restarts, next(dist.rendezvous("env://", timeout=hour))[0])
    where = {"store": store, "rank": rank, "world_size": processes, "timeout": hour}
    dist.init_process_group("nccl" if gpu else "gloo", **where)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, stays open to the end


def this_launch() -> str | None:
    """What names this call of torchrun, over all its restarts, on rank 0; None without torchrun."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    return launch and f"{launch}-{os.getppid()}"


def restarted(folder: Path) -> bool:
    """Did torchrun start us anew after a crash of this launch, which has saved to the folder?"""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    mine = again and read_config(folder).get("launch") == this_launch()
    answer = [mine and (folder / "checkpoint.pt").exists()]
    if ranks()[1] > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB for the next step. It would give them back to the
    system, which clears them anew: a tenth of a step's time. Other C libraries are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_threshold = -1, -3  # as in malloc.h
        mallopt(m_trim_threshold, 2**30)
        mallopt(m_mmap_threshold, 2**25)


def flush_stdout() -> None:
    """Write what stdout still holds. Raises OSError where that fails, and drops it: at its end
    Python would try again and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def guard(main: Callable[[], None], less: str = "") -> None:
    """Run a command's main: what can go wrong outside the program becomes one line, status 2.
    `less` says what would need less memory."""
    keep_freed_memory()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115, None where closed
        stream.reconfigure(errors="backslashreplace")  # names that a terminal cannot show
        setattr(sys, name, stream)
    catch_signals()
    try:
        try:
            main()
        finally:
            flush_stdout()
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        raise SystemExit(128 + 13) from None
    except OSError as error:
        fail(f"{error.filename or 'cannot write'}: {error.strerror or error}")
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split()) or "out of memory"
        words = ("allocate memory", "size calculation overflowed", "multiplication overflow")
        words += ("out of memory", "ALLOC_FAILED")  # from CUDA and cuBLAS themselves
        known = any(word in text for word in words)
        if known or isinstance(error, torch.OutOfMemoryError | MemoryError):
            os.environ["LOCAL_RANK"] = "0"  # whichever process it is, it says so
            what = textwrap.shorten(text, 150)
            fail(f"out of memory ({what})" + (f": try {less}" if less else ""))
        if "C++ compiler" in text or "C compiler" in text:  # for a CPU, for a GPU
            fail("--compile needs a compiler here: install gcc and g++, or leave --compile out")
        talks = dist.is_initialized() and ("gloo" in text or "NCCL" in text)
        if talks or isinstance(error, dist.DistError):
            fail(f"another process is not to be reached ({text[:80]}); the last checkpoint stays")
        raise


def main(argv: list[str] | None = None) -> None:
    """Resolve the settings of a new or a resumed run, show them, run it."""
    typed = vars(build_parser().parse_args(argv))
    name, resume, dry_run = (typed.pop(key, None) for key in ("name", "resume", "dry_run"))
    if name is None and ("data" in typed or not resume):
        name = Path(typed.get("data", DEFAULTS["data"])).resolve().name
    folder = find_run(name) if resume else run_folder(name)
    if folder.parent == RUNS / "baselines":
        fail(f"{folder.parent} has the runs of tables: python -m appendix.baselines trains there")
    device = typed.get("device", "auto")
    if resume and device == "auto":  # it goes on where it was
        device = read_config(folder).get("device", device)
    join_processes(device)
    before = written_at(folder)
    saved = read_checkpoint(folder, dier=True) if resume or restarted(folder) else None
    if saved:
        settings = resolve_resumed(typed, saved["settings"])
        if settings["amp"] != "fp16":
            saved["sums"][SKIPPED] = 0.0  # steps that fp16's scaler skipped were no error
    else:
        settings = resolve(typed)
        if (folder / "checkpoint.pt").exists() and not dry_run:
            fail(f"{folder} holds a trained run: add --resume to go on, or choose another --name")
    batch, accum, processes = settings["batch_size"], settings["accum"], ranks()[1]
    rest = batch % (processes * accum)
    if rest:
        way = "give another --accum" if saved else f"give {batch - rest + processes * accum}"
        if saved and batch % processes:
            way = "start another number of processes"
        pieces = f"{processes} process(es) x --accum {accum}"
        fail(f"--batch-size {batch} is not a multiple of {pieces}: {way}")
    counts = parameter_counts(settings)
    describe(settings, counts, folder, "preset" not in typed and not saved)
    if dry_run:
        print(json.dumps({**settings, "parameters": counts}))
        return
    if not saved:
        command = ["train.py", *(sys.argv[1:] if argv is None else argv)]
        settings["origin"] = origin(command, settings["device"])
    run(settings, folder, saved, before)


def run(settings: dict, folder: Path, saved: dict | None, before: int | None) -> None:
    """Load the data, train, say what comes next. Exits where a resumed run's data is another, or
    where the checkpoint is no longer that of the time `before`."""
    rank, processes, local = ranks()
    if local:  # the first process of each machine downloads and decodes, the others wait
        dist.barrier()
    keys = ("data", "size", "channels", "data_dir", "limit", "seed")
    split, _ = data.load(*(settings[key] for key in keys))  # and the test images, for the probe
    if processes > 1 and not local:
        dist.barrier()
    found = {"images": len(split.images), "class_names": split.class_names}
    known = {key: settings.get(key, value) for key, value in found.items()}
    if found != known:
        changed = sorted({*found["class_names"]} ^ {*known["class_names"]})
        unlike = f" (unlike: {changed[0]})" if changed else ""
        fail(
            f"{settings['data']} has {found['images']:,} images of {len(found['class_names'])} "
            f"classes, but {folder} was trained on {known['images']:,} of "
            f"{len(known['class_names'])}{unlike}: give that --data, or another --name"
        )
    done = saved["step"] * settings["batch_size"] / len(split.images) if saved else 0
    if done >= settings["epochs"]:
        fail(f"{folder} has done {done:.4g} epochs: give more with --epochs")
    settings = {**settings, **found, "launch": this_launch()}
    with claim(folder, rank):
        if rank == 0:
            if written_at(folder) != before:  # while this one read the data
                fail(f"another process has trained {folder}: --resume, or choose another --name")
            data.write_json(folder / "config.json", settings)
        torch.manual_seed(settings["seed"])
        net = build_dier(settings)
        step, seconds, stopped = train(net, dier_loss, split.images, settings, folder, saved)
    if processes > 1:  # all end together, when rank 0 has saved: gloo's threads abort a lonely end
        dist.barrier()
        dist.destroy_process_group()
    named = f" --name {shlex.quote(str(folder.relative_to(RUNS)))}"
    seen = step * settings["batch_size"]
    if stopped and seen < settings["epochs"] * len(split.images):
        print(f"stopped at step {step:,}: python train.py{named} --resume goes on")
        raise SystemExit(128 + stopped)
    if rank:  # rank 0 speaks; on another machine there is no checkpoint
        return
    if folder.parent == RUNS and folder == find_run():  # the newest needs no name
        named = ""
    command = f"probe.py{named}" + (" --t 400" if settings["data"] == "glyphs" else "")
    if not split.class_names:
        command = f"-m appendix.choose{named}"
    took = f"{step:,} steps, {seen:,} images seen, {clock(seconds)} in this call"
    print(f"{took}; next: python {command}")


if __name__ == "__main__":
    guard(main, "--accum 2 or more, or a smaller --batch-size")
