"""Train DiER: predict the noise in x_t, helped by a vector of the clean image. No labels.

    python train.py                               the embedded digits, 4 minutes on a CPU
    python train.py --data mnist                  30 minutes on a CPU, the paper's recipe on a GPU
    python train.py --data cifar10 --preset paper --epochs 200
    python train.py --run mnist --resume          go on after Ctrl-C or a crash, bit for bit
    python train.py --data mnist --dry-run        show every resolved value, train nothing
    torchrun --nproc_per_node=8 train.py --data oct2017 --preset paper        eight GPUs

One step (Eq. 4.6): draw t and eps, make x_t, predict eps from x_t, t and v_t = Encoder(x_0, t),
take the squared error, clip, Adam, EMA. The loop is `train`, and the step is `training_step`.

What a run leaves in runs/NAME/, and what others may read:
- config.json: every resolved flag;
- checkpoint.pt: weights, EMA, optimizer, step and window sums; tensors and plain values only;
- log.jsonl: step, epoch, images, seconds, loss, loss_by_t (10 numbers, the mean loss for each tenth
  of t, null where none was drawn), lr, images_per_s, grad_norm, skipped (steps that fp16 skipped);
- preview.png: what the average weights make of four images, renewed every few minutes.
With --json the last line printed is one JSON object: parameters {dit, encoder} and every resolved
flag, plus steps, images, seconds and loss after training. With --dry-run that needs no data set.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data import Batches, load, mix_seed, save_grid, to_float
from diffusion import T, alphas_cumprod, eps_loss, predict_x0, q_sample
from files import written_whole
from log import Log, Window, check_finite, clock, cut_log, is_log_step
from parallel import (
    ALONE,
    World,
    agree,
    ending_together,
    first_alone,
    join,
    restarted_run,
    share_from_first,
    world_from_environment,
)
from runs import (
    BASELINES,
    DIER,
    RUNS,
    Method,
    build_parser,
    describe_run,
    fail,
    find_run,
    new_run,
    newest_run,
    parameter_counts,
    pick_amp,
    read_checkpoint,
    require_method,
    resolve,
    resolve_resume,
    run_main,
    run_path,
)

SAVE_SECONDS = 60.0  # a crash costs at most this much training
PREVIEW_SECONDS, PREVIEW_TIMES = 150.0, (100, 300, 500, 700, 900)


# ---------------------------------------------------------------------------- the step


def draw(
    seed: int, step: int, shape: tuple[int, ...], device: torch.device, rank: int = 0
) -> tuple[Tensor, ...]:
    """t (B,), flips (B,) and eps `shape` of one step for the global batch, a pure function of
    (seed, step): a resumed run sees what it would have seen, and each process takes its part.
    Dropout uses the default generators, reseeded here too, differently for each rank."""
    generator = torch.Generator(device).manual_seed(mix_seed(seed, step))
    t = torch.randint(T, shape[:1], generator=generator, device=device)
    flips = torch.rand(shape[:1], generator=generator, device=device) < 0.5
    eps = torch.randn(shape, generator=generator, device=device)
    torch.manual_seed(mix_seed(seed, step, rank))
    return t, flips, eps


def ema_decay(decay: float, step: int) -> float:
    """min(decay, (1 + n) / (10 + n)): the average looks back over a tenth of a young run."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: Tensor, params: Tensor, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * params, in place."""
    ema.lerp_(params, 1.0 - decay)


def views(flat: Tensor, params: list[Tensor]) -> Iterator[Tensor]:
    """Pieces of a long tensor (P,) with the shapes and strides of params, end to end."""
    start = 0
    for p in params:
        yield flat.as_strided(p.shape, p.stride(), start)
        start += p.numel()


@torch.no_grad()
def flatten(model: torch.nn.Module) -> Tensor:
    """Lay all parameters of a model end to end in one long tensor (P,), and let the model go on
    with views of it. Clipping, Adam and the average then work on one tensor in place of 150, whose
    calls would take a tenth of a small model's step on a CPU."""
    params = list(model.parameters())
    flat = torch.empty(sum(p.numel() for p in params), device=params[0].device)
    for p, view in zip(params, views(flat, params)):
        p.data = view.copy_(p)
    return flat


