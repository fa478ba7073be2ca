"""What only a GPU can show: the CPU's numbers in every precision, and no wait inside the step.
Skipped where there is none; tests/test_cuda.py has what can be shown without."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import data
import probe
import train
from appendix import baselines, recover

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CPU, CUDA = torch.device("cpu"), "cuda:0"
ROWS = [  # a set, its preset and more: Table 4's own network, two small ones, 1,024 tokens
    {"data": "mnist", "preset": "paper", "batch_size": 8},
    {"data": "cifar10", "preset": "cpu", "batch_size": 32},
    {"data": "bccd", "preset": "cpu", "batch_size": 4},
    {"data": "tiny-imagenet", "preset": "cpu", "batch_size": 2, "patch": 1},
]


@pytest.fixture(autouse=True)
def kept_precision():
    """Training on a GPU lets fp32 products be TF32, for the whole process: not after a test."""
    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(kept[0])
    torch.backends.cudnn.allow_tf32 = kept[1]


@pytest.fixture
def full_precision(kept_precision):
    """fp32 products and convolutions without TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def same_draws(monkeypatch):
    """t, flips and eps of the CPU on every device; a GPU's own generator draws others."""
    real = train.draw

    def draw(seed, step, shape, device):
        return tuple(x.to(device) for x in real(seed, step, shape, CPU))

    monkeypatch.setattr(train, "draw", draw)


def run(device, *flags):
    """train.main on the tiny model; returns the rows of the log."""
    train.main([*TINY, "--device", device, "--batch-size", "16", *flags])
    return rows(flags[flags.index("--name") + 1])


def rows(name):
    """log.jsonl of a run."""
    lines = (train.RUNS / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(found):
    """The loss of each row."""
    return [row["loss"] for row in found]


def gap(a, b):
    """Relative distance of two lists of tensors, taken as one long vector."""
    a, b = (torch.cat([x.detach().double().cpu().flatten() for x in y]) for y in (a, b))
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------------------- the step


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["data"])
@pytest.mark.parametrize("amp, tolerance", [("off", 1e-4), ("bf16", 2e-2)])
def test_loss_and_gradients_agree_with_the_cpu(row, amp, tolerance, full_precision):
    """The CPU computes in fp32 for both, so bf16 is compared with what it rounds."""
    settings = train.resolve({**row, "dropout": 0.0, "device": "cpu"})
    torch.manual_seed(0)
    net = train.build_dier(settings)
    for p in net.parameters():
        if not p.any():  # zero at initialisation, where half of the gradients would be zero
            torch.nn.init.normal_(p, std=0.02)
    side = settings["size"]
    shape = (settings["batch_size"], settings["channels"], side, side)
    t, _, eps = train.draw(0, 0, shape, CPU)
    x0, abar = torch.rand(shape) * 2 - 1, train.alphas_cumprod().float()
    found = []
    for device, precision in ((CPU, "off"), (torch.device(CUDA), amp)):
        own = copy.deepcopy(net).to(device)
        if device.type == "cuda":
            own.encoder.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, train.AMP[precision], enabled=precision != "off"):
            loss = train.dier_loss(own, *(x.to(device) for x in (x0, t, eps, abar)))
        loss.mean().backward()
        found.append(([loss], [p.grad for p in own.parameters()]))
    assert gap(found[1][0], found[0][0]) < tolerance
    assert gap(found[1][1], found[0][1]) < tolerance


@pytest.mark.parametrize("method", baselines.METHODS)
def test_every_method_takes_steps(method, tmp_path, monkeypatch):
    """The compared methods too: forward, backward, the probe's encoder."""
    monkeypatch.chdir(tmp_path)
    flags = {"data": "mnist", "preset": "cpu", "device": CUDA, "batch_size": 8, "epochs": 1.0}
    settings = train.resolve(flags) | {"method": method, "class_names": list("0123456789")}
    images = np.random.default_rng(0).integers(0, 256, (24, 1, 16, 16), np.uint8)
    split = data.Split(images, np.arange(24) % 10, None, settings["class_names"])
    loss_fn = baselines.METHODS[method][1]
    if method == "supervised":
        loss_fn = baselines.labels_by_step(split, settings, 0)
    (tmp_path / "run").mkdir()
    net = baselines.METHODS[method][0](settings)
    train.train(net, loss_fn, images, settings, tmp_path / "run")
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(np.isfinite(json.loads(line)["loss"]) for line in lines)
    if method != "tokenizer":  # whose encoder makes codes
        v = probe.encode(net.encoder, images, 400, train.pick_device(CUDA), "v")
        assert len(v) == 24 and v.isfinite().all()


# ---------------------------------------------------------------------------- the loop


