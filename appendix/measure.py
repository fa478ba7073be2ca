"""How bench.py measures: each side in a process of its own, steps timed in turns, peak memory."""

import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from appendix.reference import PlainDiER, PlainTraining
from data import Batches
from runs import fail, model_config

ROUNDS = 8  # turns that each side takes
SECONDS = 1.5  # of one turn


# ---------------------------------------------------------------------------- memory


def resident() -> int:
    """Bytes of this process in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the peak so far is the best that the standard library knows
        return peak_resident()


def peak_resident() -> int:
    """Largest number of bytes this process had in memory. Linux's VmHWM belongs to the process
    alone; ru_maxrss also remembers the parent that started it."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


# ---------------------------------------------------------------------------- the two sides


def random_batches(settings: dict[str, Any], device: torch.device) -> Batches:
    """Batches of random pixels in the shapes of the settings."""
    shape = (4 * settings["batch_size"], settings["channels"], settings["size"], settings["size"])
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Batches(pixels, settings["batch_size"], 0, device, settings["flip"])


def build_step(side: str, settings: dict[str, Any]):
    """A function that takes one training step of the program or of the plain reference."""
    device = torch.device(settings["device"])
    batches = random_batches(settings, device)
    shape = (settings["batch_size"], *batches.images.shape[1:])
    if side == "program":
        state = train.TrainState(settings, device)
        state.model.train()
        if settings["compile"]:
            state.model.compile()

        def step() -> None:
            """As in train.train."""
            t, flips, eps = train.draw(0, state.step, shape, device)
            train.training_step(state, batches(state.step, flips), t, eps)

        return step
    torch.manual_seed(0)
    plain = PlainDiER(model_config(settings)).to(device).train()
    training = PlainTraining(plain, settings["lr"], settings["ema"], settings["clip"])

    def plain_step() -> None:
        """The same numbers through the plain step."""
        t, flips, eps = train.draw(0, training.step, shape, device)
        training(batches(training.step, flips), t, eps)

    return plain_step


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def worker(pipe, side: str, settings: dict[str, Any], threads: int) -> None:
    """A process of its own: warms up, then takes turns of steps when told; ends with its memory."""
    torch.set_num_threads(threads)
    device, before = torch.device(settings["device"]), resident()
    step = build_step(side, settings)
    for _ in range(3):
        step()
    synchronise(device)
    pipe.send("ready")
    while seconds := pipe.recv():
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end or not times:
            start = time.perf_counter()
            step()
            synchronise(device)
            times.append(time.perf_counter() - start)
        pipe.send(times)
    cuda = device.type == "cuda"
    pipe.send(torch.cuda.max_memory_allocated(device) if cuda else peak_resident() - before)


def take_turns(jobs: dict[str, tuple], rounds: int = 0) -> dict[str, dict[str, Any]]:
    """Run {name: (side, settings, threads)} in turns -> {name: seconds of each step, peak bytes}.

    Exits where a process dies, which is mostly for want of memory.
    """
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, job in jobs.items():
        pipes[name], far = context.Pipe()
        context.Process(target=worker, args=(far, *job), daemon=True).start()
        far.close()
    result: dict[str, dict[str, Any]] = {name: {"times": []} for name in jobs}
    try:
        for pipe in pipes.values():
            pipe.recv()
        for _ in range(rounds or ROUNDS):
            for name, pipe in pipes.items():
                pipe.send(SECONDS)
                result[name]["times"] += pipe.recv()
        for name, pipe in pipes.items():
            pipe.send(0)
            result[name]["peak"] = pipe.recv()
    except EOFError:
        fail("a measuring process ended early (out of memory?): try a smaller --batch-size")
    return result


# ---------------------------------------------------------------------------- single measurements


def split_times(settings: dict[str, Any], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of the four parts of a step: data, forward, backward, update."""
    device = torch.device(settings["device"])
    state, batches = train.TrainState(settings, device), random_batches(settings, device)
    shape, parts = (settings["batch_size"], *batches.images.shape[1:]), []
    state.model.train()
    for k in range(rounds + 3):
        marks = [time.perf_counter()]

        def mark(marks: list[float] = marks) -> None:
            """Note the time when the device is done."""
            synchronise(device)
            marks.append(time.perf_counter())

        t, flips, eps = train.draw(0, k, shape, device)
        x0 = batches(k, flips)
        mark()
        loss = train.forward_loss(state, x0, t, eps)
        mark()
        state.scaler.scale(loss.mean()).backward()
        mark()
        train.update(state)
        mark()
        parts.append(np.diff(marks))
    medians = 1e3 * np.median(parts[3:], axis=0)
    return dict(zip(("data", "forward", "backward", "update"), medians.tolist()))


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of the largest square product that takes under 50 ms."""
    best, side, spent = 0.0, 128, 0.0
    while spent < 0.05 and side <= 8192:
        a = torch.randn(side, side, device=device).to(dtype)
        times = []
        for _ in range(4):
            synchronise(device)
            start = time.perf_counter()
            a @ a
            synchronise(device)
            times.append(time.perf_counter() - start)
            if times[-1] > 1:
                break
        spent = min(times)
        best, side = max(best, 2 * side**3 / spent), 2 * side
    return best
