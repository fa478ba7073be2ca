"""diffusion.py against independent NumPy and against its own closed forms."""

import numpy as np
import pytest
import torch

import diffusion as D

ABAR = D.alphas_cumprod()


def test_schedule_equals_a_numpy_cumulative_product():
    betas = np.linspace(1e-4, 0.02, 1000)
    assert D.linear_betas().dtype == torch.float64
    np.testing.assert_allclose(ABAR.numpy(), np.cumprod(1 - betas), rtol=1e-12)
    assert abs(ABAR[0].item() - 0.9999) < 1e-12 and 0 < ABAR[-1] < 5e-5


@pytest.mark.parametrize("t", [0, 99, 500, 999])
def test_chained_steps_have_the_mean_and_variance_of_the_closed_form(t):
    generator = torch.Generator().manual_seed(t)
    x0, n = 0.7, 40_000
    x = torch.full((n,), x0, dtype=torch.float64)
    for beta in D.linear_betas()[: t + 1]:  # Eq. 3.1: q(x_t | x_{t-1})
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        x = (1 - beta).sqrt() * x + beta.sqrt() * noise
    error = (1 - ABAR[t]).sqrt().item() / n**0.5
    assert abs(x.mean().item() - ABAR[t].sqrt().item() * x0) < 4 * error
    assert x.var().item() == pytest.approx(1 - ABAR[t].item(), rel=4 * (2 / n) ** 0.5)


def test_q_sample_is_linear_with_the_roots_of_abar():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
    eps = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 999])
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t.numpy()].reshape(-1, 1, 1, 1)
    want = np.sqrt(a) * x0.numpy() + np.sqrt(1 - a) * eps.numpy()
    np.testing.assert_allclose(D.q_sample(x0, t, eps, ABAR).numpy(), want, rtol=1e-12)


def test_predict_x0_inverts_q_sample_and_clips():
    x0 = torch.linspace(-3, 3, 27, dtype=torch.float64).view(1, 3, 3, 3)
    eps = torch.randn(1, 3, 3, 3, dtype=torch.float64)
    x_t = D.q_sample(x0, torch.tensor([700]), eps, ABAR)
    assert torch.allclose(D.predict_x0(x_t, ABAR[700], eps), x0, atol=1e-12)
    assert torch.allclose(D.predict_x0(x_t, ABAR[700], eps, clip=True), x0.clamp(-1, 1))


def test_eps_loss_is_the_mean_square_per_image_in_fp32():
    eps_hat = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    eps = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 2]]).view(2, 1, 2, 2)
    loss = D.eps_loss(eps_hat, eps)
    assert loss.dtype == torch.float32 and loss.tolist() == [7.5, 1.0]


def test_ddim_times():
    assert D.ddim_times(1) == [999]
    assert D.ddim_times(2) == [999, 0]
    assert D.ddim_times(7) == [999, 832, 666, 500, 333, 166, 0]
    assert D.ddim_times(1000) == list(range(999, -1, -1))
    times = D.ddim_times(999)
    assert len(set(times)) == 999 and times[0] == 999 and times[-1] == 0
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="choose from 1 to 1000"):
            D.ddim_times(steps)


def oracle(x0):
    """The eps_fn that knows x0: the noise that Eq. 3.2 must have added."""

    def eps_fn(x, t):
        return (x - ABAR[t].sqrt() * x0) / (1 - ABAR[t]).sqrt()

    return eps_fn


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("clip", [False, True])
def test_an_oracle_eps_makes_ddim_return_x0(steps, clip):
    generator = torch.Generator().manual_seed(steps)
    x0 = torch.rand(2, 1, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    *_, x = D.denoise(oracle(x0), noise, steps, clip=clip)
    assert (x - x0).abs().max() < 1e-9


def test_inversion_then_decoding_is_the_identity_for_a_constant_eps():
    """For an eps that does not change with x, DDIM's steps are exactly reversible."""
    x0 = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    eps = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    *_, code = D.invert(lambda x, t: eps, x0, 40)
    *path, _ = D.denoise(lambda x, t: eps, code, 40, clip=False)
    assert (path[-1] - x0).abs().max() < 1e-9  # x at t = 0, where inversion began


@pytest.mark.parametrize("steps", [50, 1000])
def test_eta_1_adds_the_posterior_variance(steps):
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    times = D.ddim_times(steps)
    for t, prev in zip(times, times[1:]):
        beta = betas[t] if steps == 1000 else 1 - abar[t] / abar[prev]
        want = beta * (1 - abar[prev]) / (1 - abar[t])
        assert D.posterior_variance(ABAR[t], ABAR[prev]).item() == pytest.approx(want, rel=1e-8)
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        moved = D.ddim_step(zero, zero, ABAR[t], ABAR[prev], eta=1.0, noise=one)
        assert moved.item() == pytest.approx(want**0.5, rel=1e-8)


def test_eta_1_is_the_ancestral_step_of_ddpm():
    """The mean against DDPM's own formula (Ho et al. 2020, Eq. 11), written from betas."""
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    x, eps = torch.randn(2, 1, 3, 3).double(), torch.randn(2, 1, 3, 3).double()
    for t in (1, 10, 500, 999):
        want = (x - betas[t] / np.sqrt(1 - abar[t]) * eps) / np.sqrt(1 - betas[t])
        noise = torch.zeros_like(x)
        got = D.ddim_step(x, eps, ABAR[t], ABAR[t - 1], eta=1.0, noise=noise)
        assert torch.allclose(got, want, atol=1e-10)


def test_no_noise_at_the_last_step_and_some_before():
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    runs = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        calls = []

        def eps_fn(x, t, calls=calls):
            calls.append(x)
            return torch.zeros_like(x)

        *_, last = D.denoise(eps_fn, x, 5, eta=1.0, clip=False, generator=generator)
        assert torch.allclose(last, calls[-1] / ABAR[0].sqrt())  # the last step is x0-hat itself
        runs.append(last)
    assert not torch.allclose(runs[0], runs[1])


def test_inversion_never_clips():
    x0 = torch.full((1, 1, 2, 2), 5.0, dtype=torch.float64)
    *_, code = D.invert(oracle(x0), x0, 20)
    assert torch.isfinite(code).all() and code.abs().max() > 0.01
    *path, x = D.denoise(oracle(x0), code, 20, clip=False)
    assert (x - x0).abs().max() < 1e-9