def test_twenty_steps_fall_as_on_the_cpu(folder, same_draws):
    flags = ["--data", folder, "--epochs", "8", "--lr", "1e-3", "--dropout", "0"]
    here, there = (losses(run(x, *flags, "--name", x[:4])) for x in ("cpu", CUDA))
    assert len(here) == 20 and here[-1] < 0.9 * here[0]
    assert there == pytest.approx(here, rel=2e-3)  # TF32


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_as_fp32_does(folder, amp):
    flags = ["--data", folder, "--epochs", "64", "--lr", "1e-3", "--dropout", "0"]
    full = run(CUDA, *flags, "--name", "full")
    half = run(CUDA, *flags, "--name", "half", "--amp", amp)
    assert full[-1]["loss"] < 0.8 * full[0]["loss"]
    ends = [sum(losses(found)[-7:]) / 7 for found in (full, half)]  # the last 140 steps
    assert ends[1] == pytest.approx(ends[0], rel=0.05)
    scaler = train.read_checkpoint(train.RUNS / "half")["scaler"]
    assert (scaler.get("scale", 0) > 1) == (amp == "fp16")
    assert sum(row["skipped"] for row in half) <= 5  # until the scale fits


def test_compile_gives_the_same_curve(folder):
    flags = ["--data", folder, "--epochs", "16", "--lr", "1e-3", "--dropout", "0"]
    plain = losses(run(CUDA, *flags, "--name", "plain"))
    compiled = losses(run(CUDA, *flags, "--name", "compiled", "--compile"))
    assert compiled == pytest.approx(plain, rel=5e-3)


@pytest.mark.parametrize("first, second", [("cpu", CUDA), (CUDA, "cpu")])
def test_a_run_goes_on_on_the_other_device(folder, same_draws, first, second):
    flags = ["--data", folder, "--lr", "1e-3", "--dropout", "0", "--name"]
    still = losses(run("cpu", *flags, "still", "--epochs", "8"))
    run(first, *flags, "moves", "--epochs", "4")
    train.main(["--name", "moves", "--resume", "--epochs", "8", "--device", second])
    assert losses(rows("moves")) == pytest.approx(still, rel=2e-3)


def test_images_that_do_not_fit_go_through_pinned_memory(folder, monkeypatch):
    """The same numbers as from images that lie on the device."""
    flags = ["--data", folder, "--epochs", "8", "--flip"]
    fits = losses(run(CUDA, *flags, "--name", "fits"))
    total, pinned = torch.cuda.mem_get_info()[1], []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_to_copy" in str(func) and args[0].shape == (16, 3, 8, 8) and not args[0].is_cuda:
                pinned.append((args[0].dtype, args[0].is_pinned(), kwargs.get("non_blocking")))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, total))
    with Copies():
        assert losses(run(CUDA, *flags, "--name", "host")) == pytest.approx(fits, rel=1e-4)
    assert pinned == [(torch.uint8, True, True)] * 20


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("fits", [True, False])
def test_no_step_waits_for_the_device_between_two_rows(folder, monkeypatch, amp, fits):
    """Steps 22 to 39 of 40, over the end of a permutation, with PyTorch's own detector."""
    real, watched = train.draw, []

    def draw(seed, step, *args):
        torch.cuda.set_sync_debug_mode("error" if 21 <= step < 39 else "default")
        watched.append(torch.cuda.get_sync_debug_mode())
        return real(seed, step, *args)

    monkeypatch.setattr(train, "draw", draw)
    if not fits:
        total = torch.cuda.mem_get_info()[1]
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, total))
    flags = ["--data", folder, "--epochs", "16", "--flip", "--accum", "2", "--dropout", "0.1"]
    try:
        run(CUDA, *flags, "--amp", amp, "--name", "run")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(watched) == 40 and watched.count(2) == 18


# ---------------------------------------------------------------------------- what reads a run


def test_probe_and_recover_see_the_same_on_both_devices(folder, capsys):
    run(CUDA, "--data", folder, "--epochs", "64", "--lr", "3e-3", "--name", "run")
    torch.set_float32_matmul_precision("highest")  # TF32 alone can make half a dB
    torch.backends.cudnn.allow_tf32 = False
    probed, said = [], []
    for device in ("cpu", CUDA):
        probe.main(["--name", "run", "--t", "400", "--epochs", "20", "--device", device])
        probed.append(json.loads((train.RUNS / "run/probe-t-400-epochs-20.json").read_text()))
        capsys.readouterr()
        recover.main(["--name", "run", "--steps", "10", "--n", "4", "--device", device])
        said.append([float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()[2:4]])
    assert probed[1]["test_top1"] == pytest.approx(probed[0]["test_top1"], abs=5)
    assert probed[0]["test_top1"] > 60
    assert said[1] == pytest.approx(said[0], abs=0.5)  # dB
    model, _ = train.load_model(train.RUNS / "run")
    images = data.load(folder, 8, 3, "data")[1].images
    v = [probe.encode(model.encoder, images, 400, torch.device(x), "v") for x in ("cpu", CUDA)]
    assert gap(v[1:], v[:1]) < 2e-2
