"""appendix/baselines.py and its methods: they learn, mask exactly, resume, fill one table."""

import argparse
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from conftest import TINY, write_folder

import data
import model as M
import probe
import runs
import train
from appendix import baselines, counts, figures, masked, methods, recover, table, unet

VIT = "patch=2,hidden=32,depth=2,heads=2,dec_hidden=16,dec_depth=1"
UNET = "base=8,mult=1,2,attention=4,enc_heads=2,unet_base=8,unet_mult=1,2,unet_attention=4"
SIZES = {name: TINY[-1] for name in ("dier", "dier-notime", "supervised")}
SIZES |= {name: UNET for name in ("dier-unet", "dier-unet-notime", "diffae")}
SIZES |= {name: VIT for name in ("mae", "lmim", "dmjd")}
CPU = torch.device("cpu")


def flags(name, folder="set", *more):
    """Flags of the tiny model of a method."""
    return ["--data", folder, "--device", "cpu", "--amp", "off", "--size", "8",
            "--model", SIZES[name], *more]  # fmt: skip


def settings_of(name, folder="set", *more):
    """The resolved settings of a tiny run."""
    args = baselines.build_parser().parse_args(flags(name, folder, "--seed", "0", *more))
    return runs.resolve(args, methods.METHODS[name])


def fails(capsys, function, *args):
    """The one line with which a command leaves, status 2."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    return error


def opened(encoder):
    """The encoder with its zero-initialised layers redrawn, so that everything reaches v."""
    for layer in encoder.zero_initialised():
        layer.reset_parameters()
    return encoder


# ---------------------------------------------------------------------------- the methods


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


STEPS = {"mae": 130, "lmim": 320, "dmjd": 320, "supervised": 30, "diffae": 15}
SLOW = ("lmim", "dmjd", "dier", "dier-notime", "dier-unet", "dier-unet-notime")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in methods.METHODS]
)
def test_each_method_overfits_sixteen_images(name, folder):
    """By train.py's own step. Noise: one fixed draw of it; masks: new ones each time. Every loss
    falls well below that of the best constant prediction, which knows nothing of the image."""
    method, generator = methods.METHODS[name], torch.Generator().manual_seed(0)
    state = train.TrainState(settings_of(name, folder, "--lr", "1e-2"), CPU, method=method)
    if name == "supervised":
        state.model.labels = torch.arange(16) % 2  # without a pattern: learned by heart
    x0, t = stripes(), torch.randint(200, 1000, (16,), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    state.model.train()
    losses = []
    for step in range(STEPS.get(name, 60)):
        torch.manual_seed(step)
        train.training_step(state, x0, t, eps, torch.arange(16))
        losses.append(state.window.read()["loss"])
        state.window.reset()
    if method.denoises:  # eps_theta = 0 at first
        assert losses[0] == pytest.approx(eps.square().mean().item(), rel=1e-5)
    assert np.mean(losses[-5:]) < 0.75 * best_constant(name, x0), losses[-5:]


def test_without_time_v_ignores_t_and_the_denoiser_still_gets_it(folder):
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 5, 400, 999])
    for timed in ("dier", "dier-unet"):
        for name in (timed, f"{timed}-notime"):
            method, settings = methods.METHODS[name], settings_of(name, folder)
            torch.manual_seed(0)
            model = method.build(settings).eval()
            opened(model.encoder)
            assert method.timed == (name == timed)
            same = torch.equal(model.encoder(x, t), model.encoder(x, torch.zeros_like(t)))
            assert same == (not method.timed)
            seen = []
            model.dit.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1:]))
            model(x, t, x)
            assert torch.equal(seen[0][0], t)
            assert torch.equal(seen[0][1], model.encoder(x, t))
    assert not methods.METHODS["diffae"].timed


def test_notime_differs_from_dier_in_the_encoders_time_alone(folder):
    """Same number of parameters, same initial weights for one seed: nothing else is compared."""
    for timed in ("dier", "dier-unet"):
        models = []
        for name in (timed, f"{timed}-notime"):
            torch.manual_seed(3)
            models.append(methods.METHODS[name].build(settings_of(name, folder)).state_dict())
        assert models[0].keys() == models[1].keys()
        assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())


def test_the_unets_have_diers_encoder_in_every_row_of_every_preset():
    fields = ("size", "base", "blocks", "mult", "attention", "enc_heads", "dropout")
    for name, rows in M.PRESETS.items():
        for row, dier in rows.items():
            unet_row = methods.METHODS["dier-unet"].presets[name][row]
            assert all(getattr(unet_row.model, f) == getattr(dier.model, f) for f in fields)
            assert (unet_row.batch_size, unet_row.minutes) == (dier.batch_size, dier.minutes)


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
        return unet.UNetConfig(64, 1, 16, 1, (1, 2), (4,), base, 1, mult, (4,))

    assert works(config) == fits
    monkeypatch.setattr(unet.UNetConfig, "__post_init__", lambda self: None)
    assert works(lambda: unet.UNet(config(), 8)) == fits  # by the group norms' own check


@pytest.mark.parametrize("data_name, millions", [
    ("mnist", 126.71), ("cifar10", 126.71), ("tiny-imagenet", 130.39), ("bccd", 220.02)
])  # fmt: skip
def test_parameter_counts_of_table_5(data_name, millions):
    args = ["--data", data_name, "--preset", "paper", "--device", "cpu", "--seed", "0"]
    method = methods.METHODS["diffae"]
    settings = runs.resolve(baselines.build_parser().parse_args(args), method)
    counted = sum(runs.parameter_counts(settings, method).values()) / 1e6
    assert counted == pytest.approx(millions, abs=0.01)  # a block too few is half a percent


@pytest.mark.slow
def test_each_preset_of_each_method_builds_and_cpu_costs_about_as_much_as_dier():
    parse = baselines.build_parser().parse_args
    for data_name in ("mnist", "tiny-imagenet", "bccd"):
        cost = {}
        for name, method in methods.METHODS.items():
            for preset in ("cpu", "paper"):
                flags = ["--data", data_name, "--preset", preset, "--device", "cpu", "--seed", "0"]
                settings = runs.resolve(parse(flags), method)
                assert settings["size"] == M.PRESETS[preset][settings["row"]].model.size
                assert sum(runs.parameter_counts(settings, method).values()) > 1e5
                if preset == "cpu" and method.denoises and name != "dier-notime":
                    cost[name] = counts.flops_per_image(settings, method)
        assert all(0.4 < c / cost["dier"] < 2.5 for c in cost.values()), cost


# ---------------------------------------------------------------------------- U-Net


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
            return (
                x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
            ) / 4
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


def test_unet_takes_time_v_and_the_skips(folder):
    """Each input, and the skip connection of each stage, changes the output."""
    torch.manual_seed(0)
    model = methods.METHODS["diffae"].build(settings_of("diffae", folder)).eval()
    x, t, v = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.randn(2, unet.DIFFAE_V)
    assert not model.unet(x, t, v).any()  # zero-initialised
    for p in model.unet.parameters():
        torch.nn.init.normal_(p, std=0.2)
    base = model.unet(x, t, v)
    assert base.shape == x.shape
    for other in (model.unet(x, t + 50, v), model.unet(x, t, v + 0.5), model.unet(x + 0.1, t, v)):
        assert not torch.allclose(base, other, atol=1e-3)
    for stage in model.unet.up:  # the last half of its input is what was kept on the way down
        hook = stage[0].register_forward_pre_hook(
            lambda m, a: (torch.cat([a[0].chunk(2, 1)[0], 0 * a[0].chunk(2, 1)[1]], 1), *a[1:])
        )
        assert not torch.allclose(base, model.unet(x, t, v), atol=1e-4)
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
    for c in range(channels):
        for y in range(side):
            for x in range(side):
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


def test_masked_losses_read_only_what_they_should(folder):
    """MAE's encoder never sees a hidden patch, and only hidden patches are scored."""
    torch.manual_seed(0)
    model = methods.METHODS["mae"].build(settings_of("mae", folder))
    x = torch.rand(1, 1, 8, 8) * 2 - 1
    visible, hidden = torch.tensor([[0, 5, 10, 15]]), None
    before = model.encoder.layers(x, visible)[-1]
    changed = x.clone()
    changed[..., :2, 2:4] += 1  # token 1
    assert torch.equal(before, model.encoder.layers(changed, visible)[-1])
    assert not torch.equal(before, model.encoder.layers(x + 1, visible)[-1])
    target = masked.normalised_patches(x, 2)
    assert target.mean(2).abs().max() < 1e-5 and (target.var(2) - 1).abs().max() < 1e-2
    torch.manual_seed(5)
    visible, hidden = masked.random_split(1, 16, 0.75, CPU)
    guess = model.decoder(model.encoder.layers(x, visible)[-1], visible)
    by_hand = np.mean([(guess - target)[0, k].square().mean().item() for k in hidden[0].tolist()])
    torch.manual_seed(5)
    assert model(x, torch.zeros(1)).item() == pytest.approx(by_hand, rel=1e-5)


