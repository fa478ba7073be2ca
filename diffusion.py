"""The diffusion process: add noise, compute the loss of the predicted noise, denoise.

    x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps                 (Eq. 3.1)  linear_betas
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                     (Eq. 3.2)  q_sample
    L   = E || eps - eps_theta(x_t, t, v_t) ||^2, v_t = Encoder(x_0, t)  (Eq. 4.6)  eps_loss
    x_0-hat = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)                        predict_x0

The product of a thousand such small steps is q(x_1..x_T | x_0), the paper's Eq. 3.1. The sum of
Gaussian steps is Gaussian, so Eq. 3.2 jumps to any t at once: the image fades, the noise grows, the
variance goes from the image's to 1.

    t                        0     100     400     700     999
    sqrt(abar_t)         1.000   0.946   0.440   0.083   0.006     what is left of the image
    sqrt(1 - abar_t)     0.010   0.324   0.898   0.997   1.000     how much noise there is

Why predict the noise? Given x_t, the noise determines the image and the image the noise (the
equation of `predict_x0`), so a network could predict either. The two losses differ by a weight:
||eps - eps_hat||^2 = abar_t / (1 - abar_t) ||x_0 - x_0-hat||^2. This signal-to-noise ratio is 9999
at t = 0, where fine detail is decided, 4e-5 at t = 999: the loss hardly asks for x_0 there. DDPM
found that the unweighted loss of the noise gives better samples than the variational bound.

Time t is an integer in 0..999, and x_t at t = 0 already has the first, faintest noise. x_0 is the
clean image, as in the paper, not x_t at t = 0: its abar is 1. (Eq. 3.2 of the paper prints the
standard deviation where N(., .) takes the variance.) Nothing here knows a network: what walks the
chain takes any eps_fn(x_t, t) -> eps.

Shapes: B batch, C channels, H W pixels. Images are in [-1, 1].
"""

from collections.abc import Callable

import torch
from torch import Tensor

T = 1000  # number of noise levels (Sec. A.2)
BETA_FIRST, BETA_LAST = 1e-4, 0.02  # the linear schedule of DDPM

EpsFn = Callable[[Tensor, int], Tensor]


def linear_betas() -> Tensor:
    """beta_0 .. beta_999, float64 (1000,): the variance that each step of Eq. 3.1 adds."""
    return torch.linspace(BETA_FIRST, BETA_LAST, T, dtype=torch.float64)


def alphas_cumprod() -> Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), float64 (1000,): the share of x_0's variance left at t.

    Computed in float64 because the product of a thousand factors loses digits in float32; callers
    cast the result once.
    """
    return torch.cumprod(1.0 - linear_betas(), dim=0)


def q_sample(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0) in one jump (Eq. 3.2): x0, eps (B, C, H, W); t (B,) int -> (B, C, H, W).

    abar is `alphas_cumprod()` on x0's device, in x0's dtype.
    """
    a = abar[t].view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1.0 - a).sqrt() * eps


def eps_loss(eps_hat: Tensor, eps: Tensor) -> Tensor:
    """Eq. 4.6 for each image, averaged over C, H, W: mean squared error in fp32 -> (B,).

    Eq. 4.6 sums over C, H, W. Adam cancels the factor 1 / (C H W) of a mean, the gradient clip does
    not. The caller averages over the batch; one value an image also gives the loss by t for free.
    The expected value is 1 for a network that outputs 0, since E[eps^2] = 1.
    """
    if eps_hat.dtype != torch.float64:  # autocast may hand over half precision
        eps_hat, eps = eps_hat.float(), eps.float()
    return (eps_hat - eps).square().flatten(1).mean(1)


def predict_x0(x_t: Tensor, abar_t: Tensor, eps: Tensor, clip: bool = False) -> Tensor:
    """The one-step estimate x_0-hat: Eq. 3.2 solved for x_0; clip keeps it in [-1, 1].

    abar_t is a scalar or broadcasts against x_t (B, C, H, W).
    """
    x0 = (x_t - (1.0 - abar_t).sqrt() * eps) / abar_t.sqrt()
    return x0.clamp(-1.0, 1.0) if clip else x0


# ---------------------------------------------------------------------------- sampling


def ddim_times(steps: int) -> list[int]:
    """The times visited from noise to image: round(linspace(999, 0, steps)); steps = 1 is [999].

    Any number from 1 to 1000 works, not only divisors. Raises ValueError outside that range.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} steps: choose from 1 to {T}")
    return torch.linspace(T - 1, 0, steps, dtype=torch.float64).round().long().tolist()


def posterior_variance(abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """Variance of q(x_prev | x_t, x_0): beta (1 - abar_prev) / (1 - abar_t), with the beta of the
    whole jump, 1 - abar_t / abar_prev. It is 0 for the last step, where abar_prev = 1."""
    return (1.0 - abar_t / abar_prev) * (1.0 - abar_prev) / (1.0 - abar_t)


def ddim_step(
    x_t: Tensor,
    eps: Tensor,
    abar_t: Tensor,
    abar_prev: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
    clip: bool = False,
) -> Tensor:
    """One step of Eq. 3.3: x_t, eps (B, C, H, W), scalars abar_t, abar_prev -> x_prev (B, C, H, W).

    x_prev = sqrt(abar_prev) x_0-hat + sqrt(1 - abar_prev - var) eps + sqrt(var) noise: Eq. 3.2 with
    another abar. eta = 0 is DDIM (var = 0), eta = 1 DDPM's ancestral step (the posterior variance).
    abar_prev = 1 gives the image; with abar_prev < abar_t and eta = 0 it goes from image to noise.
    With clip, eps is recomputed from the clipped x_0-hat, so that both describe the same x_t.
    """
    x0 = predict_x0(x_t, abar_t, eps, clip)
    if clip:
        eps = (x_t - abar_t.sqrt() * x0) / (1.0 - abar_t).sqrt()
    variance = eta**2 * posterior_variance(abar_t, abar_prev)
    x = abar_prev.sqrt() * x0 + (1.0 - abar_prev - variance).clamp(min=0.0).sqrt() * eps
    return x + variance.sqrt() * noise if noise is not None else x


def ddim_sample(
    eps_fn: EpsFn,
    x: Tensor,
    steps: int,
    clip: bool,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Walk from x = x_999 (B, C, H, W) to the image (Eq. 3.3).

    clip belongs to decoding from noise; a stochastic code (`ddim_invert`) is decoded without it.
    eta = 0 is DDIM, as used here; eta = 1 is DDPM's sampler, with noise from the generator.
    """
    abar = alphas_cumprod().to(x)
    times = ddim_times(steps)
    for t, t_prev in zip(times, [*times[1:], None]):
        abar_prev = abar.new_ones(()) if t_prev is None else abar[t_prev]
        noise = None
        if eta and t_prev is not None:  # the last step's variance is 0: nothing to draw
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = ddim_step(x, eps_fn(x, t), abar[t], abar_prev, eta, noise, clip)
    return x


def ddim_invert(eps_fn: EpsFn, x0: Tensor, steps: int) -> Tensor:
    """DDIM inversion (App. C): the stochastic code of x0 (B, C, H, W), from which DDIM returns.

    Takes the clean x0 for the x_t of t = 0, whose noise is faint (0.01), and stops at x_999, where
    `ddim_sample` starts; steps = 1 has no move and returns x0 itself. Never clips.
    """
    abar = alphas_cumprod().to(x0)
    times = ddim_times(steps)[::-1]
    x = x0
    for t, t_next in zip(times, times[1:]):
        x = ddim_step(x, eps_fn(x, t), abar[t], abar[t_next])
    return x
