"""v_t of many images: each encoded once for each t, kept in half precision, standardised in place.

They stay on the device, or in a file mapped into memory where that is too small: their number is
bounded by the disk and not by the RAM.

Shapes: N images, B batch, C channels, H W pixels, V length of v, S number of t.
"""

import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import Split, to_float
from log import Progress
from parallel import ALONE, World, sum_to_first

PIXELS = 32  # raw pixels are compared at 32 x 32 at most: 256 x 256 are 196,608 weights a class
IN_MEMORY = 6 * 2**30  # bytes of features kept in RAM; more goes to a file


def to_channels(split: Split, channels: int) -> np.ndarray:
    """Images with the channels that the encoder takes: grey repeated, or colours averaged."""
    images = split.images
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=1)
    return images.mean(axis=1, keepdims=True).round().astype(np.uint8)


def pick(values: Tensor, index: Tensor | slice, device: torch.device) -> Tensor:
    """Some images' vectors out of (N, S, V), as fp32 on the device: (S, B, V).

    An image's vectors at all t lie side by side, and index_select copies whole rows, so a random
    batch costs a seventh of what it does with t in front.
    """
    if isinstance(index, Tensor):
        part = values.index_select(0, index.to(values.device))
    else:
        part = values[index]
    return part.to(device).float().transpose(0, 1)


def room(shape: tuple[int, ...], device: torch.device, folder: Path | None) -> Tensor:
    """Zeros in half precision: on the device, or in a file in `folder` where that is too much. The
    file has no name any more when this returns (where the system allows), so nothing is left."""
    size = 2 * math.prod(shape)
    free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else IN_MEMORY
    if size <= free or folder is None:
        return torch.zeros(shape, dtype=torch.half, device=device)
    path = folder / f".features.{os.getpid()}"
    try:
        values = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.half)
    finally:
        path.unlink(missing_ok=True)
    return values.view(shape)


@torch.no_grad()
def encode(
    encoder: nn.Module,
    images: np.ndarray,
    times: list[int | None],
    device: torch.device,
    amp: torch.dtype | None,
    what: str,
    folder: Path | None = None,
    world: World = ALONE,
) -> Tensor:
    """v_t of uint8 images (N, C, H, W) for each of the times -> (N, S, V) in half precision. The
    time of an encoder without time is None.

    Each image is encoded once for each t. The encoder is in eval mode: no dropout, nothing of it
    changes. With many processes each encodes its share, and rank 0 has the result.
    """
    encoder.eval()
    progress, start = Progress(), time.monotonic()
    one = to_float(torch.from_numpy(np.array(images[:1])).to(device))
    width = encoder(one, torch.zeros(1, dtype=torch.int64, device=device)).shape[1]
    out = room((len(images), len(times), width), device, folder)
    blocks = range(250 * world.rank, len(images), 250 * world.size)
    for done, first in enumerate(blocks, 1):
        x0 = to_float(torch.from_numpy(np.array(images[first : first + 250])).to(device))
        for s, t in enumerate(times):
            steps = torch.full((len(x0),), t or 0, device=device)
            with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
                out[first : first + len(x0), s] = encoder(x0, steps)
        spent = time.monotonic() - start
        if spent > 2:
            rate, left = 250 * done / spent, spent / done * (len(blocks) - done)
            progress.show(f"encoding {what}: {world.size * rate:.0f} images/s, {left:.0f} s left")
    for part in out.flatten(0, 1).split(250) if world.size > 1 else ():
        part.copy_(sum_to_first(world, part.clone()))
    return out


def small_pixels(x0: Tensor) -> Tensor:
    """Pixels as a vector: (B, C, H, W) -> (B, C * h * w), averaged to 32 x 32 if they are more."""
    if x0.shape[2] > PIXELS:
        x0 = F.interpolate(x0, (PIXELS, PIXELS), mode="area")
    return x0.flatten(1)


def raw_pixels(images: np.ndarray) -> Tensor:
    """The floor of no network: pixels (N, C, H, W) -> (N, 1, C * h * w), averaged to 32 x 32 if
    they are larger; half precision."""
    parts = []
    for x in np.array_split(images, max(1, len(images) // 1000)):
        parts.append(small_pixels(to_float(torch.from_numpy(np.array(x)))).half())
    return torch.cat(parts)[:, None]


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std over the images, (N, S, V) -> (S, 1, V) fp32 each; read in blocks."""
    total = square = 0.0
    first = values[:1].double()  # sums of differences from it lose no digits
    for part in values.split(2000):
        part = part.double() - first
        total, square = total + part.sum(0, True), square + (part**2).sum(0, True)
    mean, n = total / len(values), len(values)
    std = (square / n - mean**2).clamp(min=0).sqrt()
    return (first + mean).float().transpose(0, 1), std.float().transpose(0, 1)


def standardise(train: Tensor, test: Tensor) -> None:
    """Train (N, S, V) and test (M, S, V), in place: both lose the training mean and are divided by
    the training std, the batch norm of MAE's probe."""
    mean, std = (x.transpose(0, 1) for x in moments(train))  # (1, S, V)
    std = torch.where(std > 1e-6, std, 1.0)  # a constant feature becomes 0, not 0 / 0
    for values in (train, test):
        for part in values.split(2000):
            part.copy_((part.float() - mean) / std)
