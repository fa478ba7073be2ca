"""What a training step costs, and how that compares with the same step written plainly.

    python -m appendix.bench                            the cpu preset on mnist's shapes
    python -m appendix.bench --preset paper --data cifar10 --batch-size 8
    python -m appendix.bench --amp off --json bench.json      the program in fp32 alone

On one GPU of 80 GB give --batch-size 8 at 256 pixels: the plain reference alone fills it with 16.

Pixels are random, so no data set is needed. The program is train.py's loop as it is used: data,
step, rows of the log, checkpoints; its own log gives the times. It runs in fp32 (on a GPU: TF32)
and in the half precision of --amp auto, beside the plain reference, tests/reference.py in fp32.
Each is a process of its own and they take turns, so that a noisy machine disturbs all alike. Memory
is what a process peaked at minus what it had after its imports (on CUDA the allocator's peak). A
speed is the median of its samples, with the quartiles as spread, and a share of the fastest matrix
product or 3 x 3 convolution of the same dtype (MFU), measured in the same run.

--json FILE holds preset, data, size, batch_size, device, threads, torch, parameters,
flops_per_image, peak_flops; sides {reference, fp32, bf16}, each {images_per_s, quartile_1,
quartile_3, samples, peak_bytes, mfu, ratio_images_per_s, ratio_peak_memory (to the reference)}.

Shapes: B batch, C channels, S pixels of a side.
"""

import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import train
from appendix.baselines import flops_per_image
from data import SETS, batch_index, fail, get_batch, on_device, progress, write_json
from model import PRESETS
from train import ROW_STEPS

# not `from tests.reference`: some installed packages bring a package called tests with them
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference import PlainDiER, PlainTraining  # noqa: E402

TURNS, SECONDS = 5, 2.5  # turns of each side, and about how long one is
WARMUP = 3  # steps of a turn that do not count: first calls, and a checkpoint after the first
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---------------------------------------------------------------------------- the two sides


def random_pixels(settings: dict) -> np.ndarray:
    """Four batches of uint8 images (4 B, C, S, S)."""
    shape = (4 * settings["batch_size"], settings["channels"], settings["size"], settings["size"])
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


class Program:
    """train.py's loop on random pixels; each turn trains on, as a run that begins anew."""

    def __init__(self, settings: dict, folder: Path):
        self.settings, self.folder = settings, folder
        self.net, self.pixels = train.build_dier(settings), random_pixels(settings)

    def turn(self, n: int) -> list[float]:
        """Seconds a step, from rows of the log: on a CPU n rows of one step each.

        On CUDA such a row makes the host wait for the device, so only one 20 steps after another
        shows the loop's speed; and the first such row began with an idle device, so that it took
        the host less time than the device. The second is the turn's one sample.
        """
        warmup, steps = WARMUP, n
        if torch.device(self.settings["device"]).type == "cuda":
            warmup, steps = 2 * ROW_STEPS, ROW_STEPS
        epochs = (warmup + steps) / 4  # one has four batches
        settings = {**self.settings, "epochs": epochs}
        train.train(self.net, train.dier_loss, self.pixels, settings, self.folder)
        rows = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        batch = settings["batch_size"]
        return [batch / row["images_per_s"] for row in rows if row["step"] > warmup]


class Reference:
    """The same steps written plainly."""

    def __init__(self, settings: dict, _: Path):
        self.settings, self.device = settings, train.pick_device(settings["device"])
        self.pixels = on_device(random_pixels(settings), self.device)
        net = PlainDiER(train.model_config(settings)).to(self.device).train()
        self.training = PlainTraining(net, settings["lr"], settings["ema"], settings["clip"])

    def step(self) -> None:
        """One step; its loss is read, so it waits for the device."""
        n, batch = self.training.step, self.settings["batch_size"]
        t, flips, eps = train.draw(0, n, (batch, *self.pixels.shape[1:]), self.device)
        index = batch_index(len(self.pixels), n, batch, 0, self.pixels.device)
        flips = flips if self.settings["flip"] else None
        self.training(get_batch(self.pixels, index, self.device, flips), t, eps)

    def turn(self, n: int) -> list[float]:
        """Seconds of each of n steps after a warm-up."""
        times = []
        for _ in range(WARMUP + n):
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        return times[WARMUP:]


# ---------------------------------------------------------------------------- measuring


