"""t-SNE (van der Maaten and Hinton, 2008), exact, for up to some thousand points.

    p_{j|i} ~ exp(-|x_i - x_j|^2 / 2 s_i^2), s_i so that the perplexity is the one asked for
    p_ij    = (p_{j|i} + p_{i|j}) / 2N
    q_ij    = (1 + |y_i - y_j|^2)^-1 / Z
    dC/dy_i = 4 sum_j (p_ij - q_ij) (1 + |y_i - y_j|^2)^-1 (y_i - y_j)

Every N x N step goes through the rows in blocks that stay in the processor's cache, so that an
iteration reads only P from memory.

Shapes: N points, D their width, R rows of a block.
"""

import math

import torch
from torch import Tensor

from data import progress

PERPLEXITY = 30.0
ITERATIONS, EXAGGERATED = 1000, 250  # in the first ones P is EXAGGERATION times too large,
EXAGGERATION = 12.0  # which gathers the clusters before they spread
ROWS = 250


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of points (R, D) and (N, D) -> (R, N), never below 0."""
    d = torch.addmm((b * b).sum(1)[None], a, b.T, alpha=-2.0)
    return d.add_((a * a).sum(1)[:, None]).clamp_(min=0.0)


def conditional(distances: Tensor, perplexity: float, own: Tensor) -> Tensor:
    """p_{j|i} of rows: squared distances (R, N) -> (R, N), p_{i|i} = 0; own (R,) is each row's i.

    The precision 1 / 2 s_i^2 is found by bisection of its logarithm: the entropy falls as the
    precision grows.
    """
    target = math.log(perplexity)
    distances = distances.scatter(1, own[:, None], math.inf)
    nearest = distances.min(1, keepdim=True).values
    shifted = distances - nearest  # p does not change, and the largest exponent is 0
    finite = torch.where(shifted.isinf(), 0.0, shifted)
    scale = finite.mean(1, keepdim=True).clamp(min=1e-12)
    low, high = torch.full_like(nearest, -20.0), torch.full_like(nearest, 20.0)
    for _ in range(50):
        middle = (low + high) / 2
        precision = middle.exp() / scale
        p = (-shifted * precision).exp()
        total = p.sum(1, keepdim=True)
        entropy = total.log() + precision * (p * finite).sum(1, keepdim=True) / total
        too_flat = entropy > target
        low = torch.where(too_flat, middle, low)
        high = torch.where(too_flat, high, middle)
        if (entropy - target).abs().max() < 1e-5:
            break
    return p / total


def joint(x: Tensor, perplexity: float) -> Tensor:
    """P (N, N) of points x (N, D): symmetric, zero on the diagonal, sum 1."""
    n, rows = len(x), []
    for index in torch.arange(n, device=x.device).split(ROWS):
        rows.append(conditional(squared_distances(x[index], x), perplexity, index))
    p = torch.cat(rows)
    return (p + p.T) / (2 * n)


def gradient(y: Tensor, p: Tensor, exaggeration: float) -> tuple[Tensor, Tensor]:
    """dC/dY (N, 2) and Z at y (N, 2), with p (N, N) multiplied by the exaggeration."""
    pull, push, z = torch.empty_like(y), torch.empty_like(y), y.new_zeros(())
    for first in range(0, len(y), ROWS):
        rows = slice(first, first + ROWS)
        near = squared_distances(y[rows], y).add_(1.0).reciprocal_()  # (R, N)
        near.diagonal(first).zero_()
        z += near.sum()
        attract = p[rows] * near
        pull[rows] = y[rows] * attract.sum(1, keepdim=True) - attract @ y
        near.square_()
        push[rows] = y[rows] * near.sum(1, keepdim=True) - near @ y
    return 4.0 * (exaggeration * pull - push / z), z


def pca(x: Tensor, width: int) -> Tensor:
    """The first principal components of x (N, D) -> (N, width). Signs are fixed, so that it is the
    same everywhere."""
    kind, x = x.dtype, x.double()  # in fp32 eigh fails on some of the ranks that few points have
    x = x - x.mean(0)
    vectors = torch.linalg.eigh(x.T @ x).eigenvectors[:, -width:].flip(1)  # (D, width)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (x @ (vectors * largest.sign())).to(kind)


@torch.no_grad()
def tsne(x: Tensor, perplexity: float = PERPLEXITY, iterations: int = ITERATIONS) -> Tensor:
    """Map x (N, D) to the plane, (N, 2) fp32: gradient descent with momentum and gains from a PCA
    start, so nothing is random. Raises ValueError for fewer than 4 points."""
    n = len(x)
    if n < 4:
        raise ValueError(f"{n} points are too few for t-SNE; take 4 or more")
    x = x.float()
    p = joint(x, min(perplexity, (n - 1) / 3)).clamp_(min=1e-12)
    y = pca(x, 2)
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-12)  # points that are all equal stay at 0
    rate = max(n / EXAGGERATION / 4, 50.0)
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    for k in progress(range(iterations), f"t-SNE of {n:,} points", iterations, "iterations"):
        early = k < min(EXAGGERATED, iterations // 4)
        g, _ = gradient(y, p, EXAGGERATION if early else 1.0)
        uphill = (g > 0) == (velocity > 0)  # the last step went uphill in this coordinate: brake
        gains = torch.where(uphill, gains * 0.8, gains + 0.2).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * g
        y = y + velocity
        y = y - y.mean(0)
    return y
