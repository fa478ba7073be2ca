"""appendix/baselines.py, unet.py, masked.py: methods learn, mask exactly, resume, fill a table."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, write_folder

import data
import model
import probe
import train
from appendix import baselines, masked, unet

CPU = torch.device("cpu")
# size patch hidden depth heads base blocks mult attention enc_heads dropout batch lr epochs
DIER_ROW = (8, 4, 16, 1, 2, 8, 1, (1, 2), (4,), 2, 0.0, 8, 1e-2, 1)
UNET_ROW = (8, 1, (1, 2), (1, 2), (4,), 2, 0.0)
VIT_ROW = (2, 32, 2, 2, 16, 1)


@pytest.fixture
def tiny(monkeypatch):
    """Networks of a few thousand weights for digits and folders of small images, on the CPU."""
    monkeypatch.setitem(model.TABLE, "cpu 32", DIER_ROW)
    monkeypatch.delitem(model.TABLE, "cpu glyphs")
    monkeypatch.setitem(unet.TABLE, "cpu 32", UNET_ROW)
    monkeypatch.setitem(masked.TABLE, "cpu 32", VIT_ROW)
    for key, value in {"preset": "cpu", "device": "cpu", "amp": "off"}.items():
        monkeypatch.setitem(train.DEFAULTS, key, value)
    monkeypatch.setattr(probe, "EPOCHS", 10)


def settings_of(name, **typed):
    """Settings of a tiny run on ten classes of images of one channel."""
    settings = baselines.method_settings(name, {"data": "glyphs", **typed})
    return settings | {"class_names": [str(k) for k in range(10)]}


def built(name, **typed):
    """The tiny network of a method, seed 0."""
    torch.manual_seed(0)
    return baselines.build(name, settings_of(name, **typed))


def on_meta(name, settings):
    """Its network without numbers."""
    with torch.device("meta"):
        return baselines.build(name, {**settings, "class_names": ["a", "b"]})


def parameters(net):
    return sum(p.numel() for p in net.parameters())


# ---------------------------------------------------------------------------- the methods

NUMBERS = {  # three losses and gradient norms of commit d3d31e8, whose GELU was the tanh form
    "dier-notime": ([0.971978, 1.065634, 0.845957], [0.499955, 0.518628, 0.522715]),
    "dier-unet": ([0.971978, 0.973629, 0.749652], [2.138313, 2.047766, 1.640225]),
    "dier-unet-notime": ([0.971978, 0.973629, 0.749652], [2.138313, 2.047766, 1.640253]),
    "diffae": ([0.971978, 0.978131, 0.732781], [2.063457, 1.93299, 1.670808]),
    "mae": ([1.616925, 1.013837, 0.883545], [5.840054, 3.199475, 2.028878]),
    "lmim": ([3.508561, 2.011465, 0.833569], [8.937081, 5.521862, 2.69681]),
    "dmjd": ([1.649281, 0.873481, 0.371802], [5.703773, 4.162683, 1.547789]),
    "supervised": ([2.275505, 5.167729, 2.786102], [4.334267, 11.54624, 7.297665]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_three_steps_of_each_method_give_the_recorded_numbers(name, tiny, tmp_path):
    n, y, x = np.ogrid[:24, :8, :8]
    images = (37 * n + 11 * y * y + 23 * x * (n % 7 + 3)) % 256
    images, labels = images.astype(np.uint8)[:, None], np.arange(24) % 10
    settings, net = settings_of(name) | {"lr": 1e-2}, built(name)
    if name == "supervised":
        split = data.Split(images, labels, None, settings["class_names"])
        baselines.train_supervised(net, split, settings, tmp_path)
    else:
        train.train(net, baselines.METHODS[name][1], images, settings, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses, norms = NUMBERS[name]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-3)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=5e-3)


def stripes():
    """Sixteen images of different waves (16, 1, 8, 8), told apart by any part of them."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    a, b, phase = (torch.rand(16, 1, 1, 1, generator=generator) * 6 - 3 for _ in range(3))
    return torch.sin((a * x + b * y) / 5 + phase)


def best_constant(name, x):
    """The loss of the best prediction that is the same for all images: their variance."""

    def variance(target):
        """Mean over what is predicted of the variance over the images."""
        return target.var(0, correction=0).mean().item()

    if name == "mae":
        return variance(masked.normalised_patches(x, 2))
    if name == "lmim":
        return sum(variance(masked.hog(x, cell)) for cell in (2, 4, 8))
    if name == "dmjd":  # smooth L1 with beta 2 is a quarter of the square
        return 1.25 * variance(masked.hog_tokens(x, 2, 2))
    return math.log(2) if name == "supervised" else 1.0


