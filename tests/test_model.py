"""model.py against naive NumPy, its initial state, and the parameter counts of Table 4."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn

import diffusion as D
import model as M

TINY = M.ModelConfig(
    size=8, channels=3, patch=2, hidden=16, depth=2, heads=2, base=8, blocks=1, mult=(1, 2),
    attention=(4,), enc_heads=2, dropout=0.0,
)  # fmt: skip


def randomise(module):
    """Every parameter random, so that no branch is off."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float32) * 0.1
    return module


def test_sinusoid_against_numpy():
    t, width = [0, 1, 17, 999], 16
    got = M.sinusoid(torch.tensor(t), width).numpy()
    for i, time in enumerate(t):
        for k in range(width // 2):
            angle = time / 10_000 ** (k / (width // 2))
            assert got[i, k] == pytest.approx(math.cos(angle), abs=1e-12)
            assert got[i, width // 2 + k] == pytest.approx(math.sin(angle), abs=1e-12)


def test_positions_against_numpy():
    side, width = 3, 8
    got = M.positions_2d(side, width).numpy()
    for row in range(side):
        for col in range(side):
            want = []
            for axis in (row, col):
                angles = [axis / 10_000 ** (k / 2) for k in range(2)]
                want += [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
            np.testing.assert_allclose(got[row * side + col], want, atol=1e-6)


@pytest.mark.parametrize("n", [5, M.SHORT, M.SHORT + 1])
def test_attention_against_numpy_on_both_paths(n):
    generator = torch.Generator().manual_seed(n)
    q, k, v = torch.randn(3, 2, 3, n, 4, generator=generator, dtype=torch.float64)
    got = M.attention(q, k, v).numpy()
    q, k, v = q.numpy(), k.numpy(), v.numpy()
    for b in range(2):
        for h in range(3):
            scores = np.array([[np.dot(x, y) / 2.0 for y in k[b, h]] for x in q[b, h]])
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            np.testing.assert_allclose(got[b, h], weights @ v[b, h], atol=1e-12)


def test_patchify_order_and_inverse():
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    patches = M.patchify(x, 2)
    assert patches.shape == (2, 4, 12)
    for n, (row, col) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        want = [x[1, c, row + i, col + j] for i in range(2) for j in range(2) for c in range(3)]
        assert patches[1, n].tolist() == [int(w) for w in want]
    assert torch.equal(M.unpatchify(patches, 2, 3), x)


def test_groups_are_never_of_one_channel_and_32_for_the_papers_widths():
    assert M.GroupNorm(16).num_groups == 4
    for preset in M.PRESETS["paper"].values():
        for m in preset.model.mult:
            assert M.GroupNorm(preset.model.base * m).num_groups == 32


@pytest.mark.parametrize(
    "row,dit,encoder", [(32, 8.36, 38.37), (64, 32.89, 39.95), (256, 173.1, 181.1)]
)
def test_parameter_counts_of_table_4(row, dit, encoder):
    with torch.device("meta"):
        model = M.DiER(M.PRESETS["paper"][row].model)
    assert M.count_parameters(model.dit) / 1e6 == pytest.approx(dit, rel=0.01)
    assert M.count_parameters(model.encoder) / 1e6 == pytest.approx(encoder, rel=0.01)


@pytest.mark.parametrize("row,size", [(32, 16), (64, 32), (256, 64)])
def test_the_cpu_preset_has_its_input_size_and_is_small(row, size):
    cfg = M.PRESETS["cpu"][row].model
    with torch.device("meta"):
        model = M.DiER(cfg)
    assert cfg.size == size and M.count_parameters(model) < 7e6


@pytest.mark.parametrize("name", M.PRESETS)
def test_a_token_of_every_preset_is_wide_enough_for_the_noise_of_its_patch(name):
    for row, preset in M.PRESETS[name].items():
        channels = 1 if row in ("glyphs", "mnist") else 3
        assert preset.model.hidden >= preset.model.patch**2 * channels


def test_noise_that_does_not_fit_a_token_never_reaches_the_dit():
    dit = randomise(M.DiT(replace(TINY, patch=4)))  # 48 numbers of a patch into 16
    x_t, v = torch.randn(1, 3, 8, 8), torch.randn(1, M.V)
    kernel = torch.linalg.svd(dit.embed.weight)[2][16:]  # the 32 directions the product loses
    lost = M.unpatchify(torch.randn(1, 4, 32) @ kernel, 4, 3)
    t = torch.tensor([500])
    assert torch.allclose(dit(x_t, t, v), dit(x_t + lost, t, v), atol=1e-3)
    assert not torch.allclose(dit(x_t, t, v), dit(x_t + torch.randn_like(x_t), t, v), atol=0.1)


def test_initial_output_is_zero_so_the_first_loss_is_one():
    model = M.DiER(TINY)
    x0 = torch.rand(64, 3, 8, 8) * 2 - 1
    eps = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.randint(1000, (64,))
    eps_hat = model(D.q_sample(x0, t, eps, D.alphas_cumprod().float()), t, x0)
    assert torch.count_nonzero(eps_hat) == 0
    assert D.eps_loss(eps_hat, eps).mean().item() == pytest.approx(1.0, abs=0.04)


def test_initially_v_depends_on_the_image_and_not_on_t():
    encoder = M.Encoder(TINY).eval()
    x0 = torch.rand(2, 3, 8, 8)
    a, b = (encoder(x0, torch.full((2,), t)) for t in (0, 999))
    assert a.shape == (2, 1024)
    assert torch.equal(a, b) and not torch.allclose(a[0], a[1])
    randomise(encoder)
    a, b = (encoder(x0, torch.full((2,), t)) for t in (0, 999))
    assert not torch.allclose(a, b, atol=1e-3)


def test_encoder_gradient_is_exactly_zero_for_two_steps_and_not_by_the_fourth():
    torch.manual_seed(0)
    model = M.DiER(TINY)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    largest = []
    for _ in range(4):
        x0, eps = torch.rand(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
        t = torch.randint(1000, (8,))
        loss = D.eps_loss(model(x0 + eps, t, x0), eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grads = [p.grad for p in model.encoder.parameters() if p.grad is not None]
        largest.append(max(g.abs().max().item() for g in grads))
    assert largest[:2] == [0.0, 0.0] and largest[3] > 0


def test_v_reaches_the_dit_and_t_too():
    dit = randomise(M.DiT(TINY))
    x, t, v = torch.randn(2, 3, 8, 8), torch.tensor([5, 5]), torch.randn(2, 1024)
    base = dit(x, t, v)
    assert base.shape == x.shape
    assert not torch.allclose(base, dit(x, t, v + 1), atol=1e-4)
    assert not torch.allclose(base, dit(x, t + 500, v), atol=1e-4)


def test_dit_against_a_plain_forward_in_float64():
    """One block and the output, token by token, written from DESIGN's formulas in NumPy."""
    cfg = replace(TINY, depth=1, heads=1)
    dit = randomise(M.DiT(cfg)).double()
    x, t, v = torch.randn(1, 3, 8, 8).double(), torch.tensor([321]), torch.randn(1, 1024).double()
    w = {k: p.detach().numpy() for k, p in dit.state_dict().items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x):
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)

    def silu(x):
        return x / (1 + np.exp(-x))

    image = x[0].numpy()
    tokens = [
        [image[c, r + i, s + j] for i in range(2) for j in range(2) for c in range(3)]
        for r in range(0, 8, 2)
        for s in range(0, 8, 2)
    ]
    h = linear("embed", np.array(tokens)) + M.positions_2d(4, 16).float().numpy()
    sin = M.sinusoid(t, 256).numpy()
    c = linear("time_mlp.2", silu(linear("time_mlp.0", sin))) + linear("v_proj", v.numpy())
    s1, a1, g1, s2, a2, g2 = np.split(linear("blocks.0.ada", silu(c)), 6, axis=1)
    q, k, u = np.split(linear("blocks.0.qkv", norm(h) * (1 + a1) + s1), 3, axis=1)
    scores = np.exp(q @ k.T / 4.0)
    attended = scores / scores.sum(1, keepdims=True) @ u
    h = h + g1 * linear("blocks.0.proj", attended)
    z = linear("blocks.0.fc1", norm(h) * (1 + a2) + s2)
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    h = h + g2 * linear("blocks.0.fc2", gelu)
    shift, scale = np.split(linear("ada", silu(c)), 2, axis=1)
    out = linear("out", norm(h) * (1 + scale) + shift)
    got = M.patchify(dit(x, t, v), 2)[0].detach().numpy()
    np.testing.assert_allclose(got, out, rtol=1e-10, atol=1e-10)


def test_resblock_halves_by_average_on_both_branches():
    block = M.ResBlock(8, 8, 32, 0.0, down=True)
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    want = x.view(2, 8, 2, 2, 2, 2).mean((3, 5))
    assert torch.allclose(block(x, time), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_softmax_and_loss_stay_fp32_under_autocast(dtype, monkeypatch):
    seen = []
    for name in ("group_norm", "layer_norm"):
        real = getattr(torch.nn.functional, name)

        def spy(x, *args, real=real, **kw):
            out = real(x, *args, **kw)
            seen.append((x.dtype, out.dtype))
            return out

        monkeypatch.setattr(torch.nn.functional, name, spy)
    softmax = torch.Tensor.softmax

    def spy_softmax(x, *args, **kw):
        out = softmax(x, *args, **kw)
        seen.append((torch.float32, out.dtype))
        return out

    monkeypatch.setattr(torch.Tensor, "softmax", spy_softmax)
    model = randomise(M.DiER(TINY))
    x0, t = torch.rand(2, 3, 8, 8), torch.tensor([1, 900])
    with torch.autocast("cpu", dtype=dtype):
        eps_hat = model(x0, t, x0)
    assert eps_hat.dtype == dtype  # the products did run in half precision
    assert D.eps_loss(eps_hat, x0).dtype == torch.float32
    assert len(seen) > 10 and all(pair == (torch.float32, torch.float32) for pair in seen)


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(size=30, patch=4), "image size 30 is not a multiple of patch 4"),
        (dict(size=9, patch=3), "cannot be halved 1 times"),
        (dict(hidden=18), "hidden 18 is not a multiple of 4 x 2 heads"),
        (dict(base=6), "encoder width 6"),
    ],
)
def test_sizes_that_do_not_fit_say_so(change, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **change)


@pytest.mark.parametrize(
    "row,batch",
    [(32, 2), (64, 1), pytest.param(256, 1, marks=pytest.mark.slow)],
)
def test_the_presets_of_table_4_take_a_training_step(row, batch):
    cfg = M.PRESETS["paper"][row].model
    model = M.DiER(cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    x0 = torch.rand(batch, 3, cfg.size, cfg.size)
    eps, t = torch.randn_like(x0), torch.randint(1000, (batch,))
    before = model.dit.out.weight.clone()
    loss = D.eps_loss(model(x0 + eps, t, x0), eps).mean()
    loss.backward()
    optimizer.step()
    assert 0.9 < loss.item() < 1.1 and not torch.equal(before, model.dit.out.weight)
