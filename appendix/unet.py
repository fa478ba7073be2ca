"""Diff-AE, DiER's baseline: a U-Net conditioned on time and on a vector v, the encoder that makes v
without seeing the time, and, at the end, the sizes they come in (Table 5).

    v = VectorEncoder(x_0)             half a U-Net without time: v is one vector for all t
    eps = UNet(x_t, t, v)              time as scale and shift of the second norm, then x (1 + W v)

    python -m appendix.baselines --method diffae
    python -m appendix.baselines --method dier-unet          DiER's Encoder(x_0, t), v of 1024

As in model.py the last convolution of each residual branch of the U-Net is zero at initialisation,
so eps = 0 and the first loss is E[eps^2] = 1. VectorEncoder has no dropout. The resolution changes
inside ResBlocks: 2 x 2 average pool on the way down, nearest neighbour on the way up.

Shapes: B batch, C channels, H W pixels, E width of the time embedding, Z length of v.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import AttentionBlock, Encoder, GroupNorm, V, sinusoid
from train import model_config

DIFFAE_V = 512  # length of Diff-AE's v (Sec. A.2)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net and of Diff-AE's encoder, the columns of Table 5."""

    size: int  # images are size x size
    channels: int
    base: int  # level k of the U-Net has width base * mult[k], of the encoder base * enc_mult[k]
    blocks: int  # ResBlocks a level
    mult: tuple[int, ...]
    enc_mult: tuple[int, ...]
    attention: tuple[int, ...]  # resolutions with self-attention in both
    heads: int
    dropout: float  # in the U-Net


# ---------------------------------------------------------------------------- U-Net


class UNetBlock(nn.Module):
    """ResBlock with two conditions: the second norm is scaled and shifted by time, then scaled
    by v.

    (B, C_in, H, W), SiLU of time (B, E), SiLU of v (B, Z) -> (B, C_out, H, W), H and W halved or
    doubled by `resize` "down" or "up".
    """

    def __init__(self, c_in: int, c_out: int, e: int, z: int, dropout: float, resize: str = ""):
        super().__init__()
        self.resize = resize
        self.norm1 = GroupNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(e, 2 * c_out)
        self.v = nn.Linear(z, c_out)
        self.norm2 = GroupNorm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        zero(self.conv2)

    def resized(self, x: Tensor) -> Tensor:
        """The change of resolution, the same on both branches."""
        if self.resize == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0) if self.resize == "up" else x

    def forward(self, x: Tensor, time: Tensor, v: Tensor) -> Tensor:
        h = self.conv1(self.resized(F.silu(self.norm1(x))))  # (B, C_out, H', W')
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)  # (B, C_out, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift  # (B, C_out, H', W')
        h = h * (1 + self.v(v)[:, :, None, None])  # (B, C_out, H', W')
        h = self.conv2(self.dropout(F.silu(h)))  # (B, C_out, H', W')
        return self.skip(self.resized(x)) + h


