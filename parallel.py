"""One process or many: who this process is, what all of them agree on, and how they end together.

    torchrun --nproc_per_node=8 train.py --data oct2017 --preset paper

torchrun (PyTorch's launcher) starts N processes and tells each its rank through the environment.
Each takes its share of every batch; DistributedDataParallel averages their gradients, so all hold
the same weights; rank 0 alone writes and prints. Without torchrun the world is one process, and
everything here does nothing.
"""

import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

AGREE_EVERY = 10  # steps between two agreements: they cost a round trip between the hosts
TIMEOUT = timedelta(minutes=10)  # an evicted or hanging machine ends the others after this


@dataclass(frozen=True)
class World:
    """This process among all: rank in 0 .. size - 1; `local` is its number on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    def part(self, n: int) -> slice:
        """This process's share of n things; n must be a multiple of the size."""
        share = n // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


ALONE = World()  # the usual world of one process


def world_from_environment() -> World:
    """What torchrun says, else one process alone."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return World(*(int(os.environ.get(name, alone)) for name, alone in names.items()))


def join(world: World, device: torch.device) -> torch.device:
    """Meet the other processes, NCCL between GPUs, gloo on CPUs and for agreements; returns the
    device of this process: with GPUs the one of its number on this machine."""
    if world.size == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", world.local)
        torch.cuda.set_device(device)
    # torchrun may keep its store over a restart; a prefix hides the addresses of dead processes.
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return device


def restarted_run(folders: Iterable[Path]) -> Path | None:
    """After torchrun restarted the processes: the run among these folders that this launch began,
    known by the launch's id in config.json, if it got as far as a checkpoint."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return None
    launch, found = os.environ.get("TORCHELASTIC_RUN_ID"), []
    for folder in folders:
        config = folder / "config.json"
        if (folder / "checkpoint.pt").exists() and config.exists():
            found += [folder] * (json.loads(config.read_text()).get("launch") == launch)
    return max(found, key=lambda f: (f / "config.json").stat().st_mtime, default=None)


@contextmanager
def first_alone(world: World) -> Iterator[None]:
    """The first process of each machine does the block before the others do."""
    if world.size > 1 and world.local:
        dist.barrier()
    yield
    if world.size > 1 and not world.local:
        dist.barrier()


def share_from_first(world: World, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def agree(world: World, step: int, *flags: bool) -> list[bool]:
    """What any process wants, all do at the same step. With many processes only every tenth step
    asks; between them every answer is False."""
    if world.size == 1:
        return list(flags)
    if step % AGREE_EVERY:
        return [False] * len(flags)
    votes = torch.tensor(flags, dtype=torch.int32)  # on the CPU: no GPU waits for it
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return [bool(v) for v in votes.tolist()]


def sum_to_first(world: World, total: Tensor) -> Tensor:
    """Sum a tensor over all processes into rank 0's, in place; the others' becomes zero."""
    if world.size > 1:
        dist.reduce(total, dst=0)
        if world.rank:
            total.zero_()
    return total


def largest(world: World, value: Tensor) -> None:
    """The largest of all processes' values, in place on each."""
    if world.size > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)


@contextmanager
def ending_together(world: World, run: Path) -> Iterator[None]:
    """If another process dies, end this one with one line; torchrun reports the rest."""
    if world.size == 1:
        yield
        return

    def lost(*_: Any) -> None:
        """One line, then out, without waiting for collectives that nobody will join."""
        kept = f"the last checkpoint is {run / 'checkpoint.pt'}"
        if not (run / "checkpoint.pt").exists():
            kept = "no checkpoint was written yet"
        print(f"rank {world.rank}: another process ended or the launcher stopped this one; {kept}",
              file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)

    previous = signal.signal(signal.SIGTERM, lost)
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text:
            lost()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    dist.destroy_process_group()
