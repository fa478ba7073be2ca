"""LMIM (Wang et al. 2023) on a Swin (Liu et al. 2021), a transformer whose tokens attend in windows
and are merged four to one from stage to stage.

    python -m appendix.baselines --method lmim-swin

Only visible units enter, and each stage predicts HOG in cells of one of its tokens. The feature is
the mean of the last stage's tokens of a whole image, then normalised. What differs from the
published model: norms have no affine parameters, as the next linear layer absorbs them (but for the
patches' norm, whose output is the residual stream, and for the shift before a merge, which has no
bias); the patch is a 32nd of an image up to 64 pixels (a 16th in the cpu presets, which have three
stages), as the last stage needs units to hide; the windows are 4 x 4, and 8 x 8 at 256 pixels; all
decoders of a network are equally wide.

Shapes: B batch, C channels, H W pixels, N tokens, M of them visible, D width, W windows of at most
L tokens.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from appendix.masked import BINS, MASKED, Decoder, ViTBlock, hog_error, init_linear
from model import LayerNorm, patchify


class SwinConfig(NamedTuple):
    """Sizes of a Swin and of its decoders; the width doubles from stage to stage."""

    size: int
    channels: int
    patch: int
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    dec_width: int


class Windows(NamedTuple):
    """Which tokens attend to each other."""

    index: Tensor  # (W, L) places of the tokens of each window, 0 where there is none
    absent: Tensor  # (W, 1, L) -inf where there is none, else 0
    offsets: Tensor  # (W, L, L) which bias belongs to a pair
    back: Tensor  # (N,) where each token stands in the windows


def windows(coords: Tensor, size: int, shift: int, device: torch.device) -> Windows:
    """Cut tokens with coordinates (N, 2) into windows of size x size, shifted as in Swin. Windows
    at the border, and those with hidden tokens, are just smaller."""
    cell = (coords + size - shift) // size  # (N, 2)
    _, number, counts = cell.unique(dim=0, return_inverse=True, return_counts=True)
    order = number.argsort(stable=True)  # (N,)
    there = torch.arange(int(counts.max()), device="cpu") < counts[:, None]  # (W, L)
    index = torch.zeros(there.shape, dtype=torch.int64, device="cpu")
    index[there] = order
    back = torch.empty_like(order)
    back[order] = there.flatten().nonzero()[:, 0]
    at = coords[index]  # (W, L, 2)
    offsets = (at[:, :, None] - at[:, None]).clamp(1 - size, size - 1) + size - 1
    offsets = offsets[..., 0] * (2 * size - 1) + offsets[..., 1]  # (W, L, L)
    absent = torch.zeros(there.shape, device="cpu").masked_fill(~there, -torch.inf)[:, None]
    return Windows(*(part.to(device) for part in (index, absent, offsets, back)))


class SwinBlock(ViTBlock):
    """ViTBlock whose attention stays in windows and has a learned bias for each offset: tokens
    (B, M, D) and the windows that they are in -> (B, M, D)."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__(width, heads)
        self.bias = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))

    def forward(self, x: Tensor, places: Windows) -> Tensor:
        h = self.qkv(self.norm1(x))[:, places.index]  # (B, W, L, 3 D)
        h = h.unflatten(3, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)
        q, k, v = h  # each (B, heads, W, L, d)
        bias = self.bias[places.offsets].permute(3, 0, 1, 2) + places.absent  # (heads, W, L, L)
        scores = (q @ k.transpose(3, 4)).float() / q.shape[4] ** 0.5 + bias  # (B, heads, W, L, L)
        h = scores.softmax(4).to(v.dtype) @ v  # (B, heads, W, L, d)
        h = h.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)  # (B, W * L, D)
        x = x + self.proj(h[:, places.back])  # (B, N, D)
        return x + self.mlp(self.norm2(x))  # (B, N, D)


