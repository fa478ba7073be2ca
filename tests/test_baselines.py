"""appendix/baselines.py, unet.py: methods learn, share a recipe, resume, fill a table."""

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
from appendix import baselines, dmjd, masked, swin, tokens, unet

CPU = torch.device("cpu")
# size patch hidden depth heads base blocks mult attention enc_heads dropout batch lr epochs
DIER_ROW = (8, 4, 16, 1, 2, 8, 1, (1, 2), (4,), 2, 0.0, 8, 1e-2, 1)
UNET_ROW = (8, 1, (1, 2), (1, 2), (4,), 2, 0.0)
VIT_ROW = (2, 32, 2, 2, 32, 1)
SWIN_ROW = (1, 16, (1, 1), (1, 2), 2, 32)
TOKENS_ROW = ((8, 8, 16), 1, (1, 0.0))
DMJD_ROW = (1, (1, 2, 1), (8, 16, 32), 2, 32, 1)


@pytest.fixture
def tiny(monkeypatch):
    """Networks of a few thousand weights for digits and folders of small images, on the CPU."""
    monkeypatch.setitem(model.TABLE, "cpu 32", DIER_ROW)
    monkeypatch.delitem(model.TABLE, "cpu glyphs")
    monkeypatch.setitem(unet.TABLE, "cpu 32", UNET_ROW)
    rows = {masked: VIT_ROW, swin: SWIN_ROW, tokens: TOKENS_ROW, dmjd: DMJD_ROW}
    for module, row in rows.items():
        monkeypatch.setitem(module.TABLE, "cpu 32", row)
    for key, value in {"preset": "cpu", "device": "cpu", "amp": "off"}.items():
        monkeypatch.setitem(train.DEFAULTS, key, value)
    monkeypatch.setattr(probe, "EPOCHS", 10)
    monkeypatch.setattr(probe, "UPDATES", 12)  # of an epoch each on tiny sets


def settings_of(name, **typed):
    """Settings of a tiny run on ten classes of images of one channel."""
    settings = train.resolve({"data": "glyphs", **typed}) | {"method": name}
    return settings | {"class_names": [str(k) for k in range(10)]}


def built(name, **typed):
    """The tiny network of a method, seed 0."""
    torch.manual_seed(0)
    return baselines.METHODS[name][0](settings_of(name, **typed))


def on_meta(name, settings):
    """Its network without numbers."""
    with torch.device("meta"):
        return baselines.METHODS[name][0]({**settings, "class_names": ["a", "b"]})


def parameters(net):
    return sum(p.numel() for p in net.parameters())


# ---------------------------------------------------------------------------- the methods

