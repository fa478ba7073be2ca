"""CAE and MAGE, which predict the codes of a tokenizer, a VQ-VAE.

    tokenizer   one of K codes for each patch of an image; trained first, then frozen
    cae         half of the patches hidden: predict the encoder's output for them, then their codes
    mage        the encoder reads codes in place of pixels, 50 to 100% masked: predict those

    python -m appendix.baselines --method tokenizer cae mage

What differs from the published models: the tokenizer is a VQ-VAE of 256 to 1,024 codes that learns
from the same images (CAE's was DALL-E's dVAE of 8,192 codes, MAGE's a VQGAN of 1,024 that learned
from ImageNet), and its reconstruction error is over the variance of the batch, not of the whole
set; norms before a linear layer have no affine parameters; CAE has no drop path; MAGE's dropout
follows attention and MLPs and is not inside them (the cpu presets have none).

Shapes: B batch, C channels, H W pixels, N tokens in row-major order, M of them visible, Q hidden,
D width, K codes, E width of a code, G cells a side.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from appendix.masked import ViT, ViTBlock, ViTConfig, affine_norm, gather, init_linear, vit_config
from data import on_device, to_float
from model import LayerNorm, attention

DECAY, DEAD = 0.99, 0.1  # of the codebook's averages; a code with less of the mean count is moved
MASKS = 4096  # of CAE


# ---------------------------------------------------------------------------- tokenizer


class Residual(nn.Module):
    """Two convolutions, a quarter as wide in between: (B, width, H, W) -> the same."""

    def __init__(self, width: int):
        super().__init__()
        narrow, wide = nn.Conv2d(width, width // 4, 3, padding=1), nn.Conv2d(width // 4, width, 1)
        self.layers = nn.Sequential(nn.ReLU(), narrow, nn.ReLU(), wide)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Tokenizer(nn.Module):
    """VQ-VAE (van den Oord et al. 2017) with one code a patch of 2, 4, 8 or 16 pixels: x0
    (B, C, H, W) -> its loss (B,).

    The codebook is the moving average of each code's vectors. It moves in training mode only, in
    which a tokenizer with frozen weights never is. Buffers are not in train.py's average of the
    weights: load the raw ones.
    """

    def __init__(self, cfg: ViTConfig, width: int, code: int, codes: int):
        super().__init__()
        halvings = cfg.patch.bit_length() - 1
        self.side = cfg.size // cfg.patch
        widths = [cfg.channels, *[width // 2] * (halvings - 1), width]
        down, up = [], []
        for a, b in zip(widths, widths[1:]):
            down += [nn.Conv2d(a, b, 4, 2, 1), nn.ReLU()]
            up = [nn.ReLU(), nn.ConvTranspose2d(b, a, 4, 2, 1), *up]
        down += [nn.Conv2d(width, width, 3, padding=1), Residual(width), Residual(width)]
        self.encoder = nn.Sequential(*down, nn.ReLU(), nn.Conv2d(width, code, 1))
        first = nn.Conv2d(code, width, 3, padding=1)
        self.decoder = nn.Sequential(first, Residual(width), Residual(width), *up)
        self.register_buffer("codebook", torch.zeros(codes, code))
        self.register_buffer("counts", torch.zeros(codes))  # averages of a batch's vectors by code
        self.register_buffer("sums", torch.zeros(codes, code))

    def train(self, mode: bool = True) -> "Tokenizer":
        """As nn.Module's, but a frozen tokenizer stays in eval mode."""
        return super().train(mode and next(self.parameters()).requires_grad)

    def vectors(self, x0: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, E), fp32."""
        return self.encoder(x0).flatten(2).transpose(1, 2).float()

    def nearest(self, z: Tensor) -> Tensor:
        """Vectors (B, N, E) -> the nearest code of each (B, N). Without a matrix product, which
        autocast or TF32 would round."""
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(z.flatten(0, 1), self.codebook, compute_mode=mode)  # (B * N, K)
        return distances.argmin(1).view(z.shape[:2])

    def images(self, z: Tensor) -> Tensor:
        """(B, N, E) -> (B, C, H, W), fp32."""
        return self.decoder(z.transpose(1, 2).unflatten(2, (self.side, self.side))).float()

    @torch.no_grad()
    def codes(self, x0: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N) int64 in [0, K)."""
        return self.nearest(self.vectors(x0))

    def decode(self, codes: Tensor) -> Tensor:
        """(B, N) -> (B, C, H, W)."""
        return self.images(self.codebook[codes])

    def revive(self, z: Tensor) -> None:
        """Move each code that has less than a tenth of its share of the vectors (R, E) to a random
        one of them. In the first step that is every code."""
        share = len(z) / len(self.counts)
        dead = self.counts < DEAD * share
        found = z[torch.randint(len(z), dead.shape, device=z.device)]  # (K, E)
        self.counts.masked_fill_(dead, share)
        self.sums.copy_(torch.where(dead[:, None], share * found, self.sums))
        self.codebook.copy_(torch.where(dead[:, None], found, self.codebook))

    def follow(self, z: Tensor, codes: Tensor) -> None:
        """Move averages and codebook towards the vectors (R, E) of each code, codes (R,)."""
        counts = torch.zeros_like(self.counts).index_add(0, codes, torch.ones_like(z[:, 0]))
        sums = torch.zeros_like(self.sums).index_add(0, codes, z)
        self.counts.lerp_(counts, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        total = self.counts.sum()
        smooth = (self.counts + 1e-5) / (total + 1e-5 * len(counts)) * total  # never zero
        self.codebook.copy_(self.sums / smooth[:, None])

    def forward(self, x0: Tensor) -> Tensor:
        z = self.vectors(x0)  # (B, N, E)
        flat = z.detach().flatten(0, 1)  # (B * N, E)
        if self.training:
            self.revive(flat)
        codes = self.nearest(z.detach())  # (B, N)
        z_q = self.codebook[codes]  # (B, N, E)
        if self.training:
            self.follow(flat, codes.flatten())
        guess = self.images(z + (z_q - z).detach())  # the gradient at z_q goes straight to z
        error = (guess - x0).square().mean((1, 2, 3)) / x0.var(correction=0).clamp(min=1e-4)
        return error + 0.25 * (z - z_q).square().mean((1, 2))  # z is to stay near its code


@torch.no_grad()
def check(tokenizer: Tokenizer, images: np.ndarray, device: torch.device) -> dict[str, float]:
    """What codes keep of unseen uint8 images (N, C, H, W): explained variance of the pixels;
    exp(entropy) of the codes, with and without the commonest; share of the codes in use. Leaves the
    tokenizer on the device and in eval mode."""
    tokenizer.to(device).eval()
    error, counts = 0.0, torch.zeros(len(tokenizer.counts), dtype=torch.float64)
    for part in on_device(images, device).split(256):
        x0 = to_float(part.to(device))
        codes = tokenizer.codes(x0)
        counts += codes.flatten().bincount(minlength=len(counts)).cpu()
        error += (tokenizer.decode(codes) - x0).square().sum().item() / images.size
    rest = counts.sort().values[:-1]
    every, some = (torch.special.entr(n / n.sum().clamp(min=1)).sum().exp() for n in (counts, rest))
    found = {"explained_variance": float(1 - error / (images.var() / 127.5**2))}
    found |= {"perplexity": every.item(), "perplexity_without_commonest": some.item()}
    return found | {"used": (counts > 0).double().mean().item()}


# ---------------------------------------------------------------------------- CAE


@cache
def rectangle_masks(side: int) -> np.ndarray:
    """4,096 fixed masks of rectangles that cover half of a grid exactly, each as an order of the
    tokens that begins with the hidden half: (4096, N) int64."""
    rng, n = np.random.default_rng(0), side**2
    masks = np.zeros((MASKS, side, side), bool)
    for mask in masks:
        left = n // 2
        while left:
            area = rng.uniform(min(left, max(1, round(16 * n / 196))), left)
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if max(h, w) < side:
                y, x = rng.integers(side - h + 1), rng.integers(side - w + 1)
                part = mask[y : y + h, x : x + w]
                new = part.size - part.sum()
                if new <= left:
                    part[:] = True
                    left -= new
    return np.argsort(~masks.reshape(MASKS, n), axis=1, kind="stable")


class ScaledBlock(ViTBlock):
    """ViTBlock whose branches have a learned scale for each channel, at first 0.1 (LayerScale)."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.self_attention(self.norm1(x))  # (B, N, D)
        return x + self.scale2 * self.mlp(self.norm2(x))


class RegressorBlock(ScaledBlock):
    """Cross-attention of the hidden latents (B, Q, D) to all (B, N, D) -> (B, Q, D). Queries and
    keys have positions, values none; the second norm stands in the residual stream."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        del self.qkv
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.norm2 = affine_norm(width)

    def forward(self, x: Tensor, latents: Tensor, at: Tensor, at_all: Tensor) -> Tensor:
        q, k = self.q(self.norm1(x + at)), self.k(self.norm1(latents + at_all))
        v = self.v(self.norm1(latents))  # (B, N, D)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        x = x + self.scale1 * self.proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, Q, D)
        x = self.norm2(x)  # (B, Q, D)
        return x + self.scale2 * self.mlp(x)


class CAEEncoder(ViT):
    """CAE's ViT: (B, C, H, W), (B,) -> (B, D), the class token after the norm."""

    def __init__(self, cfg: ViTConfig):
        super().__init__(cfg, ScaledBlock)
        self.norm = affine_norm(cfg.hidden)

    def latents(self, x0: Tensor, visible: Tensor | None = None) -> Tensor:
        """The last block's tokens after the norm, class token first: (B, 1 + M, D)."""
        return self.norm(self.layers(x0, visible)[-1])

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.latents(x0)[:, 0]


class CAE(nn.Module):
    """Context autoencoder (Chen et al. 2022): x0 (B, C, H, W) -> (B,), the cross-entropy of the
    hidden patches' codes + 2 x the squared error of their latents. Regressor and decoder have
    `depth` blocks each."""

    def __init__(self, cfg: ViTConfig, tokenizer: Tokenizer, depth: int):
        super().__init__()
        width, heads = cfg.hidden, cfg.heads
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.encoder = CAEEncoder(cfg)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.regressor = nn.ModuleList(RegressorBlock(width, heads) for _ in range(depth))
        self.norm = affine_norm(width)
        self.decoder = nn.Sequential(*(ScaledBlock(width, heads) for _ in range(depth)))
        self.out = nn.Sequential(LayerNorm(width), nn.Linear(width, len(tokenizer.counts)))
        order = torch.tensor(rectangle_masks(self.encoder.side))
        self.register_buffer("order", order, persistent=False)  # (4096, N)
        init_linear(self)

    def predict(self, latents: Tensor, visible: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The visible latents (B, M, D) and the places of both kinds (B, M), (B, Q) -> the hidden
        latents (B, Q, D) and the logits of their codes (B, Q, K)."""
        positions = self.encoder.positions  # (N, D)
        at, at_all = positions[hidden], positions[torch.cat([visible, hidden], dim=1)]
        x = self.query.expand_as(at)  # (B, Q, D)
        for block in self.regressor:
            x = block(x, torch.cat([latents, x], dim=1), at, at_all)  # (B, Q, D)
        x = self.norm(x)  # (B, Q, D)
        return x, self.out(self.decoder(x + at))

    def forward(self, x0: Tensor) -> Tensor:
        order = self.order[torch.randint(MASKS, x0.shape[:1], device=x0.device)]  # (B, N)
        hidden, visible = order.tensor_split([order.shape[1] // 2], dim=1)
        latents = self.encoder.latents(x0, visible)[:, 1:]  # (B, M, D)
        guess, logits = self.predict(latents, visible, hidden)
        # Not before the pass with gradients: autocast keeps the first copy of each weight, and
        # copies made without gradients would cut the encoder off from the loss.
        with torch.no_grad():
            target = self.encoder.latents(x0, hidden)[:, 1:]  # (B, Q, D)
        codes = self.tokenizer.codes(x0).gather(1, hidden)  # (B, Q)
        entropy = F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none")
        return entropy.mean(1) + 2 * (guess.float() - target.float()).square().mean((1, 2))


# ---------------------------------------------------------------------------- MAGE


def mask_ratio(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """MAGE's shares of masked places: normal(0.55, 0.25) truncated to [0.5, 1], by its inverse."""
    low, high = (0.5 + 0.5 * math.erf((x - 0.55) / 0.25 / math.sqrt(2)) for x in (0.5, 1.0))
    return 0.55 + 0.25 * torch.special.ndtri(low + (high - low) * torch.rand(shape, device=device))


class DropoutBlock(ViTBlock):
    """ViTBlock with dropout at the end of both branches."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__(width, heads)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attention(self.norm1(x)))  # (B, N, D)
        return x + self.dropout(self.mlp(self.norm2(x)))


class MAGEEncoder(nn.Module):
    """A ViT that reads codes: (B, C, H, W), (B,) -> (B, D), the mean of the last block's tokens but
    for the class token, then normalised. Its words are K codes, [MASK] and the class token."""

    def __init__(self, cfg: ViTConfig, tokenizer: Tokenizer, dropout: float):
        super().__init__()
        width, self.mask = cfg.hidden, len(tokenizer.counts)  # `mask` is the word [MASK]
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.words = nn.Parameter(0.02 * torch.randn(self.mask + 2, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + tokenizer.side**2, width))
        self.embed = nn.Sequential(affine_norm(width), nn.Dropout(dropout))
        blocks = (DropoutBlock(width, cfg.heads, dropout) for _ in range(cfg.depth))
        self.blocks, self.norm = nn.Sequential(*blocks), LayerNorm(width)
        init_linear(self)

    def tokens(self, words: Tensor, kept: Tensor) -> Tensor:
        """The last block's output (B, 1 + M, D), class token first, for the words (B, N) at `kept`
        (B, M)."""
        words = F.pad(words, (1, 0), value=self.mask + 1)  # (B, 1 + N)
        x = self.embed(self.words[words] + self.positions)  # (B, 1 + N, D)
        return self.blocks(gather(x, F.pad(kept + 1, (1, 0))))

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        codes = self.tokenizer.codes(x0)  # (B, N)
        every = torch.arange(codes.shape[1], device=x0.device).expand_as(codes)
        return self.norm(self.tokens(codes, every)[:, 1:].mean(1))


class MAGE(nn.Module):
    """Li et al. 2023, without their contrastive loss: x0 (B, C, H, W) -> (B,), the cross-entropy of
    the masked places' codes. The decoder has `depth` blocks, as wide as the encoder's."""

    def __init__(self, cfg: ViTConfig, tokenizer: Tokenizer, depth: int, dropout: float):
        super().__init__()
        width = cfg.hidden
        self.encoder = MAGEEncoder(cfg, tokenizer, dropout)
        self.tokenizer = tokenizer  # the encoder's, frozen
        self.embed = nn.Linear(width, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1 + tokenizer.side**2, width))
        blocks = (DropoutBlock(width, cfg.heads, dropout) for _ in range(depth))
        self.decoder = nn.Sequential(*blocks, LayerNorm(width))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), affine_norm(width))
        self.bias = nn.Parameter(torch.zeros(self.encoder.mask))
        init_linear(self)

    def masks(self, b: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The places that the encoder keeps, half of them (B, M), and which of all are masked
        (B, N): those that it drops, and as many more, kept as [MASK], as the batch's ratio says."""
        order = torch.rand(b, n, device=device).argsort(1)  # (B, N)
        masked = order.argsort(1) < (n * mask_ratio((), device)).ceil()  # (B, N)
        return order[:, n - n // 2 :], masked

    def predict(self, codes: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        """Codes (B, N) and masks as above -> logits of all places' codes (B, N, K). The decoder has
        the encoder's class output at each masked place."""
        encoder = self.encoder
        x = encoder.norm(encoder.tokens(codes.masked_fill(masked, encoder.mask), kept))
        x = self.embed(x)  # (B, 1 + M, D)
        token, index = x[:, :1], kept[:, :, None].expand(-1, -1, x.shape[2])
        places = token.expand(-1, codes.shape[1], -1).scatter(1, index, x[:, 1:])  # (B, N, D)
        places = torch.where(masked[:, :, None], token, places)  # (B, N, D)
        x = self.decoder(torch.cat([token, places], dim=1) + self.positions)  # (B, 1 + N, D)
        return self.head(x[:, 1:]) @ encoder.words[: encoder.mask].detach().T + self.bias

    def forward(self, x0: Tensor) -> Tensor:
        codes = self.tokenizer.codes(x0)  # (B, N)
        kept, masked = self.masks(*codes.shape, x0.device)
        logits = self.predict(codes, kept, masked).float().transpose(1, 2)  # (B, K, N)
        entropy = F.cross_entropy(logits, codes, reduction="none", label_smoothing=0.1)  # (B, N)
        return (entropy * masked).sum(1) / masked.sum(1)


# ---------------------------------------------------------------------------- sizes
# CAE and MAGE have the ViT of masked.py's table and codes of its patches.
# fmt: off
TABLE = {
    #            tokenizer        CAE   MAGE
    #            width  E    K    depth depth dropout
    "paper 32":  ((128, 64, 512),  4,   (8, 0.1)),
    "paper 64":  ((128, 64, 512),  4,   (8, 0.1)),
    "paper 256": ((128, 64, 1024), 4,   (8, 0.1)),
    "cpu 32":    ((64,  32, 256),  2,   (2, 0.0)),
    "cpu 64":    ((64,  32, 512),  2,   (2, 0.0)),
    "cpu 256":   ((64,  32, 512),  2,   (2, 0.0)),
}
# fmt: on


def table_row(settings: dict) -> tuple:
    """The sizes (tokenizer, CAE, MAGE) of the settings' preset and row."""
    return TABLE[f"{settings['preset']} {settings['row']}"]


def build_tokenizer(settings: dict) -> Tokenizer:
    """The tokenizer in the sizes of the settings."""
    return Tokenizer(vit_config(settings), *table_row(settings)[0])


def build_cae(settings: dict) -> CAE:
    """CAE; a trained tokenizer's weights go into its `tokenizer`."""
    return CAE(vit_config(settings), build_tokenizer(settings), table_row(settings)[1])


def build_mage(settings: dict) -> MAGE:
    """MAGE; a trained tokenizer's weights go into its `tokenizer`."""
    return MAGE(vit_config(settings), build_tokenizer(settings), *table_row(settings)[2])