class TrainState:
    """All that changes while training, and so all that a checkpoint holds."""

    def __init__(
        self,
        settings: dict[str, Any],
        device: torch.device,
        world: World = ALONE,
        method: Method = DIER,
    ):
        torch.manual_seed(settings["seed"])
        self.settings, self.device, self.world, self.step = settings, device, world, 0
        self.method, self.seconds = method, 0.0  # of training, over all invocations
        self.model = method.build(settings).to(device)
        if settings["checkpoint_activations"]:
            self.model.checkpoint_activations(True)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
            self.model.encoder.to(memory_format=torch.channels_last)  # what tensor cores read
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.ema_params, params = flatten(self.ema), list(self.model.parameters())
        self.params = torch.nn.Parameter(flatten(self.model))
        self.params.grad = torch.zeros_like(self.params)
        for p, grad in zip(params, views(self.params.grad, params)):
            p.grad = grad
        self.net = self.model if world.size == 1 else DistributedDataParallel(self.model)
        self.optimizer = torch.optim.Adam([self.params], lr=settings["lr"], fused=True)
        self.amp = pick_amp(settings["amp"], device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.abar = alphas_cumprod().float().to(device)
        self.window = Window(device)

    PARTS = ["model", "ema", "optimizer", "scaler", "window"]

    def save(self, run: Path) -> None:
        """Write checkpoint.pt, whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        state |= {"step": self.step, "seconds": self.seconds, "settings": self.settings}
        with written_whole(run / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def restore(self, state: dict[str, Any]) -> None:
        """Take everything back from a checkpoint."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        if self.world.rank:
            self.window.reset()  # the sums so far are rank 0's
        self.step, self.seconds = state["step"], state["seconds"]


def forward_loss(
    state: TrainState, x0: Tensor, t: Tensor, eps: Tensor, index: Tensor | None = None
) -> Tensor:
    """Eq. 4.6 for each image: x0, eps (B, C, H, W), t (B,) -> (B,), with a graph for backward. A
    method without noise is its own loss; `index` (B,) says which images of the set x0 are."""
    amp = state.amp
    x_t = q_sample(x0, t, eps, state.abar)
    with torch.autocast(state.device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
        if not state.method.denoises:
            return state.net(x0, index)
        eps_hat = state.net(x_t, t, x0)
    return eps_loss(eps_hat, eps)


def update(state: TrainState) -> Tensor:
    """Clip the gradients, let Adam step, move the average; returns the norm before clipping."""
    s = state
    s.scaler.unscale_(s.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_([s.params], s.settings["clip"] or math.inf)
    s.scaler.step(s.optimizer)
    s.scaler.update()
    s.params.grad.zero_()
    s.step += 1
    update_ema(s.ema_params, s.params, ema_decay(s.settings["ema"], s.step))
    return grad_norm.detach()


def training_step(state: TrainState, x0: Tensor, t: Tensor, eps: Tensor, *index: Tensor) -> None:
    """One update of Eq. 4.6 on this process's images: x0, eps (B, C, H, W), t (B,), index (B,).

    With --accum N the batch goes through in N pieces whose gradients add up to the batch's; only
    the last one makes the processes exchange them. Never waits for the device.
    """
    losses, pieces = [], state.settings["accum"]
    for k, piece in enumerate(zip(*(x.chunk(pieces) for x in (x0, t, eps, *index)))):
        alone = state.world.size > 1 and k < pieces - 1
        with state.net.no_sync() if alone else contextlib.nullcontext():
            loss = forward_loss(state, *piece)
            state.scaler.scale(loss.mean() / pieces).backward()
        losses.append(loss.detach())
    grad_norm = update(state)
    state.window.add(state.step, torch.cat(losses), t, grad_norm)


# ---------------------------------------------------------------------------- the loop


@torch.no_grad()
def preview(state: TrainState, batches: Batches, path: Path) -> None:
    """Show a person what is being learned: for four training images and five t, one row a t, x_0,
    x_t and the one-step estimate of x_0 by the average weights. Draws from its own generator."""
    x0 = to_float(batches.images[:4].to(state.device))
    generator = torch.Generator().manual_seed(mix_seed(state.settings["seed"], -1))
    rows = []
    for t in PREVIEW_TIMES:
        eps = torch.randn(x0.shape, generator=generator).to(state.device)
        times = torch.full((len(x0),), t, device=state.device)
        x_t = q_sample(x0, times, eps, state.abar)
        x0_hat = predict_x0(x_t, state.abar[t], state.ema(x_t, times, x0), clip=True)
        rows.append(torch.stack([x0, x_t, x0_hat], dim=1).flatten(0, 1))  # (12, C, H, W)
    save_grid(torch.cat(rows), path, columns=3 * len(x0), scale=max(1, 64 // x0.shape[-1]))


def train(state: TrainState, batches: Batches, run: Path) -> float:
    """Train until the epochs or minutes of the settings are over; returns the seconds it took.

    Ctrl-C finishes the step, saves and exits with status 130. All processes come here; rank 0
    writes and prints.
    """
    settings, world, batch = state.settings, state.world, state.settings["batch_size"]
    shape = (batch, settings["channels"], settings["size"], settings["size"])
    last = math.ceil(settings["epochs"] * len(batches) / batch) if settings["epochs"] else math.inf
    limit = 60 * settings["minutes"] if settings["minutes"] else math.inf
    ctrl_c: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda *_: ctrl_c.append(1))
    start = saved = drawn = time.monotonic()
    log, part = Log(state, run, last, limit), world.part(batch)
    before, over, stopped = state.seconds, False, False
    state.model.train()
    while state.step < last and not over:
        t, flips, eps = draw(settings["seed"], state.step, shape, state.device, world.rank)
        x0, index = batches(state.step, flips, part), batches.index(state.step, part)
        training_step(state, x0, t[part], eps[part], index)
        now = time.monotonic()
        state.seconds = before + now - start
        if is_log_step(state.step):
            state.window.gather(world)
            check_finite(state, run)
            log.write(state, len(batches), now - start)
            state.window.reset()
        stopped, timed_out, due = agree(
            world, state.step, bool(ctrl_c), now - start >= limit, now - saved > SAVE_SECONDS
        )
        over = stopped or timed_out
        if due or over or state.step >= last:
            state.window.gather(world)
            check_finite(state, run)
            saved = now
            if world.rank == 0:
                state.save(run)
                redraw = over or state.step >= last or now - drawn > PREVIEW_SECONDS
                if redraw and state.method.denoises:
                    preview(state, batches, run / "preview.png")
                    drawn = now
    log.close()
    signal.signal(signal.SIGINT, previous)
    if stopped:
        command = f"python {state.method.train} --run {run} --resume"
        print(f"stopped at step {state.step}: {command} goes on")
        raise SystemExit(130)
    return time.monotonic() - start


# ---------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    """Train DiER as the flags say."""
    start(build_parser(__doc__).parse_args(argv))


def start(args: argparse.Namespace, method: Method = DIER) -> dict[str, Any]:
    """Resolve the settings, build or restore a run, train it, say what comes next; returns what
    --json prints."""
    state_dict, world = None, world_from_environment()
    if world.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, one process speaks for all
    again = restarted_run([run_path(args.run)] if args.run else RUNS.glob("*"))
    if again:  # torchrun has started us anew after a crash
        args.run, args.resume = str(again), True
    if args.resume:
        run = find_run(args.run, method)
        state_dict = read_checkpoint(run)
        require_method(run, state_dict["settings"], method, f"{BASELINES} --resume")
        settings = resolve_resume(args, state_dict["settings"], method)
    else:
        args.data, args.seed = args.data or "glyphs", args.seed or 0
        settings = resolve(args, method)
        run = run_path(args.run) if args.run else new_run(args.data)
        if (run / "checkpoint.pt").exists():
            fail(f"{run} holds a trained run: add --resume to go on, or choose another --run")
    if settings["checkpoint_activations"] and not method.recomputes:
        fail(f"--checkpoint-activations: {method.name} cannot compute them again; leave it out")
    pieces = world.size * settings["accum"]
    if settings["batch_size"] % pieces:
        fail(
            f"--batch-size {settings['batch_size']} is not a multiple of {world.size} process(es) "
            f"x --accum {settings['accum']}; use {-(-settings['batch_size'] // pieces) * pieces}"
        )
    counts = parameter_counts(settings, method)
    describe_run(settings, counts, run, args.preset == "auto" and not args.resume)
    result: dict[str, Any] = {**settings, "parameters": counts, "run": str(run)}
    if not args.dry_run:
        device = join(world, torch.device(settings["device"]))
        run = share_from_first(world, run)
        with ending_together(world, run):
            result |= run_training(settings, state_dict, run, device, world, method)
    if args.json:
        print(json.dumps(result))
    return result


def run_training(
    settings: dict,
    state_dict: dict | None,
    run: Path,
    device: torch.device,
    world: World,
    method: Method,
) -> dict[str, Any]:
    """Load the data, build or restore the state, train; returns steps, images, seconds, loss."""
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if settings["compile"] and device.type == "cpu" and not any(map(shutil.which, compilers)):
        fail("--compile needs a C++ compiler on a CPU: install g++, or leave --compile out")
    with first_alone(world):  # it downloads and fills the cache
        split = load(
            settings["data"], "train", settings["size"], Path(settings["data_dir"]),
            settings["limit"], settings["seed"],
        )  # fmt: skip
    batches = Batches(
        split.images, settings["batch_size"], settings["seed"], device, settings["flip"]
    )
    state = TrainState(settings, device, world, method)
    method.prepare(state.model, split)
    if state_dict is not None:
        state.restore(state_dict)
        done = state.step * settings["batch_size"] / len(batches)
        if settings["epochs"] and done >= settings["epochs"]:
            fail(f"{run} has done {done:.1f} epochs: give a larger --epochs, or --minutes")
    if world.rank == 0:
        cut_log(run / "log.jsonl", state.step)
        with written_whole(run / "config.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
    if settings["compile"]:
        state.model.compile()
    print(f"{len(batches):,} training images of {settings['data']}", flush=True)
    seconds = train(state, batches, run)
    images = state.step * settings["batch_size"]
    rows = (run / "log.jsonl").read_text().splitlines()
    named = "" if run == newest_run(method) else f" --run {run}"
    print(
        f"{state.step:,} steps, {images:,} images seen, {clock(seconds)} in this call; next: "
        f"python {method.probe}{named}" + (" --t 400" if settings["data"] == "glyphs" else "")
    )
    loss = json.loads(rows[-1])["loss"] if rows else None
    return {"steps": state.step, "images": images, "seconds": seconds, "loss": loss}


if __name__ == "__main__":
    run_main(main)