NUMBERS = {  # three losses and gradient norms of commit d3d31e8, whose GELU was the tanh form
    "dier-notime": ([0.971978, 1.065634, 0.845957], [0.499955, 0.518628, 0.522715]),
    "dier-unet": ([0.971978, 0.973629, 0.749652], [2.138313, 2.047766, 1.640225]),
    "dier-unet-notime": ([0.971978, 0.973629, 0.749652], [2.138313, 2.047766, 1.640253]),
    "diffae": ([0.971978, 0.978131, 0.732781], [2.063457, 1.93299, 1.670808]),
    "supervised": ([2.275505, 5.167729, 2.786102], [4.334267, 11.54624, 7.297665]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_three_steps_of_each_method_give_the_recorded_numbers(name, tiny, tmp_path):
    n, y, x = np.ogrid[:24, :8, :8]
    images = (37 * n + 11 * y * y + 23 * x * (n % 7 + 3)) % 256
    images, labels = images.astype(np.uint8)[:, None], np.arange(24) % 10
    settings, net = settings_of(name) | {"lr": 1e-2}, built(name)
    loss_fn = baselines.METHODS[name][1]
    if name == "supervised":
        split = data.Split(images, labels, None, settings["class_names"])
        loss_fn = baselines.labels_by_step(split, settings, 0)
    train.train(net, loss_fn, images, settings, tmp_path)
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


STEPS = {"supervised": 30, "diffae": 15}
QUICK = ["supervised", "diffae"]
SLOW = [n for n, m in baselines.METHODS.items() if m[1] is train.dier_loss and n not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_each_method_overfits_sixteen_images(name, tiny):
    """One fixed draw of noise: every loss falls well below that of the best constant prediction,
    which knows nothing of the image. (The methods with masks: test_masked.py, test_tokens.py.)"""
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
    constant = math.log(2) if name == "supervised" else 1.0
    assert np.mean(losses[-5:]) < 0.75 * constant, losses[-5:]


@pytest.mark.parametrize("name", [n for n in baselines.METHODS if n != "tokenizer"])
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


SETS = [("mnist", "paper"), ("mnist", "cpu"), ("tiny-imagenet", "cpu"), ("bccd", "cpu")]
LARGE = [("tiny-imagenet", "paper"), ("bccd", "paper")]
SETS += [pytest.param(*row, marks=pytest.mark.slow) for row in LARGE]


@pytest.mark.parametrize("name, preset", SETS)
def test_each_method_has_each_preset_with_diers_encoder_size_and_recipe(name, preset):
    typed = {"data": name, "preset": preset, "device": "cpu"}
    dier = train.resolve(typed) | {"method": "dier"}
    shapes = [p.shape for p in on_meta("dier", dier).encoder.parameters()]
    for method in baselines.METHODS:
        settings = train.resolve(typed) | {"method": method}
        net = on_meta(method, settings)
        assert parameters(net) > 1e5
        if method.startswith("dier") or method == "supervised":
            assert [p.shape for p in net.encoder.parameters()] == shapes
        assert settings == dier | {"method": method}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "tiny-imagenet", "bccd"])
def test_denoisers_of_preset_cpu_cost_about_what_dier_costs(name):
    typed, cost = {"data": name, "preset": "cpu", "device": "cpu"}, {}
    for method, (_, loss_fn) in baselines.METHODS.items():
        if loss_fn is train.dier_loss:
            settings = train.resolve(typed) | {"method": method}
            cost[method] = baselines.flops_per_image(method, settings)
    assert all(0.4 < c / cost["dier"] < 2.5 for c in cost.values()), cost


def test_flops_of_a_block_are_counted_by_hand(tiny, monkeypatch):
    """Twice the multiplications, three times for forward and both gradients."""
    few = baselines.flops_per_image("mae", settings_of("mae"))
    monkeypatch.setitem(masked.TABLE, "cpu 32", (*VIT_ROW[:-1], 2))
    places, d = 17, 32  # of the decoder: 16 tokens and the class token
    linear = places * (3 + 1 + 4 + 4) * d * d  # qkv, proj, fc1, fc2
    scores = 2 * places * places * d  # q k^T and its product with v, over all heads
    more = baselines.flops_per_image("mae", settings_of("mae"))
    assert more - few == 3 * 2 * (linear + scores)


@pytest.mark.parametrize("name, cpu, paper", [
    ("mae", 34, 4505), ("lmim", 45, 2393), ("lmim-swin", 59, 2237), ("dmjd", 229, 5923),
    ("cae", 102, 8640), ("mage", 92, 9972), ("tokenizer", 20, 850),
])  # fmt: skip
@pytest.mark.parametrize("preset", ["cpu", pytest.param("paper", marks=pytest.mark.slow)])
def test_mflop_an_image_are_what_was_estimated(name, cpu, paper, preset):
    """For digits: preset cpu at 16 pixels, preset paper at 32."""
    typed = {"data": "mnist", "preset": preset, "device": "cpu"}
    found = baselines.flops_per_image(name, train.resolve(typed) | {"method": name}) / 1e6
    mflop = {"cpu": cpu, "paper": paper}[preset]
    assert mflop / 1.5 < found < mflop * 1.5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_flops_of_convolutions_are_counted_by_hand(kind, groups, stride, monkeypatch):
    """A depthwise one too, and with stride 2. The image has no gradient, so the first convolution
    has two parts of three. The kernels of 4 x 4 and 3 x 3 lie at each place of the smaller side."""
    size = 2 + stride
    kernel = {"kernel_size": size, "stride": stride, "padding": 1}

    def build(settings):
        return torch.nn.Sequential(kind(4, 4, 3, padding=1), kind(4, 8, groups=groups, **kernel))

    loss = baselines.own_loss
    monkeypatch.setitem(baselines.METHODS, "mae", (build, lambda *a: loss(*a).mean((1, 2, 3))))
    found = baselines.flops_per_image("mae", {"channels": 4, "size": 6})
    places = 9 if stride == 2 and kind is torch.nn.Conv2d else 36
    first, second = 2 * 36 * 9 * 4 * 4, 2 * places * size**2 * 4 * 8 // groups
    assert found == 2 * first + 3 * second


# ---------------------------------------------------------------------------- U-Net


@pytest.mark.parametrize("name, millions", [
    ("mnist", 126.71), ("cifar10", 126.71), ("tiny-imagenet", 130.39), ("bccd", 220.02)
])  # fmt: skip
def test_parameter_counts_of_table_5(name, millions):
    typed = {"data": name, "preset": "paper", "device": "cpu"}
    net = on_meta("diffae", train.resolve(typed) | {"method": "diffae"})
    assert parameters(net) / 1e6 == pytest.approx(millions, abs=0.01)  # a block is half a percent


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


def test_diffaes_encoder_has_the_levels_of_table_5():
    """Resolution and width after each layer, attention where the resolution asks for it."""
    cfg = unet.UNetConfig(32, 3, 8, 2, (1, 2), (1, 2, 3), (16,), 2, 0.0)
    net, seen = unet.VectorEncoder(cfg), []
    for layer in net.layers:
        kind = "attention" if isinstance(layer, unet.AttentionBlock) else "conv"
        layer.register_forward_hook(lambda *a, k=kind: seen.append((k, *a[-1].shape[1:3])))
    net(torch.randn(1, 3, 32, 32), torch.zeros(1))
    levels = [("conv", 8, 32)] * 3 + [("conv", 8, 16)]
    levels += [("conv", 16, 16), ("attention", 16, 16)] * 2 + [("conv", 16, 8)]
    levels += [("conv", 24, 8)] * 2
    assert seen == levels + [("conv", 24, 8), ("attention", 24, 8), ("conv", 24, 8)]


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
    pca = baselines.PCA(wide)  # 8 images have 7 directions; along others they differ by rounding
    some = torch.randn(9, 3, 20, 20, generator=generator)
    x, x_test = probe.standardise(pca(wide.view(8, 3, 20, 20), None), pca(some, None))
    assert x.shape == (8, 7) and x_test.abs().max() < 5
    wide = torch.randn(model.V + 100, 3 * 20 * 20, generator=generator)
    assert baselines.PCA(wide)(some, None).shape == (9, model.V)


# ---------------------------------------------------------------------------- cells

RUNS = train.RUNS / "baselines"


def log_of(folder):
    """(step, loss, norm) of each row of a log."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def test_a_cell_leaves_what_train_and_probe_leave(tiny, folder, capsys):
    baselines.main(["--data", folder, "--method", "mae", "dier", "--epochs", "4"])
    for name, times in (("mae", [0]), ("dier", baselines.TIMES)):
        run = RUNS / f"set-{name}-0"
        config, cell = (read(run / f"{file}.json") for file in ("config", "cell"))
        assert (config["method"], config["epochs"], config["lr"]) == (name, 4, cell["lr"])
        assert (config["images"], config["class_names"]) == (40, ["class0", "class1"])
        assert log_of(run)[-1][0] == 20 and (run / "preview.png").exists() == (name == "dier")
        result = read(run / "probe.json")
        assert [row["t"] for row in result["rows"]] == times
        assert result["name"] == f"baselines/set-{name}-0" and result["protocol"]["step"] == 20
        assert result["protocol"]["epochs"] == 12
        net, saved = train.load_model(run, baselines.METHODS[name][0])
        assert saved["step"] == 20 and not net.training
        check_cell(cell, run)
    assert read(RUNS / "set.json")["probe"].endswith(", 40 labels, 12 epochs")
    assert "no run in runs" in fails(capsys, probe.main, [])  # baselines are not DiER's newest run
    name = ["--name", "baselines/set-mae-0"]
    assert "has the runs of tables" in fails(capsys, train.main, [*name, "--resume"])
    assert "is a run of mae" in fails(capsys, probe.main, name)


def read(path):
    return json.loads(Path(path).read_text())


def check_cell(cell, run):
    """Sizes, cost, rates and curve of a cell of 20 steps of 8 images."""
    net, _ = train.load_model(run, baselines.METHODS[cell["method"]][0])
    assert cell["parameters"] == parameters(net) > cell["encoder_parameters"]
    assert cell["encoder_parameters"] == parameters(net.encoder)
    assert cell["width"] == (32 if cell["method"] == "mae" else model.V)
    assert cell["images_seen"] == 160 and cell["seconds"] > 0
    assert cell["flops"] == 160 * cell["flops_per_image"]
    curve = [(row["epochs"], row["flops"]) for row in cell["curve"]]
    assert curve == [(k, k * 40 * cell["flops_per_image"]) for k in (1, 2, 4)]
    last, chosen = cell["curve"][-1], probe.choose(cell["probe"], "held_out")
    assert last["top1"] == cell["top1"] == chosen["top1"] and cell["chosen_t"] == chosen["t"]
    assert {"command", "commit", "versions", "machine"} <= set(cell)


def test_a_tokenizer_that_fails_is_no_fault_of_the_rates(tiny, folder, monkeypatch, capsys):
    monkeypatch.setattr(baselines, "TOKENIZER_RATE", 1e30)
    flags = ["--data", folder, "--method", "mage", "--epochs", "40"]
    assert "not finite" in fails(capsys, baselines.main, flags)
    assert not list(RUNS.glob("*/stage-1.json"))


def test_the_rate_is_the_best_on_held_out_images_and_an_edge_gets_one_more(
    tiny, folder, monkeypatch
):
    """Planted accuracies; a rate that does not train counts as 0."""
    planted, looked = {}, []

    def stage(table, settings, folder, share):
        assert share == 1 and settings["seed"] == 0 and settings["epochs"] == 1.0
        looked.append(settings["lr"])
        if planted[settings["lr"]] is None:
            data.fail("not finite", train.NotFinite)
        return {"held_out": planted[settings["lr"]], "top1": -planted[settings["lr"]]}

    monkeypatch.setattr(baselines, "run_stage", stage)
    table, settings = table_of(folder, epochs=10)
    for accuracies, best, more in (
        ([1.0, 3.0, 2.0, 0.0], "0.001", []),
        ([5.0, 3.0, 2.0, 0.0], "0.0005", [2.5e-4]),
        ([1.0, 3.0, 2.0, 4.0], "0.008", [8e-3]),
        ([1.0, 3.0, 2.0, None], "0.001", []),
    ):
        planted.update(zip(baselines.RATES, accuracies), **{})
        planted.update({2.5e-4: 0.5, 8e-3: 4.5})
        looked.clear()
        found = baselines.screen_rates(table, {**settings, "seed": 3})
        assert next(iter(found)) == best and looked == [*baselines.RATES, *more]
        assert len(found) == len(looked) and list(found.values()) == sorted(found.values())[::-1]
    name = f"{table.path.stem}-{settings['method']}-0-lr-0.004"  # no later call trains it again
    assert read(train.RUNS / "baselines" / name / "stage-1.json") == {"held_out": 0.0}


def test_a_damaged_screen_ends_the_command_and_scores_nothing(tiny, folder, monkeypatch):
    monkeypatch.setattr(baselines, "run_stage", lambda *_: data.fail("checkpoint.pt is damaged"))
    table, settings = table_of(folder, epochs=10)
    with pytest.raises(SystemExit) as stop:
        baselines.screen_rates(table, {**settings, "seed": 3})
    assert stop.value.code == 2


def table_of(folder, name="mae", **typed):
    """A table on a folder of images, and the settings of a method in it."""
    settings = train.resolve({"data": folder, **typed}) | {"method": name}
    split, _ = data.load(folder, settings["size"], settings["channels"], Path("data"))
    settings |= {"images": len(split.images), "class_names": split.class_names}
    probed = data.load(folder, settings["size"], settings["channels"], Path("data"), 10)
    path, epochs = RUNS / "set.json", settings["epochs"]
    return baselines.Table(path, split, probed, epochs, {"commit": "x"}), settings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["supervised", "dmjd", "mage"])
def test_a_cell_stopped_and_killed_ends_bit_equal_to_one_that_was_not(
    name, tiny, folder, monkeypatch, capsys
):
    """Stopped by Ctrl-C after step 3 of a screen and step 8 of the training, killed in step 26,
    long after its last checkpoint."""
    monkeypatch.setattr(baselines, "RATES", (1e-3, 2e-3, 1e-2))
    monkeypatch.setattr(baselines, "SCREEN", 0.2)
    arguments, real = ["--data", folder, "--method", name, "--epochs", "6"], train.draw
    baselines.main([*arguments, "--out", "straight.json"])

    def draw(seed, step, *rest):
        if step == [2, 7, 25][len(stops)]:
            stops.append(step)
            if step == 25:
                raise ConnectionError("killed")
            os.kill(os.getpid(), signal.SIGINT)
        return real(seed, step, *rest)

    stops, again = [], [*arguments, "--out", "cut.json"]
    with monkeypatch.context() as m:
        m.setattr(train, "draw", draw)
        for done in (3, 8):
            with pytest.raises(SystemExit) as stop:
                baselines.main(again)
            words = f"step {done}: the same command"
            assert stop.value.code == 130 and words in capsys.readouterr().out
        assert log_of(RUNS / f"cut-{name}-0")[-1][0] == 8
        with pytest.raises(ConnectionError):
            baselines.main(again)
    baselines.main(again)
    assert stops == [2, 7, 25]
    runs = [RUNS / f"{table}-{name}-0" for table in ("straight", "cut")]
    logs = [[row for row in log_of(run) if row[0] not in (8, 16)] for run in runs]
    assert logs[0] == logs[1] and logs[0][-1][0] == 30
    a, b = (train.read_checkpoint(run) for run in runs)
    for part in ("raw", "ema"):
        assert all(torch.equal(value, b[part][key]) for key, value in a[part].items())
    assert without_times("straight.json") == without_times("cut.json")


def test_supervised_learns_the_labels_of_the_right_images():
    """Each image is as bright as its label says, over the end of an epoch, from any step on."""
    labels = np.arange(10) % 4
    images = np.broadcast_to(60 * labels[:, None, None, None], (10, 1, 4, 4)).astype(np.uint8)
    split = data.Split(images, labels, None, list("abcd"))
    settings = settings_of("supervised", device="cpu")
    scale = torch.tensor([60.0])

    def brightness(x0):
        label = ((x0.mean((1, 2, 3)) + 1) * 127.5 / scale).round().long()
        return 100.0 * torch.nn.functional.one_hot(label, 4)

    for first in (0, 3):
        loss_fn = baselines.labels_by_step(split, settings, first)
        for step in range(first, first + 5):
            index = data.batch_index(10, step, settings["batch_size"], settings["seed"], CPU)
            x0 = data.get_batch(torch.from_numpy(images), index, CPU)
            assert loss_fn(brightness, x0, None, None, None).max() < 1e-6


# ---------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("name", ["cae", pytest.param("mage", marks=pytest.mark.slow)])
def test_the_tokenizer_is_trained_first_and_its_cost_is_in_the_row(name, tiny, folder, monkeypatch):
    monkeypatch.setattr(baselines, "RATES", (5e-4, 1e-3, 2e-3))
    baselines.main(["--data", folder, "--method", name, "--epochs", "4"])
    own, cell = read(RUNS / "set-tokenizer-0/cell.json"), read(RUNS / f"set-{name}-0/cell.json")
    assert cell["tokenizer"] == own and (RUNS / "set-tokenizer-0/reconstruction.png").exists()
    assert own["images_seen"] == 16 and own["epochs"] == pytest.approx(0.4)
    assert {"explained_variance", "perplexity", "used"} <= set(own)
    assert cell["flops"] == own["flops"] + 160 * cell["flops_per_image"]
    assert cell["curve"][-1]["flops"] == cell["flops"]
    trained = train.read_checkpoint(RUNS / "set-tokenizer-0")["raw"]
    saved = train.read_checkpoint(RUNS / f"set-{name}-0")
    assert cell["seconds"] == saved["seconds"] + own["seconds"] > saved["seconds"]
    at = "encoder.tokenizer" if "encoder.tokenizer.codebook" in saved["raw"] else "tokenizer"
    for part in ("raw", "ema"):  # frozen, and whole in the checkpoint
        held = {key: saved[part][f"{at}.{key}"] for key in trained}
        assert all(torch.equal(held[key], value) for key, value in trained.items())
    rows = read(RUNS / "set.json")["rows"]
    assert [row["method"] for row in rows] == [name]


# ---------------------------------------------------------------------------- Table 1


def without_times(path):
    """A table without what a clock says, and without where it comes from."""
    times = ("images_per_s", "seconds", "command", "commit", "machine", "versions")

    def strip(x):
        if isinstance(x, list):
            return [strip(y) for y in x]
        if isinstance(x, dict):
            return {k: strip(v) for k, v in x.items() if k not in times}
        return x

    return strip(read(path))


@pytest.mark.slow
def test_a_table_that_was_interrupted_ends_equal_to_one_that_was_not(
    tiny, folder, monkeypatch, capsys
):
    monkeypatch.setattr(baselines, "screen_rates", lambda *_: {"0.01": 50.0, "0.001": 40.0})
    arguments = ["--data", folder, "--method", "dier", "mae", "pixels", "--seeds", "2"]
    baselines.main([*arguments, "--out", "straight.json"])
    assert "nan" not in capsys.readouterr().out
    probed, trained, real, cut = [], [], probe.probe, [*arguments, "--out", "cut.json"]

    def interrupted(*args):
        if len(probed) == 4:  # dier is whole, mae was probed at a quarter
            raise KeyboardInterrupt
        probed.append(1)
        return real(*args)

    with monkeypatch.context() as m:
        m.setattr(probe, "probe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            baselines.main(cut)
    assert [cell["method"] for cell in read("cut.json")["cells"]] == ["dier"]  # saved at once
    monkeypatch.setattr(train, "draw", lambda *a, real=train.draw: trained.append(a[0]) or real(*a))
    baselines.main(cut)
    assert trained == [0, 0] + 10 * [1]  # mae went on from its half, then seed 1
    assert without_times("cut.json") == without_times("straight.json")
    cells = [(cell["method"], cell["seed"]) for cell in read("cut.json")["cells"]]
    assert cells == [("dier", 0), ("dier", 1), ("mae", 0), ("mae", 1), ("pixels", 0)]
    check_rows(read("cut.json"))
    baselines.main([*arguments[:3], "random", "--seeds", "2", "--out", "cut.json"])  # joins them
    methods = [row["method"] for row in read("cut.json")["rows"]]
    assert methods == ["dier", "mae", "random", "pixels"]
    baselines.main([*arguments[:3], "pixels", "--out", "cut.json"])  # of one seed: keeps the others
    check_rows(read("cut.json"))
    baselines.main(cut)
    assert trained == [0, 0] + 10 * [1]  # nothing is run again
    for command in (cut, [*arguments[:3], "pca", "--out", "cut.json"]):
        error = fails(capsys, baselines.main, [*command, "--epochs", "3"])
        assert "cut-dier-0 was made with epochs 1, not 3.0: move or delete" in error
    write_folder(Path("other"), per_class=3)
    os.rename("set", "old")
    os.rename("other", "set")
    assert "was made with images 40, not 6" in fails(capsys, baselines.main, cut)


def check_rows(table):
    """What the table of the test above has in its rows."""
    rows = {row["method"]: row for row in table["rows"]}
    keys = {"method", "seeds", "parameters", "encoder_parameters", "width", "seconds", "lr"}
    keys |= {"flops_per_image", "flops", "images_seen", "top1", "top1_std", "oracle", "knn"}
    assert all(set(row) == keys | {"paper"} for row in rows.values())
    assert rows["dier"]["images_seen"] == 40 and rows["dier"]["seeds"] == 2
    assert rows["dier"]["lr"] == 0.01  # the screen's best
    assert rows["pixels"]["top1_std"] is None and rows["pixels"]["flops"] is None
    assert table["epochs"] == 1 and table["images"] == 40


def test_rows_carry_means_over_the_seeds_and_the_papers_numbers():
    cell = {"method": "diffae", "seed": 0, "parameters": 1, "flops_per_image": 2, "lr": 1e-3}
    cell |= {"seconds": 3.0, "images_seen": 4, "top1": 50.0, "oracle": 51.0, "knn": 52.0}
    other = cell | {"seed": 1, "seconds": 5.0, "top1": 53.0}
    rows = baselines.make_rows([cell, other, cell | {"method": "mage"}], "mnist")
    assert [row["method"] for row in rows] == ["diffae", "mage"]
    row = rows[0]
    assert (row["seconds"], row["images_seen"], row["top1"], row["knn"]) == (4, 4, 51.5, 52)
    assert row["top1_std"] == pytest.approx(3 / 2**0.5)  # of a sample
    assert row["paper"] == 62.1 and rows[1]["paper"] == 96.5
    assert baselines.make_rows([cell], "glyphs")[0]["paper"] is None


@pytest.mark.parametrize("typed, words", [
    (["--method", "beit"], "invalid choice: 'beit' (choose from"),
    (["--seeds", "0"], "0 is not a whole number above 0"),
    (["--minutes", "3"], "unrecognized arguments: --minutes"),
    (["--data", "nowhere"], "'nowhere' is no folder of images"),
    (["--data", "flat", "--method", "supervised"], "flat has no classes"),
    (["--out", "list.json/table.json"], "list.json"),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_trained(typed, words, tiny, folder, capsys):
    Path("list.json").write_text("[]")
    Path("flat").mkdir()
    for i, path in enumerate(Path("set/train").rglob("*.png")):
        Path(f"flat/{i}.png").write_bytes(path.read_bytes())
    given = typed if "--data" in typed else [*typed, "--data", folder]
    assert words in fails(capsys, train.guard, lambda: baselines.main(given))
    assert not train.RUNS.exists()


def test_a_cell_that_cannot_be_read_is_one_line(tiny, folder, capsys):
    command = ["--data", folder, "--method", "pixels"]
    baselines.main(command)
    (RUNS / "set-pixels-0/cell.json").write_text("")  # as a power cut may leave it
    error = fails(capsys, baselines.main, command)
    assert f"{RUNS}/set-pixels-0/cell.json cannot be read (Expecting value" in error
    assert f"delete {RUNS}/set-pixels-0, and it is made again" in error


def test_a_loss_that_is_not_finite_ends_its_own_cell_alone(tiny, folder, capsys, monkeypatch):
    monkeypatch.setattr(baselines, "screen_rates", lambda *_: {"0.001": 50.0})
    build, loss_fn = baselines.METHODS["mae"]
    broken = {**baselines.METHODS, "mae": (build, lambda *args: loss_fn(*args) * math.nan)}
    monkeypatch.setattr(baselines, "METHODS", broken)
    command = ["--data", folder, "--method", "mae", "pixels", "--seeds", "2"]

    def encode(*_):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(probe, "encode", encode)
        baselines.main(command)
    assert stop.value.code == 130  # Ctrl-C ends what follows at once, no loop waits for it
    with pytest.raises(SystemExit) as stop:
        baselines.main(command)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("the loss is not finite") == 3
    assert said.out.endswith("training was not finite: mae with seed 0, mae with seed 1\n")
    assert [row["method"] for row in read(RUNS / "set.json")["rows"]] == ["pixels"]


def test_train_py_leaves_the_runs_of_tables_alone(folder, capsys):
    (RUNS / "set-dier-0").mkdir(parents=True)
    (RUNS / "set-dier-0/checkpoint.pt").write_bytes(b"a cell's")
    for flags in (["--resume", "--epochs", "9"], ["--data", folder]):
        error = fails(capsys, train.main, ["--name", "baselines/set-dier-0", *flags])
        assert "runs/baselines has the runs of tables: python -m appendix.baselines" in error
    assert [path.read_bytes() for path in RUNS.rglob("*.*")] == [b"a cell's"]


def test_a_table_is_refused_under_torchrun(tiny, folder, monkeypatch, capsys):
    for key, value in zip(train.WORLD, "02001"):
        monkeypatch.setenv(key, value)
    assert "without torchrun" in fails(capsys, baselines.main, ["--data", folder])


@pytest.mark.parametrize("busy", ["set-mage-0", "set-tokenizer-0"])
def test_a_run_that_another_process_trains_is_left_alone(tiny, folder, capsys, monkeypatch, busy):
    monkeypatch.setattr(baselines, "screen_rates", lambda *_: {"0.001": 50.0})
    with train.claim(RUNS / busy):
        line = fails(capsys, baselines.main, ["--data", folder, "--method", "mage"])
    assert f"another process is training runs/baselines/{busy}" in line
    assert not (RUNS / busy / "checkpoint.pt").exists()


def test_a_file_of_no_name_is_refused_before_the_work(tiny, folder, capsys):
    assert "'' names no file" in fails(capsys, baselines.main, ["--data", folder, "--out", ""])


def test_the_run_of_another_table_is_not_touched(tiny, folder, capsys, monkeypatch):
    """The same name with other settings."""
    monkeypatch.setattr(baselines, "screen_rates", lambda *_: {"0.001": 50.0})
    arguments = ["--data", folder, "--method", "mae"]
    baselines.main(arguments)
    before = (RUNS / "set-mae-0/checkpoint.pt").read_bytes()
    (RUNS / "set-mae-0/cell.json").unlink()
    error = fails(capsys, baselines.main, [*arguments, "--epochs", "2"])
    assert "set-mae-0 was made with epochs 1, not 2.0: move or delete" in error
    assert (RUNS / "set-mae-0/checkpoint.pt").read_bytes() == before
    baselines.main(arguments)  # the same settings: not trained again
    assert len(log_of(RUNS / "set-mae-0")) == 5


@pytest.mark.slow
def test_the_whole_command_with_every_method(tiny, folder):
    write_folder(Path("many"), per_class=30, classes=4)
    baselines.main(["--data", "many", "--epochs", "1"])
    rows = read(RUNS / "many.json")["rows"]
    usual = [name for name in baselines.METHODS if name not in baselines.OTHERS]
    assert [row["method"] for row in rows] == [*usual, *baselines.FLOORS]
    assert all(0 <= row["top1"] <= 100 for row in rows)
