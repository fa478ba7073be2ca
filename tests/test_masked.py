"""appendix/masked.py and swin.py: masks, HOG, MAE, LMIM, Swin."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from appendix import masked, swin
from appendix.masked import LMIM, MAE, ViTConfig

CPU = torch.device("cpu")
VIT = ViTConfig(16, 1, 4, 32, 4, 2, 32, 2)  # 4 x 4 tokens
SWIN = swin.SwinConfig(16, 1, 1, 8, (2, 2, 2), (1, 2, 2), 4, 32)  # grids of 16, 8, 4


def images(n=2, channels=1, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.rand(n, channels, size, size, dtype=dtype, generator=generator) - 1


def built(kind, cfg):
    torch.manual_seed(0)
    return kind(cfg)


# ---------------------------------------------------------------------------- masks and targets


@pytest.mark.parametrize("n, visible", [(16, 4), (64, 16), (256, 64), (50, 12), (2, 1)])
def test_a_quarter_of_the_tokens_is_visible_and_each_has_one_place(n, visible):
    torch.manual_seed(0)
    seen, hidden = masked.random_split(50, n, 0.75, CPU)
    assert seen.shape == (50, visible) and hidden.shape == (50, n - visible)
    assert torch.equal(torch.cat([seen, hidden], 1).sort(1).values, torch.arange(n).expand(50, n))
    assert len({tuple(row) for row in seen.tolist()}) > 1


def naive_hog(image, cell, sobel):
    """(C, H, W) -> (G, G, C, 9) with loops."""
    channels, side, _ = image.shape
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    out = np.zeros((side // cell, side // cell, channels, 9))
    for c, y, x in np.ndindex(channels, side, side):
        p = padded[c, y : y + 3, x : x + 3]
        if sobel:
            gx = sum(w * (p[k, 2] - p[k, 0]) for k, w in enumerate((1, 2, 1)))
            gy = sum(w * (p[2, k] - p[0, k]) for k, w in enumerate((1, 2, 1)))
            degrees = math.degrees(math.atan2(gx, gy)) % 180
        else:
            gx = p[1, 2] - p[1, 0] if 0 < x < side - 1 else 0.0
            gy = p[2, 1] - p[0, 1] if 0 < y < side - 1 else 0.0
            degrees = math.degrees(math.atan2(gy, gx)) % 180
        out[y // cell, x // cell, c, min(8, int(degrees // 20))] += math.hypot(gx, gy) / cell**2
    return out


@pytest.mark.parametrize("sobel", [True, False])
@pytest.mark.parametrize("cell", [2, 4, 8])
def test_hog_against_loops(cell, sobel):
    x = images(2, 3, 8, torch.float64)
    x[1, 0] = 0.5  # flat: no gradient, no NaN
    for image, want in zip(x.numpy(), masked.hog(x, cell, sobel).numpy()):
        np.testing.assert_allclose(want, naive_hog(image, cell, sobel), atol=1e-9)


@pytest.mark.parametrize("sobel, across_x, across_y", [(True, 4, 0), (False, 0, 4)])
def test_bins_of_known_edges(sobel, across_x, across_y):
    """LMIM counts angles from the y axis, DMJD from the x axis; 45 and 135 degrees are bins 2 and
    6 in both, and the sign does not matter."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    edges = ((x, across_x), (y, across_y), (x + 0.99 * y, 2), (x - 1.01 * y, 6))
    for picture, bin_ in edges:
        for sign in (1, -1):
            histogram = masked.hog(sign * picture[None, None], 2, sobel)[0, 1, 1, 0]
            assert histogram.argmax() == bin_ and (histogram > 0).sum() == 1


def test_patches_are_normalised_where_they_have_numbers_enough():
    x = images(2, 3, 16)
    target = masked.patch_targets(x, 4)  # 48 numbers
    assert target.mean(2).abs().max() < 1e-5 and (target.var(2) - 1).abs().max() < 1e-2
    assert torch.equal(masked.patch_targets(x, 2), masked.patchify(x, 2))


# ---------------------------------------------------------------------------- MAE and LMIM


