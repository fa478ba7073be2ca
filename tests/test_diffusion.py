"""diffusion.py against independent NumPy and against its own closed forms."""

import numpy as np
import pytest
import torch

import diffusion as D

ABAR = D.alphas_cumprod()
BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR_NUMPY = np.cumprod(1 - BETAS)
DOUBLE = torch.float64


def normal(*shape, seed=0):
    """Seeded Gaussian numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def oracle(x0):
    """The eps_fn that knows x0: the noise that Eq. 3.2 must have added."""

    def eps_fn(x, t):
        return (x - ABAR[t].sqrt() * x0) / (1 - ABAR[t]).sqrt()

    return eps_fn


# ---------------------------------------------------------------------------- noise


def test_schedule_equals_a_numpy_cumulative_product():
    assert D.linear_betas().dtype == ABAR.dtype == DOUBLE
    np.testing.assert_allclose(D.linear_betas().numpy(), BETAS, rtol=1e-12)
    np.testing.assert_allclose(ABAR.numpy(), ABAR_NUMPY, rtol=1e-12)
    assert abs(ABAR[0].item() - 0.9999) < 1e-12 and 0 < ABAR[-1] < 5e-5


@pytest.mark.parametrize("t", [0, 99, 500, 999])
def test_chained_steps_have_the_mean_and_variance_of_the_closed_form(t):
    """The step of Eq. 3.1, t + 1 times, against Eq. 3.2 in one jump."""
    generator = torch.Generator().manual_seed(t)
    x0, n = 0.7, 20_000
    x = torch.full((n,), x0, dtype=DOUBLE)
    for beta in D.linear_betas()[: t + 1]:
        noise = torch.randn(n, generator=generator, dtype=DOUBLE)
        x = (1 - beta).sqrt() * x + beta.sqrt() * noise
    zero, one, time = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([t])
    mean = D.q_sample(x0 * one, time, zero, ABAR).item()
    std = D.q_sample(zero, time, one, ABAR).item()
    assert abs(x.mean().item() - mean) < 4 * std / n**0.5
    assert x.var().item() == pytest.approx(std**2, rel=4 * (2 / n) ** 0.5)


def test_q_sample_is_linear_with_the_roots_of_abar():
    x0, eps = normal(4, 3, 5, 5), normal(4, 3, 5, 5, seed=1)
    t = torch.tensor([0, 10, 500, 999])
    a = ABAR_NUMPY[t.numpy()].reshape(-1, 1, 1, 1)
    want = np.sqrt(a) * x0.numpy() + np.sqrt(1 - a) * eps.numpy()
    np.testing.assert_allclose(D.q_sample(x0, t, eps, ABAR).numpy(), want, rtol=1e-12)


def test_predict_x0_inverts_q_sample_and_clips():
    x0 = torch.linspace(-3, 3, 27, dtype=DOUBLE).view(1, 3, 3, 3)
    eps = normal(1, 3, 3, 3)
    x_t = D.q_sample(x0, torch.tensor([700]), eps, ABAR)
    assert torch.allclose(D.predict_x0(x_t, ABAR[700], eps), x0, atol=1e-12)
    assert torch.allclose(D.predict_x0(x_t, ABAR[700], eps, clip=True), x0.clamp(-1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, DOUBLE])
def test_eps_loss_is_the_mean_square_per_image_in_fp32(dtype):
    eps = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 2]], dtype=dtype).view(2, 1, 2, 2)
    for guess, want in ((torch.zeros_like(eps), [7.5, 1.0]), (torch.ones_like(eps), [3.5, 1.0])):
        loss = D.eps_loss(guess, eps)
        assert loss.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
        assert loss.tolist() == want


# ---------------------------------------------------------------------------- DDIM


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


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("clip", [False, True])
def test_an_oracle_eps_makes_ddim_return_x0(steps, clip):
    """The oracle's noise follows training's schedule, so sampling cannot use another."""
    x0 = torch.tanh(normal(2, 1, 4, 4))
    x = D.ddim_sample(oracle(x0), normal(2, 1, 4, 4, seed=1), steps, clip=clip)
    assert (x - x0).abs().max() < 1e-9


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_x_on_the_way_to_the_image_has_the_noise_that_training_adds_at_its_t(eta):
    """Sampling with another schedule than training hands the network noise that it never saw. Of
    images that are all x0, x_t has the mean and the variance of Eq. 3.2 at each t visited."""
    x0, n, seen = 0.7, 10_000, []
    knows = oracle(x0)

    def eps_fn(x, t):
        seen.append((t, x.mean().item(), x.var().item()))
        return knows(x, t)

    generator = torch.Generator().manual_seed(7)
    D.ddim_sample(eps_fn, normal(n, 1, 1, 1), 10, False, eta, generator)
    assert [t for t, _, _ in seen] == D.ddim_times(10)
    for t, mean, variance in seen[1:]:
        a = ABAR_NUMPY[t]
        assert mean == pytest.approx(a**0.5 * x0, abs=5 * ((1 - a) / n) ** 0.5)
        assert variance == pytest.approx(1 - a, rel=5 * (2 / n) ** 0.5)


def test_inversion_then_decoding_is_the_identity_for_a_constant_eps():
    """For an eps that does not change with x, DDIM's steps are exactly reversible."""
    x0, eps = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    visited = []

    def eps_fn(x, t):
        visited.append((t, x))
        return eps

    code = D.ddim_invert(eps_fn, x0, 40)
    assert [t for t, _ in visited] == D.ddim_times(40)[:0:-1]  # from 0 on, but for 999
    x0_hat = D.predict_x0(x0, ABAR[0], eps)
    assert torch.allclose(code, D.q_sample(x0_hat, torch.tensor([999, 999]), eps, ABAR))
    D.ddim_sample(eps_fn, code, 40, clip=False)
    t, x = visited[-1]
    assert t == 0 and (x - x0).abs().max() < 1e-9  # x at t = 0, where inversion began


