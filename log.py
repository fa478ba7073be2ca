"""What a run writes down while it trains: sums between two log steps, log.jsonl, the progress line;
and the one line with which it ends where a loss was not finite.

Shapes: B images of a step.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion import T
from files import written_whole
from parallel import World, largest, sum_to_first
from runs import fail


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """The progress line: rewritten in place on a terminal, a new line every 10 s in a file."""

    def __init__(self) -> None:
        self.last = -math.inf

    def show(self, text: str, final: bool = False) -> None:
        """Print `text`; final ends the line."""
        if sys.stdout.isatty():
            print(f"\r\033[K{text}", end="\n" if final else "", flush=True)
        elif final or time.monotonic() - self.last > 10:
            print(text, flush=True)
            self.last = time.monotonic()


def is_log_step(step: int) -> bool:
    """Every step at first, where the loss falls fastest, then every 50th."""
    return step <= 20 or step % 50 == 0


class Window:
    """What the log needs, summed on the device between two log steps: reading it is the only time
    that the host waits for the device."""

    FIELDS = ["loss", "count", "grad_norm", "steps", "skipped", "bad_step"]

    def __init__(self, device: torch.device):
        self.loss = torch.zeros(10, device=device)  # summed loss by tenth of t
        self.count = torch.zeros(10, device=device)  # images by tenth of t
        self.grad_norm = torch.zeros((), device=device)  # summed over steps that were not skipped
        self.steps = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)  # by the fp16 scaler; never reset
        self.bad_step = torch.full((), -1.0, device=device)  # first step with a non-finite loss

    def add(self, step: int, loss: Tensor, t: Tensor, grad_norm: Tensor) -> None:
        """Add one step: loss (B,), t (B,), grad_norm a scalar."""
        tenth = t * 10 // T
        self.loss.index_add_(0, tenth, loss)
        self.count.index_add_(0, tenth, torch.ones_like(loss))
        finite = grad_norm.isfinite()
        self.grad_norm += torch.where(finite, grad_norm, 0.0)
        self.steps += finite
        self.skipped += ~finite
        bad = ~loss.isfinite().all() & (self.bad_step < 0)
        self.bad_step = torch.where(bad, float(step), self.bad_step)

    def read(self) -> dict[str, Any]:
        """loss, loss_by_t, grad_norm, skipped as plain numbers, None where nothing was summed."""
        count, loss = self.count.tolist(), self.loss.tolist()
        mean = sum(loss) / max(1, sum(count))
        return {
            "loss": mean,
            "loss_by_t": [s / n if n else None for s, n in zip(loss, count)],
            "grad_norm": self.grad_norm.item() / max(1.0, self.steps.item()),
            "skipped": int(self.skipped.item()),
        }

    def gather(self, world: World) -> None:
        """Bring the sums of all processes to rank 0. The gradient's norm is the same on each."""
        sum_to_first(world, self.loss)
        sum_to_first(world, self.count)
        largest(world, self.bad_step)

    def reset(self) -> None:
        """Start the next window."""
        for total in (self.loss, self.count, self.grad_norm, self.steps):
            total.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, for the checkpoint."""
        return {name: getattr(self, name).clone() for name in self.FIELDS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the sums back from a checkpoint."""
        for name in self.FIELDS:
            setattr(self, name, state[name].to(self.loss.device))


def check_finite(state: Any, run: Path) -> None:
    """End the run where a loss was not finite; the last good checkpoint stays. `state` is a
    train.py:TrainState."""
    bad = int(state.window.bad_step.item())
    if bad < 0:
        return
    if state.world.rank:
        raise SystemExit(2)  # rank 0 has the sums, and says it
    tenths = [i for i, s in enumerate(state.window.loss.tolist()) if not math.isfinite(s)]
    where = ", ".join(f"{100 * i}-{100 * i + 99}" for i in tenths)
    kept = f"{run}/checkpoint.pt is the last good one" if (run / "checkpoint.pt").exists() else ""
    fail(
        f"the loss is not finite since step {bad} (t in {where}; lr {state.settings['lr']:g}, amp "
        f"{state.settings['amp']}): try a smaller --lr, or --amp off. {kept}"
    )


class Log:
    """log.jsonl and the progress line, out of train.py's TrainState; on other ranks than 0 it does
    nothing."""

    def __init__(self, state: Any, run: Path, last: float, limit: float):
        self.first, self.last, self.limit = state.step, last, limit
        self.seen, self.shown = state.step, 0.0  # step and seconds at the row before
        self.progress, self.text = Progress(), ""
        self.file = (run / "log.jsonl").open("a") if state.world.rank == 0 else None

    def write(self, state: Any, images: int, spent: float) -> None:
        """One row for the window that ends now, `spent` seconds after the first step."""
        if self.file is None:
            return
        step, batch = state.step, state.settings["batch_size"]
        rate = (step - self.seen) * batch / max(spent - self.shown, 1e-9)
        row = {"step": step, "epoch": step * batch / images, "images": step * batch}
        row |= {"seconds": state.seconds, **state.window.read()}
        row |= {"lr": state.settings["lr"], "images_per_s": rate}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        left = min(self.limit - spent, (self.last - step) * spent / (step - self.first))
        self.text = f"step {step}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  "
        self.text += f"{rate:.0f} images/s  {clock(left)} left"
        self.progress.show(self.text)
        self.seen, self.shown = step, spent

    def close(self) -> None:
        """End the file and the progress line."""
        if self.file is not None:
            self.file.close()
            self.progress.show(self.text, final=True)


def cut_log(path: Path, step: int) -> None:
    """Drop rows after `step` and a torn last line, so that a resumed log has no row twice."""
    if not path.exists():
        return
    keep = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                keep.append(line + "\n")
        except ValueError:
            break
    with written_whole(path) as temporary:
        temporary.write_text("".join(keep))
