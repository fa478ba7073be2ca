"""What a GPU needs, proved without one: no wait inside the step, nothing left on the CPU, images
that cross to the device as bytes."""

import pytest
import torch
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import model as M
import train
from appendix import baselines

CPU, META = torch.device("cpu"), torch.device("meta")


class Reads(TorchDispatchMode):
    """Counts where the host reads a number from the device, which is what stops a GPU's queue."""

    def __init__(self):
        super().__init__()
        self.count = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        self.count += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


def test_the_detector_detects():
    with Reads() as mode:
        assert torch.ones(1).sum().item() == 1
    assert mode.count == 1


FP32 = pytest.param("off", "1", marks=pytest.mark.slow)


@pytest.mark.parametrize("amp, accum", [FP32, ("bf16", "2")])
def test_no_step_waits_for_the_device_between_two_rows(folder, amp, accum, monkeypatch):
    """From one step's sums to the next one's, over the end of a permutation."""
    marks, real = [], train.add_sums
    flags = ["--data", folder, "--epochs", "12", "--batch-size", "16", "--dropout", "0.1", "--flip"]
    with Reads() as mode:

        def add_sums(*args):
            real(*args)
            marks.append((mode.count, mode.calls))

        monkeypatch.setattr(train, "add_sums", add_sums)
        train.main([*TINY, *flags, "--amp", amp, "--accum", accum])
    assert len(marks) == 30
    for k in range(21, 30):  # marks[k] belongs to step k + 1
        assert marks[k][0] == marks[k - 1][0], f"step {k + 1} waited for the device"
        assert marks[k][1] > marks[k - 1][1] + 100


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


def test_a_buffer_left_on_the_cpu_is_found():
    with META:
        layer, x = torch.nn.Linear(4, 4), torch.empty(2, 4)
    with pytest.raises(AssertionError, match="on cpu"), OnMeta():
        layer(x) * torch.ones(2, 4)


def test_forward_backward_clip_and_adam_stay_on_the_device():
    cfg = M.ModelConfig(8, 1, 4, 16, 1, 2, 8, 1, (1, 2), (4,), 2, dropout=0.1)
    with META:
        net = M.DiER(cfg)
        x0, eps = torch.empty(2, 4, 1, 8, 8)
        t, abar, sums = torch.zeros(4, dtype=torch.int64), torch.empty(1000), torch.zeros(24)
    params = list(net.parameters())
    optimizer = torch.optim.Adam(params, foreach=True)
    with OnMeta() as mode:
        loss = train.dier_loss(net, x0, t, eps, abar)
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        train.add_sums(sums, loss.detach(), t, norm)
    assert mode.calls > 200 and all(p.grad.device == META for p in params)


@pytest.mark.parametrize("method", baselines.METHODS)
def test_every_compared_method_stays_on_the_device(method):
    typed = {"data": "mnist", "preset": "cpu", "device": "cpu"}
    settings = train.resolve(typed) | {"method": method, "class_names": list("0123456789")}
    with META:
        net = baselines.METHODS[method][0](settings).train()
        x0, abar = torch.empty(4, 1, settings["size"], settings["size"]), torch.empty(1000)
        t = torch.zeros(4, dtype=torch.int64)
    with OnMeta() as mode:
        baselines.METHODS[method][1](net, x0, t, x0, abar).mean().backward()
    assert mode.calls > 100


def test_batches_that_do_not_fit_the_device_are_copied_as_bytes(monkeypatch):
    """On `meta` in place of a GPU: the batch leaves the host as uint8, and flips stay with it."""
    images, copied = torch.zeros(10, 1, 4, 4, dtype=torch.uint8), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_to_copy" in str(func) and (kwargs or {}).get("device") == META:
                copied.append((args[0].dtype, kwargs.get("non_blocking")))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)  # it needs a GPU
    with Copies():
        flips = torch.zeros(4, dtype=torch.bool, device="meta")
        x = data.get_batch(images, torch.arange(4), META, flips)
    assert x.device == META and x.shape == (4, 1, 4, 4) and x.dtype == torch.float32
    assert copied[0] == (torch.uint8, True)
