"""model.py against naive NumPy, its state at initialisation, and the parameters of Table 4."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import diffusion as D
import model as M

TINY = M.ModelConfig(8, 3, 2, 16, 2, 2, 8, 1, (1, 2), (4,), 2, dropout=0.0)


def randomise(module):
    """Make every parameter random, so that no branch is off."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return module


def parameters(module):
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


def row_config(preset, name, row):
    """The ModelConfig of a row of the table."""
    columns = M.table_row(preset, name, row)
    channels = data.SETS[name].channels
    sizes = {field.name for field in fields(M.ModelConfig)} - {"channels"}
    return M.ModelConfig(channels=channels, **{key: columns[key] for key in sizes})


# ---------------------------------------------------------------------------- layers


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
    assert got.shape == (9, 8)
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


@pytest.mark.parametrize("n, fused", [(M.SHORT, 0), (M.SHORT + 1, 1)])
def test_only_long_sequences_take_the_fused_kernel(n, fused, monkeypatch):
    """However wide the heads are."""
    calls = []
    monkeypatch.setattr(M.F, "scaled_dot_product_attention", lambda q, k, v: calls.append(n) or q)
    for width in (4, 2 * M.SHORT):
        M.attention(*torch.zeros(3, 1, 1, n, width))
    assert len(calls) == 2 * fused


def test_both_blocks_of_long_sequences_have_a_fused_kernel():
    """PyTorch falls back to written-out scores, without a word, where it has no other kernel."""
    x, tokens = torch.randn(1, 8, 20, 20), torch.randn(1, 400, 8)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert M.AttentionBlock(8, 2)(x).shape == x.shape
        assert M.DiTBlock(8, 2)(tokens, torch.randn(1, 8)).shape == tokens.shape


def test_patchify_order_and_unpatchify_shape():
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    patches = M.patchify(x, 2)
    assert patches.shape == (2, 4, 12)
    for n, (row, col) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        want = [x[1, c, row + i, col + j] for i in range(2) for j in range(2) for c in range(3)]
        assert patches[1, n].tolist() == [int(w) for w in want]
    back = M.unpatchify(patches, 2, 3)
    assert back.shape == (2, 3, 4, 4) and torch.equal(back, x)  # (B, C, H, W), as its docstring


def test_groups_hold_four_channels_or_more_and_are_32_for_the_papers_widths():
    assert M.GroupNorm(16).num_groups == 4
    widths = {
        columns["base"] * m
        for row in (32, 64, 256)
        for columns in [M.table_row("paper", "", row)]
        for m in columns["mult"]
    }
    assert widths == {128, 256, 384, 512, 768, 1024}
    assert {M.GroupNorm(width).num_groups for width in widths} == {32}


def test_resblock_halves_by_average_on_both_branches():
    block = M.ResBlock(8, 8, 32, 0.0, down=True)
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    want = x.view(2, 8, 2, 2, 2, 2).mean((3, 5))
    assert torch.allclose(block(x, time), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_norms_softmax_and_loss_are_fp32_in_half_precision(dtype):
    """Each in half precision equals the float64 value of the same numbers, rounded once: half
    precision sums over so many would be off by far more."""
    generator = torch.Generator().manual_seed(0)
    x = (10 + torch.randn(2, 16, 32, 32, generator=generator)).to(dtype)
    step = 2 * torch.finfo(dtype).eps

    def same(got, want):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=step, atol=step)

    same(M.GroupNorm(16)(x), M.GroupNorm(16).double()(x.double()))
    tokens = x.flatten(2)
    same(M.LayerNorm(1024)(tokens), M.LayerNorm(1024).double()(tokens.double()))
    for n in (16, M.SHORT + 1):
        q, k, v = (2 * torch.randn(3, 2, 3, n, 4, generator=generator)).to(dtype)
        v = (v * 0 + 1).to(dtype)  # the weights add up to one, whatever the scores' rounding
        same(M.attention(q, k, v), torch.ones_like(v).double())
    model = randomise(M.DiER(TINY))
    x0, t = torch.rand(2, 3, 8, 8), torch.tensor([1, 900])
    with torch.autocast("cpu", dtype=dtype):
        eps_hat = model(x0, t, x0)
    assert eps_hat.dtype == dtype  # the products did run in half precision
    assert D.eps_loss(eps_hat, x0).dtype == torch.float32


# ---------------------------------------------------------------------------- networks