STEPS = {"mae": 180, "lmim": 320, "dmjd": 320, "supervised": 30, "diffae": 15}
SLOW = [n for n in baselines.METHODS if n not in ("mae", "supervised", "diffae")]
QUICK = [n for n in baselines.METHODS if n not in SLOW]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_each_method_overfits_sixteen_images(name, tiny):
    """Noise and masks: one fixed draw of noise, new masks each time. Every loss falls well below
    that of the best constant prediction, which knows nothing of the image."""
    generator, x0, loss_fn = torch.Generator().manual_seed(0), stripes(), baselines.METHODS[name][1]
    t = torch.randint(200, 1000, (16,), generator=generator)
    if name == "supervised":
        t = torch.arange(16) % 2  # labels without a pattern: learned by heart
    eps = torch.randn(x0.shape, generator=generator)
    net, abar, losses = built(name), train.alphas_cumprod().float(), []
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(STEPS.get(name, 60)):
        torch.manual_seed(step)
        loss = loss_fn(net, x0, t, eps, abar)
        assert loss.shape == (16,)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.mean().item())
    if loss_fn is train.dier_loss:  # eps_theta = 0 at first
        assert losses[0] == pytest.approx(eps.square().mean().item(), rel=1e-5)
    assert np.mean(losses[-5:]) < 0.75 * best_constant(name, x0), losses[-5:]


@pytest.mark.parametrize("name", baselines.METHODS)
def test_without_time_v_ignores_t_and_the_denoiser_still_gets_it(name, tiny):
    net, x, t = built(name).eval(), torch.randn(4, 1, 8, 8), torch.tensor([0, 5, 400, 999])
    zero = getattr(net.encoder, "zero_initialised", list)()
    for layer in zero:  # so that everything reaches v
        layer.reset_parameters()
    v = net.encoder(x, t)
    assert torch.equal(v, net.encoder(x, torch.zeros_like(t))) == (name in baselines.TIMELESS)
    if baselines.METHODS[name][1] is train.dier_loss:
        seen = []
        denoiser = net.dit if "unet" not in name and name != "diffae" else net.unet
        denoiser.register_forward_pre_hook(lambda _, args: seen.extend(args))
        net(x, t, stripes()[:4])
        assert torch.equal(seen[0], x) and torch.equal(seen[1], t)
        assert torch.equal(seen[2], net.encoder(stripes()[:4], t))


@pytest.mark.parametrize("timed", ["dier", "dier-unet"])
def test_notime_differs_from_dier_in_the_encoders_time_alone(timed, tiny):
    """Same number of parameters, same initial weights for one seed: nothing else is compared."""
    a, b = built(timed).state_dict(), built(f"{timed}-notime").state_dict()
    assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("preset", model.PRESETS)
@pytest.mark.parametrize("name", ["mnist", "tiny-imagenet", "bccd"])
def test_each_method_has_each_preset_with_diers_encoder_size_and_recipe(name, preset):
    typed = {"data": name, "preset": preset, "device": "cpu"}
    dier = baselines.method_settings("dier", typed)
    shapes = [p.shape for p in on_meta("dier", dier).encoder.parameters()]
    for method in baselines.METHODS:
        settings = baselines.method_settings(method, typed)
        net = on_meta(method, settings)
        assert parameters(net) > 1e5
        if method.startswith("dier") or method == "supervised":
            assert [p.shape for p in net.encoder.parameters()] == shapes
        own_lr = preset == "cpu" and method not in ("dier", "dier-notime", "supervised")
        assert settings == dier | {"method": method, "lr": 1e-3 if own_lr else dier["lr"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "tiny-imagenet", "bccd"])
def test_denoisers_of_preset_cpu_cost_about_what_dier_costs(name):
    typed, cost = {"data": name, "preset": "cpu", "device": "cpu"}, {}
    for method, (_, loss_fn) in baselines.METHODS.items():
        if loss_fn is train.dier_loss:
            settings = baselines.method_settings(method, typed)
            cost[method] = baselines.flops_per_image(method, settings)
    assert all(0.4 < c / cost["dier"] < 2.5 for c in cost.values()), cost