class Swin(nn.Module):
    """Swin (Liu et al. 2021) on whole images or on visible units alone: (B, C, H, W), (B,) ->
    (B, D), the mean of the last stage's tokens, then normalised.

    Tokens stand unit by unit, a unit being what becomes one token of the last stage, and inside it
    so that four in a row are always a square of 2 x 2: merging is a reshape, a unit is one run.
    """

    def __init__(self, cfg: SwinConfig):
        super().__init__()
        self.patch, self.window, merges = cfg.patch, cfg.window, len(cfg.depths) - 1
        self.unit = 4**merges  # tokens
        side = cfg.size // (cfg.patch * 2**merges)
        coords = torch.cartesian_prod(*2 * [torch.arange(side, device="cpu")])  # of the units
        square = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device="cpu")
        for _ in range(merges):
            coords = (2 * coords[:, None] + square).flatten(0, 1)  # (N, 2)
        self.coords, self.grid = coords, cfg.size // cfg.patch
        self.units = side**2
        self.embed = nn.Linear(cfg.patch**2 * cfg.channels, cfg.width)
        widths = [cfg.width << k for k in range(merges + 1)]
        self.norms = nn.ModuleList(LayerNorm(n) for n in [cfg.width, *(2 * n for n in widths[1:])])
        self.merges = nn.ModuleList(nn.Linear(2 * n, n, bias=False) for n in widths[1:])
        self.stages = nn.ModuleList(
            nn.ModuleList(SwinBlock(width, heads, cfg.window) for _ in range(depth))
            for width, heads, depth in zip(widths, cfg.heads, cfg.depths)
        )
        self.norm = LayerNorm(widths[-1])
        init_linear(self)

    def layers(self, x0: Tensor, units: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Tokens (B, M, D) and their coordinates (M, 2) after each merge and after the last block,
        for the units (on the CPU, as the windows' shapes follow from them) or for all of them."""
        coords, grid = self.coords, self.grid
        if units is not None:
            coords = coords.view(-1, self.unit, 2)[units].flatten(0, 1)  # (M, 2)
        index = (coords @ torch.tensor([grid, 1], device="cpu")).to(x0.device)
        x = self.norms[0](self.embed(patchify(x0, self.patch)[:, index]))  # (B, M, D)
        outputs = []
        for k, stage in enumerate(self.stages):
            if k:
                x = self.norms[k](x.unflatten(1, (-1, 4)).flatten(2))  # (B, M / 4, 4 D)
                x = self.merges[k - 1](x)  # (B, M / 4, 2 D)
                coords, grid = coords[::4] // 2, grid // 2
                outputs.append((x, coords))
            shifts = (0, self.window // 2 if grid > self.window else 0)
            both = [windows(coords, self.window, shift, x.device) for shift in shifts]
            for i, block in enumerate(stage):
                x = block(x, both[i % 2])  # (B, M, D)
        return [*outputs, (x, coords)]

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.norm(self.layers(x0)[-1][0].mean(1))  # (B, D)


class LMIMSwin(nn.Module):
    """LMIM on a Swin: x0 (B, C, H, W) -> the sum of the losses (B,) after each merge and after the
    last block, with one decoder each; a cell of HOG is one token. The mask is one for the batch."""

    def __init__(self, cfg: SwinConfig):
        super().__init__()
        self.encoder = Swin(cfg)
        levels = [*range(1, len(cfg.depths)), len(cfg.depths) - 1]
        self.cells = [cfg.patch << k for k in levels]
        self.norms = nn.ModuleList(LayerNorm(cfg.width << k) for k in levels)
        self.decoders = nn.ModuleList(
            Decoder(cfg.size // cell, cfg.width << k, cfg.dec_width, 1, cfg.channels * BINS)
            for k, cell in zip(levels, self.cells)
        )

    def forward(self, x0: Tensor) -> Tensor:
        n = self.encoder.units
        order = torch.randperm(n, device="cpu")
        layers, losses = self.encoder.layers(x0, order[round(MASKED * n) :].sort().values), []
        for (x, coords), cell, norm, decoder in zip(layers, self.cells, self.norms, self.decoders):
            side = x0.shape[2] // cell
            index = coords @ torch.tensor([side, 1], device="cpu")  # (M,)
            hidden = torch.ones(1, side**2, device="cpu").index_fill(1, index, 0.0).to(x0.device)
            guess = decoder(norm(x), index[None].to(x0.device))  # (B, N, C * 9)
            losses.append(hog_error(guess, x0, cell, hidden))
        return sum(losses)


# Rows as in model.py; glyphs and mnist take that of 32 pixels.
# fmt: off
TABLE = {
    #            patch width depths         heads           window dec_width
    "paper 32":  (1,   96,   (2, 2, 6, 2),  (3, 6, 12, 24), 4,     64),
    "paper 64":  (2,   96,   (2, 2, 18, 2), (3, 6, 12, 24), 4,     64),
    "paper 256": (4,   128,  (2, 2, 18, 2), (4, 8, 16, 32), 8,     128),
    "cpu 32":    (1,   32,   (2, 2, 2),     (1, 2, 4),      4,     64),
    "cpu 64":    (2,   32,   (2, 2, 2),     (1, 2, 4),      4,     64),
    "cpu 256":   (4,   32,   (2, 2, 2),     (1, 2, 4),      4,     64),
}
# fmt: on


def swin_config(settings: dict) -> SwinConfig:
    """The row for the settings' preset and row, at their size and channels."""
    row = TABLE[f"{settings['preset']} {settings['row']}"]
    return SwinConfig(settings["size"], settings["channels"], *row)