def test_lmim_weighs_each_cell_by_the_hidden_share_of_it(folder):
    torch.manual_seed(0)
    config = masked.ViTConfig(16, 1, 4, 16, 3, 2, 16, 1)  # 4 x 4 tokens
    model = masked.LMIM(config)
    assert config.cells() == [2, 4, 8] and model.at == [0, 1, 2]
    x, visible = torch.rand(2, 1, 16, 16), torch.tensor([[0, 1, 4, 10], [3, 6, 9, 12]])
    for scale in model.scales:
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


# ---------------------------------------------------------------------------- commands


def test_a_baseline_trains_probes_and_is_refused_by_the_commands_of_dier(folder, capsys):
    baselines.main(["--method", "mae", *flags("mae", folder, "--epochs", "4")])
    assert "python -m appendix.baselines --method mae --probe" in capsys.readouterr().out
    run = runs.RUNS / "set"
    result = json.loads((run / "probe.json").read_text())
    assert [row["t"] for row in result["rows"]] == [None] and result["chosen_t"] is None
    assert set(result["floors"]) == {"pixels", "untrained"}
    assert json.loads((run / "config.json").read_text())["method"] == "mae"
    assert not (run / "preview.png").exists()
    (run / "probe.json").unlink()
    assert "is a run of mae" in fails(
        capsys, baselines.main, ["--probe", "--method", "lmim", "--run", "set"]
    )
    baselines.main(["--probe", "--method", "mae", "--run", "set", "--device", "cpu"])
    assert json.loads((run / "probe.json").read_text()) == result
    baselines.main(["--probe", "--device", "cpu", "--epochs", "1"])  # the newest, by itself
    assert (run / "probe-epochs1.json").exists()
    command = f"python -m appendix.baselines --probe --run {run}"
    capsys.readouterr()
    assert command in fails(capsys, probe.main, ["--run", "set"])
    again = "python -m appendix.baselines --resume --run runs/set"
    assert again in fails(capsys, train.main, ["--run", "set", "--resume"])
    assert again in fails(capsys, baselines.main, ["--method", "lmim", "--run", "set", "--resume"])
    assert "no run in runs/" in fails(capsys, probe.main, [])  # the newest DiER run: there is none
    assert "makes no images" in fails(capsys, recover.main, ["--run", "set"])
    assert "do not depend on t" in fails(
        capsys, baselines.main, ["--probe", "--run", "set", "--t", "400"]
    )
    figures.main(["--run", "set", "--limit", "12", "--device", "cpu"])
    assert "no Fig. 7 of set" in capsys.readouterr().out
    assert {"fig4.png", "fig5.png", "fig6.png"} <= {p.name for p in run.iterdir()}
    assert not (run / "fig7.png").exists()


