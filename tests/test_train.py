"""train.py: the step, the loop, resume bit for bit, errors of one line."""

import contextlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, fails, full_disk, script, write_folder
from PIL import Image

import data
import model as M
import probe
import train
from appendix import baselines, choose

CPU = torch.device("cpu")
TIMES = ("seconds", "images_per_s")


def run(*args):
    """train.main on the tiny model, on the CPU."""
    train.main([*TINY, *args])


def resume(name, *args):
    """Go on with a run."""
    train.main(["--name", name, "--resume", *args])


def rows(name):
    """log.jsonl without the columns that hold times."""
    lines = (train.RUNS / name / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def checkpoint(name):
    """The checkpoint of a run."""
    return torch.load(train.RUNS / name / "checkpoint.pt", weights_only=True)


def assert_same(a, b):
    """Equal to the last bit: two nested checkpoints, but for what names the run and its times."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"settings", "seconds", "log_size"}:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


# ---------------------------------------------------------------------------- the step


def test_draw_is_pure_and_reaches_both_ends_of_t():
    before = torch.get_rng_state()
    a, b = (train.draw(3, 7, (16, 1, 4, 4), CPU) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    c = train.draw(3, 8, (16, 1, 4, 4), CPU)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a[2], c[2])
    t, flips, eps = train.draw(0, 0, (60_000, 1, 1, 1), CPU)
    assert t.min() == 0 and t.max() == 999
    assert torch.bincount(t * 10 // 1000).float().std() < 4 * math.sqrt(60_000 * 0.09)
    assert abs(flips.float().mean() - 0.5) < 0.01 and abs(eps.var() - 1) < 0.03


def test_sums_are_means_by_tenth_of_t():
    sums, t = torch.zeros(24), torch.tensor([0, 99, 100, 999])
    train.add_sums(sums, torch.tensor([1.0, 3.0, 5.0, 7.0]), t, torch.tensor(2.0))
    train.add_sums(sums, torch.tensor([2.0, 2.0, 2.0, 2.0]), t, torch.tensor(math.inf))
    got = train.means(sums.tolist())
    assert got["loss"] == pytest.approx(3.0)
    assert got["loss_by_t"] == [2.0, 3.5, *[None] * 7, 4.5]
    assert got["grad_norm"] == 2.0 and got["skipped"] == 1
    assert "NaN" not in json.dumps(got)
    assert train.means([0.0] * 24)["loss_by_t"] == [None] * 10


def test_dier_loss_is_eq_4_6():
    """One clean image with a network that returns x0: the loss is |x0 - eps|^2 at any t."""
    x0, eps = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    seen = []

    def net(x_t, t, x0):
        seen.append((x_t, t))
        return x0

    abar, t = train.alphas_cumprod().float(), torch.tensor([0, 999])
    loss = train.dier_loss(net, x0, t, eps, abar)
    assert torch.allclose(loss, ((x0 - eps) ** 2).mean((1, 2, 3)))
    x_t, times = seen[0]
    assert torch.equal(times, t) and torch.allclose(x_t[0], x0[0], atol=0.1)
    assert torch.allclose(x_t[1], eps[1], atol=0.1)


def test_a_run_learns_and_leaves_what_the_docstring_says(folder, capsys):
    run("--data", folder, "--epochs", "48", "--batch-size", "16", "--lr", "3e-3")
    out = capsys.readouterr().out.splitlines()
    shown = [re.match(r"step (\d+) of 120, epoch \S+, loss \d\.\d+, \S+ images/s", x) for x in out]
    shown = [match for match in shown if match]
    assert (shown[0][1], shown[-1][1]) == ("1", "120") and shown[-1].string.endswith(", 0:00 left")
    assert out[-1].startswith("120 steps, 1,920 images seen, ")
    assert out[-1].endswith("next: python probe.py")
    log = rows("set")
    assert [r["step"] for r in log] == [*range(1, 21), *range(40, 121, 20)]
    assert log[0]["loss"] == pytest.approx(1.0, abs=0.12)  # 1,024 draws of eps^2
    assert log[-1]["loss"] < 0.7
    assert [(r["epoch"], r["images"]) for r in log[-2:]] == [(40, 1600), (48, 1920)]
    lines = [json.loads(line) for line in (train.RUNS / "set/log.jsonl").read_text().splitlines()]
    images = np.diff([0, *(line["images"] for line in lines)])
    spent = sum(n / line["images_per_s"] for n, line in zip(images, lines))
    assert 0 < spent == pytest.approx(lines[-1]["seconds"], rel=0.02)
    assert checkpoint("set")["seconds"] == lines[-1]["seconds"]
    line = lines[0]
    keys = {"step", "epoch", "images", "seconds", "loss", "loss_by_t", "grad_norm", "skipped"}
    assert set(line) == {*keys, "images_per_s"} and len(line["loss_by_t"]) == 10
    config = json.loads((train.RUNS / "set/config.json").read_text())
    assert config["data"] == folder and config["lr"] == 3e-3 and config["method"] == "dier"
    assert config["images"] == 40 and config["class_names"] == ["class0", "class1"]
    files = "checkpoint.pt config.json log.jsonl preview.png"
    assert sorted(p.name for p in (train.RUNS / "set").iterdir()) == files.split()
    error = fails(capsys, run, "--data", folder)
    assert "add --resume to go on, or choose another --name" in error


@pytest.mark.parametrize("amp", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_half_precision_learns_on_a_cpu(folder, amp):
    run("--data", folder, "--epochs", "14", "--batch-size", "16", "--lr", "8e-3", "--amp", amp)
    log = rows("set")
    assert log[-1]["loss"] < 0.9 and all(math.isfinite(r["loss"]) for r in log)
    state = checkpoint("set")
    assert (state["scaler"] != {}) == (amp == "fp16")
    assert all(p.dtype == torch.float32 for p in state["raw"].values())


def test_fp16_steps_that_overflow_are_skipped_and_counted(folder, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: real(device, 2.0**30, enabled=enabled)
    )
    run("--data", folder, "--epochs", "3", "--batch-size", "16", "--amp", "fp16")
    log = rows("set")
    assert sum(r["skipped"] for r in log) > 0 and math.isfinite(log[-1]["loss"])


# ---------------------------------------------------------------------------- resume

LONG = ["--batch-size", "16", "--dropout", "0.2", "--flip", "--seed", "5"]


def interrupt_at(step, monkeypatch, number=signal.SIGINT, times=1):
    """Send a signal to this process in the middle of one step."""
    real = train.draw

    def draw(seed, n, *args):
        if n == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return real(seed, n, *args)

    monkeypatch.setattr(train, "draw", draw)


STOPS = [("off", signal.SIGTERM, 21, 10), ("bf16", signal.SIGINT, 19, 10)]  # off a row, at one
MORE = [("off", signal.SIGINT, 12, 9), ("fp16", signal.SIGINT, 22, 10)]
MORE += [("off", signal.SIGTERM, 24, 17), ("bf16", signal.SIGINT, 39, 17)]
STOPS += [pytest.param(*stop, marks=pytest.mark.slow) for stop in MORE]


@pytest.mark.parametrize("amp, number, step, epochs", STOPS)
def test_resume_after_a_stop_is_bit_for_bit(folder, amp, number, step, epochs, monkeypatch, capfd):
    args = ["--data", folder, "--epochs", str(epochs), "--amp", amp]  # of 2.5 steps
    run(*args, *LONG, "--name", "straight")
    with monkeypatch.context() as m:
        interrupt_at(step, m, number)
        with pytest.raises(SystemExit) as stop:
            run(*args, *LONG, "--name", "cut")
    assert stop.value.code == 128 + number
    captured = capfd.readouterr()
    assert "stopping after this step; again to stop at once" in captured.err
    assert f"stopped at step {step + 1}: python train.py --name cut --resume" in captured.out
    assert checkpoint("cut")["step"] == step + 1
    log = train.RUNS / "cut/log.jsonl"  # as kill -9 leaves it: a row too many and a torn line
    log.write_text(log.read_text() + '{"step": 50, "loss": 9}\n{"step": 5')
    (train.RUNS / "cut/.checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    resume("cut")
    assert rows("cut") == rows("straight")
    assert_same(checkpoint("cut"), checkpoint("straight"))
    times = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    assert times == sorted(times)  # the clock goes on where the first call left it
    assert not [p for p in (train.RUNS / "cut").iterdir() if p.name.startswith(".")]


def test_a_second_ctrl_c_ends_at_once_and_keeps_the_checkpoint(folder, monkeypatch):
    run("--data", folder, "--epochs", "2", "--batch-size", "16")  # 5 steps
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        interrupt_at(7, m, times=2)
        resume("set", "--epochs", "8")
    assert stop.value.code == 130
    assert checkpoint("set")["step"] == 6  # saved at the first row of the second call
    assert rows("set")[-1]["step"] == 7  # step 8 was not finished
    resume("set", "--epochs", "8")
    assert [row["step"] for row in rows("set")] == list(range(1, 21))


def test_a_row_that_the_disk_does_not_take_whole_is_an_error():
    log = io.FileIO(os.devnull, "w")
    log_of_3_bytes = type("Full", (), {"write": lambda self, line: 3, "name": "log.jsonl"})()
    train.write_row(log, {"step": 1})
    with pytest.raises(OSError, match="No space left.*log.jsonl"):
        train.write_row(log_of_3_bytes, {"step": 1})
    log.close()


def test_a_run_is_trained_by_one_process_at_a_time(folder, capsys):
    flags = ["--data", folder, "--epochs", "2", "--batch-size", "16"]
    with train.claim(train.RUNS / "set"):  # another one, before its first checkpoint
        assert "another process is training runs/set" in fails(capsys, run, *flags)
        assert [path.name for path in (train.RUNS / "set").iterdir()] == ["log.jsonl"]
    run(*flags)
    files = {path: path.read_bytes() for path in (train.RUNS / "set").iterdir()}
    with train.claim(train.RUNS / "set"):
        resumed = "--epochs", "4"
        assert "another process is training runs/set" in fails(capsys, resume, "set", *resumed)
    assert {path: path.read_bytes() for path in (train.RUNS / "set").iterdir()} == files
    resume("set", *resumed)
    assert checkpoint("set")["step"] == 10


@pytest.mark.parametrize("resumed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_another_process_trained_while_the_images_were_read_stays(
    folder, monkeypatch, capsys, resumed
):
    flags = ["--data", folder, "--batch-size", "16", "--epochs"]
    if resumed:
        run(*flags, "2")
    real = data.load

    def load(*args):
        monkeypatch.setattr(data, "load", real)
        resume("set", "--epochs", "4") if resumed else run(*flags, "4")
        capsys.readouterr()
        return real(*args)

    monkeypatch.setattr(data, "load", load)
    late = (resume, "set", "--epochs", "9") if resumed else (run, *flags, "9")
    assert "another process has trained runs/set" in fails(capsys, *late)
    assert checkpoint("set")["step"] == 10 == rows("set")[-1]["step"]
    assert json.loads((train.RUNS / "set/config.json").read_text())["epochs"] == 4


@pytest.mark.parametrize("step", [pytest.param(24, marks=pytest.mark.slow), 39])  # 39: at a row
def test_ctrl_c_saves_though_it_ends_the_reader_of_the_output_too(folder, monkeypatch, step):
    """As in `train.py 2>&1 | tee log`: neither the handler's line nor that of the row gets out."""
    ends = os.pipe()
    os.close(ends[0])
    broken = os.fdopen(ends[1], "w")
    interrupt_at(step, monkeypatch)
    real = train.draw

    def draw(seed, n, *args):
        if n == step:
            monkeypatch.setattr(sys, "stdout", broken)
            monkeypatch.setattr(sys, "stderr", broken)
        return real(seed, n, *args)

    monkeypatch.setattr(train, "draw", draw)
    with pytest.raises((SystemExit, BrokenPipeError)):
        run("--data", folder, "--batch-size", "16", "--epochs", "20")
    assert checkpoint("set")["step"] == step + 1
    with contextlib.suppress(BrokenPipeError):
        broken.close()


@pytest.mark.slow
def test_ten_kills_at_random_moments_end_bit_equal(folder, tmp_path):
    """kill -9, wherever it strikes, also in the middle of a save, loses nothing but time."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train; train.SAVE_SECONDS = 0.1;"
    code += "train.SAVE_SHARE = 1; train.guard(train.main)"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    base = [sys.executable, "-c", code]
    flags = [*TINY, "--data", folder, "--epochs", "1200", *LONG]
    train.main([*flags, "--name", "straight"])
    rng, path = np.random.default_rng(0), train.RUNS / "cut/checkpoint.pt"
    kills, command = 0, [*base, *flags, "--name", "cut"]
    while True:
        child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 60
        begun = path.stat().st_mtime if path.exists() else 0
        while (path.stat().st_mtime if path.exists() else 0) == begun and child.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if kills < 10 and child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        if child.wait() != -signal.SIGKILL:
            break
        command = [*base, "--name", "cut", "--resume"]
    assert child.returncode == 0 and kills >= 5
    assert rows("cut") == rows("straight")
    assert_same(checkpoint("cut"), checkpoint("straight"))


def test_resume_refuses_another_value_and_goes_on_with_more_epochs(folder, capsys):
    run("--data", folder, "--epochs", "2", "--batch-size", "16", "--lr", "1e-3")
    for flags, words in [
        (["--lr", "2e-3"], "--lr 0.002 differs from the checkpoint's 0.001"),
        (["--seed", "1"], "--seed 1 differs from the checkpoint's 0"),
        (["--data", "mnist", "--name", "set"], "--data mnist differs from the checkpoint's set"),
        (["--depth", "2"], "--depth 2 differs from the checkpoint's 1"),
        (["--dropout", "0.5"], "--dropout 0.5 differs from the checkpoint's 0.1"),
        (["--preset", "paper"], "--preset paper differs from the checkpoint's cpu"),
        (["--mult", "1", "4"], "--mult [1, 4] differs from the checkpoint's [1, 2]"),
        ([], "has done 2 epochs: give more with --epochs"),
    ]:
        assert words in fails(capsys, resume, "set", *flags), flags
    # the same values and `auto` are no change; --minutes and --accum may change
    resume("set", "--epochs", "4", "--lr", "1e-3", "--preset", "auto", "--accum", "2")
    assert checkpoint("set")["step"] == 10 and checkpoint("set")["settings"]["amp"] == "off"


def test_a_resumed_run_may_change_its_precision(folder):
    """fp16's scaler is new where the run before had none, and kept where it had one."""
    run("--data", folder, "--epochs", "2", "--batch-size", "16")
    scales = []
    for epochs, amp in [("4", "fp16"), ("6", "fp16"), ("8", "bf16"), ("10", "fp16")]:
        resume("set", "--epochs", epochs, "--amp", amp)
        scales.append(checkpoint("set")["scaler"].get("_growth_tracker"))
    assert scales == [5, 10, None, 5] and checkpoint("set")["step"] == 25


def test_steps_that_fp16_skipped_do_not_end_a_run_that_goes_on_without_it(folder):
    """Stopped between two rows, its sums still hold them."""
    run("--data", folder, "--epochs", "2", "--batch-size", "16", "--amp", "fp16")
    saved = checkpoint("set")
    saved["sums"][train.SKIPPED] = 1
    torch.save(saved, train.RUNS / "set/checkpoint.pt")
    resume("set", "--epochs", "4", "--amp", "off")
    assert checkpoint("set")["step"] == 10 and rows("set")[-1]["skipped"] == 0


def test_moments_of_a_gpus_layout_are_those_of_the_cpu(folder, tmp_path):
    """On CUDA the encoder, and so Adam's moments, lie channels last; fused Adam does not look."""
    run("--data", folder, "--epochs", "4", "--batch-size", "16", "--name", "here")
    shutil.copytree(train.RUNS / "here", train.RUNS / "there")
    saved, turned = checkpoint("there"), 0
    for moments in saved["optimizer"]["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            if moments[key].ndim == 4:
                moments[key] = moments[key].contiguous(memory_format=torch.channels_last)
                turned += not moments[key].is_contiguous()
    assert turned > 10
    torch.save(saved, train.RUNS / "there/checkpoint.pt")
    for name in ("here", "there"):
        resume(name, "--epochs", "8")
    assert rows("here") == rows("there")
    assert_same(checkpoint("here"), checkpoint("there"))


def test_a_stop_in_the_last_step_is_the_end(folder, monkeypatch, capsys):
    interrupt_at(9, monkeypatch)
    run("--data", folder, "--epochs", "4", "--batch-size", "16")
    assert "10 steps, 160 images seen" in capsys.readouterr().out


def test_after_the_loop_a_first_ctrl_c_ends_the_program(folder):
    run("--data", folder, "--epochs", "1", "--batch-size", "16")
    with pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert stop.value.code == 130


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_take_their_part_of_the_draws_and_dropout_of_their_own(folder, rank, monkeypatch):
    settings = train.resolve({"data": folder, "size": 8, "device": "cpu", "amp": "off"})
    settings |= {"batch_size": 8, "epochs": 0.2, "patch": 2, "seed": 5, "flip": False}
    images = data.load(folder, 8, 3, Path("data"))[0].images  # 40: one step
    seeds, seen, real = [], [], torch.manual_seed

    def loss_fn(net, x0, t, eps, abar):
        seen.append((x0, t, eps))
        return train.dier_loss(net, x0, t, eps, abar)

    monkeypatch.setattr(train, "ranks", lambda: (rank, 2, rank))
    monkeypatch.setattr(train, "DistributedDataParallel", lambda net: net)
    monkeypatch.setattr(train.dist, "all_reduce", lambda sums: None)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
    (train.RUNS / "set").mkdir(parents=True)
    train.train(train.build_dier(settings), loss_fn, images, settings, train.RUNS / "set")
    assert seeds == [data.mix_seed(5, 0, rank)]
    t, _, eps = train.draw(5, 0, (8, 3, 8, 8), CPU)
    index = data.batch_index(40, 0, 8, 5, CPU)
    x0 = data.get_batch(torch.from_numpy(np.array(images)), index, CPU)
    for got, whole in zip(seen[0], (x0, t, eps), strict=True):
        assert torch.equal(got, whole[rank::2])


def test_a_slow_save_does_not_make_every_step_save(folder, monkeypatch):
    """Saving takes SAVE_SHARE of the time at most."""
    real, saves, now = train.save, [], [0.0]

    def clock():
        now[0] += 0.01
        return now[0]

    def save(*args):
        real(*args)
        saves.append(now[0])
        now[0] += 0.06

    monkeypatch.setattr(train, "save", save)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.01)
    monkeypatch.setattr(train, "SAVE_SHARE", 0.5)
    monkeypatch.setattr(train.time, "monotonic", clock)
    run("--data", folder, "--epochs", "10", "--batch-size", "16")  # 25 steps of 0.01 s or more
    assert 3 < len(saves) < 15
    assert all(b - a > 0.12 for a, b in zip(saves[:-1], saves[1:-1]))  # the last is at the end


def test_resume_finds_data_that_moved_and_refuses_data_that_changed(folder, tmp_path, capsys):
    run("--data", folder, "--epochs", "2", "--batch-size", "16", "--minutes", "5")
    (tmp_path / "set").rename(tmp_path / "moved")
    assert "'set' is no folder of images" in fails(capsys, resume, "set", "--epochs", "4")
    resume("set", "--epochs", "4", "--data", "moved", "--minutes", "0")
    assert checkpoint("set")["settings"]["data"] == "moved"
    for path in (tmp_path / "moved/train/class1").iterdir():
        path.unlink()
    error = fails(capsys, resume, "set", "--epochs", "6")
    assert "moved has 60 images" in error or "40" in error
    write_folder(tmp_path / "names")
    run("--data", "names", "--epochs", "2")
    for split in ("train", "test"):
        (tmp_path / f"names/{split}/class1").rename(tmp_path / f"names/{split}/other")
    error = fails(capsys, resume, "names", "--epochs", "6")
    assert "40 images of 2 classes, but runs/names was trained on 40 of 2 (unlike: class1)" in error
    # with --data typed and no --name the run is that set's, never the newest
    write_folder(tmp_path / "other")
    error = fails(capsys, train.main, ["--data", "other", "--resume"])
    assert "no checkpoint in runs/other: train that run first" in error


# ---------------------------------------------------------------------------- what goes wrong


def test_the_line_of_what_is_not_finite_names_the_steps_since_the_last_row(
    folder, monkeypatch, capsys
):
    run("--data", folder, "--epochs", "1", "--batch-size", "16", "--name", "other")
    real, calls = train.eps_loss, []

    def loss(*args):
        calls.append(None)
        return real(*args) * (math.nan if len(calls) == 24 else 1)

    monkeypatch.setattr(train, "eps_loss", loss)
    monkeypatch.setattr(train, "SAVE_SECONDS", math.inf)  # where it would be seen earlier
    error = fails(capsys, run, "--data", folder, "--epochs", "20", "--batch-size", "16")
    assert "the loss is not finite (steps 21 to 40, t in " in error


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    folder, what, monkeypatch, capsys
):
    run("--data", folder, "--epochs", "10", "--batch-size", "16")  # 25 steps
    before = (train.RUNS / "set/checkpoint.pt").read_bytes()
    if what == "loss":
        real, factor = train.eps_loss, torch.tensor([float("nan"), *[1.0] * 15])
        monkeypatch.setattr(train, "eps_loss", lambda *args: real(*args) * factor)
        words = r"the loss is not finite \(steps 26 to 26, t in \d+-\d+, lr .*, amp off\)"
    else:
        norm = torch.tensor(math.inf)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kw: norm)
        words = r"the gradient is not finite \(steps 26 to 26, t in any"
    error = fails(capsys, resume, "set", "--epochs", "20")
    assert re.search(words, error) and "smaller --lr, or --amp off" in error
    assert "runs/set/checkpoint.pt is the last good one" in error
    assert (train.RUNS / "set/checkpoint.pt").read_bytes() == before


