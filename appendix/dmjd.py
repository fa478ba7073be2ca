"""DMJD: two views of an image with 60% hidden, no patch visible in both.

    python -m appendix.baselines --method dmjd

A convolutional stem and a ViT see the visible patches; a decoder predicts HOG of the hidden ones,
an MLP that of the visible ones. The feature is the mean of the last block's tokens of a whole
image, without what the stem adds to it, then normalised. The published code compares a visible
patch with another patch's HOG, as it mixes two orders; here, as in the paper, with its own. Norms
before a linear layer have no affine parameters. On 4 x 4 patches, as of 16 pixels (preset cpu),
single ones are hidden and not 2 x 2; the cpu presets' convolutional MLPs are 4 times as wide and
not 8.

Shapes: B batch, C channels, H W pixels, N tokens in row-major order, M of them visible, Q hidden,
D width, G cells a side.
"""

import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from appendix.masked import (
    BINS,
    Decoder,
    ViTBlock,
    ViTConfig,
    affine_norm,
    gather,
    hog,
    init_linear,
    vit_config,
)
from model import LayerNorm, patchify, positions_2d

SEEN = 0.4  # share of the tokens that a view shows


def hog_targets(x0: Tensor, patch: int) -> Tensor:
    """HOG of pixels 0..255 in cells of half a patch, the nine bins of a cell and channel with mean
    0 and variance 1: (B, C, H, W) -> (B, N, 4 * C * 9)."""
    cells = F.layer_norm(hog(127.5 * x0, patch // 2, sobel=False), (BINS,))  # (B, G, G, C, 9)
    return patchify(cells.flatten(3).permute(0, 3, 1, 2), 2)


def disjoint_views(b: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two views of each image, (2B, M) visible and (2B, Q) hidden tokens, none visible in both.
    They show 40% of the units of 2 x 2 tokens; on grids up to 4 x 4 a unit is one token."""
    unit = 2 if side > 4 and side % 2 == 0 else 1
    tokens = torch.arange(side**2, device=device).view(1, 1, side, side)
    tokens = patchify(tokens, unit)[0]  # (units, tokens of a unit)
    m = int(SEEN * len(tokens))
    first = torch.rand(b, len(tokens), device=device).argsort(1)  # (B, units), the m visible first
    second = torch.cat([first[:, m : 2 * m], first[:, :m], first[:, 2 * m :]], dim=1)
    order = torch.cat([first, second])  # (2B, units)
    return tokens[order[:, :m]].flatten(1), tokens[order[:, m:]].flatten(1)


class ConvBlock(nn.Module):
    """A convolution of each channel over the visible places, between linear layers, then an MLP:
    x (B, H, W, C), seen (B, H, W, 1) of 0 and 1 -> (B, H, W, C)."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.norm, self.conv = LayerNorm(width), nn.Conv2d(width, width, 5, 1, 2, groups=width)
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        h = seen * self.before(self.norm(x))  # (B, H, W, C)
        x = x + self.after(self.conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (B, H, W, C)
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class ConViT(nn.Module):
    """A convolutional stem and a ViT without class token (ConvMAE, Gao et al. 2022): (B, C, H, W),
    (B,) -> (B, D), the mean of the last block's tokens, then normalised. Three embeddings of
    patches of `strides`, `widths` wide; two ConvBlocks after the first and after the second."""

    def __init__(self, cfg: ViTConfig, strides: tuple, widths: tuple, ratio: int):
        super().__init__()
        self.side, self.strides, width = cfg.size // cfg.patch, strides, widths[2]
        self.embeds, self.stages, self.fuse = (nn.ModuleList() for _ in range(3))
        for c_in, c_out, stride in zip((cfg.channels, *widths), widths, strides):
            linear = nn.Linear(c_in * stride**2, c_out)  # a convolution whose kernel is its stride
            self.embeds.append(nn.Sequential(linear, affine_norm(c_out), nn.GELU()))
        for c, patch in zip(widths, (strides[1] * strides[2], strides[2])):
            self.stages.append(nn.ModuleList(ConvBlock(c, ratio) for _ in range(2)))
            self.fuse.append(nn.Linear(c * patch**2, width))
        self.last = nn.Linear(width, width)
        positions = positions_2d(self.side, width).float()
        self.register_buffer("positions", positions, persistent=False)  # (N, D)
        self.blocks = nn.Sequential(*(ViTBlock(width, cfg.heads) for _ in range(cfg.depth)))
        self.norm = LayerNorm(width)
        init_linear(self)

    def tokens(self, x0: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The last block's output (B, M, D) for the tokens of x0 (B, C, H, W) at `visible` (B, M),
        or for all of them, and what both stages add to it for the losses (B, M, D)."""
        if visible is None:
            visible = torch.arange(self.side**2, device=x0.device).expand(len(x0), -1)
        grid = torch.zeros(len(x0), self.side**2, device=x0.device).scatter(1, visible, 1.0)
        grid = grid.view(-1, 1, self.side, self.side)  # 1 where visible
        x, added = x0, 0
        for embed, stage, fuse, stride in zip(self.embeds, self.stages, self.fuse, self.strides):
            side = x.shape[2] // stride
            seen = F.interpolate(grid, side).permute(0, 2, 3, 1)  # (B, H, W, 1)
            x = embed(patchify(x, stride)).unflatten(1, (side, side))  # (B, H, W, C)
            for block in stage:
                x = block(x, seen)  # (B, H, W, C)
            x = x.permute(0, 3, 1, 2)  # (B, C, H, W)
            added = added + fuse(gather(patchify(x, side // self.side), visible))  # (B, M, D)
        x = self.last(self.embeds[2](patchify(x, self.strides[2]))) + self.positions  # (B, N, D)
        return self.blocks(gather(x, visible)), added

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.norm(self.tokens(x0)[0].mean(1))


class DMJD(nn.Module):
    """Ma et al. 2023, disjoint masking with joint distillation: x0 (B, C, H, W) -> (B,), the mean
    over two views of the squared error of the hidden tokens' HOG and the smooth L1 error of the
    visible ones'. The decoder has `depth` blocks of `width`."""

    def __init__(self, cfg: ViTConfig, convit: tuple, width: int, depth: int):
        super().__init__()
        self.encoder, self.patch = ConViT(cfg, *convit), cfg.patch
        out = 4 * cfg.channels * BINS
        self.decoder = Decoder(self.encoder.side, cfg.hidden, width, depth, out)
        first = [nn.Linear(cfg.hidden, width), affine_norm(width), nn.GELU()]
        second = [nn.Linear(width, width), affine_norm(width), nn.GELU()]
        last = [nn.Linear(width, width), LayerNorm(width), nn.Linear(width, out)]
        self.projector = nn.Sequential(*first, *second, *last)
        init_linear(self.projector)

    def loss(self, x0: Tensor, target: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Of one view of each image: x0 (B, C, H, W), target (B, N, out), places -> (B,)."""
        x, added = self.encoder.tokens(x0, visible)
        x = self.encoder.norm(x + added)  # (B, M, D)
        guess, seen = gather(self.decoder(x, visible), hidden).float(), self.projector(x).float()
        error = (guess - gather(target, hidden)).square()  # (B, Q, out)
        other = F.smooth_l1_loss(seen, gather(target, visible), reduction="none", beta=2.0)
        return error.mean((1, 2)) + other.mean((1, 2))

    def forward(self, x0: Tensor) -> Tensor:
        target = hog_targets(x0, self.patch)  # (B, N, out)
        visible, hidden = disjoint_views(len(x0), self.encoder.side, x0.device)
        losses = self.loss(torch.cat([x0, x0]), torch.cat([target, target]), visible, hidden)
        return losses.view(2, -1).mean(0)


# Heads are those of the ViT in masked.py's table; the last width is the hidden width, the product
# of the strides the patch. Rows as in model.py.
# fmt: off
TABLE = {
    #            blocks strides    widths           ratio  decoder: width depth
    "paper 32":  (11,   (1, 2, 2), (64, 96, 192),   8,     128, 8),
    "paper 64":  (11,   (1, 2, 2), (128, 192, 384), 8,     256, 8),
    "paper 256": (11,   (4, 2, 2), (256, 384, 768), 8,     512, 8),
    "cpu 32":    (3,    (1, 2, 2), (32, 64, 128),   4,     64,  2),
    "cpu 64":    (3,    (1, 2, 2), (32, 64, 128),   4,     64,  2),
    "cpu 256":   (3,    (2, 2, 2), (32, 64, 128),   4,     64,  2),
}
# fmt: on


def build_dmjd(settings: dict) -> DMJD:
    """DMJD in the sizes of the settings; raises ValueError where they do not fit."""
    depth, strides, widths, ratio, *decoder = TABLE[f"{settings['preset']} {settings['row']}"]
    own = {"patch": math.prod(strides), "hidden": widths[2], "depth": depth}
    cfg = replace(vit_config(settings), **own)
    return DMJD(cfg, (strides, widths, ratio), *decoder)
