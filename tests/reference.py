"""The networks of DiER and one training step, written plainly: what tests and bench compare with.

This is a test oracle: to read the method, open model.py. Nothing here is fast, and nothing but the
table of sizes is shared with model.py, diffusion.py or train.py. Attention is einsum and softmax,
means and variances are spelled out, the weight average is a loop, Adam is PyTorch's unfused one,
all is fp32 and eager. Parameters have model.py's names, so that `load_state_dict` carries weights
across; everything else is written from the paper and the design.

Shapes: B batch, C channels, H W pixels, N tokens, D width, E width of the time embedding, V = 1024.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from model import ModelConfig


def time_embedding(t: Tensor, width: int) -> Tensor:
    """cos and sin of t at width / 2 frequencies from 1 down to 1 / 10,000: (B,) -> (B, width)."""
    columns = []
    for function in (torch.cos, torch.sin):
        for k in range(width // 2):
            columns.append(function(t.double() * math.exp(-math.log(10_000) * k / (width // 2))))
    return torch.stack(columns, dim=1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention on (B, N, D) each -> (B, N, D); head h owns the h-th slice of D."""
    b, n, d = q.shape
    q, k, v = (x.reshape(b, n, heads, d // heads) for x in (q, k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(d // heads)
    weights = torch.softmax(scores, dim=-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(b, n, d)


def plain_layer_norm(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last dimension, eps 1e-6, no scale and shift."""
    x = x - x.mean(dim=-1, keepdim=True)
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 1e-6)


class PlainGroupNorm(nn.Module):
    """Mean 0 and variance 1 in each of min(32, C / 4) groups, then a scale and shift a channel:
    (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.groups = min(32, channels // 4)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g = x.reshape(b, self.groups, -1)
        g = g - g.mean(dim=2, keepdim=True)
        g = g / torch.sqrt((g**2).mean(dim=2, keepdim=True) + 1e-5)
        return g.reshape(b, c, h, w) * self.weight.view(1, c, 1, 1) + self.bias.view(1, c, 1, 1)


class PlainResBlock(nn.Module):
    """GroupNorm - SiLU - (pool) - conv - GroupNorm (1 + scale) + shift - SiLU - dropout - conv.

    (B, C_in, H, W), time (B, E) -> (B, C_out, H, W), H and W halved with `down`.
    """

    def __init__(self, c_in: int, c_out: int, time_width: int, dropout: float, down: bool):
        super().__init__()
        self.norm1 = PlainGroupNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * c_out)
        self.norm2 = PlainGroupNorm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.pool(nn.functional.silu(self.norm1(x))))
        scale, shift = torch.chunk(self.time(nn.functional.silu(time)), 2, dim=1)
        h = self.norm2(h) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        h = self.conv2(self.dropout(nn.functional.silu(h)))
        return self.skip(self.pool(x)) + h


class PlainAttention(nn.Module):
    """Residual self-attention over pixels: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = PlainGroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, HW, 3C)
        q, k, v = torch.split(tokens, c, dim=2)
        out = softmax_attention(q, k, v, self.heads).transpose(1, 2).reshape(b, c, h, w)
        return x + self.proj(out)


class PlainEncoder(nn.Module):
    """Half a diffusion U-Net with time: x_0 (B, C, H, W), t (B,) -> v_t (B, V)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        e = 4 * cfg.base
        self.time_mlp = nn.Sequential(nn.Linear(cfg.base, e), nn.SiLU(), nn.Linear(e, e))
        widths = [cfg.base * m for m in cfg.mult]
        self.stem = nn.Conv2d(cfg.channels, widths[0], 3, padding=1)
        layers = []
        width = widths[0]
        side = cfg.size
        for level in range(len(widths)):
            for _ in range(cfg.blocks):
                layers.append(PlainResBlock(width, widths[level], e, cfg.dropout, False))
                width = widths[level]
                if side in cfg.attention:
                    layers.append(PlainAttention(width, cfg.enc_heads))
            if level + 1 < len(widths):
                layers.append(PlainResBlock(width, width, e, cfg.dropout, True))
                side = side // 2
        layers.append(PlainResBlock(width, width, e, cfg.dropout, False))
        layers.append(PlainAttention(width, cfg.enc_heads))
        layers.append(PlainResBlock(width, width, e, cfg.dropout, False))
        self.layers = nn.ModuleList(layers)
        self.norm = PlainGroupNorm(width)
        self.head = nn.Linear(width, 1024)

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        time = self.time_mlp(time_embedding(t, self.cfg.base).to(x0.dtype))
        h = self.stem(x0)
        for layer in self.layers:
            h = layer(h, time) if isinstance(layer, PlainResBlock) else layer(h)
        h = nn.functional.silu(self.norm(h))
        return self.head(h.mean(dim=3).mean(dim=2))


class PlainBlock(nn.Module):
    """A transformer block with adaLN-Zero, one Linear for its six vectors: (B, N, D), c (B, D)
    -> (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.ada = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        ada = self.ada(nn.functional.silu(c))[:, None, :]
        shift1, scale1, gate1, shift2, scale2, gate2 = torch.chunk(ada, 6, dim=2)
        h = plain_layer_norm(x) * (1 + scale1) + shift1
        q, k, v = torch.chunk(self.qkv(h), 3, dim=2)
        x = x + gate1 * self.proj(softmax_attention(q, k, v, self.heads))
        h = self.fc1(plain_layer_norm(x) * (1 + scale2) + shift2)
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))  # GELU
        return x + gate2 * self.fc2(h)


class PlainDiT(nn.Module):
    """A Diffusion Transformer on pixels: x_t (B, C, H, W), t (B,), v (B, V) -> eps."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        d = cfg.hidden
        pixels = cfg.patch**2 * cfg.channels
        self.embed = nn.Linear(pixels, d)
        self.time_mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.v_proj = nn.Linear(1024, d)
        self.blocks = nn.ModuleList([PlainBlock(d, cfg.heads) for _ in range(cfg.depth)])
        self.ada = nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, pixels)

    def positions(self, like: Tensor) -> Tensor:
        """(N, D): sinusoids of the row in the first half of D, of the column in the second."""
        side = self.cfg.size // self.cfg.patch
        rows, columns = [], []
        for i in range(side):
            for j in range(side):
                rows.append(i)
                columns.append(j)
        halves = [time_embedding(torch.tensor(k), self.cfg.hidden // 2) for k in (rows, columns)]
        return torch.cat(halves, dim=1).float().to(like)  # stored in fp32, as model.py does

    def forward(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        p = self.cfg.patch
        side = self.cfg.size // p
        tokens = []
        for i in range(side):
            for j in range(side):
                patch = x_t[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
                tokens.append(patch.permute(0, 2, 3, 1).flatten(1))
        x = self.embed(torch.stack(tokens, dim=1)) + self.positions(x_t)
        c = self.time_mlp(time_embedding(t, 256).to(x_t.dtype)) + self.v_proj(v)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = torch.chunk(self.ada(nn.functional.silu(c))[:, None, :], 2, dim=2)
        x = self.out(plain_layer_norm(x) * (1 + scale) + shift)
        eps = torch.empty_like(x_t)
        for n in range(side * side):
            i, j = n // side * p, n % side * p
            patch = x[:, n].reshape(len(x), p, p, self.cfg.channels).permute(0, 3, 1, 2)
            eps[:, :, i : i + p, j : j + p] = patch
        return eps


class PlainDiER(nn.Module):
    """eps_theta(x_t, t, Encoder(x_0, t)), with model.py's parameter names: x_t, x0 (B, C, H, W),
    t (B,) -> (B, C, H, W)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.encoder = PlainEncoder(cfg)
        self.dit = PlainDiT(cfg)

    def forward(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        return self.dit(x_t, t, self.encoder(x0, t))


class PlainTraining:
    """The training step spelled out: noise, squared error, clip, Adam, weight average."""

    def __init__(self, model: PlainDiER, lr: float, ema: float, clip: float):
        self.model = model
        self.ema = ema
        self.clip = clip
        self.step = 0
        self.average = [p.detach().clone() for p in model.parameters()]
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, foreach=False, fused=False)
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        self.abar = torch.cumprod(1 - betas, dim=0)

    def __call__(self, x0: Tensor, t: Tensor, eps: Tensor) -> float:
        """One update on x0, eps (B, C, H, W) and t (B,); returns the loss."""
        abar = self.abar.to(x0)[t][:, None, None, None]
        x_t = torch.sqrt(abar) * x0 + torch.sqrt(1 - abar) * eps
        loss = ((eps - self.model(x_t, t, x0)) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=False)
        self.optimizer.step()
        self.step += 1
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, p in zip(self.average, self.model.parameters()):
                average.copy_(decay * average + (1 - decay) * p)
        return loss.item()