def test_bad_input_is_one_line_and_status_2(folder, tmp_path, capsys):
    run("--data", folder, "--epochs", "1", "--name", "done")
    (tmp_path / "runs/file").write_text("")
    (tmp_path / "runs/odd").mkdir()
    (tmp_path / "runs/odd/config.json").write_text("")
    files = {p: p.read_bytes() for p in train.RUNS.rglob("*") if p.is_file()}
    for flags, words in [
        (["--size", "30", "--patch", "4"], "size 30 is not a multiple of patch 4: give --patch 3"),
        (["--size", "9", "--patch", "3"], "size 9 cannot be halved 1 times: give --size 8"),
        (["--hidden", "18"], "hidden 18 is not a multiple of 4 x heads 2: give --hidden 16"),
        (["--enc-heads", "3"], "encoder width 8"),
        (["--depth", "x"], "x is not a whole number above 0"),
        (["--batch-size", "99999999999999999999"], "is not a whole number above 0, below 2^31"),
        (["--mult"], "expected at least one argument"),
        (["--data", "nowhere"], "'nowhere' is no folder of images and none of glyphs, mnist"),
        (["--name", "done"], "add --resume to go on, or choose another --name"),
        (["--name", "none", "--resume"], "no checkpoint in runs/none"),
        (["--name", "/tmp/x"], "--name /tmp/x: give the name of a folder in runs/"),
        (["--name", "../x"], "--name ../x: give the name"),
        (["--name", ""], "--name : give the name"),
        (["--name", "odd", "--resume"], "no checkpoint in runs/odd"),
        (["--device", "nonsense"], "--device nonsense does not work here"),
        (["--device", "meta"], "--device meta does not work here (cpu and cuda alone do)"),
        (["--epochs", "0"], "0 is not a number above 0"),
        (["--epochs", "nan"], "nan is not a number above 0"),
        (["--epochs", "1e308"], "1e308 is not a number above 0, below 1e12"),
        (["--batch-size", "2.5"], "2.5 is not a whole number above 0"),
        (
            ["--batch-size", "9", "--accum", "2"],
            "--batch-size 9 is not a multiple of 1 process(es) x --accum 2: give 10",
        ),
        (["--ema", "1"], "1 is not in [0, 1)"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["--epo", "1"], "unrecognized arguments: --epo 1"),
    ]:
        argv = [*TINY, *flags, *["--data", folder][: 2 * ("--data" not in flags)]]
        assert words in fails(capsys, train.main, argv), flags
    argv = [*TINY, "--data", folder, "--name", "file"]
    assert "runs/file" in fails(capsys, train.guard, lambda: train.main(argv))
    assert files == {p: p.read_bytes() for p in train.RUNS.rglob("*") if p.is_file()}


