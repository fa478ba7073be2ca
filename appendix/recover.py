"""What v_t and the noise carry: images recovered by a trained DiER (Appendix C, Figs. 8-13), or by
another method of methods.py that guesses the noise.

    python -m appendix.recover                        the newest run: from noise and from codes
    python -m appendix.recover --run mnist --steps 100 --n 16 --curve
    python -m appendix.recover --mode interpolate     between two images
    python -m appendix.recover --mode swap            the noise of one image, v of another
    python -m appendix.recover --mode timesteps       one-step estimates with right and wrong v

Decoding walks from x_999 to the image, with v_t = Encoder(x_0, t) of the true image at each step.
From *random noise* x_999 ~ N(0, I) the picture is what v alone knows. From the *stochastic code*,
which DDIM run backwards makes of x_0 (diffusion.py:invert), v and noise together give x_0 back, up
to the error of the inversion, which --curve shows. x_0-hat is clipped when decoding from noise and
never otherwise. MSE and PSNR are of pixels in 0..1, each the mean over the images.

Files in the run's folder: recover-noise.png, recover-code.png and recover.png, or
recover-MODE.png.

Shapes: B batch, C channels, H W pixels, S steps, V length of v.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from appendix.chart import Canvas
from appendix.methods import method_of
from data import load, mix_seed, to_float, to_uint8
from diffusion import T, alphas_cumprod, ddim_times, denoise, invert, predict_x0, q_sample
from features import to_channels
from log import Progress
from probe import TIMES
from runs import (
    Parser,
    count,
    fail,
    find_run,
    not_negative,
    pick_device,
    read_checkpoint,
    restore_model,
    run_main,
    whole,
)

CURVE = (10, 20, 50, 100, 250)
MEAN_SAMPLE = 2_000  # training images whose mean v_t stands for that of all
GAP, HEAD = 4, 30  # pixels between images, and above a block for its title
Block = tuple[str, Tensor, int]  # title, images (B, C, H, W), columns


# ---------------------------------------------------------------------------- walking the chain


@torch.no_grad()
def trajectory(model: nn.Module, x0: Tensor, times: list[int]) -> dict[int, Tensor]:
    """v_t of x0 (B, C, H, W) for each of the times, {t: (B, V)}: once per image and step used."""
    return {t: model.encoder(x0, torch.full((len(x0),), t, device=x0.device)) for t in times}


def eps_fn(model: nn.Module, v: dict[int, Tensor]) -> Callable[[Tensor, int], Tensor]:
    """The network as diffusion.py wants it: (x_t, t) -> eps, with v_t looked up."""

    @torch.no_grad()
    def predict(x_t: Tensor, t: int) -> Tensor:
        """eps_theta(x_t, t, v_t)."""
        return model.dit(x_t, torch.full((len(x_t),), t, device=x_t.device), v[t])

    return predict


def last(walk, what: str, steps: int) -> Tensor:
    """The end of a walk, with a progress line when it takes long."""
    progress, start, x = Progress(), time.monotonic(), None
    for k, x in enumerate(walk, 1):  # noqa: B007, the last one is the result
        spent = time.monotonic() - start
        if spent > 2:
            left = spent / k * (steps - k)
            progress.show(f"{what}: step {k} of {steps}, {left:.0f} s left")
    return x


def from_noise(
    model: nn.Module, v: dict[int, Tensor], x_T: Tensor, steps: int, eta: float, seed: int
) -> Tensor:
    """Images decoded from x_T ~ N(0, I) (B, C, H, W), x_0-hat clipped; the noise of eta > 0 is
    seeded."""
    generator = torch.Generator(x_T.device).manual_seed(mix_seed(seed, 1))
    walk = denoise(eps_fn(model, v), x_T, steps, eta, True, generator)
    return last(walk, "from noise", steps)


def encode_code(model: nn.Module, v: dict[int, Tensor], x0: Tensor, steps: int) -> Tensor:
    """The stochastic code x_999 of x0 (B, C, H, W)."""
    return last(invert(eps_fn(model, v), x0, steps), "inversion", steps - 1)


def from_code(model: nn.Module, v: dict[int, Tensor], code: Tensor, steps: int) -> Tensor:
    """Images decoded from stochastic codes (B, C, H, W); never clipped, eta = 0."""
    return last(denoise(eps_fn(model, v), code, steps, 0.0, False), "from code", steps)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation between noises (B, C, H, W): keeps the norm that noise has."""
    u, w = a.flatten(1), b.flatten(1)
    cosine = (u * w).sum(1) / (u.norm(dim=1) * w.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos().view(-1, 1, 1, 1)
    safe = torch.where(angle.sin() > 1e-6, angle.sin(), 1.0)
    mixed = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / safe
    return torch.where(angle.sin() > 1e-6, mixed, (1 - share) * a + share * b)


def score(x: Tensor, x0: Tensor) -> tuple[float, float]:
    """(MSE, PSNR in dB) of images in [-1, 1] with pixels taken to 0..1, means over the images."""
    error = ((x.clamp(-1, 1) - x0) / 2).square().flatten(1).mean(1)
    return error.mean().item(), (-10 * error.clamp(min=1e-12).log10()).mean().item()


# ---------------------------------------------------------------------------- pages


def scale_of(size: int) -> int:
    """How large a pixel is drawn: small images at about 64 pixels."""
    return max(1, 64 // size)


def block_size(block: Block, scale: int) -> tuple[int, int]:
    """Width and height of a titled block of images."""
    _, images, columns = block
    side = images.shape[-1] * scale + GAP
    return columns * side - GAP, math.ceil(len(images) / columns) * side - GAP + HEAD


def draw_block(canvas: Canvas, block: Block, at: tuple[float, float], scale: int) -> None:
    """The title, and the images below it in reading order."""
    title, images, columns = block
    side = images.shape[-1] * scale + GAP
    canvas.text((at[0], at[1] + HEAD / 2), title, 15, "lm")
    for k, image in enumerate(to_uint8(images).cpu().numpy()):
        place = (at[0] + k % columns * side, at[1] + HEAD + k // columns * side)
        canvas.paste(image, place, scale)


def page(left: list[Block], right: list[Block], path: Path) -> None:
    """Two columns of blocks, each column one below the other; the shorter one in the middle."""
    scale = scale_of(left[0][1].shape[-1])
    sizes = [[block_size(b, scale) for b in column] for column in (left, right)]
    heights = [sum(h for _, h in column) + 16 * (len(column) - 1) for column in sizes]
    widths = [max((max(w, 230) for w, _ in column), default=0) for column in sizes]
    canvas = Canvas(sum(widths) + 40 + 24 * bool(right), max(heights) + 36)
    x = 20
    for column, column_sizes, height, width in zip((left, right), sizes, heights, widths):
        y = 12 + (max(heights) - height) / 2
        for block, (_, h) in zip(column, column_sizes):
            draw_block(canvas, block, (x, y), scale)
            y += h + 16
        x += width + 24
    canvas.save(path)


def table_page(rows: list[tuple[str, Tensor]], heads: list[str], path: Path) -> None:
    """One row of images for each (label, images), a head above each column."""
    size = rows[0][1].shape[-1]
    scale = scale_of(size)
    side, label = size * scale + GAP, 150
    canvas = Canvas(label + len(heads) * side + 20, HEAD + len(rows) * side + 20)
    for k, head in enumerate(heads):
        canvas.text((label + (k + 0.5) * side - GAP / 2, HEAD / 2 + 4), head, 14)
    for r, (name, images) in enumerate(rows):
        y = HEAD + 8 + r * side
        canvas.text((label - 10, y + side / 2), name, 14, "rm")
        for k, image in enumerate(to_uint8(images).cpu().numpy()):
            canvas.paste(image, (label + k * side, y), scale)
    canvas.save(path)


# ---------------------------------------------------------------------------- modes


def recover(model: nn.Module, x0: Tensor, args: argparse.Namespace, run: Path) -> None:
    """Figs. 8-13: from random noise and from stochastic codes, beside the true images."""
    x_T = torch.randn(x0.shape, generator=torch.Generator().manual_seed(args.seed)).to(x0.device)
    columns = math.ceil(len(x0) ** 0.5)
    curve = [steps for steps in CURVE if args.curve and steps != args.steps]
    for steps in [*curve, args.steps]:  # the last one is drawn
        v = trajectory(model, x0, ddim_times(steps))
        noise = from_noise(model, v, x_T, steps, args.eta, args.seed)
        code = from_code(model, v, encode_code(model, v, x0, steps), steps)
        for name, x in (("noise", noise), ("code", code)):
            mse, psnr = score(x, x0)
            print(f"{steps:4d} steps from {name:5}  MSE {mse:.5f}  PSNR {psnr:5.2f} dB")
    truth = (f"test images of {args.data}", x0, columns)
    made = {
        "noise": (f"from random noise, {args.steps} steps, eta {args.eta:g}", noise, columns),
        "code": (f"from stochastic codes, {args.steps} steps", code, columns),
    }
    for name, block in made.items():
        page([block], [truth], run / f"recover-{name}.png")
    page(list(made.values()), [truth], run / "recover.png")


def interpolate(model: nn.Module, x0: Tensor, args: argparse.Namespace, run: Path) -> None:
    """From one image to the next: slerp of their codes, linear in their trajectories of v."""
    a, b = x0[0::2][: len(x0) // 2], x0[1::2][: len(x0) // 2]
    times = ddim_times(args.steps)
    v_a, v_b = trajectory(model, a, times), trajectory(model, b, times)
    codes = [encode_code(model, v, x, args.steps) for v, x in ((v_a, a), (v_b, b))]
    shares = [k / 6 for k in range(7)]
    steps = []
    for share in shares:
        v = {t: torch.lerp(v_a[t], v_b[t], share) for t in times}
        steps.append(from_code(model, v, slerp(*codes, share), args.steps))
    rows = [("", torch.stack([a[i], *(x[i] for x in steps), b[i]])) for i in range(len(a))]
    heads = ["image", *(f"{share:.2f}" for share in shares), "image"]
    table_page(rows, heads, run / "recover-interpolate.png")


def swap(model: nn.Module, x0: Tensor, args: argparse.Namespace, run: Path) -> None:
    """Row i, column j: the stochastic code of image i decoded with v of image j."""
    x0, times = x0[:8], ddim_times(args.steps)
    n, v = len(x0), trajectory(model, x0[:8], times)
    code = encode_code(model, v, x0, args.steps)
    crossed = {t: v[t].repeat(n, 1) for t in times}  # (n * n, V): j runs fastest
    x = from_code(model, crossed, code.repeat_interleave(n, 0), args.steps)
    x = x.view(n, n, *x.shape[1:])
    white = torch.ones_like(x0[:1])
    rows = [("v of", torch.cat([white, x0]))]
    rows += [("code of" if i == 0 else "", torch.cat([x0[i : i + 1], x[i]])) for i in range(n)]
    table_page(rows, [""] * (n + 1), run / "recover-swap.png")
    own = x[range(n), range(n)]
    other = torch.stack([x[i, (i + 1) % n] for i in range(n)])
    to_v = torch.stack([x0[(i + 1) % n] for i in range(n)])
    print(f"own v: MSE {score(own, x0)[0]:.5f}; another's v: {score(other, x0)[0]:.5f} to the "
          f"image of the code, {score(other, to_v)[0]:.5f} to the image of v")  # fmt: skip


def timesteps(
    model: nn.Module, x0: Tensor, args: argparse.Namespace, run: Path, mean_v: dict[int, Tensor]
) -> None:
    """One-step estimates of x_0 from x_t, with the right v and with three that are wrong. Zero v
    lies off the distribution that the DiT has seen, and so overstates what v does; the mean does
    not."""
    abar = alphas_cumprod().to(x0)
    generator = torch.Generator().manual_seed(args.seed)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    v = trajectory(model, x0, TIMES)
    kinds: dict[str, Callable[[int], Tensor]] = {
        "right v": lambda t: v[t],
        "another's v": lambda t: v[t].roll(1, 0),
        "mean v": lambda t: mean_v[t].expand_as(v[t]),
        "zero v": lambda t: torch.zeros_like(v[t]),
    }
    grid: dict[str, list[Tensor]] = {"x_t": []}
    print("MSE of one-step estimates at t = " + ", ".join(map(str, TIMES)))
    whole = {t: torch.full((len(x0),), t, device=x0.device) for t in TIMES}
    noisy = {t: q_sample(x0, whole[t], eps, abar) for t in TIMES}
    grid["x_t"] = [noisy[t] for t in TIMES]
    for kind, choose in kinds.items():
        predict = eps_fn(model, {t: choose(t) for t in TIMES})
        grid[kind] = [predict_x0(noisy[t], abar[t], predict(noisy[t], t), True) for t in TIMES]
        errors = "  ".join(f"{score(x, x0)[0]:.4f}" for x in grid[kind])
        print(f"{kind:12} {errors}")
    rows = []
    for i in range(min(4, len(x0))):
        rows += [(kind, torch.stack([x[i] for x in columns])) for kind, columns in grid.items()]
    table_page(rows, [f"t = {t}" for t in TIMES], run / "recover-timesteps.png")


# ---------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its unit and default."""
    p = Parser(prog="python -m appendix.recover", description="Images recovered by a DiER run.")
    p.add_argument("--run", help="name or path of a run (the newest)")
    p.add_argument("--mode", choices=["recover", "interpolate", "swap", "timesteps"],
                   default="recover", help="what to draw (recover)")  # fmt: skip
    p.add_argument("--steps", type=whole, help=f"of the chain, 1 to {T} (50)")
    p.add_argument("--eta", type=not_negative, default=0.0,
                   help="noise added on the way: 0 DDIM, 1 DDPM (0)")  # fmt: skip
    p.add_argument("--n", type=whole, default=16, help="test images (16)")
    p.add_argument("--seed", type=count, default=0, help="of the choice of images and noise (0)")
    p.add_argument("--curve", action="store_true",
                   help=f"also the errors with {', '.join(map(str, CURVE))} steps")  # fmt: skip
    p.add_argument("--data", help="another set or folder than the run's")
    p.add_argument("--data-dir", type=Path, help="sets live here (the run's)")
    p.add_argument("--weights", choices=["ema", "raw"], default="ema", help="which weights (ema)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    return p


def main(argv: list[str] | None = None) -> None:
    """Load the run and its test images, draw what the mode asks for."""
    args = build_parser().parse_args(argv)
    if (args.eta or args.curve) and args.mode != "recover":
        fail(f"--eta and --curve belong to --mode recover, not {args.mode}: leave them out")
    if args.steps and args.mode == "timesteps":
        fail("--mode timesteps walks no chain: leave --steps out")
    args.steps = args.steps or 50
    if not 1 <= args.steps <= T:
        fail(f"--steps {args.steps}: choose from 1 to {T}")
    if args.mode in ("interpolate", "swap") and args.n < 2:
        fail(f"--n {args.n}: --mode {args.mode} needs two images or more")
    run = find_run(args.run)
    state = read_checkpoint(run)
    settings, device = state["settings"], pick_device(args.device)
    method = method_of(settings)
    if not method.denoises:
        fail(f"{run} is a run of {method.name}, which makes no images: nothing can be recovered")
    model = restore_model(state, method, args.weights).to(device).eval()
    args.data = args.data or settings["data"]
    data_dir = args.data_dir or Path(settings["data_dir"])

    def images(split: str, limit: int) -> Tensor:
        """A seeded sample of a split, equal over the classes, on the device."""
        part = load(args.data, split, settings["size"], data_dir, limit, args.seed)
        pixels = to_channels(part, settings["channels"])
        return to_float(torch.from_numpy(pixels.copy()).to(device))

    x0 = images("test", args.n)
    print(f"run {run}, step {state['step']:,}, {args.weights} weights: {len(x0)} test images")
    if args.mode == "timesteps":
        v = [trajectory(model, x, TIMES) for x in images("train", MEAN_SAMPLE).split(500)]
        mean_v = {t: torch.cat([part[t] for part in v]).mean(0, keepdim=True) for t in TIMES}
        timesteps(model, x0, args, run, mean_v)
    else:
        {"recover": recover, "interpolate": interpolate, "swap": swap}[args.mode](
            model, x0, args, run
        )
    made = "recover-noise.png, recover-code.png, recover.png"
    print(f"saved in {run}: {made if args.mode == 'recover' else f'recover-{args.mode}.png'}")


if __name__ == "__main__":
    run_main(main)