def test_inversion_never_clips_and_one_step_is_no_move():
    x0 = torch.full((1, 1, 2, 2), 5.0, dtype=DOUBLE)
    code = D.ddim_invert(oracle(x0), x0, 20)
    assert torch.isfinite(code).all() and code.abs().max() > 0.01
    x = D.ddim_sample(oracle(x0), code, 20, clip=False)
    assert (x - x0).abs().max() < 1e-9
    assert torch.equal(D.ddim_invert(oracle(x0), x0, 1), x0)


def test_a_clipped_x0_hat_comes_with_the_eps_that_belongs_to_it():
    """clip changes x0-hat, and eps with it: both still describe the same x_t."""
    x_t, eps = 3 * normal(1, 1, 4, 4), normal(1, 1, 4, 4, seed=1)
    x0 = D.predict_x0(x_t, ABAR[300], eps, clip=True)
    rest = (x_t - ABAR[300].sqrt() * x0) / (1 - ABAR[300]).sqrt()
    want = D.q_sample(x0, torch.tensor([200]), rest, ABAR)
    got = D.ddim_step(x_t, eps, ABAR[300], ABAR[200], clip=True)
    assert torch.allclose(got, want, atol=1e-12) and x0.abs().max() == 1


@pytest.mark.parametrize("steps, eta", [(50, 1.0), (1000, 1.0), (50, 0.5)])
def test_eta_1_adds_the_posterior_variance_and_eta_scales_its_root(steps, eta):
    times = D.ddim_times(steps)
    zero, one = torch.zeros(1, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    for t, prev in list(zip(times, times[1:]))[:: steps // 50]:
        beta = BETAS[t] if steps == 1000 else 1 - ABAR_NUMPY[t] / ABAR_NUMPY[prev]
        want = beta * (1 - ABAR_NUMPY[prev]) / (1 - ABAR_NUMPY[t])
        assert D.posterior_variance(ABAR[t], ABAR[prev]).item() == pytest.approx(want, rel=1e-8)
        moved = D.ddim_step(zero, zero, ABAR[t], ABAR[prev], eta, noise=one)
        assert moved.item() == pytest.approx(eta * want**0.5, rel=1e-8)


def test_eta_1_is_the_ancestral_step_of_ddpm():
    """The mean against DDPM's own formula (Ho et al. 2020, Eq. 11), written from betas."""
    x, eps = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)
    for t in (1, 10, 500, 999):
        want = (x - BETAS[t] / np.sqrt(1 - ABAR_NUMPY[t]) * eps) / np.sqrt(1 - BETAS[t])
        got = D.ddim_step(x, eps, ABAR[t], ABAR[t - 1], eta=1.0, noise=torch.zeros_like(x))
        assert torch.allclose(got, want, atol=1e-10)


def test_no_noise_at_the_last_step_and_some_before():
    x, results = normal(1, 1, 4, 4), []
    for seed in (0, 1, 1):
        visited = []

        def eps_fn(x, t, visited=visited):
            visited.append(x)
            return torch.zeros_like(x)

        generator = torch.Generator().manual_seed(seed)
        last = D.ddim_sample(eps_fn, x, 5, eta=1.0, clip=False, generator=generator)
        assert torch.allclose(last, visited[-1] / ABAR[0].sqrt())  # the last step is x0-hat itself
        results.append(last)
    assert not torch.allclose(results[0], results[1])
    assert torch.equal(results[1], results[2])  # noise comes from the generator alone
