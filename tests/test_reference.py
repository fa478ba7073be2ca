"""model.py against the plain networks of appendix/reference.py, with every parameter random."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from conftest import TINY

import model as M
import runs
import train
from appendix.reference import PlainDiER, PlainTraining
from data import Batches, load
from parallel import World

SIZES = {
    "two levels": M.ModelConfig(8, 1, 4, 16, 2, 2, 8, 1, (1, 2), (4,), 2, dropout=0.0),
    "long attention": M.ModelConfig(16, 3, 1, 16, 1, 2, 8, 2, (1, 2, 2), (16, 4), 2, dropout=0.0),
}


def both(cfg, dtype, seed=0):
    """The program's model and the plain one with the same random parameters, none of them zero."""
    torch.manual_seed(seed)
    program, plain = M.DiER(cfg).to(dtype), PlainDiER(cfg).to(dtype)
    with torch.no_grad():
        for p in program.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.ndim < 2 else p[0].numel() ** -0.5))
    plain.load_state_dict(program.state_dict())
    return program, plain


def inputs(cfg, dtype, batch=3):
    x0, x_t, eps = torch.randn(3, batch, cfg.channels, cfg.size, cfg.size, dtype=dtype)
    return x_t, torch.tensor([0, 400, 999])[:batch], x0, eps


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_equal_the_reference(name, dtype, tolerance, recompute):
    program, plain = both(SIZES[name], dtype)
    program.checkpoint_activations(recompute)
    x_t, t, x0, eps = inputs(SIZES[name], dtype)
    outputs = []
    for model in (program, plain):
        out = model(x_t, t, x0)
        ((out - eps) ** 2).mean().backward()
        outputs.append(out.detach())

    def close(a, b):
        return (a - b).abs().max() <= tolerance * b.abs().max()

    assert outputs[1].std() > 0.1 and close(*outputs)
    others = dict(plain.named_parameters())
    for key, p in program.named_parameters():
        assert p.grad.any(), key
        assert close(p.grad, others[key].grad), key