def test_bad_input_of_baselines_is_one_line(folder, capsys):
    (runs.RUNS.parent / "table.json").write_text("[]")
    for args, words in [
        ([], "--method is needed: one of dier, dier-notime"),
        (["--method", "mae", "--dropout", "0.1"], "--dropout 0.1: mae has none"),
        (["--method", "lmim", "--size", "16", "--model", "patch=1"], "HOG cells of"),
        (["--method", "mae", "--model", "patch=5"], "does not cut into 2 x 2"),
        (["--method", "mae", "--model", "hidden=30"], "hidden 30 is not a multiple of 4 x 4"),
        (["--method", "mae", "--model", "mult=1,2"], "'mult' is not one of"),
        (["--method", "diffae", "--model", "unet_base=24"], "use --model unet_base=32"),
        (["--method", "diffae", "--size", "10"], "image size 10 cannot be halved"),
        (["--table", "--run", "x"], "--table chooses --run itself"),
        (["--table", "--seed", "1"], "--seeds N"),
        (["--table", "--json"], "--table chooses --json itself"),
        (["--table", "--dropout", "0"], "--table chooses --dropout itself"),
        (["--table", "--checkpoint-activations"], "chooses --checkpoint-activations itself"),
        (["--method", "mae", "--seeds", "2"], "--seeds belongs to --table"),
        (["--method", "mae", "--checkpoint-activations"], "mae cannot compute them again"),
        (["--method", "dier-unet", "--checkpoint-activations"], "dier-unet cannot compute"),
        (["--table", "--methods", "dier,cae"], "'cae' is not one of dier"),
        (["--table", "--out", "table.json"], "is not a table of this command"),
        (["--resume", "--run", "none"], "no checkpoint in runs/none"),
        (["--probe", "--run", "none"], "no checkpoint in runs/none"),
    ]:
        given = [*args, "--device", "cpu"] + ["--data", folder] * ("--probe" not in args)
        assert words in fails(capsys, train.run_main, lambda a=given: baselines.main(a)), args
    assert not runs.RUNS.exists()


