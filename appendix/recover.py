"""What v_t and the noise carry: images recovered by a trained run (Appendix C, Figs. 8-13).

    python -m appendix.recover                        the newest run: from noise and from codes
    python -m appendix.recover --name mnist --steps 100 --n 8
    python -m appendix.recover --mode interpolate     between two images
    python -m appendix.recover --mode swap            the noise of one image, v of another
    python -m appendix.recover --mode timesteps       one-step estimates with right and wrong v
    python -m appendix.recover --name baselines/mnist-diffae-0      a method that predicts noise

Decoding walks from x_999 to the image with v_t = Encoder(x_0, t) of the true image at each step.
From *random noise* x_999 ~ N(0, I) the picture shows what v alone knows. From the *stochastic
code*, which DDIM inversion makes of x_0, v and noise together give x_0 back, up to the error of the
inversion. x_0-hat is clipped where x_999 is random noise, and in one-step estimates; never on the
way to a code and back. MSE and PSNR are of pixels in 0..1, each the mean over the images.

The picture is recover.png or recover-MODE.png in the run's folder.

Shapes: B batch, C channels, H W pixels, V length of v.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import train
from appendix.baselines import METHODS
from appendix.chart import image_grid
from data import Split, fail, load, progress, sample, to_float, to_uint8
from diffusion import T, alphas_cumprod, ddim_invert, ddim_sample, ddim_times, predict_x0, q_sample
from probe import TIMES
from train import dier_loss, find_run, guard, load_model, pick_device

MODES = ("recover", "interpolate", "swap", "timesteps")
MEAN_SAMPLE, BLOCK = 2_000, 25  # training images whose mean v_t stands for that of all; at a time

# ---------------------------------------------------------------------------- walking the chain


def build_method(settings: dict) -> nn.Module:
    """The networks of a run's method; exits where it does not predict the noise."""
    method = settings["method"]
    if METHODS.get(method, (None, None))[1] is not dier_loss:
        fail(f"a run of {method} makes no images: nothing can be recovered, choose another --name")
    return METHODS[method][0](settings)


def embed(model: nn.Module, x0: Tensor, t: int) -> Tensor:
    """v_t = Encoder(x0, t): (B, C, H, W) -> (B, V)."""
    return model.encoder(x0, torch.full((len(x0),), t, device=x0.device))


def trajectory(model: nn.Module, x0: Tensor, times: list[int]) -> dict[int, Tensor]:
    """v_t of x0 (B, C, H, W) for each of the times, {t: (B, V)}: once for each image and step."""
    return {t: embed(model, x0, t) for t in progress(times, "encoding", len(times), "steps")}


def predict_eps(model: nn.Module, x_t: Tensor, t: int, v: Tensor) -> Tensor:
    """eps_theta(x_t, t, v) by a run's DiT or U-Net: x_t (B, C, H, W), v (B, V) -> (B, C, H, W)."""
    denoiser = model.unet if hasattr(model, "unet") else model.dit
    return denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device), v)


