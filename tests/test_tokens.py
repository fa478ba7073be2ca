"""appendix/tokens.py: what each network may see, what it has to predict, and that it learns."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data
import train
from appendix import baselines, dmjd, masked, tokens

CPU = torch.device("cpu")
CONFIG = masked.ViTConfig(16, 1, 4, 32, 2, 2, 32, 1)  # 4 x 4 tokens
CONVIT = ((1, 2, 2), (8, 16, 32), 2)
METHODS = ("cae", "mage", "dmjd")


def tokenizer(codes=32):
    return tokens.Tokenizer(CONFIG, 16, 8, codes)


def built(name, config=CONFIG):
    """A tiny network; a tokenizer in it has 32 codes that random images use."""
    torch.manual_seed(0)
    if name == "dmjd":
        return dmjd.DMJD(config, CONVIT, 32, 1)
    read = tokenizer() if config is CONFIG else tokens.Tokenizer(config, 16, 8, 32)
    read.revive(read.vectors(images(64, config.size)).detach().flatten(0, 1))
    return tokens.CAE(config, read, 1) if name == "cae" else tokens.MAGE(config, read, 1, 0.0)


def images(n, size=16):
    """Random waves (n, 1, size, size) in [-1, 1]."""
    generator = torch.Generator().manual_seed(n)
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    a, b, phase = (torch.rand(n, 1, 1, 1, generator=generator) * 6 - 3 for _ in range(3))
    return torch.sin((a * x + b * y) / 5 + phase)


def change(x0, places, patch=4):
    """The images with other pixels in these patches (B, Q)."""
    patches = masked.patchify(x0, patch)
    index = places[:, :, None].expand(-1, -1, patches.shape[2])
    patches = patches.scatter(1, index, torch.randn(index.shape))
    return tokens_to_images(patches, patch)


def tokens_to_images(patches, patch):
    side = math.isqrt(patches.shape[1])
    x = patches.view(len(patches), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(patches), -1, side * patch, side * patch)


def buffers(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------- what is seen


def views(x0, side):
    """Visible and hidden places of each image."""
    order = torch.rand(len(x0), side**2).argsort(1)
    return order[:, : side**2 // 2], order[:, side**2 // 2 :]


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("name", METHODS)
def test_hidden_patches_do_not_reach_the_encoder_and_the_order_of_visible_ones_is_free(name, size):
    torch.manual_seed(1)
    net, x0 = built(name, replace(CONFIG, size=size)).eval(), images(3, size)
    visible, hidden = views(x0, size // 4)
    perm = torch.randperm(visible.shape[1])
    if name == "dmjd":  # through the stem, in both of its outputs
        for value in net.encoder.state_dict().values():
            nn.init.normal_(value, std=0.2)
        before = net.encoder.tokens(x0, visible)
        after = net.encoder.tokens(change(x0, hidden), visible)
        other = net.encoder.tokens(change(x0, visible[:, :1]), visible)
        target = dmjd.hog_targets(x0, 4)
        losses = [net.loss(x0, target, v, hidden) for v in (visible, visible[:, perm])]
    elif name == "cae":
        before = [net.encoder.latents(x0, visible)]
        after = [net.encoder.latents(change(x0, hidden), visible)]
        other = [net.encoder.latents(change(x0, visible[:, :1]), visible)]
        index = visible[:, perm]
        shuffled = net.encoder.latents(x0, index)[:, 1:]
        losses = [net.predict(before[0][:, 1:], visible, hidden)[1]]
        losses.append(net.predict(shuffled, index, hidden)[1])
    else:  # what is masked, dropped or not, is seen by nobody
        codes = torch.randint(32, (3, (size // 4) ** 2))
        kept, masks = net.masks(*codes.shape, CPU)
        masks[:, :3], masks[0, :] = False, masks[1]
        masks = masks | ~torch.zeros_like(masks).scatter(1, kept, True)
        before = [net.predict(codes, kept, masks)]
        after = [net.predict(torch.where(masks, (codes + 5) % 32, codes), kept, masks)]
        other = [net.predict(torch.where(masks, codes, (codes + 5) % 32), kept, masks)]
        shuffled = kept[:, torch.randperm(kept.shape[1])]
        losses = [before[0], net.predict(codes, shuffled, masks)]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not any(torch.equal(a, b) for a, b in zip(before, other))
    assert torch.allclose(*losses, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_probed_feature(name):
    """CAE: the class token; the others: the mean of the tokens, without DMJD's added stages."""
    net, x0, t = built(name).eval(), images(4), torch.zeros(4)
    v = net.encoder(x0, t)
    assert v.shape == (4, 32)
    if name == "cae":
        assert torch.equal(v, net.encoder.norm(net.encoder.layers(x0)[-1])[:, 0])
        return
    assert v.mean(1).abs().max() < 1e-5 and (v.var(1, correction=0) - 1).abs().max() < 1e-3
    last = []
    net.encoder.blocks.register_forward_hook(lambda *args: last.append(args[2]))
    if name == "dmjd":
        for layer in net.encoder.fuse:
            nn.init.zeros_(layer.weight)
    assert torch.equal(v, net.encoder(x0, t))
    x = last[0] if name == "dmjd" else last[0][:, 1:]
    assert x.shape == (4, 16, 32) and torch.allclose(v, net.encoder.norm(x.mean(1)))