class Bomb:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("bomb",)


def foreign(path, kind):
    """Checkpoints that are none of ours."""
    saved = torch.load(path, weights_only=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "pickle":
        torch.save({"object": Bomb()}, path)
    elif kind == "state_dict":
        torch.save(saved["raw"], path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "no settings":
        torch.save({**saved, "settings": [1]}, path)
    elif kind == "older settings":
        del saved["settings"]["lr"]
        torch.save(saved, path)
    elif kind == "no weights":
        torch.save({**saved, "raw": None, "ema": None}, path)
    else:
        saved["settings"]["hidden"] = 32
        torch.save(saved, path)


KINDS = ["empty", "cut", "pickle", "state_dict", "list", "text", "no settings", "older settings"]
KINDS += ["no weights", "other sizes"]


def test_a_foreign_or_damaged_checkpoint_is_one_line(folder, capsys):
    run("--data", folder, "--epochs", "1")
    path = train.RUNS / "set/checkpoint.pt"
    whole = path.read_bytes()
    for kind in KINDS:
        path.write_bytes(whole)
        foreign(path, kind)
        for command in (resume, lambda name, *_: probe.main(["--name", name])):
            error = fails(capsys, command, "set", "--epochs", "9")
            inside = kind in ("no weights", "other sizes")
            words = "does not fit its own settings" if inside else "set/check"
            assert words in error and "train a" in error, kind
            assert ("(it is no checkpoint)" in error) == (kind == "text")
            assert not Path("bomb").exists()
    path.write_bytes(whole)
    torch.save({**torch.load(path, weights_only=True), "optimizer": None}, path)
    assert "does not fit its own settings" in fails(capsys, resume, "set", "--epochs", "9")


def test_a_checkpoint_that_may_not_be_read_is_not_to_be_deleted(folder, monkeypatch, capsys):
    run("--data", folder, "--epochs", "1")
    denied = PermissionError(13, "Permission denied", "runs/set/checkpoint.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(denied))
    error = fails(capsys, train.guard, lambda: resume("set", "--epochs", "9"))
    assert error == "error: runs/set/checkpoint.pt: Permission denied\n"


def test_only_rank_0_looks_for_a_run_at_the_end(folder, monkeypatch):
    """On another machine than rank 0's there is no checkpoint."""
    settings = train.resolve({"data": folder, "size": 8, "device": "cpu"})
    monkeypatch.setattr(train, "train", lambda *_: (10, 1.0, 0))
    monkeypatch.setattr(train, "ranks", lambda: (1, 2, 1))
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(train.dist, name, lambda: None)
    train.run({**settings, "patch": 2}, train.RUNS / "set", None, None)
    assert not train.RUNS.exists()


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(folder, capsys):
    run("--data", folder, "--epochs", "2", "--batch-size", "16")
    before = (train.RUNS / "set/checkpoint.pt").read_bytes()
    with full_disk(len(before) // 2):
        error = fails(capsys, train.guard, lambda: resume("set", "--epochs", "4"))
    assert "disk full" in error or "too large" in error
    assert (train.RUNS / "set/checkpoint.pt").read_bytes() == before
    assert not [p for p in (train.RUNS / "set").iterdir() if p.name.startswith(".")]


def test_a_large_checkpoint_on_a_full_disk_is_an_error_of_the_disk(tmp_path, capsys):
    """torch's writer raises an error of its own over that of the system."""
    counters = {"x": torch.zeros(10**7)}
    with full_disk(2**20):
        error = fails(capsys, train.guard, lambda: train.save(tmp_path / "run", {}, counters))
    assert "is the disk full?" in error and not list((tmp_path / "run").iterdir())


def test_a_closed_pipe_ends_quietly(folder, monkeypatch, capsys):
    """As of `python train.py | head -1`: the reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as m:
        m.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            train.guard(lambda: run("--data", folder, "--epochs", "4"))
        pipe.flush()  # as Python does at its end; it has nothing to complain of
    assert stop.value.code == 141 and capsys.readouterr().err == ""


@pytest.mark.parametrize("status", [0, 2, 130])
@pytest.mark.parametrize("full", [True, False])
def test_output_that_cannot_be_written_leaves_no_traceback_at_the_end(
    full, status, monkeypatch, capsys
):
    """As of `> /dev/full` or `| tee log`, which Ctrl-C ends too: a command's last lines are still
    in a buffer, which Python writes once more at its end."""

    def main():
        print("stopped at step 5")
        raise SystemExit(status)

    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") if full else os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as stop:
            train.guard(main)
        out.flush()
    errors = capsys.readouterr().err.splitlines()
    assert (stop.value.code, len(errors)) == ((2, 1) if full else (141, 0))
    if full:
        os.close(writer)


@pytest.mark.slow
def test_a_pipe_that_closes_while_a_process_trains_ends_it_quietly(folder, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--data", folder, "--epochs", "4"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait() == 141


@pytest.mark.slow
def test_closed_streams_are_no_error(tmp_path):
    """The status is that of the flag: a traceback would leave 1."""
    command = f"exec {sys.executable} {ROOT}/train.py --epochs 0 >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path).returncode == 2


CPU_MEMORY = (  # as torch says it
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 1 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "20.00 GiB"),
        (RuntimeError("CUDA error: out of memory. CUDA kernel"), "out of memory (CUDA error"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "or a smaller --batch-size"),
        (MemoryError(), "--accum 2 or more, or a smaller --batch-size"),
        (RuntimeError(CPU_MEMORY), "you tried to allocate 1 bytes. Error"),
        (RuntimeError("Storage size calculation overflowed with sizes=[3]"), "out of memory ("),
        (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), "install gcc and g++"),
        (RuntimeError("numel: integer multiplication overflow"), "out of memory (numel"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "install gcc and g++"),
        (torch.distributed.DistNetworkError("EADDRINUSE"), "is not to be reached (EADDRINUSE)"),
        (OSError(28, "No space left on device"), "cannot write: No space left on device"),
        (PermissionError(13, "Permission denied", "runs/x"), "runs/x: Permission denied"),
    ],
)
def test_what_goes_wrong_outside_the_program_is_one_line(error, words, capsys):
    def main():
        raise error

    less = "--accum 2 or more, or a smaller --batch-size"
    assert words in fails(capsys, train.guard, main, less)


def test_a_fault_of_the_program_keeps_its_traceback():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        train.guard(main)


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("preset", ["paper", "cpu"])
@pytest.mark.parametrize("name", list(data.SETS))
def test_dry_run_needs_no_set_and_writes_nothing(name, preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--data", name, "--preset", preset, "--dry-run"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    facts = data.SETS[name]
    assert set(result["parameters"]) == {"dit", "encoder"} and result["preset"] == preset
    assert result["channels"] == facts.channels and result["flip"] == facts.flip
    row = M.table_row(preset, name, facts.row)
    assert all(result[key] == (list(v) if isinstance(v, tuple) else v) for key, v in row.items())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_named_as_a_row_of_table_4_has_the_row_of_its_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "32" / split).mkdir(parents=True)
        Image.new("RGB", (300, 300)).save(tmp_path / "32" / split / "1.png")
    assert train.resolve({"data": "32", "preset": "paper", "device": "cpu"})["size"] == 256


def test_two_spellings_of_a_folder_are_one_and_a_sets_name_is_no_folder():
    spelled = {"pics/": "pics", "./a//b/.": "a/b", "../a": "../a", "mnist": "mnist", "": ""}
    spelled |= {"./mnist": "./mnist", "mnist/": "mnist/"}  # folders of that name
    for module in (train, probe, choose, baselines):
        for text, name in spelled.items():
            assert module.build_parser().parse_args(["--data", text]).data == name


def test_typed_flags_replace_the_presets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--preset paper --epochs 0.5 --minutes 2 --mult 1 2 --patch 4 --no-flip --lr 3e-4"
    flags += " --dropout 0 --ema 0"
    train.main([*flags.split(), "--data", "cifar10", "--dry-run"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    want = {"epochs": 0.5, "minutes": 2, "mult": [1, 2], "patch": 4, "flip": False, "lr": 3e-4}
    want |= {"dropout": 0, "ema": 0}
    assert {key: result[key] for key in want} == want
    train.main(["--data", "cifar10", "--preset", "cpu", "--dry-run", "--patch", "8"])
    assert "192 values do not fit a token of 128: 33% of the noise" in capsys.readouterr().out


def test_attention_that_no_level_of_the_encoder_has_is_said(capsys):
    def said(**typed):
        settings = train.resolve({"device": "cpu", **typed})
        train.describe(settings, {"encoder": 1, "dit": 1}, Path("runs/a"), auto=False)
        return "has no effect: the sides of the encoder's levels are" in capsys.readouterr().out

    for name in ("mnist", "tiny-imagenet", "bccd"):
        assert not said(data=name, preset="cpu") and not said(data=name, preset="paper")
    assert said(data="mnist", preset="cpu", size=32)  # 32, 16, 8; the preset's is at 4
    assert not said(data="mnist", preset="cpu", size=32, attention=[8])


@pytest.mark.parametrize(("gpu", "preset", "other"), [(0, "cpu", "paper"), (1, "paper", "cpu")])
def test_a_preset_that_nobody_typed_names_the_other(gpu, preset, other, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(train, "pick_device", lambda _: torch.device("cuda" if gpu else "cpu"))
    monkeypatch.setattr(train, "pick_amp", lambda *_: "off")
    for auto in (True, False):
        train.describe(train.resolve({}), {"encoder": 1, "dit": 1}, Path("runs/a"), auto)
        line = capsys.readouterr().out.splitlines()[0]
        assert line.startswith("no GPU: " * (auto and not gpu) + f"preset {preset}, ")
        assert (f"; --preset {other} for" in line) == auto


def test_a_folder_with_a_space_is_shown_as_it_is(folder, capsys):
    Path(folder).rename("my pictures")
    run("--data", "my pictures", "--dry-run")
    out = " ".join(capsys.readouterr().out.split())  # a long line is wrapped
    assert " data=my pictures " in out and " mult=[1,2] " in out


def test_minutes_are_a_limit_and_epochs_may_be_a_fraction(folder):
    run("--data", folder, "--epochs", "0.5", "--batch-size", "8")
    assert checkpoint("set")["step"] == 3  # ceil(20 / 8)
    run("--data", folder, "--epochs", "1e6", "--minutes", "0.01", "--name", "short")
    assert 1 < checkpoint("short")["step"] < 10_000


@pytest.mark.parametrize(
    "step, spent, limit, words",
    [
        (29, 19.0, math.inf, ""),
        (30, 20.0, math.inf, ", 1:20 left"),
        (30, 20.0, 10.0, ", 0:10 left"),
        (30, 50.0, -20.0, ", 0:00 left"),
    ],
)
def test_time_left_is_said_from_the_twentieth_step_and_never_negative(
    step, spent, limit, words, capsys
):
    """Of a call that began at step 10 and goes on to step 110."""
    row = {"step": step, "epoch": 0.25, "loss": 0.5, "images_per_s": 1234.5}
    train.show_row(row, 110, 10, spent, limit, again=True)
    line = f"step {step} of 110, epoch 0.25, loss 0.5000, 1,234 images/s{words}\n"
    assert capsys.readouterr().out == line


def test_the_gpu_that_was_asked_for_is_the_one_that_answers(monkeypatch):
    """What torch.cuda tells of itself it tells of the current GPU."""
    second, current = torch.device("cuda:1"), []
    monkeypatch.setattr(torch, "ones", lambda *_, device: types.SimpleNamespace(device=second))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert train.pick_device("cuda:1") == second and current == [second]


def test_a_gpu_that_the_installed_torch_was_not_built_for_is_refused(monkeypatch, capsys):
    """It gives memory, and fails at the first kernel."""
    text = "CUDA error: no kernel image is available for execution on the device"

    def ones(*_, device):
        raise RuntimeError(f"{text}\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(torch, "ones", ones)
    said = f"--device cuda does not work here ({text}); use --device cpu"
    assert said in fails(capsys, train.pick_device, "cuda")


def test_auto_precision_follows_the_hardware(monkeypatch):
    for found, want in [({"amx_bf16"}, "bf16"), ({"avx512_bf16"}, "bf16"), (set(), "off")]:
        capabilities = {name: name in found for name in ("amx_bf16", "avx512_bf16")}
        tell = partial(dict, capabilities)
        monkeypatch.setattr(torch.cpu, "get_capabilities", tell, raising=False)
        assert train.pick_amp("auto", CPU) == want
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch before 2.11
    assert train.pick_amp("auto", CPU) == "off"
    for native, want in [(True, "bf16"), (False, "fp16")]:
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, n=native: n
        )
        assert train.pick_amp("auto", torch.device("cuda")) == want
    assert train.pick_amp("off", CPU) == "off"


def test_only_runs_of_dier_are_found(folder, tmp_path, capsys):
    run("--data", folder, "--epochs", "1")
    for name, config in [("mae", '{"method": "mae"}'), ("torn", "{"), ("list", "[]")]:
        (train.RUNS / name).mkdir()
        (train.RUNS / name / "config.json").write_text(config)
        (train.RUNS / name / "checkpoint.pt").write_bytes(b"newer")
    assert train.find_run() == train.RUNS / "set"
    (train.RUNS / "set/checkpoint.pt").unlink()
    assert "no run in runs/: start with python train.py" in fails(capsys, train.find_run)
    run("--data", folder, "--epochs", "1", "--name", "deeper/down")
    assert "next: python probe.py --name deeper/down" in capsys.readouterr().out


def test_both_scripts_as_a_user_runs_them(folder, tmp_path, monkeypatch):
    """In a terminal that knows ASCII alone; both at once, since each of them imports torch anew."""
    (tmp_path / "set").rename(tmp_path / "größe")
    run("--data", "größe", "--epochs", "1", "--name", "earlier")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    train_words = "train.py", "--data", "größe", *TINY, "--epochs", "2"
    probe_words = "probe.py", "--name", "earlier", "--t", "400", "--epochs", "20"
    with ThreadPoolExecutor(2) as pool:
        trained = pool.submit(script, *train_words, cwd=tmp_path)
        probed = pool.submit(script, *probe_words, cwd=tmp_path)
    done = trained.result()
    assert done.returncode == 0, done.stderr
    assert "preset cpu" in done.stdout and "gr\\xf6\\xdfe: " in done.stdout
    assert done.stdout.splitlines()[-1].endswith("next: python probe.py")
    done = probed.result()
    assert done.returncode == 0, done.stderr
    assert "t = 400 (given)" in done.stdout and "floors: pixels 100.00" in done.stdout


@pytest.mark.parametrize("rate, last", [("1e-3", "2 steps, 32 images"), ("1e9", "error: the ")])
def test_on_a_terminal_the_last_line_stands_alone(folder, monkeypatch, rate, last):
    """The progress line is rewritten in place, but what follows it is not glued to it."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as m:
        m.setattr(sys, "stdout", terminal)
        m.setattr(sys, "stderr", terminal)
        epochs, status = ("0.8", 0) if last[0] == "2" else ("40", 2)
        flags = ["--data", folder, "--lr", rate, "--batch-size", "16", "--epochs", epochs]
        with pytest.raises(SystemExit) as stop:
            train.guard(lambda: run(*flags))
            raise SystemExit(0)  # as Python ends a script that came to its end
    out = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while block := os.read(ours, 4096):
            out += block
    os.close(ours)
    assert stop.value.code == status
    *_, row, end = out.decode().splitlines()
    assert row.removeprefix("\033[A\033[K").startswith("step ") and end.startswith(last), out
    assert out.count(b"\033[A\033[K") == out.count(b"\nstep ") + out.count(b"Kstep ") - 1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["probe.py", "appendix/figures.py", "appendix/choose.py"])
def test_an_error_of_each_script_is_one_line_and_status_2(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = script(command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no run in runs/: start with python train.py\n"


def test_previews_show_the_images_and_leave_the_training_bits_unchanged(folder, monkeypatch):
    args = ["--data", folder, "--epochs", "8", "--batch-size", "16", "--dropout", "0.2"]
    run(*args, "--name", "few")
    monkeypatch.setattr(train, "SAVE_SECONDS", -1.0)  # a checkpoint and a preview at each step
    monkeypatch.setattr(train, "SAVE_SHARE", math.inf)
    run(*args, "--name", "many")
    assert rows("few") == rows("many")
    assert_same(checkpoint("few"), checkpoint("many"))
    page = np.asarray(Image.open(train.RUNS / "few/preview.png"))
    assert page.shape == (5 * 64, 12 * 64, 3)  # 8 pixels drawn at 8 x 8
    images = data.load(folder, 8, 3, train.Path("data"))[0].images
    for k in range(4):  # x_0 stands in columns 0, 3, 6, 9 of each row
        for row in range(5):
            cell = page[64 * row :, 64 * 3 * k :][:64:8, :64:8]
            assert np.array_equal(cell, images[k].transpose(1, 2, 0))
    means = [page[64 * r :, 64:][:64, :64].astype(float).std() for r in range(5)]
    assert means[0] != means[4]  # x_t differs from row to row


# ---------------------------------------------------------------------------- the numbers stay

LOSSES = [0.971978, 1.097925, 0.91084, 0.842677, 0.880207, 1.012817, 0.932841, 1.003659]
NORMS = [0.499955, 0.532299, 0.536828, 0.469491, 0.513466, 0.607411, 0.575969, 0.720978]


def test_eight_steps_give_the_recorded_numbers(tmp_path):
    """As commit d3d31e8 computed them, in fp32: initialisation, batches, draws, loss, update."""
    n, y, x = np.ogrid[:24, :8, :8]
    images = ((37 * n + 11 * y * y + 23 * x * (n % 7 + 3)) % 256).astype(np.uint8)[:, None]
    sizes = {"size": 8, "patch": 4, "hidden": 16, "depth": 1, "heads": 2, "base": 8}
    sizes |= {"mult": [1, 2], "attention": [4], "enc_heads": 2, "batch_size": 8, "lr": 2e-3}
    settings = train.resolve({**sizes, "epochs": 64 / 24, "device": "cpu", "amp": "off"})
    torch.manual_seed(0)
    train.train(train.build_dier(settings), train.dier_loss, images, settings, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in log] == pytest.approx(LOSSES, rel=1e-3)
    assert [row["grad_norm"] for row in log] == pytest.approx(NORMS, rel=1e-3)


def test_the_probe_needs_nothing_that_training_did_not_check(folder, tmp_path, capsys):
    """A class of test that train lacks is found before the first step."""
    (tmp_path / "set/test/class1").rename(tmp_path / "set/test/Class1")
    assert "Class1" in fails(capsys, run, "--data", folder, "--epochs", "1")
    assert not train.RUNS.exists()


def test_a_run_keeps_where_it_began(folder, monkeypatch):
    """Command, commit, versions and machine are those of the first call, in words a shell takes."""
    run("--data", folder, "--epochs", "1", "--name", "a b")
    first = train.read_config(train.RUNS / "a b")["origin"]
    assert first["command"].startswith("python train.py --size 8") and "'a b'" in first["command"]
    head = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(head, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit = first["commit"].removesuffix("-dirty")
    assert head.startswith(commit) and bool(commit) == bool(head)
    assert first["versions"]["torch"] == str(torch.__version__)
    assert re.search(r"threads \(.+\)$", first["machine"])
    monkeypatch.setenv("PATH", "")  # no git
    assert train.origin(["x.py"], "cpu")["commit"] == ""
    resume("a b", "--epochs", "2")
    assert checkpoint("a b")["settings"]["origin"] == first


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_glibc_is_told_to_keep_freed_memory(monkeypatch):
    """Both of malloc.h's options are taken (1; 0 would be a refusal), and no other system is told
    anything. What they save depends on where the heap happens to lie, so no test counts pages."""
    told = []

    class Libc:
        def mallopt(self, option, value):
            told.append((option, value, real.mallopt(option, value)))

    real = train.ctypes.CDLL(None)
    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: Libc())
    train.keep_freed_memory()
    m_trim_threshold, m_mmap_threshold = -1, -3
    assert told == [(m_trim_threshold, 2**30, 1), (m_mmap_threshold, 2**25, 1)]
    monkeypatch.setattr(train.sys, "platform", "darwin")
    train.keep_freed_memory()
    assert len(told) == 2