@pytest.mark.parametrize("kind", [MAE, LMIM])
def test_the_encoder_sees_visible_patches_alone(kind):
    net, x = built(kind, VIT), images(1)
    visible = torch.tensor([[0, 5, 10, 15]])
    before = net.encoder.layers(x, visible)
    changed = x.clone()
    changed[..., :4, 4:8] += 1  # token 1
    after = net.encoder.layers(changed, visible)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not torch.equal(before[-1], net.encoder.layers(x + 1, visible)[-1])


@pytest.mark.parametrize("kind", [MAE, LMIM])
def test_the_order_of_visible_tokens_does_not_matter(kind, monkeypatch):
    net, x, losses = built(kind, VIT).double(), images(dtype=torch.float64), []
    order = torch.randperm(16).expand(2, -1)
    for visible in (order[:, :4], order[:, :4].flip(1)):
        monkeypatch.setattr(masked, "random_split", lambda *_, v=visible: (v, order[:, 4:]))
        losses.append(net(x))
    assert torch.allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize("before", [0, 1])
def test_a_decoder_puts_each_visible_token_at_its_place(before):
    """Without its blocks; with and without a class token in front."""
    torch.manual_seed(0)
    net = masked.Decoder(4, 8, 32, 0, 1)
    x, visible = torch.randn(2, before + 3, 8), torch.tensor([[5, 0, 11], [2, 9, 4]])
    got, embedded = net.tokens(x, visible), net.embed(x)[:, before:]
    for b in range(2):
        want = net.mask[0].repeat(16, 1)
        want[visible[b]] = embedded[b]
        assert torch.allclose(got[b], net.norm(want + net.positions), atol=1e-6)


def test_mae_scores_hidden_patches_alone():
    net, x = built(MAE, VIT), images()
    torch.manual_seed(5)
    visible, hidden = masked.random_split(2, 16, 0.75, CPU)
    tokens = net.encoder.norm(net.encoder.layers(x, visible)[-1])
    error = (net.decoder(tokens, visible) - masked.patch_targets(x, 4)).square().mean(2)
    by_hand = [error[b, hidden[b]].mean().item() for b in range(2)]
    torch.manual_seed(5)
    assert net(x).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_the_feature_is_the_mean_of_patch_tokens_normalised():
    net, x = built(MAE, VIT).encoder, images()
    mean = net.layers(x)[-1][:, 1:].mean(1)
    assert torch.allclose(net(x, torch.zeros(2)), F.layer_norm(mean, (32,), eps=1e-6), atol=1e-6)


@pytest.mark.parametrize("size, patch, depth, cells, at", [
    (16, 4, 4, [2, 4, 8], [2, 3, 4]), (32, 4, 12, [2, 4, 8, 16], [2, 4, 10, 12]),
    (32, 2, 12, [2, 4, 8, 16], [2, 4, 10, 12]), (64, 8, 12, [2, 4, 8, 16], [2, 4, 10, 12]),
    (256, 16, 12, [4, 8, 16, 32], [2, 4, 10, 12]),
])  # fmt: skip
def test_lmim_has_the_cells_and_blocks_that_were_published(size, patch, depth, cells, at):
    with torch.device("meta"):
        net = LMIM(ViTConfig(size, 1, patch, 32, depth, 2, 32, 1))
    assert [scale.cell for scale in net.scales] == cells and net.at == at
    assert [len(scale.split) for scale in net.scales] == [
        max(0, int(math.log2(patch / cell))) for cell in cells
    ]


def test_lmim_weighs_each_cell_by_its_hidden_share():
    net, visible = built(LMIM, VIT), torch.tensor([[0, 1, 4, 10], [3, 6, 9, 12]])
    for scale in net.scales:
        cells = 16 // scale.cell
        for b, share in enumerate(scale.hidden(visible)):
            hidden = np.ones((4, 4))
            hidden.flat[visible[b].tolist()] = 0
            pixels = np.kron(hidden, np.ones((4, 4)))
            want = pixels.reshape(cells, scale.cell, cells, scale.cell).mean((1, 3))
            np.testing.assert_allclose(share.view(cells, cells), want, atol=1e-6)
    guess, hidden = torch.rand(2, 16, 9), torch.zeros(2, 16)
    hidden[:, 3], hidden[:, 7] = 0.5, 0.25
    target = F.normalize(masked.hog(images(), 4, True), dim=4).view(2, 16, 9)
    error = (guess - target).square().mean(2)
    want = (2 * error[:, 3] + error[:, 7]) / 3
    assert torch.allclose(masked.hog_error(guess, images(), 4, hidden), want, atol=1e-6)


