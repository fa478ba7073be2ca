"""Linear heads on features, and how an accuracy is measured with them (Sec. 5.2, A.2).

A head is Linear(1024, K) under AdamW. Head 0 of each t sees all training images and gives `top1`,
the others leave out a fold and give `held_out`, the accuracy on what they did not see. All heads of
all t are trained in one batched product.

Shapes: N images, B batch, V = 1024, K classes, S number of t, H heads of one t, F folds.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import mix_seed
from features import pick
from log import Progress

FEW = 5_000  # with fewer training images one tenth is too small a sample to choose t by
WEIGHT_DECAY, WARMUP = 0.05, 10  # Sec. A.2; the warm-up in epochs
NEIGHBOURS = 20
KNN_BLOCK = 4_000  # images compared at once


# ---------------------------------------------------------------------------- folds


def make_folds(n: int, groups: np.ndarray | None, seed: int) -> np.ndarray:
    """Fold of each training image (n,): 0 .. F - 1 are held out in turn, -1 never.

    From 5,000 images on F = 1, one tenth; below, F = 5 and every image is held out once. Images of
    one group are never apart.
    """
    unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    order = np.random.default_rng(mix_seed(seed, 1)).permutation(unit.max() + 1)
    share = order[unit] / (unit.max() + 1)  # in [0, 1)
    if n >= FEW:
        return np.where(share < 0.1, 0, -1)
    return (share * 5).astype(np.int64)


# ---------------------------------------------------------------------------- heads


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up to the peak, then linear decay to 0 (Sec. A.2), by step in 0 .. total - 1."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / (total - warmup)


def train_heads(
    features: Tensor,
    labels: Tensor,
    folds: Tensor,
    classes: int,
    epochs: int,
    peak: float,
    batch_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Train all heads at once: features (N, S, V), labels (N,), folds (N,) in -1 .. F - 1
    -> weights (S, H * K, V) and biases (S, H * K, 1), H = 1 + F.

    Head 0 learns from every image, head f + 1 from those outside fold f: a mask on the loss, so
    that one gather and one product serve them all. Classes are rows of the logits, images columns:
    both products are twice as fast that way. After the last epoch, never the best of them.
    """
    n, s, width = features.shape
    heads, device = 2 + int(folds.max()), labels.device
    generator = torch.Generator().manual_seed(mix_seed(seed, 2))
    weight = 0.01 * torch.randn(s, heads * classes, width, generator=generator)  # normal(0.01)
    weight = weight.to(device).requires_grad_()
    bias = torch.zeros(s, heads * classes, 1, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], peak, weight_decay=WEIGHT_DECAY, fused=True)
    own = torch.arange(-1, heads - 1, device=device)  # the fold that head h leaves out
    batch_size = min(batch_size, n)
    per_epoch = n // batch_size  # the rest of a permutation is dropped: every batch is full
    total, warmup = epochs * per_epoch, min(WARMUP, epochs) * per_epoch
    progress, start = Progress(), time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator).to(device)
        for i in range(per_epoch):
            index = order[i * batch_size : (i + 1) * batch_size]
            optimizer.param_groups[0]["lr"] = learning_rate(
                epoch * per_epoch + i, total, warmup, peak
            )
            x = pick(features, index, device).transpose(1, 2)  # (S, V, B)
            logits = torch.baddbmm(bias, weight, x)  # (S, H * K, B)
            logits = logits.view(s * heads, classes, batch_size)
            target = labels[index].expand(s * heads, batch_size)
            loss = F.cross_entropy(logits, target, reduction="none")  # (S * H, B)
            mask = (folds[index] != own[:, None]) | (own[:, None] < 0)  # (H, B)
            loss = loss.view(s, heads, batch_size) * mask / mask.sum(1, keepdim=True).clamp(min=1)
            optimizer.zero_grad()
            loss.sum().backward()  # heads share no weight: a sum trains each as if alone
            optimizer.step()
        spent = time.monotonic() - start
        if spent > 2:
            left = spent / (epoch + 1) * (epochs - epoch - 1)
            progress.show(f"heads: epoch {epoch + 1} of {epochs}, {left:.0f} s left")
    return weight.detach(), bias.detach()