def test_flops_of_a_block_are_counted_by_hand(tiny, monkeypatch):
    """Twice the multiplications, three times for forward and both gradients."""
    few = baselines.flops_per_image("mae", settings_of("mae"))
    monkeypatch.setitem(masked.TABLE, "cpu 32", (*VIT_ROW[:-1], 2))
    tokens, d = 16, 16  # of the decoder
    linear = tokens * (3 + 1 + 4 + 4) * d * d  # qkv, proj, fc1, fc2
    scores = 2 * tokens * tokens * d  # q k^T and its product with v, over both heads
    more = baselines.flops_per_image("mae", settings_of("mae"))
    assert more - few == 3 * 2 * (linear + scores)


# ---------------------------------------------------------------------------- U-Net


@pytest.mark.parametrize("name, millions", [
    ("mnist", 126.71), ("cifar10", 126.71), ("tiny-imagenet", 130.39), ("bccd", 220.02)
])  # fmt: skip
def test_parameter_counts_of_table_5(name, millions):
    typed = {"data": name, "preset": "paper", "device": "cpu"}
    net = on_meta("diffae", baselines.method_settings("diffae", typed))
    assert parameters(net) / 1e6 == pytest.approx(millions, abs=0.01)  # a block is half a percent


@pytest.mark.parametrize("base, mult, fits", [
    (16, (1, 1, 2, 4, 8), True), (16, (1, 8), False), (24, (1, 2, 4), False), (16, (2, 1, 4), True)
])  # fmt: skip
def test_widths_of_a_unet_are_refused_where_it_does_not_build_and_only_there(
    base, mult, fits, monkeypatch
):
    def works(make):
        try:
            with torch.device("meta"):
                return bool(make())
        except ValueError:
            return False

    def config():
        return unet.UNetConfig(64, 1, base, 1, mult, (1, 2), (4,), 4, 0.0)

    assert works(config) == fits
    monkeypatch.setattr(unet.UNetConfig, "__post_init__", lambda self: None)
    assert works(lambda: unet.UNet(config(), 8)) == fits  # by the group norms' own check


def plain_unet_block(block, x, time, v):
    """UNetBlock with norms written out; groups of min(32, C / 4)."""

    def norm(layer, x):
        """Group normalisation by hand."""
        groups = min(32, x.shape[1] // 4)
        g = x.reshape(len(x), groups, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        return g.view_as(x) * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(x):
        return x / (1 + (-x).exp())

    def conv(layer, x):
        return torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)

    def resize(x):
        if block.resize == "down":
            a, b, c, d = x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]
            return (a + b + c + d) / 4
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if block.resize == "up" else x

    c = block.conv2.out_channels
    both = time @ block.time.weight.T + block.time.bias
    h = norm(block.norm2, conv(block.conv1, resize(silu(norm(block.norm1, x)))))
    h = h * (1 + both[:, :c, None, None]) + both[:, c:, None, None]
    h = h * (1 + (v @ block.v.weight.T + block.v.bias)[:, :, None, None])
    return block.skip(resize(x)) + conv(block.conv2, silu(h))


@pytest.mark.parametrize("resize, c_out", [("", 12), ("down", 8), ("up", 8)])
def test_unet_block_against_a_plain_one_in_float64(resize, c_out):
    torch.manual_seed(0)
    block = unet.UNetBlock(8, c_out, 6, 5, 0.0, resize).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, time, v = (torch.randn(s, dtype=torch.float64) for s in ((2, 8, 4, 4), (2, 6), (2, 5)))
    want = plain_unet_block(block, x, time, v)
    assert torch.allclose(block(x, time, v), want, atol=1e-10)
    side = {"": 4, "down": 2, "up": 8}[resize]
    assert want.shape == (2, c_out, side, side)


def test_unet_takes_time_v_and_the_skips(tiny):
    """Each input, and the skip connection of each stage, changes the output."""
    net = built("diffae").eval().unet
    x, t, v = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.randn(2, unet.DIFFAE_V)
    assert not net(x, t, v).any()  # zero-initialised
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    base = net(x, t, v)
    assert base.shape == x.shape
    for other in (net(x, t + 50, v), net(x, t, v + 0.5), net(x + 0.1, t, v)):
        assert not torch.allclose(base, other, atol=1e-3)
    for stage in net.up:  # the last half of its input is what was kept on the way down
        hook = stage[0].register_forward_pre_hook(
            lambda m, a: (torch.cat([a[0].chunk(2, 1)[0], 0 * a[0].chunk(2, 1)[1]], 1), *a[1:])
        )
        assert not torch.allclose(base, net(x, t, v), atol=1e-4)
        hook.remove()