def test_resume_of_a_baseline_is_bit_for_bit(folder, monkeypatch):
    """With masks from the default generator, and with labels found by the images' places."""
    for name in ("dmjd", "supervised"):
        args = flags(name, folder, "--epochs", "6", "--batch-size", "16")
        parse, method = baselines.build_parser().parse_args, methods.METHODS[name]
        train.start(parse([*args, "--run", f"{name}-straight"]), method)
        real = train.training_step

        def stop_at_7(state, *rest, real=real):
            if state.step == 7:
                os.kill(os.getpid(), signal.SIGINT)
            real(state, *rest)

        with monkeypatch.context() as m:
            m.setattr(train, "training_step", stop_at_7)
            with pytest.raises(SystemExit) as stop:
                train.start(parse([*args, "--run", f"{name}-cut"]), method)
        assert stop.value.code == 130
        train.start(parse(["--run", f"{name}-cut", "--resume", "--device", "cpu"]), method)
        states, logs = [], []
        for end in ("straight", "cut"):
            run = runs.RUNS / f"{name}-{end}"
            states.append(runs.read_checkpoint(run))
            rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
            logs.append([(row["step"], row["loss"], row["grad_norm"]) for row in rows])
        assert logs[0] == logs[1] and states[0]["step"] == 15
        for part in ("model", "ema"):
            assert all(torch.equal(v, states[1][part][k]) for k, v in states[0][part].items())


def test_supervised_learns_the_labels_of_the_right_images(folder):
    """The classes are quarters of the picture: chance is 50%, and shuffled labels would stay it."""
    method = methods.METHODS["supervised"]
    args = flags("supervised", folder, "--epochs", "10", "--batch-size", "8", "--accum", "2",
                 "--lr", "5e-3")  # fmt: skip
    result = train.start(baselines.build_parser().parse_args(args), method)
    assert result["loss"] < 0.2
    model = runs.restore_model(runs.read_checkpoint(runs.RUNS / "set"), method, "raw").eval()
    split = data.load(folder, "test", 8)
    x = data.to_float(torch.from_numpy(split.images))
    v = model.encoder(x, torch.zeros(len(x), dtype=torch.int64))
    hits = model.classifier(v).argmax(1) == torch.from_numpy(split.labels)
    assert hits.float().mean() > 0.95