# ---------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("patch, size", [(2, 8), (4, 32), (8, 32)])
def test_tokenizer_has_one_code_a_patch_in_row_major_order(patch, size):
    torch.manual_seed(0)
    net = tokens.Tokenizer(replace(CONFIG, patch=patch, size=size), 16, 8, 32).eval()
    side, x0 = size // patch, torch.zeros(1, 1, size, size)
    assert net.codes(x0).shape == (1, side**2) and net.codes(x0).dtype == torch.int64
    assert net.decode(net.codes(x0)).shape == x0.shape
    x0[..., :patch, -patch:] = 1  # the last patch of the first row
    codes = net.vectors(x0) - net.vectors(0 * x0)
    other = torch.zeros(1, side**2, dtype=torch.int64)
    other[0, side - 1] = 1  # the same place, decoded
    net.codebook.normal_()
    pixels = net.decode(other) - net.decode(0 * other)
    for moved in (codes.square().sum(2).view(side, side), pixels.square()[0, 0]):
        top, bottom = moved.detach().chunk(2)
        quarters = [half.sum().item() for rows in (top, bottom) for half in rows.chunk(2, 1)]
        assert np.argmax(quarters) == 1


def test_codes_are_the_nearest_of_all_under_autocast_too():
    net = tokenizer()
    net.codebook.copy_(10 + torch.randn(32, 8) * 1e-2)  # too close for half precision
    z = 10 + torch.randn(2, 16, 8) * 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        codes = net.nearest(z)
    for vector, code in zip(z.flatten(0, 1).double(), codes.flatten()):
        distances = [(vector - c).square().sum().item() for c in net.codebook.double()]
        assert code == int(np.argmin(distances))


def test_gradient_goes_straight_through_the_codes():
    net, x0 = built("cae").tokenizer.requires_grad_(True).eval(), images(3)
    z = torch.randn(3, 16, 8, requires_grad=True)
    net.vectors = lambda x: z
    net(x0).sum().backward()
    z_q = net.codebook[net.nearest(z.detach())].requires_grad_()
    error = (net.images(z_q) - x0).square().mean((1, 2, 3)) / x0.var(correction=0)
    error.sum().backward()
    commitment = 0.25 * 2 * (z - z_q).detach() / (16 * 8)
    assert z_q.grad.abs().min() > 0
    assert torch.allclose(z.grad, z_q.grad + commitment, atol=1e-7)


def test_codebook_is_the_moving_average_of_each_codes_vectors():
    """Three steps of training against loops in float64."""
    torch.manual_seed(0)
    net = tokenizer(codes=4).train()
    net(images(8))  # the codebook's beginning
    net.counts.fill_(32.0)
    net.sums.copy_(32 * net.codebook)
    counts = [32.0] * 4
    sums = net.sums.double().numpy().copy()
    for step in range(3):
        x0 = images(8 + step)
        z = net.vectors(x0).detach().flatten(0, 1).double().numpy()
        book = net.codebook.double().numpy().copy()
        codes = [int(np.argmin([((v - c) ** 2).sum() for c in book])) for v in z]
        net(x0)
        for k in range(4):
            own = [v for v, code in zip(z, codes) if code == k]
            counts[k] = 0.99 * counts[k] + 0.01 * len(own)
            sums[k] = 0.99 * sums[k] + 0.01 * sum(own, np.zeros(8))
        n = sum(counts)
        want = [sums[k] / ((counts[k] + 1e-5) / (n + 4e-5) * n) for k in range(4)]
        np.testing.assert_allclose(net.codebook.numpy(), want, rtol=1e-4, atol=1e-6)