# ---------------------------------------------------------------------------- masks and HOG


@pytest.mark.parametrize(
    "n, masked_share, visible",
    [(16, 0.75, 4), (64, 0.75, 16), (256, 0.75, 64), (16, 0.6, 6), (256, 0.6, 102), (4, 0.9, 1)],
)
def test_masks_have_exactly_their_share_and_views_are_disjoint(n, masked_share, visible):
    torch.manual_seed(0)
    seen, hidden = masked.random_split(50, n, masked_share, CPU)
    assert seen.shape == (50, visible) and hidden.shape == (50, n - visible)
    assert torch.equal(torch.cat([seen, hidden], 1).sort(1).values, torch.arange(n).expand(50, n))
    assert len({tuple(row) for row in seen.sort(1).values.tolist()}) > (4 if n == 4 else 30) - 1
    views = masked.disjoint_splits(50, n, masked_share, CPU)
    for seen, hidden in views:
        assert seen.shape == (50, visible)
        both = torch.cat([seen, hidden], 1).sort(1).values
        assert torch.equal(both, torch.arange(n).expand(50, n))
    for a, b, hidden_b in zip(views[0][0].tolist(), views[1][0].tolist(), views[1][1].tolist()):
        assert not set(a) & set(b) and set(a) <= set(hidden_b)


