"""The two networks of DiER (Fig. 2) and, at the end, the sizes they come in (Table 4).

    v_t = Encoder(x_0, t)                 half a U-Net that sees the clean image and the time
    eps = DiT(x_t, t, v_t)                a transformer on pixel patches that sees the noisy image

As in the paper v_t reaches the DiT only through adaLN. Here it is added to the embedding of t. Each
block has a linear layer `ada`, which takes the SiLU of the sum to the scale and shift of each
normalisation and to the gate of each branch; another, before `out`, gives scale and shift. One
vector has to tell the transformer what the noise has hidden. That this makes it semantic is the
paper's claim, which probe.py tests.

At initialisation every residual branch and the output are zero, as in DiT: eps = 0, so the first
loss is E[eps^2] = 1, and v does not depend on t. No gradient reaches the encoder in the first two
steps: one opens `out` alone, the next the `ada` layers, and only then does the output depend on v.

Shapes: B batch, C channels, H W pixels, N tokens, D width, E width of the time embedding,
V = 1024 length of v.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

V = 1024  # length of v (Sec. A.2)
MAX_PERIOD = 10_000  # of the sinusoids, as in the Transformer
SHORT = 256  # tokens up to which attention written out beats the fused kernel in bf16 on a CPU


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of both networks, as in Table 4. Raises ValueError where they do not fit."""

    size: int  # images are size x size
    channels: int
    patch: int  # the DiT: patches of patch x patch pixels
    hidden: int  # its width D
    depth: int
    heads: int
    base: int  # the encoder: level k has width base * mult[k]
    blocks: int  # ResBlocks a level
    mult: tuple[int, ...]
    attention: tuple[int, ...]  # resolutions with self-attention
    enc_heads: int
    dropout: float

    def __post_init__(self) -> None:
        size, patch, halvings = self.size, self.patch, len(self.mult) - 1
        if size % patch:
            fits = max(p for p in range(1, patch) if size % p == 0)
            raise ValueError(f"size {size} is not a multiple of patch {patch}: give --patch {fits}")
        if size % 2**halvings:
            fits = max(1, size // 2**halvings) * 2**halvings
            raise ValueError(
                f"size {size} cannot be halved {halvings} times: give --size {fits} or fewer --mult"
            )
        if self.hidden % (4 * self.heads):  # enough for heads and for 2-D positions
            fits = max(1, self.hidden // (4 * self.heads)) * 4 * self.heads
            raise ValueError(
                f"hidden {self.hidden} is not a multiple of 4 x heads {self.heads}: "
                f"give --hidden {fits}"
            )
        for width in (self.base * m for m in self.mult):
            groups = max(1, min(32, width // 4))
            # base is even: half of it is sines of t, half cosines
            if self.base % 2 or width % groups or width % self.enc_heads:
                raise ValueError(
                    f"encoder width {width} (base {self.base} x mult) does not divide into "
                    f"{groups} groups and {self.enc_heads} heads: give another --base or --mult"
                )


# ---------------------------------------------------------------------------- shared pieces


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Embed times as cosines and sines of `width / 2` frequencies, t (B,) -> (B, width), fp64."""
    half = width // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float64) / half
    angles = t[:, None] * MAX_PERIOD**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def positions_2d(side: int, width: int) -> Tensor:
    """Fixed 2-D sin-cos positions -> (side * side, width): the first half of the channels is the
    row's sinusoid, the second the column's; tokens in row-major order."""
    axis = sinusoid(torch.arange(side), width // 2)
    rows = axis[:, None].expand(side, side, -1)
    cols = axis[None].expand(side, side, -1)
    return torch.cat([rows, cols], dim=2).reshape(side * side, width)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head: (B, heads, N, d) -> (B, heads, N, d); v are values.

    Short sequences are two batched products, in training in bf16 on a CPU up to seven times as fast
    as the fused kernel (in fp32 a step takes as long with either); long ones use it, as it never
    stores the N x N scores. Both sum in fp32.
    """
    if q.shape[2] > SHORT:
        # Where a token's d numbers are apart, as after a convolution, there is no fused kernel.
        return F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # (B, heads, N, N)
    return scores.softmax(3).to(v.dtype) @ v


class GroupNorm(nn.GroupNorm):
    """Group normalisation with min(32, C / 4) groups, at least one; PyTorch sums in fp32.

    A group of one channel would subtract that channel's mean, hence four channels or more each.
    """

    def __init__(self, channels: int):
        super().__init__(max(1, min(32, channels // 4)), channels)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation without scale and shift, which adaLN gives."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6, elementwise_affine=False)


# ---------------------------------------------------------------------------- encoder


def halve(x: Tensor) -> Tensor:
    """Average pooling, (B, C, H, W) -> (B, C, H/2, W/2): two sums of slices, which on a CPU take
    half the time of F.avg_pool2d."""
    rows = x[:, :, ::2] + x[:, :, 1::2]  # (B, C, H/2, W)
    return (rows[..., ::2] + rows[..., 1::2]) / 4


class ResBlock(nn.Module):
    """Two convolutions with time in between; `down` halves the resolution by average pooling.

    (B, C_in, H, W), SiLU of time (B, E) -> (B, C_out, H, W), H and W halved with `down`. Time is
    the scale and shift of the second norm.
    """

    def __init__(self, c_in: int, c_out: int, time_width: int, dropout: float, down: bool = False):
        super().__init__()
        self.down = down
        self.norm1 = GroupNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * c_out)
        self.norm2 = GroupNorm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))  # (B, C_in, H, W)
        if self.down:
            h, x = halve(h), halve(x)  # (B, C_in, H/2, W/2)
        h = self.norm2(self.conv1(h))  # (B, C_out, H, W)
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)  # (B, C_out, 1, 1)
        h = F.silu(torch.addcmul(shift, h, 1 + scale))  # (B, C_out, H, W)
        h = self.conv2(self.dropout(h))  # (B, C_out, H, W)
        return self.skip(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over the H * W pixels, residual: (B, C, H, W) -> (B, C, H, W).

    Pixels are the tokens; channels are split over the heads.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x))  # (B, 3C, H, W)
        qkv = qkv.reshape(b, 3, self.heads, c // self.heads, h * w)  # (B, 3, heads, d, N)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # each (B, heads, N, d)
        out = attention(q, k, v).transpose(2, 3).reshape(b, c, h, w)  # (B, C, H, W)
        return x + self.proj(out)


class Encoder(nn.Module):
    """v_t = Encoder(x_0, t), the time-dependent encoder of Fig. 3.

    x_0 (B, C, H, W) in [-1, 1], t (B,) in 0..999 -> (B, V). v is affine in the pooled features (B,
    base * mult[-1]): but for the head's bias its rank is at most that width, not 1024.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.base = cfg.base
        time_width = 4 * cfg.base
        self.time_mlp = nn.Sequential(
            nn.Linear(cfg.base, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        self.stem = nn.Conv2d(cfg.channels, cfg.base * cfg.mult[0], 3, padding=1)
        self.layers = nn.ModuleList()
        width, side = cfg.base * cfg.mult[0], cfg.size
        for level, m in enumerate(cfg.mult):
            for _ in range(cfg.blocks):
                self.layers.append(ResBlock(width, cfg.base * m, time_width, cfg.dropout))
                width = cfg.base * m
                if side in cfg.attention:
                    self.layers.append(AttentionBlock(width, cfg.enc_heads))
            if level < len(cfg.mult) - 1:
                self.layers.append(ResBlock(width, width, time_width, cfg.dropout, down=True))
                side //= 2
        self.layers.append(ResBlock(width, width, time_width, cfg.dropout))
        self.layers.append(AttentionBlock(width, cfg.enc_heads))
        self.layers.append(ResBlock(width, width, time_width, cfg.dropout))
        self.norm = GroupNorm(width)
        self.head = nn.Linear(width, V)
        self.init_weights()

    def init_weights(self) -> None:
        """PyTorch's defaults, but the last layer of each residual branch is zero."""
        for last in self.zero_initialised():
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def zero_initialised(self) -> list[nn.Conv2d]:
        """The convolutions that end the residual branches, zero at initialisation."""
        return [m.conv2 if isinstance(m, ResBlock) else m.proj for m in self.layers]

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        # Each block has a Linear layer of its own after the SiLU of time, which is taken once here.
        time = F.silu(self.time_mlp(sinusoid(t, self.base).to(x0.dtype)))  # (B, E)
        h = self.stem(x0)  # (B, base * mult[0], H, W)
        for layer in self.layers:
            h = layer(h, time) if isinstance(layer, ResBlock) else layer(h)  # (B, C_l, H_l, W_l)
        h = F.silu(self.norm(h)).mean((2, 3))  # (B, C_last)
        return self.head(h)  # (B, V)


# ---------------------------------------------------------------------------- DiT


def patchify(x: Tensor, p: int) -> Tensor:
    """Cut images into p x p patches: (B, C, H, W) -> (B, N, p * p * C), N = H/p * W/p, row-major;
    inside a patch the order is row, column, channel."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(x: Tensor, p: int, channels: int) -> Tensor:
    """The inverse of `patchify` for square images: (B, N, p * p * C) -> (B, C, H, W)."""
    b, n, _ = x.shape
    side = math.isqrt(n)
    x = x.reshape(b, side, side, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, channels, side * p, side * p)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, the same for all tokens: (B, N, D), (B, D), (B, D) -> (B, N, D), in
    shift's dtype: under autocast that is the half precision which the next linear layer reads."""
    return torch.addcmul(shift[:, None], x.to(shift.dtype), 1 + scale[:, None])


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: (B, N, D), SiLU of the condition (B, D) -> (B, N, D).

    The condition sets shift, scale and gate of both branches; gates start at zero, so the block
    starts as the identity.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.ada = nn.Linear(width, 6 * width)

    def self_attention(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(b, n, d))

    def mlp(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), four times as wide inside. GELU is exact: on a CPU the tanh of
        DiT's takes three times as long and differs from it by at most 5e-4."""
        return self.fc2(F.gelu(self.fc1(x)))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c).chunk(6, dim=1)  # (B, D) each
        x = x + gate1[:, None] * self.self_attention(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x  # (B, N, D)


class DiT(nn.Module):
    """eps = DiT(x_t, t, v), a Diffusion Transformer in pixel space, without learned variance.

    x_t (B, C, H, W), t (B,) int, v (B, V) -> eps (B, C, H, W).
    """

    TIME_WIDTH = 256  # of the sinusoid

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.patch, self.channels = cfg.patch, cfg.channels
        pixels = cfg.patch**2 * cfg.channels
        self.embed = nn.Linear(pixels, cfg.hidden)
        positions = positions_2d(cfg.size // cfg.patch, cfg.hidden).float()
        self.register_buffer("positions", positions, persistent=False)  # (N, D), never learned
        self.time_mlp = nn.Sequential(
            nn.Linear(self.TIME_WIDTH, cfg.hidden), nn.SiLU(), nn.Linear(cfg.hidden, cfg.hidden)
        )
        self.v_proj = nn.Linear(V, cfg.hidden)
        self.blocks = nn.ModuleList(DiTBlock(cfg.hidden, cfg.heads) for _ in range(cfg.depth))
        self.norm = LayerNorm(cfg.hidden)
        self.ada = nn.Linear(cfg.hidden, 2 * cfg.hidden)
        self.out = nn.Linear(cfg.hidden, pixels)
        self.init_weights()

    def init_weights(self) -> None:
        """All of DiT's initialisation in one place."""
        # Linear layers: Xavier-uniform, bias zero.
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        # Time MLP: small normal.
        nn.init.normal_(self.time_mlp[0].weight, std=0.02)
        nn.init.normal_(self.time_mlp[2].weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, the output as zero.
        for layer in [*(block.ada for block in self.blocks), self.ada, self.out]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        x = self.embed(patchify(x_t, self.patch)) + self.positions  # (B, N, D)
        time = sinusoid(t, self.TIME_WIDTH).to(x_t.dtype)  # (B, 256)
        c = F.silu(self.time_mlp(time) + self.v_proj(v))  # (B, D), the same SiLU for all blocks
        for block in self.blocks:
            x = block(x, c)  # (B, N, D)
        shift, scale = self.ada(c).chunk(2, dim=1)  # (B, D) each
        x = self.out(modulate(self.norm(x), shift, scale))  # (B, N, p * p * C)
        return unpatchify(x, self.patch, self.channels)  # (B, C, H, W)


class DiER(nn.Module):
    """Both networks: eps_theta(x_t, t, Encoder(x_0, t)) of Eq. 4.6.

    x_t (B, C, H, W), t (B,) int, x0 (B, C, H, W) -> eps (B, C, H, W). v_t is made on the way.
    """

    def __init__(self, cfg: ModelConfig, encoder: type[Encoder] = Encoder):
        super().__init__()
        self.encoder = encoder(cfg)
        self.dit = DiT(cfg)

    def forward(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        return self.dit(x_t, t, self.encoder(x0, t))


# ---------------------------------------------------------------------------- Table 4
#
# A row has the sizes of both networks and the recipe that goes with them; each column is a flag of
# train.py. `paper` is Table 4: 32 pixels for mnist, cifar10, cifar100; 64 for tiny-imagenet; 256
# for bccd, oct2017. `cpu` is the same architecture at a size that a CPU trains in an hour in bf16:
# few pixels, large patches, small batches, since steps count more than images in a short run. Two
# bounds hold for every row. But for biases v has at most rank base x mult[-1], and the part of it
# that the DiT reads at most rank `hidden`. If patch^2 x channels > hidden, a token cannot hold its
# patch's noise, and the loss cannot fall below 1 - hidden / (patch^2 x channels): at hidden 128
# digits take patch 8 (64 numbers), colour patch 4 (48).

# fmt: off
COLUMNS = (
    "size", "patch", "hidden", "depth", "heads",  # images and DiT
    "base", "blocks", "mult", "attention", "enc_heads", "dropout",  # encoder
    "batch_size", "lr", "epochs",  # recipe
)
TABLE = {
    #     size patch hidden depth heads base blocks mult attention enc_heads dropout batch lr epochs
    "paper 32":    (32, 2, 192, 12, 3,  128, 2, (1, 2, 3, 4), (16, 8), 4, 0.1,      128, 1e-4, 200),
    "paper 64":    (64, 4, 384, 12, 6,  128, 2, (1, 2, 3, 4), (16, 8), 4, 0.1,      128, 1e-4, 200),
    "paper 256":  (256, 8, 768, 16, 12, 256, 2, (1, 1, 2, 2, 3, 4), (16, 8), 4, 0.1, 16, 1e-5, 200),
    "cpu glyphs":  (16, 8, 128, 2, 4,    16, 1, (1, 2, 4), (4,), 4, 0.0,             32, 2e-3, 32),
    "cpu mnist":   (16, 8, 128, 4, 4,    16, 1, (1, 2, 8), (4,), 4, 0.0,             64, 2e-3, 10),
    "cpu 32":      (16, 4, 128, 4, 4,    16, 1, (1, 2, 8), (4,), 4, 0.1,             64, 2e-3, 31),
    "cpu 64":      (32, 4, 128, 4, 4,    16, 1, (1, 2, 4, 8), (4,), 4, 0.0,          32, 1e-3, 2),
    "cpu 256":     (64, 8, 256, 4, 4,    16, 1, (1, 2, 2, 4, 8), (4,), 4, 0.0,       32, 1e-3, 7),
    "cpu oct2017": (64, 8, 256, 4, 4,    16, 1, (1, 2, 2, 4, 8), (4,), 4, 0.0,       32, 1e-3, 1),
}
# fmt: on
PRESETS = ("paper", "cpu")


def table_row(preset: str, data: str, row: int) -> dict:
    """{column: value} of a set's own row, else of that for its pixels in the paper: 32, 64, 256."""
    return dict(zip(COLUMNS, TABLE.get(f"{preset} {data}") or TABLE[f"{preset} {row}"]))