def test_tokens_are_split_into_the_squares_they_cover():
    """A scale whose layers pass a token's number on: the cells of a token stand where it stood."""
    scale = built(LMIM, VIT).scales[0]  # cells of 2 pixels: 4 a token
    scale.decoder.tokens = lambda x, visible: torch.arange(16.0).view(1, 16, 1).expand(1, 16, 64)
    with torch.no_grad():
        scale.split[0].weight.fill_(1 / 64)
        scale.decoder.out.weight.fill_(1 / 32)
    grid = scale(torch.zeros(1, 5, 32), torch.zeros(1, 4, dtype=torch.int64))[0, :, 0].view(8, 8)
    want = torch.arange(16.0).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.allclose(grid, want, atol=1e-5)


@pytest.mark.parametrize("k", range(3))
def test_each_loss_of_lmim_trains_the_blocks_below_it_alone(k, monkeypatch):
    net, losses, real = built(LMIM, VIT), [], masked.hog_error
    monkeypatch.setattr(masked, "hog_error", lambda *a: losses.append(real(*a)) or losses[-1])
    net(images())
    losses[k].mean().backward()
    trained = [block.fc1.weight.grad is not None for block in net.encoder.blocks]
    assert trained == [i < net.at[k] for i in range(4)]


# ---------------------------------------------------------------------------- Swin


def plain_block(block, x, side, window, shift, seen=None):
    """Swin's block on a grid, with roll and mask as published: (B, side * side, D). Keys that are
    not seen, bool (side, side), get no attention."""
    b, n, d = x.shape
    grid = block.norm1(x).view(b, side, side, d).roll((-shift, -shift), (1, 2))
    band = torch.zeros(side)  # 0, 1, 2 as in Swin's mask
    band[side - window : side - shift] = 1
    band[side - shift :] = 2
    region = 3 * band[:, None] + band if shift else torch.zeros(side, side)
    seen = torch.ones(side, side, dtype=torch.bool) if seen is None else seen
    seen, out = seen.roll((-shift, -shift), (0, 1)), torch.zeros_like(grid)
    at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"), -1)
    at = at.view(-1, 2)
    offsets = at[:, None] - at[None] + window - 1
    bias = block.bias[offsets[..., 0] * (2 * window - 1) + offsets[..., 1]].permute(2, 0, 1)
    for y in range(0, side, window):
        for left in range(0, side, window):
            part = (slice(None), slice(y, y + window), slice(left, left + window))
            h = block.qkv(grid[part].flatten(1, 2)).unflatten(2, (3, block.heads, -1))
            q, k, v = h.permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + bias
            same = region[part[1:]].flatten()
            scores = scores.masked_fill(same[:, None] != same[None], -torch.inf)
            scores = scores.masked_fill(~seen[part[1:]].flatten(), -1e30)
            h = (scores.softmax(3) @ v).transpose(1, 2).flatten(2)
            out[part] = h.unflatten(1, (window, window))
    x = x + block.proj(out.roll((shift, shift), (1, 2)).view(b, n, d))
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("side, shift", [(8, 0), (8, 2), (16, 2), (4, 0)])
def test_windows_without_a_roll_equal_swins_with_one(side, shift):
    torch.manual_seed(0)
    block = swin.SwinBlock(8, 2, 4).double()
    coords = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    order = torch.randperm(side**2)
    x = torch.randn(2, side**2, 8, dtype=torch.float64)
    got = block(x[:, order], swin.windows(coords[order], 4, shift, CPU))
    want = plain_block(block, x, side, 4, shift)
    assert torch.allclose(got, want[:, order], rtol=1e-6)