def walk(
    function: Callable[..., Tensor],
    model: nn.Module,
    v: dict[int, Tensor],
    x: Tensor,
    what: str,
    **more: Any,
) -> Tensor:
    """`ddim_sample` or `ddim_invert` from x (B, C, H, W) over the times of v, with a progress line
    where that is slow."""
    steps = progress(v, what, len(v), "steps")

    def eps_fn(x_t: Tensor, t: int) -> Tensor:
        next(steps, None)
        return predict_eps(model, x_t, t, v[t])

    x = function(eps_fn, x, len(v), **more)
    for _ in steps:  # the end of the line
        pass
    return x


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation between noises (B, C, H, W), which keeps the norm that noise has."""
    u, w = a.flatten(1), b.flatten(1)
    cosine = (u * w).sum(1) / (u.norm(dim=1) * w.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos().view(-1, 1, 1, 1)
    apart = angle.sin() > 1e-6
    mixed = ((1 - share) * angle).sin() * a + (share * angle).sin() * b
    return torch.where(apart, mixed / torch.where(apart, angle.sin(), 1.0), torch.lerp(a, b, share))


def score(x: Tensor, x0: Tensor) -> tuple[float, float]:
    """(MSE, PSNR in dB) of images in [-1, 1] with pixels taken to 0..1, means over the images."""
    error = ((x.clamp(-1, 1) - x0) / 2).square().flatten(1).mean(1)
    return error.mean().item(), (-10 * error.clamp(min=1e-12).log10()).mean().item()


# ---------------------------------------------------------------------------- modes


def pixels(images: Tensor) -> np.ndarray:
    """Images in [-1, 1] (B, C, H, W) as a page takes them: uint8."""
    return to_uint8(images).cpu().numpy()


def standard_noise(x0: Tensor, seed: int) -> Tensor:
    """N(0, I) in the shape of x0, drawn on the CPU, so that it is the same on every device."""
    return torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)


def recover(model: nn.Module, x0: Tensor, steps: int, seed: int, path: Path) -> None:
    """Figs. 8-13: from random noise and from stochastic codes, below the true images."""
    v = trajectory(model, x0, ddim_times(steps))
    noise = walk(ddim_sample, model, v, standard_noise(x0, seed), "from noise", clip=True)
    code = walk(ddim_invert, model, v, x0, "inversion")
    back = walk(ddim_sample, model, v, code, "from code", clip=False)
    for name, x in (("noise", noise), ("code", back)):
        mse, psnr = score(x, x0)
        print(f"{steps:4d} steps from {name:5}  MSE {mse:.5f}  PSNR {psnr:5.2f} dB")
    rows = [("image", pixels(x0)), ("from noise", pixels(noise)), ("from code", pixels(back))]
    image_grid(rows, [], path, f"{steps} steps")


def interpolate(model: nn.Module, x0: Tensor, steps: int, path: Path) -> None:
    """From one image to the next: slerp of their codes, linear in their trajectories of v."""
    pairs = len(x0) // 2
    a, b = x0[0 : 2 * pairs : 2], x0[1 : 2 * pairs : 2]
    times = ddim_times(steps)
    v_a, v_b = trajectory(model, a, times), trajectory(model, b, times)
    code_a = walk(ddim_invert, model, v_a, a, "inversion")
    code_b = walk(ddim_invert, model, v_b, b, "inversion")
    columns, heads = [a], ["image"]
    for k in range(7):
        share = k / 6
        v = {t: torch.lerp(v_a[t], v_b[t], share) for t in times}
        code = slerp(code_a, code_b, share)
        columns.append(walk(ddim_sample, model, v, code, "from code", clip=False))
        heads.append(f"{share:.2f}")
    rows = torch.stack([*columns, b], dim=1)  # (pairs, 9, C, H, W)
    image_grid([("", pixels(row)) for row in rows], [*heads, "image"], path)


def swap(model: nn.Module, x0: Tensor, steps: int, path: Path) -> None:
    """Row i, column j: the stochastic code of image i decoded with v of image j."""
    n, times = len(x0), ddim_times(steps)
    v = trajectory(model, x0, times)
    code = walk(ddim_invert, model, v, x0, "inversion").repeat_interleave(n, 0)
    crossed = {t: v[t].repeat(n, 1) for t in times}  # (n * n, V): j runs fastest
    x = walk(ddim_sample, model, crossed, code, "from code", clip=False)
    x = x.view(n, n, *x.shape[1:])
    rows = [("v of", pixels(torch.cat([torch.ones_like(x0[:1]), x0])))]  # the corner is white
    rows += [("code of", pixels(torch.cat([x0[i : i + 1], x[i]]))) for i in range(n)]
    image_grid(rows, [], path)
    own = x.diagonal(dim1=0, dim2=1).movedim(-1, 0)  # code and v of the same image
    other = torch.stack([x[i, (i + 1) % n] for i in range(n)])  # v of the next image
    print(
        f"own v: MSE {score(own, x0)[0]:.5f}; another's v: {score(other, x0)[0]:.5f} to the image "
        f"of the code, {score(other, x0.roll(-1, 0))[0]:.5f} to the image of v"
    )


def mean_of_v(model: nn.Module, images: np.ndarray, device: torch.device) -> dict[int, Tensor]:
    """The mean v_t of uint8 images (N, C, H, W) at each of the probe's times, {t: (1, V)}."""
    blocks = torch.from_numpy(images).split(BLOCK)
    mean = {}
    for t in progress(TIMES, "mean v", len(TIMES), "times"):
        v = torch.cat([embed(model, to_float(block.to(device)), t) for block in blocks])
        mean[t] = v.mean(0, keepdim=True)
    return mean