@torch.no_grad()
def head_ranks(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """How many classes score above the right one, for each head: features (N, S, V),
    labels (N,) -> (S, H, N) int; 0 is a top-1 hit, below 5 a top-5 hit."""
    s, ranks = len(weight), []
    for first in range(0, len(labels), 2000):
        rows = slice(first, first + 2000)
        x, y = pick(features, rows, labels.device), labels[rows]
        logits = torch.baddbmm(bias, weight, x.transpose(1, 2))  # (S, H * K, B)
        logits = logits.view(s, -1, k, x.shape[1])  # (S, H, K, B)
        right = logits.gather(2, y.expand(s, logits.shape[1], 1, -1))  # (S, H, 1, B)
        ranks.append((logits > right).sum(2))
    return torch.cat(ranks, dim=2)


@torch.no_grad()
def knn_accuracy(
    train: Tensor, test: Tensor, s: int, y_train: Tensor, y_test: Tensor, k: int
) -> float:
    """Percent of test images whose 20 nearest training images at time number s, by cosine, vote
    for their class; of equal votes the lowest class wins. Reads the training images in blocks."""

    def rows(features: Tensor, first: int) -> Tensor:
        """A block of unit vectors (B, V)."""
        part = features[first : first + KNN_BLOCK, s].to(y_train.device).float()
        return F.normalize(part, dim=1)

    hits, n = 0, len(y_train)
    for first in range(0, len(y_test), KNN_BLOCK):
        x, y = rows(test, first), y_test[first : first + KNN_BLOCK]
        near = torch.empty(len(x), 0, device=x.device)
        index = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        for start in range(0, n, KNN_BLOCK):
            cosine = x @ rows(train, start).T  # (B, block)
            best, where = cosine.topk(min(NEIGHBOURS, cosine.shape[1]), dim=1)
            near, index = torch.cat([near, best], 1), torch.cat([index, where + start], 1)
            near, keep = near.topk(min(NEIGHBOURS, near.shape[1]), dim=1)
            index = index.gather(1, keep)
        votes = F.one_hot(y_train[index], k).sum(1)  # (B, K)
        hits += (votes.argmax(1) == y).sum().item()
    return 100.0 * hits / len(y_test)


@dataclass
class Task:
    """What stays the same for every set of features: labels, folds, and how heads are trained."""

    y_train: Tensor  # (N,)
    y_test: Tensor  # (M,)
    folds: Tensor  # (N,), -1 .. F - 1
    classes: int
    epochs: int
    lr: float
    batch_size: int
    seeds: int

    def evaluate(self, train: Tensor, test: Tensor) -> list[dict[str, float | None]]:
        """Train and score the heads of features (N, S, V) and (M, S, V): for each t top1, top5
        (None up to 10 classes), held_out, in percent; top1_std where there are several seeds."""
        runs = []
        for seed in range(self.seeds):
            weight, bias = train_heads(
                train, self.y_train, self.folds, self.classes, self.epochs, self.lr,
                self.batch_size, seed,
            )  # fmt: skip
            ranks = head_ranks(test, self.y_test, weight, bias, self.classes)[:, 0]  # (S, M)
            seen = head_ranks(train, self.y_train, weight, bias, self.classes)  # (S, H, N)
            held = self.folds >= 0
            own = seen[:, 1:][:, self.folds[held], held.nonzero()[:, 0]]  # by the head of its fold
            hits = [ranks == 0, ranks < 5, own == 0]
            runs.append(torch.stack([100 * hit.double().mean(1) for hit in hits]))
        stacked = torch.stack(runs)  # (seeds, 3, S)
        rows = []
        for top1, top5, held_out in stacked.mean(0).T.tolist():
            top5 = top5 if self.classes > 10 else None
            rows.append({"top1": top1, "top5": top5, "held_out": held_out})
            if self.seeds > 1:
                rows[-1]["top1_std"] = stacked[:, 0, len(rows) - 1].std().item()
        return rows

    def rows(self, train: Tensor, test: Tensor, times: list[int | None]) -> list[dict[str, Any]]:
        """The rows of probe.json: `evaluate` and kNN at each of the times."""
        rows = [{"t": t, **row} for t, row in zip(times, self.evaluate(train, test))]
        for s, row in enumerate(rows):
            row["knn"] = knn_accuracy(train, test, s, self.y_train, self.y_test, self.classes)
        return rows


def choose(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The row with the largest `key`, the smallest t of equals."""
    return max(rows, key=lambda row: (row[key], -(row["t"] or 0)))  # one row may have no t


def binomial_interval(percent: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval, in percent, of an accuracy measured on n images."""
    p, z = percent / 100, 1.96
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (centre - spread) / (1 + z * z / n), 100 * (centre + spread) / (1 + z * z / n)