def plain_swin(net, x0, window, seen):
    """The grids (B, side, side, D) after each merge and after the last block of a Swin with patches
    of one pixel, as published, but that the tokens of units that are not seen get no attention."""
    x, outputs = net.norms[0](net.embed(x0.permute(0, 2, 3, 1))), []  # (B, H, W, D)
    for k, stage in enumerate(net.stages):
        if k:
            corners = [x[:, i::2, j::2] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))]
            x = net.merges[k - 1](net.norms[k](torch.cat(corners, 3)))
            outputs.append(x)
        side = x.shape[1]
        there = seen.repeat_interleave(side // 4, 0).repeat_interleave(side // 4, 1)
        for i, block in enumerate(stage):
            shift = window // 2 if i % 2 and side > window else 0
            x = plain_block(block, x.flatten(1, 2), side, window, shift, there).unflatten(
                1, [side] * 2
            )
    return [*outputs, x]


@pytest.mark.parametrize("units", [range(16), [1, 4, 6, 11]])
def test_swin_equals_the_published_one_in_which_hidden_keys_get_no_attention(units):
    net, x0 = built(swin.Swin, SWIN).double(), images(dtype=torch.float64)
    seen = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.tensor([*units]), True)
    got = net.layers(x0, torch.tensor([*units]))
    for (x, coords), grid in zip(got, plain_swin(net, x0, 4, seen.view(4, 4)), strict=True):
        assert torch.allclose(x, grid[:, coords[:, 0], coords[:, 1]], rtol=1e-4, atol=1e-5)
    if len(units) == 16:
        assert torch.allclose(net(x0, None), net.norm(grid.mean((1, 2))), rtol=1e-4, atol=1e-5)


def test_tokens_stand_so_that_units_are_runs_and_merges_are_squares():
    net = built(swin.Swin, SWIN)
    units = net.coords.view(16, 16, 2) // 4
    assert (
        torch.equal(units, units[:, :1].expand_as(units)) and len(units[:, 0].unique(dim=0)) == 16
    )
    squares = net.coords.view(64, 4, 2)
    assert torch.equal(squares // 2, (squares[:, :1] // 2).expand_as(squares))
    layers = net.layers(images())
    assert [x.shape for x, _ in layers] == [(2, 64, 16), (2, 16, 32), (2, 16, 32)]
    for (_, coords), side in zip(layers, (8, 4, 4)):
        want = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        assert torch.equal(coords[(coords @ torch.tensor([side, 1])).argsort()], want)


def test_every_second_block_is_shifted_where_the_grid_is_larger_than_a_window(monkeypatch):
    """Grids of 16, 8 and 4 with windows of 4."""
    net, cut, used, real = built(swin.Swin, SWIN), [], [], swin.windows

    def record(coords, size, shift, device):
        cut.append((int(coords.max()) + 1, size, shift))
        return real(coords, size, shift, device)

    monkeypatch.setattr(swin, "windows", record)
    for stage in net.stages:
        for block in stage:
            block.register_forward_pre_hook(lambda _, args: used.append(id(args[1])))
    net.layers(images())
    assert cut == [(16, 4, 0), (16, 4, 2), (8, 4, 0), (8, 4, 2), (4, 4, 0), (4, 4, 0)]
    assert all(used[k] != used[k + 1] for k in (0, 2, 4))


def test_swin_sees_visible_units_alone():
    net, x = built(swin.Swin, SWIN), images(1)
    units = torch.tensor([1, 4, 6, 15])  # of 4 x 4, row-major
    changed = x.clone()
    changed[..., 8:12, 4:8] += 1  # unit 9, which rows and columns swapped would be 6
    before, after = (net.layers(y, units) for y in (x, changed))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(before, after))
    assert not torch.equal(before[-1][0], net.layers(x + 1, units)[-1][0])
    assert (before[-1][1] @ torch.tensor([4, 1])).tolist() == units.tolist()