def timesteps(
    model: nn.Module, x0: Tensor, mean_v: dict[int, Tensor], seed: int, path: Path
) -> None:
    """One-step estimates of x_0 from x_t, with the right v and with three that are wrong.

    Zero v lies off the distribution that the network has seen, and so overstates what v does; the
    mean does not.
    """
    abar, eps = alphas_cumprod().to(x0), standard_noise(x0, seed)
    v = trajectory(model, x0, TIMES)
    kinds = {
        "right v": v,
        "another's v": {t: v[t].roll(1, 0) for t in TIMES},
        "mean v": {t: mean_v[t].expand_as(v[t]) for t in TIMES},
        "zero v": {t: torch.zeros_like(v[t]) for t in TIMES},
    }
    noisy = {t: q_sample(x0, torch.full((len(x0),), t).to(x0.device), eps, abar) for t in TIMES}
    grid = [("x_t", list(noisy.values()))]
    print("MSE of one-step estimates at t = " + ", ".join(map(str, TIMES)))
    for kind, chosen in kinds.items():
        guesses = {t: predict_eps(model, noisy[t], t, chosen[t]) for t in TIMES}
        images = [predict_x0(noisy[t], abar[t], guesses[t], clip=True) for t in TIMES]
        grid.append((kind, images))
        print(f"{kind:12} " + "  ".join(f"{score(x, x0)[0]:.4f}" for x in images))
    rows = []
    for i in range(min(4, len(x0))):
        rows += [(kind, pixels(torch.stack([x[i] for x in images]))) for kind, images in grid]
    image_grid(rows, [f"t = {t}" for t in TIMES], path)


# ---------------------------------------------------------------------------- command line


def build_parser() -> train.Parser:
    """Every flag, with its unit and default."""
    p = train.Parser(__doc__, prog="python -m appendix.recover")
    steps = partial(train.number, int, lambda n: 1 <= n <= T, f"a whole number from 1 to {T}")
    p.add_argument("--name", help="the run in runs/NAME (the newest)")
    p.add_argument("--mode", choices=MODES, help="what to draw (recover)")
    p.add_argument("--steps", type=steps, help=f"of the chain, 1 to {T} (50)")
    p.add_argument("--n", type=train.positive_int, help="test images (16; swap: at most 8)")
    p.add_argument("--seed", type=train.natural, help="of the images chosen and of the noise (0)")
    p.add_argument("--device", help="auto, cpu, cuda (auto)")
    return p


def main(argv: list[str] | None = None) -> None:
    """Load the run and its images, draw what the mode asks for."""
    typed = vars(build_parser().parse_args(argv))
    mode, steps, seed = typed.get("mode", "recover"), typed.get("steps", 50), typed.get("seed", 0)
    if mode == "timesteps" and "steps" in typed:
        fail("--mode timesteps walks no chain: leave --steps out")
    folder, device = find_run(typed.get("name")), pick_device(typed.get("device", "auto"))
    model, saved = load_model(folder, build_method)
    model = model.to(device).requires_grad_(False)
    keys = ("data", "size", "channels", "data_dir", "limit", "seed")
    train_split, test_split = load(*(saved["settings"][key] for key in keys))

    def choose(split: Split, n: int) -> np.ndarray:
        """A seeded sample of n images, as equal over the classes as can be."""
        return sample(split, n, seed).images

    x0 = to_float(torch.from_numpy(choose(test_split, typed.get("n", 16))).to(device))
    if mode == "swap":
        x0 = x0[:8]  # 64 images to decode
    if mode != "recover" and len(x0) < 2:  # the others need another's v
        way = "give --n 2" if len(test_split.images) > 1 else "the set has one"
        fail(f"--mode {mode} needs two test images or more: {way}")
    print(f"{folder}, step {saved['step']:,}: {len(x0)} test images")
    path = folder / ("recover.png" if mode == "recover" else f"recover-{mode}.png")
    if mode == "recover":
        recover(model, x0, steps, seed, path)
    elif mode == "timesteps":
        mean_v = mean_of_v(model, choose(train_split, MEAN_SAMPLE), device)
        timesteps(model, x0, mean_v, seed, path)
    else:
        draw = interpolate if mode == "interpolate" else swap
        draw(model, x0, steps, path)
    print(f"saved: {path}")


if __name__ == "__main__":
    guard(main, "a smaller --n")