def naive_hog(image, cell):
    """(C, H, W) -> (G, G, C * 9) with loops and NumPy."""
    channels, side, _ = image.shape
    g = side // cell
    out = np.zeros((g, g, channels, 9))
    for c, y, x in np.ndindex(channels, side, side):
        dy = image[c, y + 1, x] - image[c, y - 1, x] if 0 < y < side - 1 else 0.0
        dx = image[c, y, x + 1] - image[c, y, x - 1] if 0 < x < side - 1 else 0.0
        degrees = math.degrees(math.atan2(dy, dx)) % 180
        out[y // cell, x // cell, c, min(8, int(degrees // 20))] += math.hypot(dy, dx)
    length = np.sqrt((out**2).sum(3, keepdims=True))
    return (out / np.maximum(length, 1e-5)).reshape(g, g, channels * 9)


@pytest.mark.parametrize("cell", [2, 4, 8])
def test_hog_against_a_naive_one(cell):
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[1, 0] = 0.5  # a flat channel has no gradient and no NaN
    got = masked.hog(x, cell)
    for image, want in zip(got, x.numpy()):
        np.testing.assert_allclose(image.numpy(), naive_hog(want, cell), atol=1e-9)
    if cell == 2:  # all cells of a token, in the order of its patch
        tokens = masked.hog_tokens(x, 2, 4)
        assert torch.equal(tokens[0, 1].view(2, 2, -1), got[0, :2, 2:])


def test_masked_losses_read_only_what_they_should(tiny):
    """MAE's encoder never sees a hidden patch, and only hidden patches are scored."""
    net = built("mae")
    x, visible = torch.rand(1, 1, 8, 8) * 2 - 1, torch.tensor([[0, 5, 10, 15]])
    before = net.encoder.layers(x, visible)[-1]
    changed = x.clone()
    changed[..., :2, 2:4] += 1  # token 1
    assert torch.equal(before, net.encoder.layers(changed, visible)[-1])
    assert not torch.equal(before, net.encoder.layers(x + 1, visible)[-1])
    target = masked.normalised_patches(x, 2)
    assert target.mean(2).abs().max() < 1e-5 and (target.var(2) - 1).abs().max() < 1e-2
    torch.manual_seed(5)
    visible, hidden = masked.random_split(1, 16, 0.75, CPU)
    guess = net.decoder(net.encoder.layers(x, visible)[-1], visible)
    by_hand = np.mean([(guess - target)[0, k].square().mean().item() for k in hidden[0].tolist()])
    torch.manual_seed(5)
    assert net(x).item() == pytest.approx(by_hand, rel=1e-5)


def test_lmim_weighs_each_cell_by_the_hidden_share_of_it():
    torch.manual_seed(0)
    config = masked.ViTConfig(16, 1, 4, 16, 3, 2, 16, 1)  # 4 x 4 tokens
    net = masked.LMIM(config)
    assert config.cells() == [2, 4, 8] and net.at == [0, 1, 2]
    x, visible = torch.rand(2, 1, 16, 16), torch.tensor([[0, 1, 4, 10], [3, 6, 9, 12]])
    for scale in net.scales:
        tokens = torch.randn(2, 4, 16)
        cells, target = 16 // scale.cell, masked.hog(x, scale.cell)
        error = (scale(tokens, visible, cells) - target).square().mean(3)
        for b in range(2):
            hidden = np.ones((4, 4))
            hidden.flat[visible[b].tolist()] = 0
            pixels = np.kron(hidden, np.ones((4, 4)))
            weight = pixels.reshape(cells, scale.cell, cells, scale.cell).mean((1, 3))
            want = (weight * error[b].detach().numpy()).sum() / weight.sum()
            got = scale.loss(tokens, visible, x)[b].item()
            assert got == pytest.approx(want, rel=1e-5)


# ---------------------------------------------------------------------------- floors


def test_pca_keeps_the_directions_of_largest_variance_first():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(200, 12, generator=generator) * torch.arange(1, 13) + 3
    pca = baselines.PCA(pixels)
    with torch.autocast("cpu", torch.bfloat16):  # must not round the components
        x = pca(pixels.view(200, 3, 2, 2), torch.zeros(200))
    assert x.shape == (200, 12) and x.mean(0).abs().max() < 1e-3
    assert torch.equal(x.var(0), x.var(0).sort(descending=True).values)
    assert torch.allclose(x.var(0).sum(), pixels.var(0).sum(), rtol=1e-4)
    _, s, _ = torch.linalg.svd(pixels - pixels.mean(0))
    assert torch.allclose(x.var(0), s**2 / 199, rtol=1e-3)
    wide = torch.randn(8, 3 * 20 * 20, generator=generator)
    assert baselines.PCA(wide)(wide.view(8, 3, 20, 20), None).shape == (8, model.V)


@pytest.mark.parametrize("size", [8, 64])
def test_the_floor_of_pixels_is_the_probes_own(size):
    """At most 32 x 32, each averaged."""
    images = np.random.default_rng(0).integers(0, 256, (5, 3, size, size), np.uint8)
    pixels = baselines.Pixels()(data.to_float(torch.from_numpy(images)), torch.zeros(5))
    assert torch.equal(pixels.half(), probe.raw_pixels(images))


# ---------------------------------------------------------------------------- cells

RUNS = train.RUNS / "baselines"


def log_of(folder):
    """(step, loss, norm) of each row of a log."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def test_a_cell_leaves_what_train_and_probe_leave(tiny, folder, capsys):
    baselines.main(["--data", folder, "--method", "mae", "dier", "--epochs", "4"])
    assert "lr=0.001 epochs=4.0" in capsys.readouterr().out
    for name, times in (("mae", [0]), ("dier", baselines.TIMES)):
        run = RUNS / f"set-{name}-0"
        config = json.loads((run / "config.json").read_text())
        assert (config["method"], config["epochs"]) == (name, 4)
        assert (config["images"], config["class_names"]) == (40, ["class0", "class1"])
        assert log_of(run)[-1][0] == 20 and (run / "preview.png").exists() == (name == "dier")
        result = json.loads((run / "probe.json").read_text())
        assert [row["t"] for row in result["rows"]] == times
        assert result["name"] == f"baselines/set-{name}-0" and result["protocol"]["step"] == 20
        net, saved = train.load_model(run, baselines.METHODS[name][0])
        assert saved["step"] == 20 and not net.training
    assert "no run in runs" in fails(capsys, probe.main, [])  # baselines are not DiER's newest run
    name = ["--name", "baselines/set-mae-0"]
    assert "is a run of mae" in fails(capsys, train.main, [*name, "--resume"])
    assert "is a run of mae" in fails(capsys, probe.main, name)


@pytest.mark.parametrize("name", ["dmjd", "supervised"])
def test_a_cell_stopped_and_killed_ends_bit_equal_to_one_that_was_not(
    name, tiny, folder, monkeypatch, capsys
):
    """Stopped after step 8 by Ctrl-C, killed in step 26, long after its last checkpoint."""
    arguments, real = ["--data", folder, "--method", name, "--epochs", "6"], train.draw
    baselines.main([*arguments, "--out", "straight.json"])

    def draw(seed, step, *rest):
        if step == (7 if len(stops) == 0 else 25):
            stops.append(step)
            if step == 25:
                raise ConnectionError("killed")
            os.kill(os.getpid(), signal.SIGINT)
        return real(seed, step, *rest)

    stops, again = [], [*arguments, "--out", "cut.json"]
    with monkeypatch.context() as m:
        m.setattr(train, "draw", draw)
        with pytest.raises(SystemExit) as stop:
            baselines.main(again)
        assert stop.value.code == 130 and "step 8: the same command" in capsys.readouterr().out
        assert log_of(RUNS / f"cut-{name}-0")[-1][0] == 8
        with pytest.raises(ConnectionError):
            baselines.main(again)
    baselines.main(again)
    assert stops == [7, 25]
    runs = [RUNS / f"{table}-{name}-0" for table in ("straight", "cut")]
    assert log_of(runs[0]) == log_of(runs[1]) and log_of(runs[0])[-1][0] == 30
    a, b = (train.read_checkpoint(run) for run in runs)
    for part in ("raw", "ema"):
        assert all(torch.equal(value, b[part][key]) for key, value in a[part].items())
    assert without_times("straight.json") == without_times("cut.json")


def test_minutes_of_a_cell_count_over_all_calls(tiny, folder, monkeypatch):
    baselines.main(["--data", folder, "--method", "mae", "--minutes", "2"])
    run, limits = RUNS / "set-mae-0", []
    settings, saved = train.read_config(run), train.read_checkpoint(run)
    split, _ = data.load(folder, 8, 3, Path("data"))

    def record(net, loss_fn, images, settings, *_):
        limits.append(settings["minutes"])
        return 5, 0.0, 0

    monkeypatch.setattr(train, "train", record)
    for seconds in (30.0, 119.0, 120.0, 150.0):
        torch.save(saved | {"seconds": seconds}, run / "checkpoint.pt")
        baselines.train_cell("mae", settings, run, split)
    assert limits == pytest.approx([1.5, 1 / 60])
    assert train.read_config(run) == settings  # with the two minutes that were given


def test_supervised_learns_the_labels_of_the_right_images(tiny, folder):
    """The classes are quarters of the picture: chance is 50%, and shuffled labels would stay it."""
    arguments = ["--data", folder, "--method", "supervised", "--epochs", "10"]
    baselines.main(arguments)
    run = RUNS / "set-supervised-0"
    assert log_of(run)[-1][1] < 0.2
    net, _ = train.load_model(run, baselines.METHODS["supervised"][0], "raw")
    _, test = data.load(folder, 8, 3, Path("data"))
    hits = net(data.to_float(torch.from_numpy(test.images))).argmax(1)
    assert (hits == torch.from_numpy(test.labels)).float().mean() > 0.95


def test_supervised_sees_the_batches_of_the_others_and_averages_its_weights(
    tiny, folder, tmp_path, monkeypatch, capsys
):
    typed = {"data": folder, "epochs": 0.8}  # four steps
    split, _ = data.load(folder, 8, 3, Path("data"))
    seen, real = [], data.get_batch

    def record(images, index, device, flips=None):
        seen.append((index.tolist(), flips.tolist()))
        return real(images, index, device, flips)

    for module in (train, data):
        monkeypatch.setattr(module, "get_batch", record)
    settings = baselines.method_settings("mae", typed)
    train.train(
        baselines.build("mae", settings), baselines.own_loss, split.images, settings, tmp_path
    )
    settings = settings_of("supervised", **typed) | {"minutes": 1e-9}
    torch.manual_seed(0)
    net = baselines.build("supervised", settings)
    before, saved = [p.detach().clone() for p in net.parameters()], None
    for step in range(4):  # the limit ends each call after one step, which saves
        assert baselines.train_supervised(net, split, settings, tmp_path, saved)[0] == step + 1
        saved = train.read_checkpoint(tmp_path)
        if step == 0:  # decay (1 + n) / (10 + n)
            pairs = zip(before, net.parameters())
            want = [(2 * old + 9 * new) / 11 for old, new in pairs]
            assert all(torch.allclose(a, b) for a, b in zip(saved["ema"].values(), want))
    assert len(seen) == 8 and seen[:4] == seen[4:]
    settings |= {"minutes": 0, "lr": 1e20, "epochs": 5}
    error = fails(capsys, baselines.train_supervised, net, split, settings, tmp_path)
    assert "is not finite (steps" in error


# ---------------------------------------------------------------------------- Table 1


def without_times(path):
    """A table without what a clock says, and without its command."""

    def strip(x):
        if isinstance(x, list):
            return [strip(y) for y in x]
        if isinstance(x, dict):
            return {k: strip(v) for k, v in x.items() if k not in ("images_per_s", "command")}
        return x

    with open(path) as file:
        return strip(json.load(file))


def test_a_table_that_was_interrupted_ends_equal_to_one_that_was_not(
    tiny, folder, monkeypatch, capsys
):
    arguments = ["--data", folder, "--method", "dier", "mae", "pixels", "--seeds", "2"]
    baselines.main([*arguments, "--out", "straight.json"])
    out = capsys.readouterr().out
    assert "(reported, not run)" in out and "nan" not in out
    probed, trained, real, cut = [], [], probe.probe, [*arguments, "--out", "cut.json"]

    def interrupted(*args):
        if len(probed) == 1:
            raise KeyboardInterrupt
        probed.append(1)
        return real(*args)

    with monkeypatch.context() as m:
        m.setattr(probe, "probe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            baselines.main(cut)
    with open("cut.json") as file:
        half = json.load(file)
    assert [cell["method"] for cell in half["cells"]] == ["dier"]  # saved at once
    monkeypatch.setattr(train, "draw", lambda *a, real=train.draw: trained.append(a[0]) or real(*a))
    baselines.main(cut)
    assert trained == 10 * [1]  # seed 0 of mae was trained, but not probed
    assert without_times("cut.json") == without_times("straight.json")
    with open("cut.json") as file:
        table = json.load(file)
    cells = [(cell["method"], cell["seed"]) for cell in table["cells"]]
    assert cells == [("dier", 0), ("mae", 0), ("pixels", 0), ("dier", 1), ("mae", 1)]
    check_rows(table)
    baselines.main([*arguments[:3], "random", "--out", "cut.json"])  # joins the others
    assert [row["method"] for row in without_times("cut.json")["rows"]][:4] == [
        "dier", "mae", "random", "pixels"
    ]  # fmt: skip
    other = [*cut, "--epochs", "3"]
    assert "was begun with epochs 1, not 3.0" in fails(capsys, baselines.main, other)
    write_folder(Path("other"), per_class=3)
    os.rename("set", "old")
    os.rename("other", "set")
    assert "was begun with images 40, not 6" in fails(capsys, baselines.main, cut)


def check_rows(table):
    """What the table of the test above has in its rows and cells."""
    keys = {"method", "parameters", "flops_per_image", "images_per_s", "images_seen", "top1"}
    keys |= {"top1_std", "oracle", "knn", "paper", "reported"}
    rows = {row["method"]: row for row in table["rows"]}
    assert all(set(row) == keys for row in rows.values()) and table["seeds"] == 2
    assert rows["dier"]["images_seen"] == 40 and rows["dier"]["images_per_s"] > 0
    times = [[row["t"] for row in cell["probe"]] for cell in table["cells"]]
    assert times == [baselines.TIMES, [0], [0], baselines.TIMES, [0]]
    assert rows["pixels"]["top1_std"] is None and rows["pixels"]["images_per_s"] is None
    assert rows["CAE"]["reported"] and rows["CAE"]["top1"] is None


def test_rows_carry_means_over_the_seeds_and_the_papers_numbers():
    cell = {"method": "diffae", "seed": 0, "parameters": 1, "flops_per_image": 2}
    cell |= {"images_per_s": 3.0, "images_seen": 4, "top1": 50.0, "oracle": 51.0, "knn": 52.0}
    other = cell | {"seed": 1, "images_per_s": 5.0, "top1": 53.0}
    rows = {row["method"]: row for row in baselines.make_rows([cell, other], "mnist")}
    assert list(rows) == ["diffae", "CAE", "MAGE", "LMIM-Swin"]
    row = rows["diffae"]
    assert (row["images_per_s"], row["images_seen"], row["top1"], row["knn"]) == (4, 4, 51.5, 52)
    assert row["top1_std"] == pytest.approx(3 / 2**0.5)  # of a sample
    assert row["paper"] == 62.1 and not row["reported"]
    assert rows["MAGE"]["paper"] == 96.5 and rows["LMIM-Swin"]["paper"] == 87.8
    assert baselines.make_rows([cell], "glyphs")[0]["paper"] is None


def test_a_cell_has_the_accuracy_at_the_t_that_held_out_images_choose(tiny, monkeypatch):
    rows = [{"t": 0, "top1": 7.0, "held_out": 5.0, "knn": 3.0}]
    rows += [{"t": 100, "top1": 6.0, "held_out": 8.0, "knn": 2.0}]
    monkeypatch.setattr(probe, "probe", lambda *_: {"rows": rows, "oracle_top1": 7.0})
    cell = baselines.run_cell("random", settings_of("random", seed=3), None, None, (None, None))
    got = {key: cell[key] for key in ("seed", "top1", "knn", "chosen_t", "oracle", "probe")}
    want = {"seed": 3, "top1": 6.0, "knn": 2.0, "chosen_t": 100, "oracle": 7.0, "probe": rows}
    assert got == want


@pytest.mark.parametrize("typed, words", [
    (["--method", "cae"], "invalid choice: 'cae' (choose from"),
    (["--seeds", "0"], "0 is not a whole number above 0"),
    (["--table"], "unrecognized arguments: --table"),
    (["--data", "nowhere"], "'nowhere' is no folder of images"),
    (["--data", "flat", "--method", "supervised"], "flat has no classes"),
    (["--out", "list.json"], "list.json is no table of this command"),
    (["--out", "cells.json"], "cells.json is no table of this command"),
    (["--out", "list.json/table.json"], "list.json"),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_trained(typed, words, tiny, folder, capsys):
    Path("list.json").write_text("[]")
    Path("cells.json").write_text('{"cells": [{"method": "mae"}]}')
    Path("flat").mkdir()
    for i, path in enumerate(Path("set/train").rglob("*.png")):
        Path(f"flat/{i}.png").write_bytes(path.read_bytes())
    given = typed if "--data" in typed else [*typed, "--data", folder]
    assert words in fails(capsys, train.guard, lambda: baselines.main(given))
    assert not train.RUNS.exists()


def test_a_table_is_refused_under_torchrun(tiny, folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in fails(capsys, baselines.main, ["--data", folder])


def test_the_run_of_another_table_is_not_touched(tiny, folder, capsys):
    """The same name with other settings: as when the table's file was deleted."""
    arguments = ["--data", folder, "--method", "mae"]
    baselines.main(arguments)
    (RUNS / "set.json").unlink()
    before = (RUNS / "set-mae-0/checkpoint.pt").read_bytes()
    error = fails(capsys, baselines.main, [*arguments, "--epochs", "2"])
    assert "set-mae-0 was trained with epochs 1, not 2.0: move or delete" in error
    assert (RUNS / "set-mae-0/checkpoint.pt").read_bytes() == before
    (RUNS / "set.json").unlink()
    baselines.main(arguments)  # the same settings: probed again, not trained
    assert len(log_of(RUNS / "set-mae-0")) == 5


@pytest.mark.parametrize("table, row, name, words", [
    (masked, (3, 32, 2, 2, 16, 1), "mae", "mae: size 8 does not cut into 2 x 2 or more patches"),
    (masked, (2, 30, 2, 2, 16, 1), "mae", "hidden 30 is not a multiple of 4 x heads 2"),
    (masked, (2, 32, 2, 2, 20, 1), "mae", "dec_hidden 20 is not a multiple"),
    (masked, (1, 32, 2, 2, 16, 1), "lmim", "HOG cells of [2, 4, 8] pixels do not fit size 8 and"),
    (masked, (4, 32, 2, 2, 16, 1), "mae", None),
    (unet, (8, 1, (1, 2, 2, 2, 2), (1,), (4,), 2, 0.0), "diffae", "cannot be halved 4 times"),
    (unet, (8, 1, (1, 2), (1, 2, 2, 2, 2), (4,), 2, 0.0), "diffae", "cannot be halved 4 times"),
    (unet, (9, 1, (1, 2), (1, 2), (4,), 2, 0.0), "dier-unet", "base 9 x mult does not divide into"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_one_line(table, row, name, words, tiny, monkeypatch, capsys):
    monkeypatch.setitem(table.TABLE, "cpu 32", row)
    assert words is None or words in fails(capsys, built, name)
    if words is None:
        built(name)


@pytest.mark.slow
def test_the_whole_command_with_every_method(tiny, folder):
    write_folder(Path("many"), per_class=30, classes=4)
    baselines.main(["--data", "many", "--epochs", "1"])
    rows = json.loads((RUNS / "many.json").read_text())["rows"]
    assert [row["method"] for row in rows if not row["reported"]] == [
        *baselines.METHODS, *baselines.FLOORS
    ]  # fmt: skip
    assert all(0 <= row["top1"] <= 100 for row in rows if not row["reported"])