def test_the_swins_loss_is_on_hidden_cells_of_one_token_each(monkeypatch):
    net, seen, places, real = built(swin.LMIMSwin, SWIN), [], [], masked.hog_error
    for decoder in net.decoders:
        decoder.register_forward_pre_hook(lambda _, args: places.append(args[1][0]))

    def record(guess, x0, cell, hidden):
        assert guess.shape[1] == hidden.shape[1]
        seen.append((cell, hidden.view(16 // cell, -1)))
        return real(guess, x0, cell, hidden)

    monkeypatch.setattr(swin, "hog_error", record)
    monkeypatch.setattr(torch, "randperm", lambda n, **kw: torch.arange(n - 1, -1, -1))
    assert net(images()).shape == (2,)
    units = torch.ones(4, 4).index_fill(0, torch.tensor([0]), 0.0)  # the first row is visible
    fine = units.repeat_interleave(2, 0).repeat_interleave(2, 1)
    for (cell, hidden), want in zip(seen, ((2, fine), (4, units), (4, units)), strict=True):
        assert cell == want[0] and torch.equal(hidden, want[1])
    layers = net.encoder.layers(images(), torch.arange(4))
    for index, (_, coords), (_, hidden) in zip(places, layers, seen, strict=True):
        assert torch.equal(index, coords @ torch.tensor([len(hidden), 1]))  # each at its own place


# ---------------------------------------------------------------------------- all

KINDS = {
    "mae": (lambda s: MAE(masked.vit_config(s))),
    "lmim": (lambda s: LMIM(masked.vit_config(s))),
    "lmim-swin": (lambda s: swin.LMIMSwin(swin.swin_config(s))),
}


def on_meta(name, data, preset):
    settings = train.resolve({"data": data, "preset": preset, "device": "cpu"})
    with torch.device("meta"):
        return KINDS[name](settings)


@pytest.mark.parametrize("name, data, preset, encoder, rest", [
    ("mae", "mnist", "paper", 5.34, 1.61), ("mae", "tiny-imagenet", "paper", 21.3, 6.4),
    ("mae", "bccd", "paper", 85.7, 26.0), ("mae", "mnist", "cpu", 0.80, 0.21),
    ("lmim", "mnist", "paper", 5.34, 0.26), ("lmim", "tiny-imagenet", "paper", 21.3, 3.6),
    ("lmim", "bccd", "paper", 85.7, 4.0), ("lmim-swin", "mnist", "paper", 27.5, None),
    ("lmim-swin", "tiny-imagenet", "paper", 48.8, None), ("lmim-swin", "bccd", "paper", 86.8, None),
    ("lmim-swin", "mnist", "cpu", 0.56, None),
])  # fmt: skip
def test_parameters_are_those_of_the_published_sizes(name, data, preset, encoder, rest):
    net = on_meta(name, data, preset)
    own = sum(p.numel() for p in net.encoder.parameters()) / 1e6
    assert own == pytest.approx(encoder, rel=0.02)
    if rest:
        others = sum(p.numel() for p in net.parameters()) / 1e6 - own
        assert others == pytest.approx(rest, rel=0.07)


SMALL = {"mae": (MAE, VIT), "lmim": (LMIM, VIT), "lmim-swin": (swin.LMIMSwin, SWIN)}


@pytest.mark.parametrize("name", KINDS)
def test_a_gradient_reaches_every_weight(name):
    net = built(*SMALL[name])
    net(images()).mean().backward()
    still = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_each_method_overfits_sixteen_images(name):
    """New masks each time; the loss falls below that of the best constant prediction."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    a, b, phase = (torch.rand(16, 1, 1, 1, generator=generator) * 6 - 3 for _ in range(3))
    x0 = torch.sin((a * x + b * y) / 8 + phase)
    net = built(*SMALL[name])
    cells = {"lmim": (2, 4, 8), "lmim-swin": (2, 4, 4)}.get(name, ())
    targets = [F.normalize(masked.hog(x0, cell, True), dim=4) for cell in cells]
    targets = targets or [masked.patch_targets(x0, 4)]
    constant = sum(target.var(0, correction=0).mean().item() for target in targets)
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=3e-3), []
    for step in range(150):
        torch.manual_seed(step)
        loss = net(x0)
        assert loss.shape == (16,)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    assert np.mean(losses[-5:]) < 0.9 * constant, (losses[-5:], constant)