def test_dead_codes_come_back_as_vectors_of_the_batch():
    net, z = tokenizer(), torch.randn(320, 8)
    net.revive(z)  # the first batch: all of them
    vectors = {tuple(v) for v in z.tolist()}
    assert {tuple(v) for v in net.codebook.tolist()} <= vectors
    assert torch.equal(net.counts, torch.full((32,), 10.0))
    before, z = net.codebook.clone(), torch.randn(320, 8)
    net.counts[5], net.counts[6] = 0.99, 1.01  # a tenth of the share is 1
    net.revive(z)
    moved = (net.codebook != before).any(1).nonzero().flatten().tolist()
    assert moved == [5] and net.counts[5] == 10 and torch.equal(net.sums[5], 10 * net.codebook[5])
    assert tuple(net.codebook[5].tolist()) in {tuple(v) for v in z.tolist()}


def test_codebook_moves_in_training_mode_only_and_never_when_frozen():
    net, x0 = tokenizer().train(), images(8)
    net(x0)
    assert net.codebook.any()
    before = buffers(net)
    net.eval()(x0)
    assert same(before, buffers(net))
    net.train()(x0)
    assert not same(before, buffers(net))
    frozen = net.requires_grad_(False).train()
    before = buffers(net)
    frozen(x0)
    assert not frozen.training and not frozen.decoder.training and same(before, buffers(net))


def test_check_against_counting_by_hand():
    net = built("cae").tokenizer
    net.codebook[:3] = 100.0  # never the nearest
    x = data.to_uint8(images(300)).numpy()  # two batches
    x0 = data.to_float(torch.from_numpy(x))
    found = tokens.check(net, x, CPU)
    error = (net.decode(net.codes(x0)) - x0).square().mean().item()
    assert found["explained_variance"] == pytest.approx(
        1 - error / x0.var(correction=0).item(), rel=1e-4
    )
    counts = np.bincount(net.codes(x0).flatten().numpy(), minlength=32)
    for name, n in (
        ("perplexity", counts),
        ("perplexity_without_commonest", np.delete(counts, counts.argmax())),
    ):
        p = n[n > 0] / n.sum()
        assert found[name] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert found["used"] == (counts > 0).mean() <= 29 / 32
    net.codebook.copy_(net.codebook[:1].expand_as(net.codebook))  # one code for everything
    found = tokens.check(net, x, CPU)
    assert found["perplexity"] == found["perplexity_without_commonest"] == 1


@pytest.mark.parametrize("name", ["cae", "mage"])
def test_a_frozen_tokenizer_goes_through_training_and_the_checkpoint_unchanged(name, tmp_path):
    """Three steps of train.py's loop; then as load_model gives it, with the average weights too."""
    net = built(name)
    before, weight = buffers(net.tokenizer), net.encoder.blocks[0].fc1.weight.clone()
    settings = train.resolve({"data": "glyphs", "preset": "cpu", "device": "cpu", "amp": "off"})
    settings |= {"batch_size": 8, "epochs": 1, "method": name}
    batch = data.to_uint8(images(24)).numpy()
    train.train(net, lambda net, x0, *_: net(x0), batch, settings, tmp_path)
    assert same(before, buffers(net.tokenizer)) and net.training and not net.tokenizer.training
    assert not torch.equal(weight, net.encoder.blocks[0].fc1.weight)
    for weights in ("ema", "raw"):
        fresh = (lambda s: tokens.CAE(CONFIG, tokenizer(), 1)) if name == "cae" else None
        fresh = fresh or (lambda s: tokens.MAGE(CONFIG, tokenizer(), 1, 0.0))
        loaded, saved = train.load_model(tmp_path, fresh, weights)
        assert same(before, buffers(loaded.tokenizer))
    assert same(buffers(net), buffers(loaded))
    frozen = {k for k, p in enumerate(net.parameters()) if not p.requires_grad}
    learned = {k for k, p in enumerate(net.parameters()) if p.requires_grad}
    assert frozen and set(saved["optimizer"]["state"]) == learned


