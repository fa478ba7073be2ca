"""What a GPU needs, proved without one: no wait inside the step, nothing left on the CPU, and the
dtypes that mixed precision must keep."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import diffusion
import model as M
import train

CPU = torch.device("cpu")


def settings(*flags):
    args = train.build_parser().parse_args(["--data", "mnist", "--device", "cpu", *TINY, *flags])
    args.seed = 0
    return train.resolve(args)


class Waits(TorchDispatchMode):
    """Fails where the host reads a number from the device, which is what stops a GPU's queue."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        assert "_local_scalar_dense" not in str(func), "the host waited for the device"
        assert "nonzero" not in str(func), "an index of unknown length waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_detector_detects():
    with pytest.raises(AssertionError, match="waited"), Waits():
        torch.ones(1).sum().item()


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("accum", ["1", "2"])
def test_nothing_between_two_log_steps_waits_for_the_device(amp, accum):
    s = settings("--amp", amp, "--accum", accum, "--batch-size", "8", "--dropout", "0.1", "--flip")
    state = train.TrainState(s, CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), np.uint8)
    batches = data.Batches(pixels, 8, 0, CPU, flip=True)
    state.model.train()
    with Waits() as mode:
        for step in range(4):  # crosses the end of a permutation
            t, flips, eps = train.draw(0, step, (8, 1, 8, 8), CPU)
            train.training_step(state, batches(step, flips), t, eps)
    assert state.step == 4 and mode.calls > 100


class OnMeta(TorchDispatchMode):
    """Fails where an operation mixes a tensor of the CPU into those of the device; plain meta
    tensors accept that without a word. Numbers of dimension 0 are allowed, as CUDA allows them."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "meta" for x in tensors):
            self.calls += 1
            for x in tensors:
                assert x.device.type == "meta" or x.ndim == 0, f"{func} has a tensor on {x.device}"
        return func(*args, **kwargs)


def test_forward_backward_clip_and_adam_stay_on_the_device():
    cfg = M.ModelConfig(8, 1, 4, 16, 1, 2, 8, 1, (1, 2), (4,), 2, dropout=0.1)
    with torch.device("meta"):
        model = M.DiER(cfg)
        x0, eps = torch.empty(2, 4, 1, 8, 8)
        t = torch.zeros(4, dtype=torch.int64)
        abar = torch.empty(1000)
    params = list(model.parameters())
    flat = torch.nn.Parameter(train.flatten(model))
    flat.grad = torch.zeros_like(flat)
    for p, grad in zip(params, train.views(flat.grad, params)):
        p.grad = grad
    optimizer, average = torch.optim.Adam([flat], foreach=True), flat.detach().clone()
    with OnMeta() as mode:
        loss = diffusion.eps_loss(model(diffusion.q_sample(x0, t, eps, abar), t, x0), eps)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_([flat], 1.0)
        optimizer.step()
        train.update_ema(average, flat, 0.9)
    assert mode.calls > 200 and all(p.grad.device.type == "meta" for p in params)


def test_a_buffer_left_on_the_cpu_is_found():
    with torch.device("meta"):
        layer, x = torch.nn.Linear(4, 4), torch.empty(2, 4)
    with pytest.raises(AssertionError, match="on cpu"), OnMeta():
        layer(x) * torch.ones(2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_softmax_and_loss_are_fp32_in_mixed_precision(dtype, monkeypatch):
    seen = {"group_norm": set(), "layer_norm": set(), "softmax": set()}
    for name in ("group_norm", "layer_norm"):
        real = getattr(F, name)

        def spy(x, *args, real=real, name=name, **kwargs):
            seen[name].add(x.dtype)
            return real(x, *args, **kwargs)

        monkeypatch.setattr(F, name, spy)
    softmax = torch.Tensor.softmax

    def spy_softmax(x, *args, **kwargs):
        seen["softmax"].add(x.dtype)
        return softmax(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", spy_softmax)
    state = train.TrainState(settings("--amp", "bf16" if dtype == torch.bfloat16 else "fp16"), CPU)
    x0, eps = torch.randn(2, 4, 1, 8, 8)
    loss = train.forward_loss(state, x0, torch.tensor([0, 1, 500, 999]), eps)
    assert seen == {name: {torch.float32} for name in seen} and loss.dtype == torch.float32


def test_batches_that_do_not_fit_the_device_are_copied_as_bytes():
    """On `meta` in place of a GPU: the batch leaves the host as uint8, and flips stay with it."""
    pixels = np.zeros((10, 1, 4, 4), np.uint8)
    batches = data.Batches(pixels, 4, 0, torch.device("meta"), flip=True)
    assert batches.images.device == CPU
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_to_copy" in str(func) and (kwargs or {}).get("device") == torch.device("meta"):
                copied.append((args[0].dtype, kwargs.get("non_blocking")))
            return func(*args, **(kwargs or {}))

    with Copies():
        x = batches(0, torch.zeros(4, dtype=torch.bool, device="meta"))
    assert x.device.type == "meta" and x.shape == (4, 1, 4, 4)
    assert copied[0] == (torch.uint8, True)
    assert json.dumps([str(d) for d, _ in copied]).count("float") == 0
