"""Diff-AE (Table 5), DiER's baseline: a U-Net conditioned on the time and on a vector v, and the
encoder that makes v without seeing the time. Also the U-Net with DiER's encoder in its place.

    v = VectorEncoder(x_0)             half a U-Net without time: v is one vector for all t
    eps = UNet(x_t, t, v)              time as scale and shift of the second norm, then x (1 + W v)

    python -m appendix.baselines --method diffae
    python -m appendix.baselines --method dier-unet          DiER's Encoder(x_0, t), v of 1024

Dropout 0.1 (cpu 0) and zero-initialised last convolutions in the U-Net as in model.py, so that
eps = 0 and the first loss is E[eps^2] = 1 here too; VectorEncoder has no dropout. Resolution
changes inside ResBlocks: 2 x 2 average pool on the way down, nearest neighbour on the way up.

Shapes: B batch, C channels, H W pixels, E width of the time embedding, Z length of v.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import AttentionBlock, Encoder, GroupNorm, ModelConfig, V, sinusoid

DIFFAE_V = 512  # length of Diff-AE's v (Sec. A.2)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of Table 5: first the encoder under the names of Table 4, then the U-Net. Raises
    ValueError where they do not fit."""

    size: int  # images are size x size
    channels: int
    base: int
    blocks: int
    mult: tuple[int, ...]
    attention: tuple[int, ...]  # resolutions with self-attention in the encoder
    unet_base: int
    unet_blocks: int
    unet_mult: tuple[int, ...]
    unet_attention: tuple[int, ...]
    enc_heads: int = 4  # of all self-attention
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for base, mult in ((self.base, self.mult), (self.unet_base, self.unet_mult)):
            ModelConfig(  # Table 4's checks of an encoder hold for every half U-Net
                self.size, self.channels, 1, 4, 1, 1, base, 1, mult, enc_heads=self.enc_heads
            )
        pairs = zip(self.unet_mult, (*self.unet_mult[1:], self.unet_mult[-1]))
        for width in (self.unet_base * n for a, b in pairs for n in (2 * a, a + b)):
            if width % min(32, width // 4):
                raise ValueError(
                    f"two levels of the U-Net make {width} channels, which do not divide into "
                    f"groups; use --model unet_base={max(1, self.unet_base // 32) * 32}"
                )


class UNetBlock(nn.Module):
    """ResBlock with two conditions: the second norm is scaled and shifted by time, then
    scaled by v.

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
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def resized(self, x: Tensor) -> Tensor:
        """The change of resolution, the same on both branches."""
        if self.resize == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0) if self.resize == "up" else x

    def forward(self, x: Tensor, time: Tensor, v: Tensor) -> Tensor:
        """As the class says."""
        h = self.conv1(self.resized(F.silu(self.norm1(x))))  # (B, C_out, H', W')
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)  # (B, C_out, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift
        h = h * (1 + self.v(v)[:, :, None, None])
        h = self.conv2(self.dropout(F.silu(h)))  # (B, C_out, H', W')
        return self.skip(self.resized(x)) + h


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
        """As the class says."""
        h = F.silu(self.norm(x))  # (B, C_in, H, W)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # (B, C_in, H/2, W/2)
        return self.skip(x) + self.conv(h)


class VectorEncoder(nn.Module):
    """v = Encoder(x_0) of Diff-AE, half a U-Net without time: (B, C, H, W), (B,) -> (B, Z). It
    takes a t like DiER's and does not look at it."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        width, side = cfg.base * cfg.mult[0], cfg.size
        self.layers = nn.ModuleList([nn.Conv2d(cfg.channels, width, 3, padding=1)])
        for level, m in enumerate(cfg.mult):
            for _ in range(cfg.blocks):
                self.layers.append(PlainBlock(width, cfg.base * m))
                width = cfg.base * m
                if side in cfg.attention:
                    self.layers.append(AttentionBlock(width, cfg.enc_heads))
            if level < len(cfg.mult) - 1:
                self.layers.append(PlainBlock(width, width, down=True))
                side //= 2
        self.layers.append(PlainBlock(width, width))
        self.layers.append(AttentionBlock(width, cfg.enc_heads))
        self.layers.append(PlainBlock(width, width))
        self.norm, self.head = GroupNorm(width), nn.Linear(width, DIFFAE_V)
        for layer in self.zero_initialised():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def zero_initialised(self) -> list[nn.Conv2d]:
        """The convolutions that end the attention's branches. A PlainBlock has one convolution:
        at zero, nothing but pixels would reach v."""
        return [m.proj for m in self.layers if isinstance(m, AttentionBlock)]

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        """As the class says."""
        h = x0
        for layer in self.layers:
            h = layer(h)  # (B, C_l, H_l, W_l)
        return self.head(F.silu(self.norm(h)).mean((2, 3)))  # (B, Z)


class UNet(nn.Module):
    """eps = UNet(x_t, t, v) with skip connections: (B, C, H, W), (B,), (B, Z) -> (B, C, H, W)."""

    def __init__(self, cfg: UNetConfig, z: int):
        super().__init__()
        self.cfg, e, base = cfg, 4 * cfg.unet_base, cfg.unet_base
        self.sizes = (e, z, cfg.dropout)
        self.time_mlp = nn.Sequential(nn.Linear(base, e), nn.SiLU(), nn.Linear(e, e))
        width, side, levels = base * cfg.unet_mult[0], cfg.size, list(enumerate(cfg.unet_mult))
        self.stem = nn.Conv2d(cfg.channels, width, 3, padding=1)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [width]
        for level, m in levels:
            for _ in range(cfg.unet_blocks):
                self.down.append(self.stage(width, base * m, side))
                width = base * m
                skips.append(width)
            if level < len(levels) - 1:
                self.down.append(nn.ModuleList([UNetBlock(width, width, *self.sizes, "down")]))
                skips.append(width)
                side //= 2
        # The middle has attention at any resolution: `stage` is told one that has it.
        self.middle = self.stage(width, width, cfg.unet_attention[0])
        self.middle.append(UNetBlock(width, width, *self.sizes))
        for level, m in reversed(levels):
            for k in range(cfg.unet_blocks + 1):
                stage = self.stage(width + skips.pop(), base * m, side)
                width = base * m
                if level and k == cfg.unet_blocks:
                    stage.append(UNetBlock(width, width, *self.sizes, "up"))
                    side *= 2
                self.up.append(stage)
        self.norm, self.out = GroupNorm(width), nn.Conv2d(width, cfg.channels, 3, padding=1)
        for layer in [self.out, *(m.proj for m in self.modules() if isinstance(m, AttentionBlock))]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def stage(self, c_in: int, c_out: int, side: int) -> nn.ModuleList:
        """A ResBlock, and self-attention where the resolution has it."""
        layers = nn.ModuleList([UNetBlock(c_in, c_out, *self.sizes)])
        if side in self.cfg.unet_attention:
            layers.append(AttentionBlock(c_out, self.cfg.enc_heads))
        return layers

    @staticmethod
    def run(stage: nn.ModuleList, h: Tensor, time: Tensor, v: Tensor) -> Tensor:
        """The layers of a stage in turn."""
        for layer in stage:
            h = layer(h, time, v) if isinstance(layer, UNetBlock) else layer(h)
        return h

    def forward(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """As the class says."""
        sines = sinusoid(t, self.cfg.unet_base).to(x_t.dtype)  # (B, base)
        time, v = F.silu(self.time_mlp(sines)), F.silu(v)  # (B, E), (B, Z): the same for all blocks
        h = self.stem(x_t)  # (B, base, H, W)
        skips = [h]
        for stage in self.down:
            h = self.run(stage, h, time, v)  # (B, C_l, H_l, W_l)
            skips.append(h)
        h = self.run(self.middle, h, time, v)
        for stage in self.up:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), time, v)
        return self.out(F.silu(self.norm(h)))  # (B, C, H, W)


class UNetMethod(nn.Module):
    """An encoder and the U-Net: (x_t, t, x0) -> eps, all (B, C, H, W), t (B,).

    diffae has its own encoder and v of 512; with DiER's encoder v has 1024, and `Encoder` or its
    child without time is given as `encoder`.
    """

    def __init__(self, cfg: UNetConfig, encoder: type[nn.Module]):
        super().__init__()
        self.encoder = encoder(cfg)
        self.unet = UNet(cfg, V if issubclass(encoder, Encoder) else DIFFAE_V)

    @property
    def dit(self) -> nn.Module:
        """What makes eps out of x_t, t and v, under the name that appendix/recover.py calls."""
        return self.unet

    def forward(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The guess of the noise; v is made on the way."""
        return self.unet(x_t, t, self.encoder(x0, t))