def test_images_without_classes_cannot_be_supervised(folder, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for i, path in enumerate((tmp_path / "set/train").rglob("*.png")):
        path.rename(tmp_path / f"flat/{i}.png")
    error = fails(capsys, baselines.main, ["--method", "supervised", *flags("supervised", "flat")])
    assert "flat has no classes" in error


def test_diffae_reconstructs(folder, capsys):
    args = flags("diffae", folder, "--epochs", "2")
    train.start(baselines.build_parser().parse_args(args), methods.METHODS["diffae"])
    for mode in ("recover", "timesteps"):
        steps = ["--steps", "2"] * (mode == "recover")
        recover.main(["--run", "set", "--mode", mode, "--n", "4", "--device", "cpu", *steps])
    assert "from code" in capsys.readouterr().out
    assert (runs.RUNS / "set/recover.png").exists()
    assert (runs.RUNS / "set/recover-timesteps.png").exists()


def test_training_ends_with_one_json_that_has_the_probe_in_it(folder, capsys):
    baselines.main(["--method", "dier-notime", *flags("dier-notime", folder, "--epochs", "1"),
                    "--checkpoint-activations", "--json"])  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == 1 and result["method"] == "dier-notime"
    assert result["probe"] == json.loads((runs.RUNS / "set/probe.json").read_text())


# ---------------------------------------------------------------------------- Table 1


def test_pca_keeps_the_directions_of_largest_variance_first():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(200, 12, generator=generator) * torch.arange(1, 13) + 3
    pca = table.PCA(images)
    x = pca(images.view(200, 3, 2, 2), torch.zeros(200))
    assert x.shape == (200, 12) and x.mean(0).abs().max() < 1e-3
    assert torch.equal(x.var(0), x.var(0).sort(descending=True).values)
    assert torch.allclose(x.var(0).sum(), images.var(0).sum(), rtol=1e-4)
    _, s, _ = torch.linalg.svd(images - images.mean(0))
    assert torch.allclose(x.var(0), s**2 / 199, rtol=1e-3)
    wide = torch.randn(8, 3 * 20 * 20, generator=generator)
    assert table.PCA(wide)(wide.view(8, 3, 20, 20), None).shape == (8, M.V)


@pytest.fixture
def small_table(folder, monkeypatch):
    """A table of tiny models: the presets of the three kinds replaced, a short probe."""
    for name in ("dier", "mae"):
        preset = methods.METHODS[name].presets["cpu"][32]
        args = argparse.Namespace(**vars(baselines.build_parser().parse_args(flags(name, folder))))
        model = runs.model_config(
            runs.resolve(args, methods.METHODS[name]),
            masked.ViTConfig if name == "mae" else M.ModelConfig,
        )
        monkeypatch.setitem(methods.METHODS[name].presets["cpu"], 32, preset.__class__(
            model, 16, 1e-3, None, 1.0))  # fmt: skip
    monkeypatch.setattr(table, "TIMES", "0,999")
    monkeypatch.setattr(table, "flops_per_image", lambda settings, method: len(method.name))
    return ["--table", "--data", folder, "--device", "cpu", "--epochs", "1", "--seeds", "2",
            "--methods", "dier,mae,pixels"]  # fmt: skip


def without_times(path):
    """A table without what a clock says, and without its command."""

    def strip(x):
        if isinstance(x, list):
            return [strip(y) for y in x]
        if isinstance(x, dict):
            return {k: strip(v) for k, v in x.items() if k not in ("images_per_s", "command")}
        return x

    return strip(json.loads(path.read_text()))


def test_a_table_that_was_interrupted_ends_equal_to_one_that_was_not(
    small_table, tmp_path, monkeypatch, capsys
):
    straight, cut = tmp_path / "straight.json", tmp_path / "cut.json"
    baselines.main([*small_table, "--out", str(straight)])
    assert "(reported, not run)" in capsys.readouterr().out
    real, done = train.start, []

    def start(args, method):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((method.name, args.seed))
        if len(done) == 2:  # leaves a run, but no cell
            real(args, method)
            raise KeyboardInterrupt
        return real(args, method)

    monkeypatch.setattr(train, "start", start)
    with pytest.raises(KeyboardInterrupt):
        baselines.main([*small_table, "--out", str(cut)])
    half = json.loads(cut.read_text())
    assert [cell["method"] for cell in half["cells"]] == ["dier"]  # saved at once
    monkeypatch.setattr(train, "start", lambda *a: done.append((a[1].name, a[0].seed)) or real(*a))
    baselines.main([*small_table, "--out", str(cut)])
    assert done == [("dier", 0), ("mae", 0), ("mae", 0), ("dier", 1), ("mae", 1)]
    assert without_times(cut) == without_times(straight)
    got = json.loads(cut.read_text())
    cells = [(c["method"], c["seed"]) for c in got["cells"]]
    assert cells == [("dier", 0), ("mae", 0), ("pixels", 0), ("dier", 1), ("mae", 1)]  # fmt: skip
    keys = {"method", "parameters", "flops_per_image", "images_per_s", "images_seen", "top1"}
    keys |= {"top1_std", "oracle", "knn", "paper", "reported"}
    rows = {row["method"]: row for row in got["rows"]}
    assert all(set(row) == keys for row in rows.values())
    dier = [c for c in got["cells"] if c["method"] == "dier"]
    assert rows["dier"]["top1"] == pytest.approx(np.mean([c["top1"] for c in dier]))
    assert rows["dier"]["top1_std"] == pytest.approx(np.std([c["top1"] for c in dier], ddof=1))
    assert [row["t"] for row in dier[0]["probe"]] == [0, 999]
    assert [row["t"] for row in got["cells"][1]["probe"]] == [None]
    assert rows["pixels"]["top1_std"] is None and rows["pixels"]["images_per_s"] is None
    assert rows["CAE"]["reported"] and rows["CAE"]["top1"] is None
    other = [*small_table, "--epochs", "3", "--out", str(cut)]
    assert "was begun with epochs 1.0, not 3.0" in fails(capsys, baselines.main, other)
    other = [*small_table, "--limit", "12", "--out", str(cut)]
    assert "was begun with given" in fails(capsys, baselines.main, other)


def test_rows_carry_the_papers_numbers():
    cell = {"method": "diffae", "seed": 0, "parameters": 1, "flops_per_image": 2}
    cell |= {"images_per_s": 3.0, "images_seen": 4, "top1": 50.0, "oracle": 51.0, "knn": 52.0}
    rows = {row["method"]: row for row in table.make_rows([cell], "mnist")}
    assert list(rows) == ["diffae", "CAE", "MAGE", "LMIM-Swin"]
    assert rows["diffae"]["paper"] == 62.1 and not rows["diffae"]["reported"]
    assert rows["MAGE"]["paper"] == 96.5 and rows["LMIM-Swin"]["paper"] == 87.8
    assert table.make_rows([cell], "glyphs")[0]["paper"] is None


@pytest.mark.slow
def test_the_whole_command_with_every_method(folder, tmp_path):
    write_folder(tmp_path / "many", per_class=30, classes=4)
    args = ["--table", "--data", "many", "--device", "cpu", "--epochs", "1"]
    baselines.main(args)
    rows = json.loads((tmp_path / "runs/table1-many.json").read_text())["rows"]
    assert [r["method"] for r in rows if not r["reported"]] == [*methods.METHODS, *table.FLOORS]
    assert all(0 <= r["top1"] <= 100 for r in rows if not r["reported"])