def test_initial_output_is_zero_so_the_first_loss_is_one():
    model = M.DiER(TINY)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(64, 3, 8, 8, generator=generator) * 2 - 1
    eps = torch.randn(64, 3, 8, 8, generator=generator)
    t = torch.randint(1000, (64,), generator=generator)
    eps_hat = model(D.q_sample(x0, t, eps, D.alphas_cumprod().float()), t, x0)
    assert eps_hat.shape == x0.shape and torch.count_nonzero(eps_hat) == 0
    assert D.eps_loss(eps_hat, eps).mean().item() == pytest.approx(1.0, abs=0.04)


def test_linear_layers_of_the_dit_start_xavier_uniform_and_its_time_mlp_small():
    torch.manual_seed(0)
    dit = M.DiT(row_config("cpu", "mnist", 32))
    block = dit.blocks[0]
    for layer in (dit.embed, dit.v_proj, block.qkv, block.proj, block.fc1, block.fc2):
        largest = math.sqrt(6 / sum(layer.weight.shape))  # Glorot and Bengio 2010
        assert 0.99 * largest < layer.weight.abs().max().item() <= largest
        assert layer.weight.std().item() == pytest.approx(largest / math.sqrt(3), rel=0.02)
        assert not layer.bias.any()
    for layer in (dit.time_mlp[0], dit.time_mlp[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert layer.weight.abs().max() > 0.06 and not layer.bias.any()  # a normal's tails


def test_initially_v_depends_on_the_image_and_not_on_t():
    torch.manual_seed(0)
    encoder = M.Encoder(TINY).eval()
    x0 = torch.rand(2, 3, 8, 8)
    a, b = (encoder(x0, torch.full((2,), t)) for t in (0, 999))
    assert a.shape == (2, M.V) == (2, 1024)
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
    torch.manual_seed(0)
    dit = randomise(M.DiT(TINY))
    x, t, v = torch.randn(2, 3, 8, 8), torch.tensor([5, 5]), torch.randn(2, M.V)
    base = dit(x, t, v)
    assert base.shape == x.shape
    assert not torch.allclose(base, dit(x, t, v + 1), atol=1e-4)
    assert not torch.allclose(base, dit(x, t + 500, v), atol=1e-4)


def test_the_rank_of_v_is_bounded_by_the_last_width():
    torch.manual_seed(0)
    encoder = randomise(M.Encoder(TINY)).double().eval()
    v = encoder(torch.rand(64, 3, 8, 8).double(), torch.full((64,), 100))
    assert torch.linalg.matrix_rank(v - v.mean(0)) == TINY.base * TINY.mult[-1] == 16


def test_noise_that_does_not_fit_a_token_never_reaches_the_dit():
    torch.manual_seed(0)
    dit = randomise(M.DiT(replace(TINY, patch=4)))  # 48 numbers of a patch into 16
    x_t, v = torch.randn(1, 3, 8, 8), torch.randn(1, M.V)
    kernel = torch.linalg.svd(dit.embed.weight)[2][16:]  # the 32 directions the product loses
    lost = M.unpatchify(torch.randn(1, 4, 32) @ kernel, 4, 3)
    t = torch.tensor([500])
    assert torch.allclose(dit(x_t, t, v), dit(x_t + lost, t, v), atol=1e-3)
    assert not torch.allclose(dit(x_t, t, v), dit(x_t + torch.randn_like(x_t), t, v), atol=0.1)


def test_dit_against_a_plain_forward_in_float64():
    """One block and the output, token by token, written from the paper's formulas in NumPy."""
    torch.manual_seed(0)
    dit = randomise(M.DiT(replace(TINY, depth=1, heads=1))).double()
    x, t, v = torch.randn(1, 3, 8, 8).double(), torch.tensor([321]), torch.randn(1, M.V).double()
    weights = {name: p.detach().numpy() for name, p in dit.state_dict().items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

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
    gelu = 0.5 * z * (1 + np.vectorize(math.erf)(z / np.sqrt(2)))
    h = h + g2 * linear("blocks.0.fc2", gelu)
    shift, scale = np.split(linear("ada", silu(c)), 2, axis=1)
    out = linear("out", norm(h) * (1 + scale) + shift)
    got = M.patchify(dit(x, t, v), 2)[0].detach().numpy()
    np.testing.assert_allclose(got, out, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------- Table 4


@pytest.mark.parametrize(
    "row, dit, encoder", [(32, 8.36, 38.37), (64, 32.89, 39.95), (256, 173.1, 181.1)]
)
def test_parameter_counts_of_table_4(row, dit, encoder):
    name = {32: "cifar10", 64: "tiny-imagenet", 256: "bccd"}[row]
    with torch.device("meta"):
        model = M.DiER(row_config("paper", name, row))
    assert parameters(model.dit) / 1e6 == pytest.approx(dit, rel=0.01)
    assert parameters(model.encoder) / 1e6 == pytest.approx(encoder, rel=0.01)


def test_the_paper_rows_are_table_4_as_published():
    columns = ("patch", "hidden", "heads", "base", "attention", "enc_heads", "mult")
    same = {"mnist", "cifar10", "cifar100"}
    for name in same:
        row = M.table_row("paper", name, data.SETS[name].row)
        assert [row[c] for c in columns] == [2, 192, 3, 128, (16, 8), 4, (1, 2, 3, 4)]
    row = M.table_row("paper", "tiny-imagenet", data.SETS["tiny-imagenet"].row)
    assert [row[c] for c in columns] == [4, 384, 6, 128, (16, 8), 4, (1, 2, 3, 4)]
    for name in ("bccd", "oct2017"):
        row = M.table_row("paper", name, data.SETS[name].row)
        assert [row[c] for c in columns] == [8, 768, 12, 256, (16, 8), 4, (1, 1, 2, 2, 3, 4)]


@pytest.mark.parametrize("preset", M.PRESETS)
@pytest.mark.parametrize("name", data.SETS)
def test_every_set_has_a_row_that_builds_and_whose_tokens_hold_the_noise(preset, name):
    facts = data.SETS[name]
    columns, cfg = M.table_row(preset, name, facts.row), row_config(preset, name, facts.row)
    with torch.device("meta"):
        model = M.DiER(cfg)
    assert set(columns) == set(M.COLUMNS) and columns["epochs"] >= 1
    assert cfg.hidden >= cfg.patch**2 * cfg.channels
    if preset == "paper":
        assert (cfg.size, columns["epochs"]) == (facts.row, 200)
        assert columns["lr"] == (1e-5 if facts.row == 256 else 1e-4)
        assert columns["batch_size"] == (16 if facts.row == 256 else 128)
    else:
        assert cfg.size == {32: 16, 64: 32, 256: 64}[facts.row] and parameters(model) < 7e6


def test_a_set_takes_its_own_row_before_that_of_its_size():
    assert all(len(row) == len(M.COLUMNS) for row in M.TABLE.values())
    assert {key.split()[0] for key in M.TABLE} == set(M.PRESETS)
    assert M.table_row("cpu", "glyphs", 32)["epochs"] != M.table_row("cpu", "mnist", 32)["epochs"]
    assert M.table_row("cpu", "my pictures", 64) == M.table_row("cpu", "tiny-imagenet", 64)
    assert M.table_row("paper", "glyphs", 32) == M.table_row("paper", "cifar10", 32)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"size": 30, "patch": 4}, "size 30 is not a multiple of patch 4: give --patch 3"),
        ({"size": 9, "patch": 3}, "size 9 cannot be halved 1 times: give --size 8 or fewer --mult"),
        (
            {"size": 17, "patch": 1, "mult": (1, 2, 3, 4)},
            "size 17 cannot be halved 3 times: give --size 16",
        ),
        ({"hidden": 20}, "hidden 20 is not a multiple of 4 x heads 2: give --hidden 16"),
        ({"hidden": 4}, "hidden 4 is not a multiple of 4 x heads 2: give --hidden 8"),
        ({"base": 7}, "encoder width 7 (base 7 x mult) does not divide into 1 groups and 2 heads"),
        ({"enc_heads": 3}, "encoder width 8 (base 8 x mult) does not divide into 2 groups and 3"),
        ({"base": 18}, "encoder width 18 (base 18 x mult) does not divide into 4 groups"),
    ],
)
def test_sizes_that_do_not_fit_say_so_and_show_the_way_out(change, line):
    with pytest.raises(ValueError) as error:
        replace(TINY, **change)
    message = str(error.value)
    assert message.startswith(line) and len(message.splitlines()) == 1
    assert "give " in message


@pytest.mark.slow
@pytest.mark.parametrize("row, batch", [(32, 2), (64, 1), (256, 1)])
def test_the_sizes_of_table_4_take_a_training_step(row, batch):
    cfg = row_config("paper", {32: "cifar10", 64: "tiny-imagenet", 256: "bccd"}[row], row)
    torch.manual_seed(0)
    model = M.DiER(cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    x0 = torch.rand(batch, 3, cfg.size, cfg.size)
    eps, t = torch.randn_like(x0), torch.randint(1000, (batch,))
    before = model.dit.out.weight.clone()
    loss = D.eps_loss(model(x0 + eps, t, x0), eps).mean()
    loss.backward()
    optimizer.step()
    assert 0.9 < loss.item() < 1.1 and not torch.equal(before, model.dit.out.weight)