# ---------------------------------------------------------------------------- CAE


@pytest.mark.parametrize("side", [2, 3, 4, 8, 16])
def test_rectangles_cover_half_of_a_grid_exactly(side):
    n = side**2
    order = tokens.rectangle_masks(side)
    assert order.shape == (4096, n) and (np.sort(order, 1) == np.arange(n)).all()
    for half in np.split(order, [n // 2], axis=1):  # hidden, visible: each in row-major order,
        assert (np.diff(half) > 0).all()  # which a half with a place of the other kind is not
    masks = np.zeros((4096, n), bool)
    np.put_along_axis(masks, order[:, : n // 2], True, 1)
    assert (masks.sum(1) == n // 2).all()
    if side < 4:
        return
    masks = masks.reshape(-1, side, side)
    assert len({mask.tobytes() for mask in masks}) > (1000 if side == 4 else 4000)
    share = masks.mean(0)  # rectangles reach a corner less often than the middle
    assert share.min() > 0.04 and share.max() < 0.9 and abs(share.mean() - 0.5) < 1e-9
    pairs = (masks[:, 1:] & masks[:, :-1]).mean()  # neighbours hidden together
    assert pairs > (0.27 if side == 4 else 0.33)  # of single places it would be about 0.24


def test_regressor_block_against_a_plain_one_in_float64():
    torch.manual_seed(0)
    block = tokens.RegressorBlock(8, 2).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.4)
    shapes = (2, 3, 8), (2, 7, 8), (2, 3, 8), (2, 7, 8)
    x, latents, at, at_all = (torch.randn(s, dtype=torch.float64) for s in shapes)

    def norm(x):
        return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-6).sqrt()

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias

    q, k = linear(block.q, norm(x + at)), linear(block.k, norm(latents + at_all))
    v = linear(block.v, norm(latents))
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(2)
        heads.append(weights @ v[..., part])
    want = x + block.scale1 * linear(block.proj, torch.cat(heads, 2))
    want = norm(want) * block.norm2.weight + block.norm2.bias
    want = want + block.scale2 * linear(block.fc2, F.gelu(linear(block.fc1, want)))
    assert torch.allclose(block(x, latents, at, at_all), want, atol=1e-10)


def test_cae_loss_by_hand_and_its_target_is_the_current_encoder():
    """Twice, with a step of training between: the target moves with the weights."""
    net, x0, targets = built("cae").train(), images(4), []
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    codes = net.tokenizer.codes(x0)
    for _ in range(2):
        torch.manual_seed(3)
        loss = net(x0)
        torch.manual_seed(3)
        order = net.order[torch.randint(4096, (4,))]
        hidden, visible = order[:, :8], order[:, 8:]
        target = net.encoder.norm(net.encoder.layers(x0, hidden)[-1])[:, 1:]
        latents = net.encoder.latents(x0, visible)[:, 1:]
        guess, logits = net.predict(latents, visible, hidden)
        for b in range(4):
            ce = -logits[b].log_softmax(1)[range(8), codes[b, hidden[b]]].mean()
            want = ce + 2 * (guess - target)[b].square().mean()
            assert loss[b].item() == pytest.approx(want.item(), rel=1e-5)
        targets.append(target.detach())
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(*targets, atol=1e-3)


def test_cae_learns_through_the_prediction_alone(monkeypatch):
    """With it cut off, no gradient is left: the target has none. And what is predicted sees the
    visible patches in the regressor alone."""
    net, x0 = built("cae"), images(4)
    predict = net.predict
    net.predict = lambda *args: tuple(x.detach() for x in predict(*args))
    assert not net(x0).requires_grad
    monkeypatch.setattr(tokens.RegressorBlock, "forward", lambda self, x, *_: x)
    order = net.order[:4]
    hidden, visible = order[:, :8], order[:, 8:]
    a, b = (predict(torch.randn(4, 8, 32), visible, hidden) for _ in range(2))
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_every_weight_under_autocast(name):
    """A pass without gradients before the one with them would leave the encoder without any."""
    net, x0 = built(name).train(), images(8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x0)
    assert loss.shape == (8,) and loss.dtype == torch.float32
    loss.mean().backward()
    without = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert all("tokenizer" in n for n in frozen)
    assert without - frozen == set()


# ---------------------------------------------------------------------------- MAGE


def test_ratios_are_of_the_truncated_normal():
    torch.manual_seed(0)
    r = tokens.mask_ratio((20_000,), CPU)
    assert 0.5 - 1e-6 <= r.min() < 0.501 and 0.995 < r.max() <= 1 + 1e-6
    assert r.mean().item() == pytest.approx(0.6936, abs=0.004)
    assert r.std().item() == pytest.approx(0.1286, abs=0.003)
    assert r.median().item() == pytest.approx(0.6757, abs=0.005)


@pytest.mark.parametrize("n", [9, 16, 64])
def test_half_of_the_places_are_dropped_and_all_dropped_ones_masked(n):
    net, counts = built("mage"), set()
    for seed in range(40):
        torch.manual_seed(seed)
        kept, masks = net.masks(5, n, CPU)
        assert kept.shape == (5, n // 2) and masks.shape == (5, n)
        dropped = ~torch.zeros_like(masks).scatter(1, kept, True)
        assert (dropped.sum(1) == math.ceil(n / 2)).all() and masks[dropped].all()
        assert len(set(masks.sum(1).tolist())) == 1  # one ratio a batch
        counts.add(masks.sum(1)[0].item())
    assert math.ceil(n / 2) <= min(counts) and max(counts) <= n and len(counts) > n // 4


def test_mage_masks_and_loss():
    """Masked places hold the class output; kept ones enter as [MASK]; codes that nobody sees get no
    gradient; the loss is the smoothed cross-entropy of masked places."""
    net, x0, inputs, words = built("mage").train(), images(4), [], []
    net.decoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    net.embed.register_forward_hook(lambda *args: words.append(args[2]))
    codes = net.tokenizer.codes(x0)
    torch.manual_seed(2)
    loss = net(x0)
    torch.manual_seed(2)
    kept, masks = net.masks(4, 16, CPU)
    places, token = inputs[0] - net.positions, words[0][:, 0]
    assert 8 < masks.sum() / 4 < 16
    for b, k in np.ndindex(4, 16):
        if masks[b, k]:
            want = token[b]
        else:
            want = words[0][b, 1 + kept[b].tolist().index(k)]
        assert torch.allclose(places[b, 1 + k], want, atol=1e-6)
    loss.sum().backward()
    seen = set(codes[~masks].tolist()) | {32, 33}  # [MASK] and the class token
    assert set(net.encoder.words.grad.any(1).nonzero().flatten().tolist()) == seen
    logits = net.predict(codes, kept, masks).log_softmax(2)
    for b in range(4):
        own = logits[b, masks[b]]
        true = own[range(len(own)), codes[b, masks[b]]]
        want = -(0.9 * true + 0.1 * own.mean(1)).mean()
        assert loss[b].item() == pytest.approx(want.item(), rel=1e-5)


# ---------------------------------------------------------------------------- DMJD


@pytest.mark.parametrize("side, seen, unit", [(4, 6, 1), (5, 10, 1), (8, 24, 2), (16, 100, 2)])
def test_views_are_disjoint_and_of_whole_units(side, seen, unit):
    n = side**2
    visible, hidden = dmjd.disjoint_views(20, side, CPU)
    assert visible.shape == (40, seen) and hidden.shape == (40, n - seen)
    assert torch.equal(
        torch.cat([visible, hidden], 1).sort(1).values, torch.arange(n).expand(40, n)
    )
    shown = torch.zeros(40, n, dtype=torch.bool).scatter(1, visible, True)
    assert not (shown[:20] & shown[20:]).any()  # so the second view hides all that the first saw
    units = shown.view(40, side // unit, unit, side // unit, unit).float().mean((2, 4))
    assert set(units.unique().tolist()) == {0.0, 1.0}
    assert len({row.numpy().tobytes() for row in shown}) > 30


def test_hog_targets_are_whitened_and_belong_to_their_patch():
    x0 = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    target = dmjd.hog_targets(x0, 4)
    assert target.shape == (2, 16, 4 * 3 * 9)
    bins = target.view(-1, 9)
    assert bins.mean(1).abs().max() < 1e-5
    assert (bins.var(1, correction=0) - 1).abs().max() < 1e-3
    flat = dmjd.hog_targets(torch.full((1, 1, 16, 16), 0.3), 4)
    assert not flat.any()
    step = torch.zeros(1, 1, 16, 16).index_fill(3, torch.arange(7, 16), 1.0)
    bins = dmjd.hog_targets(step, 4).view(16, -1, 9)
    assert (bins[bins.any(2)].argmax(1) == 0).all()  # by differences, the angle from x
    faint = torch.zeros(1, 1, 16, 16)
    faint[..., 9:11, 5:7] = 2 / 255  # one grey level, inside of patch 9
    bins = dmjd.hog_targets(faint, 4).view(16, -1, 9)
    assert bins.abs().sum((1, 2)).nonzero().flatten().tolist() == [9]
    assert (bins[9].var(1, correction=0) - 1).abs().max() < 1e-3  # eps does not swamp it


def test_dmjd_loss_by_hand():
    net, x0 = built("dmjd"), images(3)
    target = dmjd.hog_targets(x0, 4)
    torch.manual_seed(4)
    loss = net(x0)
    torch.manual_seed(4)
    visible, hidden = dmjd.disjoint_views(3, 4, CPU)
    want = np.zeros(3)
    for view in range(2):
        v, h = visible[3 * view :][:3], hidden[3 * view :][:3]
        x, added = net.encoder.tokens(x0, v)
        x = net.encoder.norm(x + added)
        guess, seen = net.decoder(x, v), net.projector(x)
        for b in range(3):
            want[b] += np.mean([(guess - target)[b, k].square().mean().item() for k in h[b]]) / 2
            for place, k in enumerate(v[b]):
                d = (seen[b, place] - target[b, k]).abs()
                smooth = torch.where(d < 2, d.square() / 4, d - 1).mean().item()
                want[b] += smooth / len(v[b]) / 2
    assert loss.tolist() == pytest.approx(want.tolist(), rel=1e-5)


def test_the_stem_against_plain_convolutions():
    """Everything visible: embeddings and added stages are convolutions whose kernel is their
    stride; the blocks convolve each channel."""
    net = built("dmjd").double().encoder
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)

    def conv(linear, x, stride):
        kernel = linear.weight.view(len(linear.weight), stride, stride, -1).permute(0, 3, 1, 2)
        return F.conv2d(x, kernel, linear.bias, stride)

    def norm(x, layer=None):
        x = x.permute(0, 2, 3, 1)
        weight, bias = (layer.weight, layer.bias) if layer else (None, None)
        return F.layer_norm(x, x.shape[3:], weight, bias, 1e-6).permute(0, 3, 1, 2)

    def block(layer, x):
        depth = layer.conv
        h = F.conv2d(conv(layer.before, norm(x), 1), depth.weight, depth.bias, 1, 2, 1, len(x[0]))
        x = x + conv(layer.after, h, 1)
        return x + conv(layer.fc2, F.gelu(conv(layer.fc1, norm(x), 1)), 1)

    x0 = images(2).double()
    x, added = x0, 0
    for k, (stride, rest) in enumerate([(1, 4), (2, 2)]):
        x = F.gelu(norm(conv(net.embeds[k][0], x, stride), net.embeds[k][1]))
        for layer in net.stages[k]:
            x = block(layer, x)
        added = added + conv(net.fuse[k], x, rest)
    x = F.gelu(norm(conv(net.embeds[2][0], x, 2), net.embeds[2][1]))
    x = conv(net.last, x, 1).flatten(2).transpose(1, 2) + net.positions
    got = net.tokens(x0)
    assert torch.allclose(got[0], net.blocks(x), atol=1e-8)
    assert torch.allclose(got[1], added.flatten(2).transpose(1, 2), atol=1e-8)
    assert x.shape == got[1].shape == (2, 16, 32)


# ---------------------------------------------------------------------------- all


def learn(net, x0, steps, lr):
    """Train on the same images, new masks each time; returns the last loss."""
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for step in range(steps):
        torch.manual_seed(step)
        loss = net(x0)
        assert loss.shape == (len(x0),)
        optimizer.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return loss.mean().item()


@pytest.fixture(scope="module")
def learned():
    """A tokenizer that has seen the sixteen images."""
    torch.manual_seed(0)
    net = tokenizer().train()
    learn(net, images(16), 150, 3e-3)
    return net


def test_the_tokenizer_overfits_sixteen_images(learned):
    x0 = images(16)
    learned.eval()
    error = (learned.decode(learned.codes(x0)) - x0).square().mean()
    assert error < 0.3 * x0.var(0, correction=0).mean()  # of the best constant image
    found = tokens.check(learned, data.to_uint8(x0).numpy(), CPU)
    assert found["explained_variance"] > 0.7 and found["used"] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name, steps", [("cae", 280), ("mage", 700), ("dmjd", 80)])
def test_each_method_overfits_sixteen_images(name, steps, learned):
    """Below the best prediction that is the same for all images. Of codes: each place's entropy."""
    net, x0 = built(name), images(16)
    if name == "dmjd":  # smooth L1 with beta 2 is at most a quarter of the square
        best = dmjd.hog_targets(x0, 4).var(0, correction=0).mean().item()
        assert learn(net.train(), x0, steps, 3e-3) < 0.75 * best
        return
    net.tokenizer.load_state_dict(learned.state_dict())
    codes = net.tokenizer.codes(x0)
    share = F.one_hot(codes, 32).float().mean(0)  # (N, K)
    entropy = torch.special.entr(share).sum(1).mean().item()
    learn(net.train(), x0, steps, 3e-3)
    torch.manual_seed(0)
    if name == "cae":
        order = net.order[torch.randint(4096, (16,))]
        hidden, visible = order[:, :8], order[:, 8:]
        latents = net.encoder.latents(x0, visible)[:, 1:]
        logits, codes = net.predict(latents, visible, hidden)[1], codes.gather(1, hidden)
        found = F.cross_entropy(logits.transpose(1, 2), codes).item()
    else:
        kept, masks = net.masks(16, 16, CPU)
        found = F.cross_entropy(net.predict(codes, kept, masks)[masks], codes[masks]).item()
    assert entropy > 1 and found < 0.75 * entropy


def settings_of(preset, row, size, channels):
    return {"preset": preset, "row": row, "size": size, "channels": channels}


BUILD = {"tokenizer": tokens.build_tokenizer, "cae": tokens.build_cae}
BUILD |= {"mage": tokens.build_mage, "dmjd": dmjd.build_dmjd}
ROWS = [("cpu", 32, 16, 1), ("cpu", 64, 32, 3), ("cpu", 256, 64, 3)]
PAPER = [("paper", 32, 32, 3), ("paper", 64, 64, 3), ("paper", 256, 256, 3)]
ROWS += [pytest.param(row, marks=pytest.mark.slow) for row in PAPER]


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_each_row_builds_and_its_cost_can_be_counted(name, row):
    """Counted on the meta device, where a tensor's value cannot be read."""
    settings = settings_of(*row)
    assert baselines.flops_per_image(name, settings) > 1e7
    with torch.device("meta"):
        net = BUILD[name](settings)
    if name == "dmjd" and row[0] == "cpu" and row[1] > 32:
        assert net.encoder.side == 8
    assert isinstance(copy.deepcopy(net), type(net))


def millions(net, *without):
    """Parameters and codebooks, without some parts."""
    count = sum(p.numel() for name, p in net.named_parameters() if not name.startswith(without))
    books = [m.codebook.numel() for m in net.modules() if isinstance(m, tokens.Tokenizer)]
    return (count + (0 if without else sum(books))) / 1e6


SIZES = {  # row -> pixels, channels; then what section by section is published, in millions
    "paper 32": (32, 3, {"tokenizer": 0.44, "cae": 9.01, "mage": 9.2, "dmjd": 7.5}),
    "paper 64": (64, 3, {"tokenizer": 0.70, "cae": 35.7, "mage": 36.2}),
    "paper 256": (256, 3, {"tokenizer": 1.0, "cae": 143.2, "mage": 144.1}),
    "cpu 32": (16, 1, {"tokenizer": 0.18, "cae": 1.63, "mage": 1.26}),
}


@pytest.mark.parametrize("row", SIZES)
def test_parameters_are_those_of_the_published_sizes(row):
    size, channels, wanted = SIZES[row]
    settings = settings_of(*row.split(), size, channels)
    for name, want in wanted.items():
        with torch.device("meta"):
            net = BUILD[name](settings)
        without = () if name == "tokenizer" else ("tokenizer", "encoder.tokenizer")
        assert millions(net, *without) == pytest.approx(want, rel=0.03, abs=0.0065), name
