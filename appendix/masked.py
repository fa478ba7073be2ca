"""Masked image modelling on a plain ViT: MAE and LMIM, built from the layers of model.py.

    mae     hide 75% of the patches, predict their pixels
    lmim    the same mask; blocks on the way up each predict HOG, the early ones in small cells

    python -m appendix.baselines --method mae lmim

The encoder sees visible tokens only. The feature is the mean of the last block's patch tokens of a
whole image, then normalised. What differs from the published models: norms have no affine
parameters, as the next linear layer absorbs them (but after the norm before a decoder's second
split, in LMIM at 256 pixels, comes GELU); MAE's feature is the mean and not the class token;
patches of fewer than 48 numbers are predicted as they are and not normalised; HOG's smallest cell
is 2 pixels, as one pixel has a direction and no histogram.

Shapes: B batch, C channels, H W pixels, N tokens in row-major order, M of them visible, D width,
G cells a side.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import DiTBlock, LayerNorm, patchify, positions_2d, unpatchify

MASKED = 0.75  # share of the tokens hidden, as published
BINS = 9  # orientations of HOG, 20 degrees each
FEW = 48  # with fewer numbers in a patch its mean and variance leave little but noise
HEAD = 32  # width of a decoder's head


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the ViT, under Table 4's names, and of MAE's decoder."""

    size: int  # images are size x size
    channels: int
    patch: int
    hidden: int
    depth: int
    heads: int
    dec_hidden: int
    dec_depth: int


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
    """The encoder: a learned class token and patches plus fixed positions, `depth` blocks;
    (B, C, H, W), (B,) -> (B, D), the mean of the last block's patch tokens, then normalised. It is
    given a t, as DiER's encoder is, and does not look at it."""

    def __init__(self, cfg: ViTConfig, block: type[ViTBlock] = ViTBlock):
        super().__init__()
        self.patch, self.side = cfg.patch, cfg.size // cfg.patch
        self.embed = nn.Linear(cfg.patch**2 * cfg.channels, cfg.hidden)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, cfg.hidden))
        positions = positions_2d(self.side, cfg.hidden).float()
        self.register_buffer("positions", positions, persistent=False)  # (N, D), never learned
        self.blocks = nn.ModuleList(block(cfg.hidden, cfg.heads) for _ in range(cfg.depth))
        self.norm = LayerNorm(cfg.hidden)
        init_linear(self)

    def layers(self, x0: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """The output of each block (B, 1 + M, D), class token first, for the tokens of x0
        (B, C, H, W) at `visible` (B, M), or for all of them."""
        x = self.embed(patchify(x0, self.patch)) + self.positions  # (B, N, D)
        x = x if visible is None else gather(x, visible)  # (B, M, D)
        token = self.token.to(x.dtype).expand(len(x), -1, -1)  # (B, 1, D)
        x = torch.cat([token, x], dim=1)  # (B, 1 + M, D)
        outputs = []
        for block in self.blocks:
            x = block(x)  # (B, 1 + M, D)
            outputs.append(x)
        return outputs

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.norm(self.layers(x0)[-1][:, 1:].mean(1))  # (B, D)


class Decoder(nn.Module):
    """Visible tokens and their places -> a prediction for every place: (B, M, D), (B, M) ->
    (B, N, out). The hidden places start as one learned token. Tokens that stand before the visible
    ones, as the class token does, are seen by all and have no place."""

    def __init__(self, side: int, hidden: int, width: int, depth: int, out: int):
        super().__init__()
        self.embed = nn.Linear(hidden, width)
        self.mask = nn.Parameter(0.02 * torch.randn(1, 1, width))
        positions = positions_2d(side, width).float()
        self.register_buffer("positions", positions, persistent=False)  # (N, width)
        self.blocks = nn.ModuleList(ViTBlock(width, width // HEAD) for _ in range(depth))
        self.norm, self.out = LayerNorm(width), nn.Linear(width, out)
        init_linear(self)

    def tokens(self, x: Tensor, visible: Tensor) -> Tensor:
        """All places after the blocks, normalised: (B, N, width)."""
        before = x.shape[1] - visible.shape[1]
        x = self.embed(x)  # (B, before + M, width)
        places = self.mask.to(x.dtype).expand(len(x), len(self.positions), -1)  # (B, N, width)
        index = visible[:, :, None].expand(len(x), -1, x.shape[2])
        places = places.scatter(1, index, x[:, before:]) + self.positions  # (B, N, width)
        x = torch.cat([x[:, :before], places], dim=1)  # (B, before + N, width)
        for block in self.blocks:
            x = block(x)  # (B, before + N, width)
        return self.norm(x[:, before:])

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.out(self.tokens(x, visible))  # (B, N, out)


def init_linear(module: nn.Module) -> None:
    """Initialise linear layers Xavier-uniform, bias zero, as DiT and MAE do."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def affine_norm(width: int) -> nn.LayerNorm:
    """Layer normalisation with scale and shift, where no linear layer follows to absorb them."""
    return nn.LayerNorm(width, eps=1e-6)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, D) at index (B, M) -> (B, M, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


# ---------------------------------------------------------------------------- masks and targets


def random_split(b: int, n: int, masked: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random order of n tokens for each image, cut in two: visible (B, M), hidden (B, N - M),
    M = int((1 - masked) n), but at least 1."""
    order = torch.rand(b, n, device=device).argsort(1)
    visible = max(1, int((1 - masked) * n))
    return order[:, :visible], order[:, visible:]


def patch_targets(x0: Tensor, patch: int) -> Tensor:
    """Pixels of each patch, with mean 0 and variance 1 if they are 48 or more: (B, C, H, W) ->
    (B, N, p * p * C)."""
    x = patchify(x0, patch)
    if x.shape[2] < FEW:
        return x
    return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 1e-6).sqrt()


def gradients(x0: Tensor, sobel: bool) -> tuple[Tensor, Tensor]:
    """Differences along x and along y, each (B, C, H, W): Sobel's, mirrored at the border, or
    central ones, 0 at the border."""
    if sobel:
        x = F.pad(x0, (1, 1, 1, 1), mode="reflect")  # (B, C, H + 2, W + 2)
        along_x, along_y = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
        gx = along_x[..., :-2, :] + 2 * along_x[..., 1:-1, :] + along_x[..., 2:, :]
        return gx, along_y[..., :-2] + 2 * along_y[..., 1:-1] + along_y[..., 2:]
    gx, gy = torch.zeros_like(x0), torch.zeros_like(x0)
    gx[..., 1:-1] = x0[..., 2:] - x0[..., :-2]
    gy[..., 1:-1, :] = x0[..., 2:, :] - x0[..., :-2, :]
    return gx, gy


def hog(x0: Tensor, cell: int, sobel: bool) -> Tensor:
    """Histograms of oriented gradients: (B, C, H, W) -> (B, G, G, C, 9), G = H / cell.

    Each pixel adds the length of its gradient to the bin of its direction modulo 180 degrees, and a
    cell has the mean over its pixels. LMIM takes Sobel's gradients and the angle from the y axis,
    DMJD central differences and the angle from the x axis.
    """
    gx, gy = gradients(x0, sobel)
    angle = torch.atan2(gx, gy) if sobel else torch.atan2(gy, gx)  # (B, C, H, W)
    bins = (angle * (BINS / torch.pi)).floor().long() % BINS
    votes = F.one_hot(bins, BINS) * torch.hypot(gx, gy)[..., None]  # (B, C, H, W, 9)
    b, c, h, w, _ = votes.shape
    cells = votes.view(b, c, h // cell, cell, w // cell, cell, BINS).mean((3, 5))
    return cells.permute(0, 2, 3, 1, 4)  # (B, G, G, C, 9)


def hog_error(guess: Tensor, x0: Tensor, cell: int, hidden: Tensor) -> Tensor:
    """LMIM's loss of one layer: squared error of a guess (B, G * G, C * 9) of the histograms of x0,
    each of unit length, weighted by the hidden share of each cell (B, G * G) -> (B,)."""
    target = F.normalize(hog(x0, cell, sobel=True), dim=4, eps=1e-6)  # (B, G, G, C, 9)
    target = target.flatten(1, 2).flatten(2)  # (B, G * G, C * 9)
    error = (guess.float() - target).square().mean(2)  # (B, G * G)
    return (hidden * error).sum(1) / hidden.sum(1)


# ---------------------------------------------------------------------------- MAE and LMIM


class MAE(nn.Module):
    """He et al. 2022: x0 (B, C, H, W) -> mean squared error of the hidden patches (B,)."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.encoder = ViT(cfg)
        out = cfg.patch**2 * cfg.channels
        self.decoder = Decoder(self.encoder.side, cfg.hidden, cfg.dec_hidden, cfg.dec_depth, out)

    def forward(self, x0: Tensor) -> Tensor:
        visible, hidden = random_split(len(x0), self.encoder.side**2, MASKED, x0.device)
        x = self.encoder.norm(self.encoder.layers(x0, visible)[-1])  # (B, 1 + M, D)
        guess = gather(self.decoder(x, visible), hidden).float()  # (B, N - M, p * p * C)
        target = gather(patch_targets(x0, self.encoder.patch), hidden)
        return (guess - target).square().mean((1, 2))


class Scale(nn.Module):
    """What one block of LMIM has to predict: HOG in cells of `cell` pixels. A decoder of one block
    gives tokens, which are averaged to larger cells, or split in 2 x 2 of half the width until they
    are as small as the cells. (B, 1 + M, D), visible (B, M) -> (B, G * G, C * 9)."""

    def __init__(self, cfg: ViTConfig, cell: int):
        super().__init__()
        self.cell, self.side, self.patch = cell, cfg.size // cfg.patch, cfg.patch
        width, out = 64 if cfg.hidden < 384 else 256, cfg.channels * BINS
        self.norm = LayerNorm(cfg.hidden)
        self.decoder = Decoder(self.side, cfg.hidden, width, 1, out)
        self.split = nn.ModuleList()
        while cell << len(self.split) < cfg.patch:
            self.split.append(nn.Linear(width, 2 * width))  # 2 x 2 tokens of half the width
            width //= 2
        self.decoder.out = nn.Linear(width, out)
        init_linear(self)

    def to_cells(self, x: Tensor) -> Tensor:
        """Averages of the tokens (B, N, D) of each cell (B, G * G, D), where cells are larger."""
        k = max(1, self.cell // self.patch)
        x = x.unflatten(1, (self.side // k, k, self.side // k, k)).mean((2, 4))
        return x.flatten(1, 2)

    def hidden(self, visible: Tensor) -> Tensor:
        """The hidden share of each cell, (B, G * G), for visible tokens (B, M)."""
        hidden = torch.ones(len(visible), self.side**2, device=visible.device)
        share = self.to_cells(hidden.scatter(1, visible, 0.0)[:, :, None])  # (B, G * G, 1)
        for _ in self.split:
            share = unpatchify(share.expand(-1, -1, 4), 2, 1).flatten(1)[:, :, None]
        return share[:, :, 0]

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = self.to_cells(self.decoder.tokens(self.norm(x), visible))  # (B, cells or N, width)
        for k, split in enumerate(self.split):
            x = F.gelu(F.layer_norm(x, x.shape[2:])) if k else x
            x = split(x)  # (B, N, 4 * half the width)
            x = unpatchify(x, 2, x.shape[2] // 4).flatten(2).transpose(1, 2)  # (B, 4 N, half)
        return self.decoder.out(x)


class LMIM(nn.Module):
    """Wang et al. 2023, local multi-scale reconstruction: x0 (B, C, H, W) -> the sum of the losses
    of four blocks (B,), or three for small images, the finest cells for the lowest block."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.encoder = ViT(cfg)
        first, depth = max(2, cfg.patch // 4), cfg.depth
        cells = [first * k for k in (1, 2, 4, 8) if first * k <= cfg.size // 2]
        self.scales = nn.ModuleList(Scale(cfg, cell) for cell in cells)
        self.at = (
            [2, 4, depth - 2, depth] if depth > 6 else [-(-depth * k // 4) for k in (1, 2, 3, 4)]
        )
        self.at = self.at[-len(cells) :]  # numbers of the blocks, from 1

    def forward(self, x0: Tensor) -> Tensor:
        visible, _ = random_split(len(x0), self.encoder.side**2, MASKED, x0.device)
        layers, losses = self.encoder.layers(x0, visible), []  # each (B, 1 + M, D)
        for k, scale in zip(self.at, self.scales):
            guess = scale(layers[k - 1], visible)  # (B, G * G, C * 9)
            losses.append(hog_error(guess, x0, scale.cell, scale.hidden(visible)))
        return sum(losses)


# ---------------------------------------------------------------------------- sizes
#
# `paper` has the tiny, small and base models for 32, 64 and 256 pixels; `cpu` reads images of the
# sizes of DiER's cpu presets. Rows are named as in model.py; glyphs and mnist take that of 32.

# fmt: off
TABLE = {
    #            patch hidden depth heads dec_hidden dec_depth
    "paper 32":  (2,   192,   12,   3,    128,       8),
    "paper 64":  (4,   384,   12,   6,    256,       8),
    "paper 256": (16,  768,   12,   12,   512,       8),
    "cpu 32":    (4,   128,   4,    4,    64,        4),
    "cpu 64":    (4,   128,   4,    4,    64,        4),
    "cpu 256":   (8,   128,   4,    4,    64,        4),
}
# fmt: on


def vit_config(settings: dict) -> ViTConfig:
    """The row for the settings' preset and row, at their size and channels."""
    row = TABLE[f"{settings['preset']} {settings['row']}"]
    return ViTConfig(settings["size"], settings["channels"], *row)