def test_the_training_step_equals_the_plain_step():
    """Loss by loss and weight by weight for ten steps, from the same random start."""
    flags = ["--data", "mnist", "--device", "cpu", "--batch-size", "8", *TINY]
    args = train.build_parser().parse_args(flags)
    args.seed = 0
    state = train.TrainState(train.resolve(args), torch.device("cpu"))
    plain = PlainDiER(runs.model_config(state.settings))
    plain.load_state_dict(state.model.state_dict())
    training = PlainTraining(plain, state.settings["lr"], 0.9999, 1.0)
    first = copy.deepcopy(plain.state_dict())
    for step in range(10):
        t, _, eps = train.draw(0, step, (8, 1, 8, 8), torch.device("cpu"))
        x0 = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        train.training_step(state, x0, t, eps)
        loss = training(x0, t, eps)
        assert state.window.read()["loss"] == pytest.approx(loss, rel=1e-4)
        state.window.reset()
    for key, value in state.model.state_dict().items():
        assert torch.allclose(value, plain.state_dict()[key], atol=1e-4), key
    for average, value in zip(training.average, state.ema.parameters()):
        assert torch.allclose(average, value, atol=1e-4)
    assert any(not torch.equal(first[k], v) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(amp):
    cfg = SIZES["two levels"]
    settings = {"seed": 0, "model": {k: getattr(cfg, k) for k in cfg.__dataclass_fields__}}
    settings |= {"lr": 1e-3, "ema": 0.99, "clip": 0.0, "amp": amp, "checkpoint_activations": False}
    settings["model"] = {
        k: list(v) if isinstance(v, tuple) else v for k, v in settings["model"].items()
    }
    norms, losses, weights = [], [], []
    for pieces in (1, 4):
        state = train.TrainState({**settings, "accum": pieces}, torch.device("cpu"))
        with torch.no_grad():
            program, _ = both(cfg, torch.float32)
            state.model.load_state_dict(program.state_dict())
        generator = torch.Generator().manual_seed(0)
        x0, eps = torch.randn(2, 8, 1, 8, 8, generator=generator)
        t = torch.randint(1000, (8,), generator=generator)
        train.training_step(state, x0, t, eps)
        got = state.window.read()
        norms.append(got["grad_norm"])
        losses.append(got["loss"])
        weights.append(state.optimizer.state_dict()["state"])
    tolerance = 1e-4 if amp == "off" else 2e-2
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(norms[0], rel=tolerance)
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    for a, b in zip(weights[0].values(), weights[1].values()):  # first moment: 0.1 x gradient
        scale = a["exp_avg"].abs().max()
        assert (a["exp_avg"] - b["exp_avg"]).abs().max() <= 50 * tolerance * scale + 1e-9


def test_only_the_last_piece_makes_processes_exchange_gradients():
    class Net(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.alone = model, 0

        def forward(self, *args):
            return self.model(*args)

        def no_sync(self):
            self.alone += 1
            return contextlib.nullcontext()

    flags = ["--data", "mnist", "--device", "cpu", "--accum", "4", *TINY]
    args = train.build_parser().parse_args(flags)
    args.seed = 0
    state = train.TrainState(train.resolve(args), torch.device("cpu"))
    state.world, state.net = World(0, 2), Net(state.model)
    x0, eps = torch.randn(2, 8, 1, 8, 8)
    train.training_step(state, x0, torch.arange(8), eps)
    assert state.net.alone == 3


def test_recomputation_reaches_both_networks():
    model = M.DiER(SIZES["two levels"])
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 999])
    calls = []
    for part in (model.encoder.layers[0], model.dit.blocks[0]):
        part.register_forward_pre_hook(lambda *_: calls.append(1))
    for on, times in ((False, 2), (True, 4)):  # forward, and again in backward
        model.checkpoint_activations(on)
        calls.clear()
        model(x, t, x).mean().backward()
        assert len(calls) == times


@pytest.mark.slow
@pytest.mark.parametrize("data, preset, batch, steps", [
    ("mnist", "cpu", 32, 200), ("cifar10", "paper", 8, 20),
])  # fmt: skip
def test_the_loss_curve_is_the_references_within_the_noise_of_two_seeds(data, preset, batch, steps):
    """Same start, batches, t, eps and dropout: what differs is rounding."""
    flags = ["--data", data, "--preset", preset, "--batch-size", str(batch), "--device", "cpu"]
    args = train.build_parser().parse_args(flags)
    pixels = load("glyphs", "train", 16 if preset == "cpu" else 32).images
    curves = {}
    for side, seed in (("program", 0), ("reference", 0), ("program", 1)):
        args.seed = seed
        settings = train.resolve(args)
        state = train.TrainState(settings, torch.device("cpu"))
        images = np.repeat(pixels, settings["channels"], axis=1)
        batches = Batches(images, batch, seed, torch.device("cpu"), False)
        plain = PlainDiER(runs.model_config(settings))
        plain.load_state_dict(state.model.state_dict())
        training = PlainTraining(plain, settings["lr"], settings["ema"], settings["clip"])
        losses = []
        for step in range(steps):
            shape = (batch, *images.shape[1:2], settings["size"], settings["size"])
            t, _, eps = train.draw(seed, step, shape, torch.device("cpu"))
            if side == "program":
                train.training_step(state, batches(step), t, eps)
                losses.append(state.window.read()["loss"])
                state.window.reset()
            else:
                losses.append(training(batches(step), t, eps))
        curves[side, seed] = np.array(losses)
    program = curves["program", 0]
    to_reference = np.abs(program - curves["reference", 0]).mean()
    to_other_seed = np.abs(program - curves["program", 1]).mean()
    print(f"{preset}: {to_reference:.5f} from the reference, {to_other_seed:.5f} from another seed")
    assert to_reference < to_other_seed and program[-5:].mean() < program[:5].mean()
