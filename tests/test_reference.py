"""model.py and the loop of train.py against the plain networks and the plain step."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from reference import PlainDiER, PlainTraining

import data
import model as M
import train

CPU = torch.device("cpu")
MNIST = ["--data", "mnist", "--batch-size", "8"]
SIZES = {
    "two levels": M.ModelConfig(8, 1, 4, 16, 2, 2, 8, 1, (1, 2), (4,), 2, dropout=0.0),
    "long attention": M.ModelConfig(16, 3, 1, 16, 1, 2, 8, 2, (1, 2, 2), (16, 4), 2, dropout=0.0),
}


def randomise(net):
    """Make all parameters random, none of them zero: at initialisation whole branches are off."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.ndim < 2 else p[0].numel() ** -0.5))


def close(a, b, tolerance):
    """Is the largest difference that small beside the largest number of b?"""
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_outputs_and_gradients_equal_the_reference(name, dtype, tolerance):
    cfg = SIZES[name]
    torch.manual_seed(0)
    program, plain = M.DiER(cfg).to(dtype), PlainDiER(cfg).to(dtype)
    randomise(program)
    plain.load_state_dict(program.state_dict())
    x0, x_t, eps = torch.randn(3, 3, cfg.channels, cfg.size, cfg.size, dtype=dtype)
    t = torch.tensor([0, 400, 999])
    outputs = []
    for net in (program, plain):
        out = net(x_t, t, x0)
        ((out - eps) ** 2).mean().backward()
        outputs.append(out.detach())
    assert outputs[1].std() > 0.1 and close(*outputs, tolerance)
    others = dict(plain.named_parameters())
    for key, p in program.named_parameters():
        assert p.grad.any() and close(p.grad, others[key].grad, tolerance), key


# ---------------------------------------------------------------------------- the loop


def settings_of(*flags):
    """The settings that train.py would take for these flags."""
    return train.resolve(vars(train.build_parser().parse_args([*flags, "--device", "cpu"])))


def start(settings):
    """Both networks as initialised: the program's and a plain one with the same parameters."""
    torch.manual_seed(settings["seed"])
    net = train.build_dier(settings)
    plain = PlainDiER(train.model_config(settings))
    plain.load_state_dict(net.state_dict())
    return net, plain


def pixels(settings, n=20):
    """Random images (n, C, S, S), uint8."""
    shape = (n, settings["channels"], settings["size"], settings["size"])
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def loop(net, settings, images, steps, folder, loss_fn=train.dier_loss):
    """Train net in train.py's loop; returns the rows of the log and the checkpoint."""
    folder.mkdir()
    settings = {**settings, "epochs": steps * settings["batch_size"] / len(images)}
    train.train(net, loss_fn, images, settings, folder)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return rows, torch.load(folder / "checkpoint.pt", weights_only=True)


def plain_loop(plain, settings, images, steps):
    """The same steps spelled out; returns the loss of each, and the training at its end."""
    training = PlainTraining(plain.train(), settings["lr"], settings["ema"], settings["clip"])
    seed, batch = settings["seed"], settings["batch_size"]
    losses = []
    for step in range(steps):
        torch.manual_seed(data.mix_seed(seed, step, 0))  # dropout's
        t, flips, eps = train.draw(seed, step, (batch, *images.shape[1:]), CPU)
        index = data.batch_index(len(images), step, batch, seed, CPU)
        x0 = torch.from_numpy(images[index.numpy()]) / 127.5 - 1
        for k in range(batch):
            if settings["flip"] and flips[k]:
                x0[k] = x0[k].flip(2)
        losses.append(training(x0, t, eps))
    return losses, training


FLAGS = [(), ("--flip", "--clip", "0.1", "--ema", "0.3"), ("--dropout", "0.2")]


@pytest.mark.parametrize("flags", FLAGS)
def test_the_training_loop_equals_the_plain_step(tmp_path, flags):
    """Loss by loss and weight by weight for ten steps, from the same start."""
    settings = settings_of(*MNIST, *TINY, *flags)
    images = pixels(settings)
    net, plain = start(settings)
    rows, saved = loop(net, settings, images, 10, tmp_path / "run")
    losses, training = plain_loop(plain, settings, images, 10)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    for key, value in plain.state_dict().items():
        assert torch.allclose(saved["raw"][key], value, atol=1e-4), key
    names = [key for key, _ in plain.named_parameters()]
    for key, value in zip(names, training.average, strict=True):
        assert torch.allclose(saved["ema"][key], value, atol=1e-4), key
    assert not torch.allclose(saved["ema"]["dit.out.weight"], saved["raw"]["dit.out.weight"])


@pytest.mark.parametrize("amp, tolerance", [("off", 1e-4), ("bf16", 2e-2)])
def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path, amp, tolerance):
    rows, moments, exchanged = [], [], []

    def spy(net, *args):
        exchanged.append(net.require_backward_grad_sync)
        return train.dier_loss(net, *args)

    for accum in ("1", "4"):
        settings = settings_of(*MNIST, *TINY, "--amp", amp, "--accum", accum, "--clip", "0")
        net, _ = start(settings)
        randomise(net)
        (row,), saved = loop(net, settings, pixels(settings), 1, tmp_path / accum, spy)
        rows.append(row)
        moments.append(saved["optimizer"]["state"])
    assert exchanged == [True, False, False, False, True]  # processes: with the last piece alone
    assert rows[0]["grad_norm"] > 0.1
    for key in ("loss", "grad_norm"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=tolerance)
    for whole, pieces in zip(moments[0].values(), moments[1].values(), strict=True):
        # Adam's first moment is 0.1 x the gradient
        assert close(pieces["exp_avg"], whole["exp_avg"], 50 * tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("flags, steps", [
    (("--data", "mnist", "--preset", "cpu", "--batch-size", "32"), 100),
    (("--data", "cifar10", "--preset", "paper", "--batch-size", "8"), 10),
])  # fmt: skip
def test_the_loss_curve_is_the_references_within_the_noise_of_two_seeds(tmp_path, flags, steps):
    """Same start, batches, t, eps and dropout: what differs is rounding."""

    def spy(net, *args):
        loss = train.dier_loss(net, *args)
        curve.append(loss.mean().item())
        return loss

    curves = []
    for seed in ("0", "1"):
        settings = settings_of(*flags, "--amp", "off", "--no-flip", "--seed", seed)
        glyphs = data.load("glyphs", settings["size"], settings["channels"], tmp_path)[0].images
        net, plain = start(settings)
        curve = []
        loop(net, settings, glyphs, steps, tmp_path / seed, spy)
        curves.append(np.array(curve))
        if seed == "0":
            reference = np.array(plain_loop(plain, settings, glyphs, steps)[0])
    to_reference = np.abs(curves[0] - reference).mean()
    to_other_seed = np.abs(curves[0] - curves[1]).mean()
    print(f"{to_reference:.5f} from the reference, {to_other_seed:.5f} from another seed")
    assert to_reference < 0.1 * to_other_seed and curves[0][-5:].mean() < curves[0][:5].mean()
