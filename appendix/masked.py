"""Masked image modelling on a plain ViT: MAE, LMIM and DMJD, built from the layers of model.py.

    mae     hide 75% of the patches, predict their pixels, each patch with mean 0 and variance 1
    lmim    the same mask; layers on the way up each predict HOG, the early ones in small cells
    dmjd    two views with 60% hidden and nothing visible in both; HOG of the hidden tokens from
            a decoder, and of the visible ones from an MLP

    python -m appendix.baselines --method mae

The encoder sees visible tokens only; its feature is the average of all tokens of a whole image.
What differs from the published models: no class token; norms without affine parameters; LMIM has
three scales, not four; DMJD here has no convolutional stem and hides single tokens, not blocks
of 2 x 2. HOG's cells are p/2, p and 2p pixels for patch p, and p, 2p and 4p for patch 2, whose half
is too small for a direction: 2, 4, 8 at 16 pixels (patch 4) and at Table 4's 32 (patch 2). The
published LMIM has p/4 as well. LMIM takes all three, DMJD the smallest.

Shapes: B batch, C channels, H W pixels, N tokens in row-major order, M of them visible, D width,
G cells a side.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import DiTBlock, LayerNorm, patchify, positions_2d

MAE_MASKED, DMJD_MASKED = 0.75, 0.6  # share of the tokens hidden, as published
BINS = 9  # orientations of HOG, 20 degrees each


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the ViT, under Table 4's names, and of its decoder. Raises ValueError where they do
    not fit."""

    size: int  # images are size x size
    channels: int
    patch: int
    hidden: int
    depth: int
    heads: int
    dec_hidden: int
    dec_depth: int

    def __post_init__(self) -> None:
        if self.size % self.patch or self.size // self.patch < 2:
            raise ValueError(
                f"size {self.size} does not cut into 2 x 2 or more patches of {self.patch}"
            )
        for name in ("hidden", "dec_hidden"):
            if getattr(self, name) % (4 * self.heads):
                raise ValueError(
                    f"{name} {getattr(self, name)} is not a multiple of 4 x heads {self.heads}"
                )

    def cells(self) -> list[int]:
        """Pixels of HOG's cells, small to large. Raises ValueError where they do not fit."""
        cells = [max(2, self.patch // 2) * k for k in (1, 2, 4)]
        if self.patch % 2 or self.size % cells[-1]:
            raise ValueError(
                f"HOG cells of {cells} pixels do not fit size {self.size} and patch {self.patch}"
            )
        return cells


# ---------------------------------------------------------------------------- layers


class ViTBlock(DiTBlock):
    """DiT's block without adaLN: pre-norm attention and MLP, (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        del self.ada

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.norm1(x))  # (B, N, D)
        return x + self.mlp(self.norm2(x))  # (B, N, D)


class ViT(nn.Module):
    """The encoder: patches plus fixed positions, `depth` blocks; (B, C, H, W), (B,) -> (B, D), the
    average of all tokens. It is given a t, as DiER's encoder is, and does not look at it."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.patch, self.side = cfg.patch, cfg.size // cfg.patch
        self.embed = nn.Linear(cfg.patch**2 * cfg.channels, cfg.hidden)
        positions = positions_2d(self.side, cfg.hidden).float()
        self.register_buffer("positions", positions, persistent=False)  # (N, D), never learned
        self.blocks = nn.ModuleList(ViTBlock(cfg.hidden, cfg.heads) for _ in range(cfg.depth))
        self.norm = LayerNorm(cfg.hidden)
        init_linear(self)

    def layers(self, x0: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """The output of each block (B, M, D), normalised, for the tokens of x0 (B, C, H, W) at
        `visible` (B, M), or for all of them."""
        x = self.embed(patchify(x0, self.patch)) + self.positions  # (B, N, D)
        x = x if visible is None else gather(x, visible)  # (B, M, D)
        outputs = []
        for block in self.blocks:
            x = block(x)  # (B, M, D)
            outputs.append(self.norm(x))
        return outputs

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.layers(x0)[-1].mean(1)  # (B, D)


class Decoder(nn.Module):
    """Visible tokens and their places -> a prediction for every place: (B, M, D), (B, M) ->
    (B, N, out). The hidden places start as one learned token."""

    def __init__(self, cfg: ViTConfig, depth: int, out: int):
        super().__init__()
        side, width = cfg.size // cfg.patch, cfg.dec_hidden
        self.embed = nn.Linear(cfg.hidden, width)
        self.mask = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.register_buffer("positions", positions_2d(side, width).float(), persistent=False)
        self.blocks = nn.ModuleList(ViTBlock(width, cfg.heads) for _ in range(depth))
        self.norm, self.out = LayerNorm(width), nn.Linear(width, out)
        init_linear(self)

    def tokens(self, x: Tensor, visible: Tensor) -> Tensor:
        """All places after the blocks, (B, N, dec_hidden)."""
        x = self.embed(x)  # (B, M, dec_hidden)
        places = self.mask.to(x.dtype).expand(len(x), len(self.positions), -1)  # (B, N, dec_hidden)
        x = places.scatter(1, visible[:, :, None].expand_as(x), x)  # (B, N, dec_hidden)
        x = x + self.positions  # (B, N, dec_hidden)
        for block in self.blocks:
            x = block(x)  # (B, N, dec_hidden)
        return self.norm(x)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.out(self.tokens(x, visible))  # (B, N, out)


def init_linear(module: nn.Module) -> None:
    """Initialise linear layers Xavier-uniform, bias zero, as DiT and MAE do."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, D) at index (B, M) -> (B, M, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


# ---------------------------------------------------------------------------- masks and targets


def random_split(b: int, n: int, masked: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random order of n tokens for each image, cut in two: visible (B, M), hidden (B, N - M),
    M = round((1 - masked) n). Neither is empty."""
    order = torch.rand(b, n, device=device).argsort(1)
    visible = min(max(1, round((1 - masked) * n)), n - 1)
    return order[:, :visible], order[:, visible:]


def disjoint_splits(b: int, n: int, masked: float, device: torch.device) -> list[tuple]:
    """Two views [(visible, hidden), ...] as in `random_split`, no token visible in both, so that
    every token is hidden, and predicted, at least once. masked is 0.5 or more."""
    visible, hidden = random_split(b, n, masked, device)
    m = visible.shape[1]
    other = torch.cat([visible, hidden[:, m:]], dim=1)  # hidden in the second view
    return [(visible, hidden), (hidden[:, :m], other)]


def normalised_patches(x0: Tensor, patch: int) -> Tensor:
    """Pixels of each patch with mean 0 and variance 1: (B, C, H, W) -> (B, N, p * p * C)."""
    x = patchify(x0, patch)
    return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 1e-6).sqrt()


def hog(x0: Tensor, cell: int) -> Tensor:
    """Histograms of oriented gradients: (B, C, H, W) -> (B, G, G, C * 9), G = H / cell.

    Central differences, zero at the border; the gradient's length is added to the bin of its
    direction modulo 180 degrees; the nine sums of a cell and channel are scaled to length 1.
    """
    rows, cols = torch.zeros_like(x0), torch.zeros_like(x0)
    rows[:, :, 1:-1] = x0[:, :, 2:] - x0[:, :, :-2]
    cols[..., 1:-1] = x0[..., 2:] - x0[..., :-2]
    angle = torch.atan2(rows, cols) % torch.pi
    bins = (angle * (BINS / torch.pi)).long().clamp(max=BINS - 1)
    votes = F.one_hot(bins, BINS) * torch.hypot(rows, cols)[..., None]  # (B, C, H, W, 9)
    b, c, h, w, _ = votes.shape
    sums = votes.view(b, c, h // cell, cell, w // cell, cell, BINS).sum((3, 5))  # (B, C, G, G, 9)
    sums = F.normalize(sums, dim=4, eps=1e-5)
    return sums.permute(0, 2, 3, 1, 4).flatten(3)  # (B, G, G, C * 9)


def hog_tokens(x0: Tensor, cell: int, patch: int) -> Tensor:
    """HOG of all cells of each patch: (B, C, H, W) -> (B, N, (p / cell)^2 * C * 9)."""
    return patchify(hog(x0, cell).permute(0, 3, 1, 2), patch // cell)


# ---------------------------------------------------------------------------- methods


class MAE(nn.Module):
    """He et al. 2022: x0 (B, C, H, W) -> mean squared error of the hidden patches (B,)."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.encoder = ViT(cfg)
        self.decoder = Decoder(cfg, cfg.dec_depth, cfg.patch**2 * cfg.channels)

    def forward(self, x0: Tensor) -> Tensor:
        visible, hidden = random_split(len(x0), self.encoder.side**2, MAE_MASKED, x0.device)
        guess = self.decoder(self.encoder.layers(x0, visible)[-1], visible)  # (B, N, p * p * C)
        target = normalised_patches(x0, self.encoder.patch)  # (B, N, p * p * C)
        return (gather(guess, hidden).float() - gather(target, hidden)).square().mean((1, 2))


class Scale(nn.Module):
    """What one layer of LMIM has to predict: HOG in cells of `cell` pixels, from a decoder of one
    block whose tokens are resized to the cells. (B, M, D), (B, M), G -> (B, G, G, C * 9)."""

    def __init__(self, cfg: ViTConfig, cell: int):
        super().__init__()
        self.side, self.cell, width = cfg.size // cfg.patch, cell, cfg.dec_hidden
        self.decoder = Decoder(cfg, 1, cfg.channels * BINS)
        finer = cell < cfg.patch
        self.resize = nn.ConvTranspose2d(width, width, 2, 2) if finer else nn.Identity()

    def to_cells(self, grid: Tensor, cells: int) -> Tensor:
        """Average a grid (B, K, side, side) over the tokens of each cell, if cells are larger."""
        return F.avg_pool2d(grid, self.side // cells) if self.side > cells else grid

    def forward(self, x: Tensor, visible: Tensor, cells: int) -> Tensor:
        x = self.decoder.tokens(x, visible)  # (B, N, dec_hidden)
        grid = x.transpose(1, 2).reshape(len(x), -1, self.side, self.side)
        grid = self.resize(self.to_cells(grid, cells))  # (B, dec_hidden, G, G)
        return self.decoder.out(grid.permute(0, 2, 3, 1))  # (B, G, G, C * 9)

    def loss(self, x: Tensor, visible: Tensor, x0: Tensor) -> Tensor:
        """Squared error against HOG, each cell weighted by the share of it that is hidden: (B,)."""
        target = hog(x0, self.cell)  # (B, G, G, C * 9)
        cells = target.shape[1]
        hidden = torch.ones(len(x0), self.side**2, device=x0.device).scatter(1, visible, 0.0)
        weight = self.to_cells(hidden.view(-1, 1, self.side, self.side), cells)
        weight = F.interpolate(weight, size=cells)[:, 0]  # (B, G, G)
        error = (self(x, visible, cells).float() - target).square().mean(3)  # (B, G, G)
        return (weight * error).sum((1, 2)) / weight.sum((1, 2))


class LMIM(nn.Module):
    """Wang et al. 2023, local multi-scale reconstruction: x0 (B, C, H, W) -> sum of the losses of
    three layers (B,), a third, two thirds and all the way up, from the smallest cells on."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.encoder = ViT(cfg)
        self.scales = nn.ModuleList(Scale(cfg, cell) for cell in cfg.cells())
        self.at = [max(1, round(cfg.depth * k / 3)) - 1 for k in (1, 2, 3)]

    def forward(self, x0: Tensor) -> Tensor:
        visible, _ = random_split(len(x0), self.encoder.side**2, MAE_MASKED, x0.device)
        layers = self.encoder.layers(x0, visible)  # each (B, M, D)
        return sum(scale.loss(layers[k], visible, x0) for k, scale in zip(self.at, self.scales))


class DMJD(nn.Module):
    """Ma et al. 2023, disjoint masking with joint distillation: x0 (B, C, H, W) -> (B,), the mean
    over two views of the squared error of the hidden tokens' HOG and the smooth L1 error of the
    visible ones'."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cell, width = cfg.cells()[0], cfg.dec_hidden
        out = (cfg.patch // self.cell) ** 2 * cfg.channels * BINS
        self.encoder = ViT(cfg)
        self.decoder = Decoder(cfg, cfg.dec_depth, out)
        first = [nn.Linear(cfg.hidden, width), LayerNorm(width), nn.GELU()]
        second = [nn.Linear(width, width), LayerNorm(width), nn.GELU()]
        self.projector = nn.Sequential(*first, *second, nn.Linear(width, out))
        init_linear(self.projector)

    def forward(self, x0: Tensor) -> Tensor:
        target = hog_tokens(x0, self.cell, self.encoder.patch)  # (B, N, out)
        losses = []
        views = disjoint_splits(len(x0), target.shape[1], DMJD_MASKED, x0.device)
        for visible, hidden in views:
            x = self.encoder.layers(x0, visible)[-1]  # (B, M, D)
            guess = gather(self.decoder(x, visible), hidden).float()  # (B, N - M, out)
            losses.append((guess - gather(target, hidden)).square().mean((1, 2)))
            seen = self.projector(x).float()  # (B, M, out)
            error = F.smooth_l1_loss(seen, gather(target, visible), reduction="none", beta=2.0)
            losses.append(error.mean((1, 2)))
        return sum(losses) / len(views)


# ---------------------------------------------------------------------------- sizes
#
# `paper` has Table 4's patch, width, depth and heads; its decoders are light: half the width, a
# third of the depth. `cpu` has the sizes of images of DiER's cpu presets, 16 or 64 tokens of them.
# Three quarters of the tokens are hidden, so MAE and LMIM cost a quarter of what DiER costs. Rows
# are named as in model.py; glyphs and mnist take the row of 32 pixels.

# fmt: off
TABLE = {
    #            patch hidden depth heads dec_hidden dec_depth
    "paper 32":  (2,   192,   12,   3,    96,        4),
    "paper 64":  (4,   384,   12,   6,    192,       4),
    "paper 256": (8,   768,   16,   12,   384,       5),
    "cpu 32":    (4,   128,   4,    4,    64,        2),
    "cpu 64":    (4,   128,   4,    4,    64,        2),
    "cpu 256":   (8,   128,   4,    4,    64,        2),
}
# fmt: on


def vit_config(settings: dict[str, Any]) -> ViTConfig:
    """The row for the settings' preset and row, at their size and channels."""
    row = TABLE[f"{settings['preset']} {settings['row']}"]
    return ViTConfig(settings["size"], settings["channels"], *row)
