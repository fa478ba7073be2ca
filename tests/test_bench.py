"""appendix/bench.py: what can be known without a clock, and the report as a whole."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, fails

import train
from appendix import bench

CPU = torch.device("cpu")


def settings_of(*flags):
    """The settings that train.py would take."""
    argv = ["--data", "mnist", *TINY, "--batch-size", "4", *flags]
    return train.resolve(vars(train.build_parser().parse_args(argv)))


def test_flops_are_counted_as_by_hand():
    """Twice the multiplications, three times for forward and both gradients."""
    few, more = (
        bench.flops_per_image("dier", settings_of("--patch", "4", "--depth", depth))
        for depth in "12"
    )
    tokens, d = 4, 16
    linear = tokens * (3 + 1 + 4 + 4) * d * d + 6 * d * d  # qkv, proj, fc1, fc2, and ada once
    scores = 2 * tokens * tokens * d  # q k^T and its product with v, over both heads
    assert more - few == 3 * 2 * (linear + scores)


@pytest.mark.parametrize("device, n, steps, counted", [
    ("cpu", 5, 8, [4, 5, 6, 7, 8]), ("cuda", 5, 60, [60]),
])  # fmt: skip
def test_rows_that_count_leave_the_warm_up_and_the_waiting_out(
    device, n, steps, counted, tmp_path, monkeypatch
):
    """A loop whose step n has n images/s: on CUDA only rows of 20 steps tell the speed."""
    seen = []

    def fake(net, loss_fn, images, settings, folder):
        last = math.ceil(settings["epochs"] * len(images) / settings["batch_size"])
        seen.append(last)
        rows = [n for n in range(1, last + 1) if n <= 20 or n % 20 == 0 or n == last]
        lines = [json.dumps({"step": n, "images_per_s": n}) + "\n" for n in rows]
        (folder / "log.jsonl").write_text("".join(lines))

    monkeypatch.setattr(train, "train", fake)
    program = bench.Program({**settings_of(), "device": device}, tmp_path)
    assert program.turn(n) == [4 / row for row in counted] and seen == [steps]


@pytest.mark.parametrize("side", [bench.Program, bench.Reference])
def test_each_turn_of_a_side_takes_its_steps(side, tmp_path):
    runner = side(settings_of(), tmp_path)
    assert runner.pixels.shape == (16, 1, 8, 8)
    for n in (1, 3):
        times = runner.turn(n)
        assert len(times) == n and all(0 < seconds < 10 for seconds in times)


def test_speed_is_a_median_with_its_quartiles():
    got = bench.speed([0.1, 0.2, 0.4, 0.2, 0.2], 8)
    assert got["images_per_s"] == pytest.approx(40)
    assert got["quartile_1"] == pytest.approx(8 / 0.3) and got["samples"] == 5
    assert got["quartile_3"] == pytest.approx(8 / 0.15)


def test_memory_has_a_peak_above_the_present():
    block = torch.ones(2**24)  # 64 MiB
    assert bench.memory("VmRSS") > block.nbytes
    del block
    assert bench.memory("VmHWM") >= bench.memory("VmRSS") > 2**20


def test_the_peak_is_the_faster_of_products_and_convolutions(monkeypatch):
    product, convolution = 2 * 128**3, 2 * 8 * 32 * 32 * 9 * 128**2
    for seconds in ([1.0, 1e6], [1e6, 1.0]):  # so slow that one of each kind is made
        calls = iter(seconds)
        monkeypatch.setattr(bench, "best_seconds", lambda call, calls=calls: next(calls))
        fastest = product if seconds[0] == 1 else convolution
        assert bench.peak_flops(torch.float32, CPU) == fastest


@pytest.mark.slow
def test_the_peak_of_this_machine_is_above_100_mflops():
    assert bench.peak_flops(torch.float32, CPU) > 1e8


def test_both_precisions_are_measured_unless_one_is_typed(monkeypatch):
    monkeypatch.setattr(train, "pick_amp", lambda name, device: "bf16")
    names = {amp: list(bench.sides_of({**settings_of(), "amp": amp})) for amp in ("auto", "off")}
    assert names == {"auto": ["reference", "fp32", "bf16"], "off": ["reference", "fp32"]}


@pytest.mark.slow
def test_the_report_compares_two_processes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench, "SECONDS", 0.05)
    monkeypatch.setattr(bench, "TURNS", 2)
    monkeypatch.setattr(bench, "peak_flops", lambda dtype, device: dtype.itemsize * 1e11)
    path = tmp_path / "made/bench.json"
    flags = ["--batch-size", "2", "--device", "cpu", "--amp", "bf16", "--json", str(path)]
    bench.main([*flags, "--data", "glyphs"])
    r, out = json.loads(path.read_text()), capfd.readouterr().out
    program, reference = r["sides"]["bf16"], r["sides"]["reference"]
    for name, key in (("images_per_s", "images_per_s"), ("peak_memory", "peak_bytes")):
        assert program[f"ratio_{name}"] == program[key] / reference[key]
    assert all(side["peak_bytes"] > 2**20 for side in (program, reference))
    for side, peak in ((program, 2e11), (reference, 4e11)):  # the reference is fp32
        assert side["mfu"] == pytest.approx(r["flops_per_image"] * side["images_per_s"] / peak)
        assert 2 <= side["samples"] <= 2 * 17
    assert r["preset"] == "cpu" and r["batch_size"] == 2
    for words in ("program, bf16", "plain, fp32", "of the peak", "x the plain", "saved:"):
        assert words in out
    assert "step 1 of" not in out  # the loop's own progress is not shown


def test_bad_input_is_one_line(capsys):
    for flags, words in [
        (["--data", "nowhere"], "invalid choice: 'nowhere'"),
        (["--batch-size", "0"], "0 is not a whole number above 0"),
        (["--device", "nonsense"], "--device nonsense does not work here"),
        (["--growth"], "unrecognized arguments: --growth"),
    ]:
        assert words in fails(capsys, bench.main, flags)


@pytest.mark.slow
def test_an_installed_package_called_tests_does_not_stand_in_the_way(tmp_path):
    """Badly packed wheels bring one, and a package wins against a folder without __init__.py."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/__init__.py").touch()
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "appendix.bench", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Killed(bench.Program):
    """A side that the system ends for want of memory."""

    def turn(self, n):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("side, batch, words", [
    (bench.Program, 10**12, "out of memory"),
    (Killed, 4, "a measuring process ended early"),
])  # fmt: skip
def test_a_process_that_dies_ends_the_report(side, batch, words, monkeypatch, capfd):
    """With the line that it had to say, else with one of our own."""
    monkeypatch.setattr(bench, "Program", side)
    with pytest.raises(SystemExit) as stop:
        bench.take_turns({**settings_of(), "batch_size": batch})
    error = capfd.readouterr().err
    assert stop.value.code == 2 and words in error and len(error.splitlines()) == 1, error