def memory(line: str) -> int:
    """Bytes of this process: "VmRSS" has it now, "VmHWM" had it at most. Where there is no /proc
    the peak stands for both."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{line}:")[1].split()[0]) * 1024
    except OSError:
        import resource  # Unix alone has it

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def work(pipe: Connection, side: type, settings: dict, folder: Path, threads: int) -> None:
    """A process of its own: takes a turn of n whenever told n; at 0 tells its memory and ends."""
    torch.set_num_threads(threads)
    device = torch.device(settings["device"])
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32 for the reference too
    before = memory("VmRSS")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        runner = side(settings, folder)
        for n in iter(pipe.recv, 0):
            times = runner.turn(n)
            if on_gpu:  # the others' turns need what the allocator keeps
                torch.cuda.empty_cache()
            pipe.send(times)
    pipe.send(torch.cuda.max_memory_allocated(device) if on_gpu else memory("VmHWM") - before)


def ask(pipe: Connection, process: BaseProcess, n: int) -> Any:
    """Tell a process n and wait for its answer; exits where it has died."""
    try:
        pipe.send(n)
        return pipe.recv()
    except (EOFError, OSError):
        process.join()
    if process.exitcode == 2:  # it has said why
        raise SystemExit(2)
    fail("a measuring process ended early (out of memory?): try a smaller --batch-size")


def sides_of(settings: dict) -> dict[str, tuple[type, dict]]:
    """What is measured: {name: (side, its settings)}; the program's name is its precision. Where
    no --amp was typed it runs in fp32 and in what train.py would take."""
    amps = {settings["amp"]}
    if settings["amp"] == "auto":
        amps = {"off", train.pick_amp("auto", torch.device(settings["device"]))}
    sides = {"reference": (Reference, settings)}
    for amp in sorted(amps, reverse=True):  # "off" first
        sides["fp32" if amp == "off" else amp] = (Program, {**settings, "amp": amp})
    return sides


def take_turns(settings: dict) -> dict[str, dict]:
    """Measure all sides -> {name: {"times": seconds a step, "peak": bytes}}."""
    context, workers, counts = multiprocessing.get_context("spawn"), {}, {}
    result: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, (side, own) in sides_of(settings).items():
                pipe, far = context.Pipe()
                place = Path(folder) / name
                place.mkdir()
                job = partial(work, far, side, own, place, torch.get_num_threads())
                process = context.Process(target=train.guard, args=(job, "a smaller --batch-size"))
                process.start()
                far.close()
                workers[name] = (pipe, process)
                # The first turn warms up caches, allocators and --compile, and tells the pace.
                seconds = statistics.median(ask(pipe, process, 2))
                counts[name] = max(1, min(ROW_STEPS - WARMUP, round(SECONDS / seconds)))
                result[name] = {"times": []}
            for _ in progress(range(TURNS), "measuring", TURNS, "turns"):
                for name, worker in workers.items():
                    result[name]["times"] += ask(*worker, counts[name])
            for name, worker in workers.items():
                result[name]["peak"] = ask(*worker, 0)
        finally:
            for _, process in workers.values():
                process.kill()
                process.join()
    return result


def best_seconds(call: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of up to six calls, with the wait for the device."""
    times: list[float] = []
    while len(times) < 6 and sum(times) < 0.5:  # emulated bf16 can take seconds
        start = time.perf_counter()
        result = call()
        result[(0,) * result.ndim].item()  # waits
        times.append(time.perf_counter() - start)
    return min(times)


def peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of the fastest of square matrix products and of 3 x 3
    convolutions of 128 channels, each grown until it takes 50 ms. Convolutions count as products,
    so that Winograd's, in fp32, can beat them."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in train.py

    def product(size: int) -> tuple[Callable[[], Tensor], float]:
        """(the call, its operations) of a product of size x size matrices."""
        a = torch.randn(size, size, device=device).to(dtype)
        return lambda: a @ a, 2.0 * size**3

    def convolution(size: int) -> tuple[Callable[[], Tensor], float]:
        """The same of a convolution over size / 16 images (128, 32, 32)."""
        conv = torch.nn.Conv2d(128, 128, 3, padding=1, bias=False, device=device, dtype=dtype)
        conv.requires_grad_(False).to(memory_format=torch.channels_last)
        x = torch.randn(size // 16, 128, 32, 32, device=device).to(dtype)
        x = x.to(memory_format=torch.channels_last)
        return lambda: conv(x), 2.0 * x.numel() * 9 * 128

    best = 0.0
    for kind in (product, convolution):
        spent, size = 0.0, 128
        while spent < 0.05 and size <= 8192:
            call, flops = kind(size)
            spent = best_seconds(call)
            best, size = max(best, flops / spent), 2 * size
    return best


# ---------------------------------------------------------------------------- the report


def speed(times: list[float], batch: int) -> dict[str, float]:
    """Median and quartiles of images a second, from seconds a step."""
    low, middle, high = (batch / q for q in reversed(statistics.quantiles(times, n=4)))
    return {"images_per_s": middle, "quartile_1": low, "quartile_3": high, "samples": len(times)}


def compare(settings: dict) -> dict:
    """Everything about one preset: the program beside the plain reference."""
    keys = ("preset", "data", "size", "batch_size", "device")
    result = {key: settings[key] for key in keys}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    flops = flops_per_image("dier", settings)
    result |= {"parameters": train.parameter_counts(settings), "flops_per_image": flops}
    sides, device = take_turns(settings), torch.device(settings["device"])
    rows = {}
    for name, side in sides.items():
        row = speed(side["times"], settings["batch_size"])
        rows[name] = {**row, "peak_bytes": side["peak"]}
    reference = rows["reference"]
    used = [name for name in PRECISIONS if name == "fp32" or name in rows]
    peaks = {name: peak_flops(PRECISIONS[name], device) for name in used}
    for name, row in rows.items():
        row["mfu"] = flops * row["images_per_s"] / peaks[precision(name)]
        row["ratio_images_per_s"] = row["images_per_s"] / reference["images_per_s"]
        row["ratio_peak_memory"] = row["peak_bytes"] / reference["peak_bytes"]
    return {**result, "sides": rows, "peak_flops": peaks}


def precision(name: str) -> str:
    """What a side multiplies in."""
    return "fp32" if name == "reference" else name


def print_report(r: dict) -> None:
    """The report as a person reads it."""
    dit, encoder = r["parameters"]["dit"], r["parameters"]["encoder"]
    print(
        f"preset {r['preset']}, {r['data']} at {r['size']} px, batch {r['batch_size']}, "
        f"{r['device']} ({r['threads']} threads), torch {r['torch']}\n"
        f"parameters      {dit + encoder:,} (encoder {encoder:,}, DiT {dit:,})\n"
        f"FLOPs an image  {r['flops_per_image'] / 1e6:,.1f} M, forward and backward"
    )
    for name, row in r["sides"].items():
        print(
            f"{'plain' if name == 'reference' else 'program'}, {precision(name)}".ljust(16)
            + f"{row['images_per_s']:,.1f} images/s (quartiles {row['quartile_1']:,.1f} to "
            f"{row['quartile_3']:,.1f}, {row['samples']} samples), {row['mfu']:.0%} of the peak; "
            f"{row['peak_bytes'] / 2**20:,.0f} MiB; {row['ratio_images_per_s']:.2f} x the plain "
            f"images/s at {row['ratio_peak_memory']:.2f} x its memory"
        )
    peaks = ", ".join(f"{name} {peak / 1e9:,.1f}" for name, peak in r["peak_flops"].items())
    print(f"peak            {peaks} GFLOP/s, the best product or convolution")


# ---------------------------------------------------------------------------- command line


def build_parser() -> train.Parser:
    """Every flag, with its unit and default."""
    p = train.Parser(__doc__, prog="python -m appendix.bench")
    p.add_argument("--data", choices=SETS, help="whose shapes (mnist)")
    preset = "paper: Table 4; cpu: minutes to an hour (auto: paper with CUDA, else cpu)"
    p.add_argument("--preset", choices=["auto", *PRESETS], help=preset)
    p.add_argument("--batch-size", type=train.positive_int, help="images a step (the preset's)")
    amp = "precision of the program (fp32, and bf16 or fp16 where the hardware has it)"
    p.add_argument("--amp", choices=[*train.AMP], help=amp)
    p.add_argument("--device", help="auto, cpu, cuda (auto)")
    p.add_argument("--compile", action="store_true", help="torch.compile the program (off)")
    figures = "write the figures there as well"
    p.add_argument("--json", type=train.new_file, metavar="FILE", help=figures)
    return p


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    typed = vars(build_parser().parse_args(argv))
    path = typed.pop("json", None)
    amp = typed.pop("amp", "auto")
    result = compare({**train.resolve({"data": "mnist", **typed}), "amp": amp})
    print_report(result)
    if path:
        write_json(path, result)
        print(f"saved: {path}")


if __name__ == "__main__":
    train.guard(main)