class UNet(nn.Module):
    """eps = UNet(x_t, t, v) with skip connections: (B, C, H, W), (B,), (B, Z) -> (B, C, H, W).

    A level goes down `blocks` ResBlocks and comes up blocks + 1, each of which also reads what was
    kept on the way down: so every stage of `up` has its partner in the stem or in `down`.
    """

    def __init__(self, cfg: UNetConfig, z: int):
        super().__init__()
        self.base, time_width, self.heads = cfg.base, 4 * cfg.base, cfg.heads
        self.sizes = (time_width, z, cfg.dropout)  # of every block
        self.time_mlp = nn.Sequential(
            nn.Linear(cfg.base, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        width, side, last = cfg.base * cfg.mult[0], cfg.size, len(cfg.mult) - 1
        self.stem = nn.Conv2d(cfg.channels, width, 3, padding=1)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [width]
        for level, m in enumerate(cfg.mult):
            for _ in range(cfg.blocks):
                self.down.append(self.stage(width, cfg.base * m, side in cfg.attention))
                width = cfg.base * m
                skips.append(width)
            if level < last:
                self.down.append(nn.ModuleList([UNetBlock(width, width, *self.sizes, "down")]))
                skips.append(width)
                side //= 2
        self.middle = self.stage(width, width, True)
        self.middle.append(UNetBlock(width, width, *self.sizes))
        for level in range(last, -1, -1):
            for k in range(cfg.blocks + 1):
                c_out = cfg.base * cfg.mult[level]
                stage = self.stage(width + skips.pop(), c_out, side in cfg.attention)
                width = c_out
                if level and k == cfg.blocks:
                    stage.append(UNetBlock(width, width, *self.sizes, "up"))
                    side *= 2
                self.up.append(stage)
        self.norm, self.out = GroupNorm(width), nn.Conv2d(width, cfg.channels, 3, padding=1)
        zero(self.out, *(m.proj for m in self.modules() if isinstance(m, AttentionBlock)))

    def stage(self, c_in: int, c_out: int, attends: bool) -> nn.ModuleList:
        """A ResBlock and, where the resolution has it, self-attention."""
        layers = nn.ModuleList([UNetBlock(c_in, c_out, *self.sizes)])
        if attends:
            layers.append(AttentionBlock(c_out, self.heads))
        return layers

    def forward(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        # Each block has Linear layers of its own after these two SiLUs, which are taken once here.
        time = F.silu(self.time_mlp(sinusoid(t, self.base).to(x_t.dtype)))  # (B, E)
        v = F.silu(v)  # (B, Z)
        h = self.stem(x_t)  # (B, base, H, W)
        skips = [h]
        for stage in self.down:
            h = run_stage(stage, h, time, v)  # (B, C_l, H_l, W_l)
            skips.append(h)
        h = run_stage(self.middle, h, time, v)  # (B, C_last, H_last, W_last)
        for stage in self.up:
            h = torch.cat([h, skips.pop()], dim=1)  # (B, C_l + C_skip, H_l, W_l)
            h = run_stage(stage, h, time, v)  # (B, C_l, H_l, W_l), twice as large after an "up"
        return self.out(F.silu(self.norm(h)))  # (B, C, H, W)


def run_stage(stage: nn.ModuleList, h: Tensor, time: Tensor, v: Tensor) -> Tensor:
    """The layers of a stage in turn; attention has no condition."""
    for layer in stage:
        h = layer(h, time, v) if isinstance(layer, UNetBlock) else layer(h)
    return h


def zero(*layers: nn.Module) -> None:
    """Set weights and biases to zero."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------------------- Diff-AE's encoder


class PlainBlock(nn.Module):
    """The encoder's block, one convolution without time: (B, C_in, H, W) -> (B, C_out, H, W), H
    and W halved with `down`."""

    def __init__(self, c_in: int, c_out: int, down: bool = False):
        super().__init__()
        self.down = down
        self.norm = GroupNorm(c_in)
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(x))  # (B, C_in, H, W)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # (B, C_in, H/2, W/2)
        return self.skip(x) + self.conv(h)


class VectorEncoder(nn.Module):
    """v = Encoder(x_0) of Diff-AE, half a U-Net without time: (B, C, H, W), (B,) -> (B, Z). It is
    given a t, as DiER's encoder is, and does not look at it."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        width, side = cfg.base * cfg.enc_mult[0], cfg.size
        self.layers = nn.ModuleList([nn.Conv2d(cfg.channels, width, 3, padding=1)])
        for level, m in enumerate(cfg.enc_mult):
            for _ in range(cfg.blocks):
                self.layers.append(PlainBlock(width, cfg.base * m))
                width = cfg.base * m
                if side in cfg.attention:
                    self.layers.append(AttentionBlock(width, cfg.heads))
            if level < len(cfg.enc_mult) - 1:
                self.layers.append(PlainBlock(width, width, down=True))
                side //= 2
        self.layers.append(PlainBlock(width, width))
        self.layers.append(AttentionBlock(width, cfg.heads))
        self.layers.append(PlainBlock(width, width))
        self.norm, self.head = GroupNorm(width), nn.Linear(width, DIFFAE_V)
        zero(*self.zero_initialised())

    def zero_initialised(self) -> list[nn.Conv2d]:
        """The convolutions that end the attention's branches. A PlainBlock has one convolution:
        at zero, nothing but pixels would reach v."""
        return [m.proj for m in self.layers if isinstance(m, AttentionBlock)]

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        h = x0
        for layer in self.layers:
            h = layer(h)  # (B, C_l, H_l, W_l)
        return self.head(F.silu(self.norm(h)).mean((2, 3)))  # (B, Z)


# ---------------------------------------------------------------------------- methods


class UNetMethod(nn.Module):
    """An encoder (x0, t) -> v and a U-Net of that v: x_t (B, C, H, W), t (B,) int, x0 (B, C, H, W)
    -> eps (B, C, H, W). v is made on the way."""

    def __init__(self, encoder: nn.Module, unet: UNet):
        super().__init__()
        self.encoder = encoder
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        return self.unet(x_t, t, self.encoder(x0, t))


def build_diffae(settings: dict) -> UNetMethod:
    """Diff-AE in the sizes of Table 5. Raises ValueError where they do not fit the images."""
    cfg = unet_config(settings)
    encoder = VectorEncoder(cfg)  # the first to draw its weights
    return UNetMethod(encoder, UNet(cfg, DIFFAE_V))


def build_dier_unet(settings: dict, encoder: type[Encoder] = Encoder) -> UNetMethod:
    """DiER's encoder in its own sizes, or a child of it, and the U-Net of Table 5. Raises
    ValueError where they do not fit the images."""
    first = encoder(model_config(settings))  # the first to draw its weights
    return UNetMethod(first, UNet(unet_config(settings), V))


# ---------------------------------------------------------------------------- Table 5
#
# `paper` is Table 5. `cpu` is the same in small, at the sizes of images of DiER's cpu presets; its
# encoder too has one level more than the U-Net. On MNIST the cpu Diff-AE costs 0.7 times what DiER
# costs, DiER's encoder on this U-Net 1.5 times. Rows are named as in model.py; glyphs, mnist have
# that of 32 pixels.

# fmt: off
TABLE = {
    #            base blocks mult                     enc_mult             attention heads dropout
    "paper 32":  (128, 2, (1, 1, 2, 3, 4),          (1, 1, 2, 3, 4, 4),       (16, 8), 4, 0.1),
    "paper 64":  (128, 2, (1, 1, 2, 3, 4),          (1, 1, 2, 3, 4, 4),       (16, 8), 4, 0.1),
    "paper 256": (128, 2, (1, 1, 2, 2, 3, 3, 4, 4), (1, 1, 2, 2, 3, 3, 4, 4), (32,),   4, 0.1),
    "cpu 32":     (16, 1, (1, 1, 2, 4),             (1, 1, 2, 4, 4),          (4,),    4, 0.0),
    "cpu 64":     (16, 1, (1, 1, 2, 4),             (1, 1, 2, 4, 4),          (4,),    4, 0.0),
    "cpu 256":    (16, 1, (1, 1, 2, 4, 8),          (1, 1, 2, 4, 8, 8),       (4,),    4, 0.0),
}
# fmt: on


def unet_config(settings: dict) -> UNetConfig:
    """The row of Table 5 for the settings' preset and row, at their size and channels."""
    row = TABLE[f"{settings['preset']} {settings['row']}"]
    return UNetConfig(settings["size"], settings["channels"], *row)
