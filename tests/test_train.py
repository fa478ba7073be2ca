"""train.py: the step, the loop, resume bit for bit, errors of one line."""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, script
from PIL import Image

import data
import files
import model as M
import probe
import runs
import train
from appendix import baselines, bench, figures, recover
from log import Window, cut_log

TIMES = ("seconds", "images_per_s")


def run(*args):
    """train.main on the tiny model, on the CPU."""
    train.main(["--device", "cpu", *TINY, *args])


def rows(name):
    """log.jsonl without the columns that hold times."""
    lines = (runs.RUNS / name / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def assert_same(a, b):
    """Equal to the last bit: two nested checkpoints."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"settings", "seconds"}:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def checkpoint(name):
    """The checkpoint of a run below runs/."""
    return torch.load(runs.RUNS / name / "checkpoint.pt", weights_only=True)


# ---------------------------------------------------------------------------- the step


def test_draw_is_pure_and_reaches_both_ends_of_t():
    a = train.draw(3, 7, (16, 1, 4, 4), torch.device("cpu"))
    b = train.draw(3, 7, (16, 1, 4, 4), torch.device("cpu"))
    c = train.draw(3, 8, (16, 1, 4, 4), torch.device("cpu"))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a[2], c[2])
    t, flips, eps = train.draw(0, 0, (60_000, 1, 1, 1), torch.device("cpu"))
    assert t.min() == 0 and t.max() == 999
    assert torch.bincount(t * 10 // 1000).float().std() < 4 * math.sqrt(60_000 * 0.09)
    assert abs(flips.float().mean() - 0.5) < 0.01 and abs(eps.var() - 1) < 0.03


def test_ema_warms_up_and_averages():
    assert train.ema_decay(0.9999, 0) == 0.1
    assert train.ema_decay(0.9999, 10**9) == 0.9999
    ema, p = torch.tensor([1.0]), torch.tensor([3.0])
    train.update_ema(ema, p, 0.75)
    assert ema.item() == pytest.approx(0.75 * 1 + 0.25 * 3)


def test_a_flattened_model_computes_the_same_and_shares_its_memory():
    cfg = M.ModelConfig(8, 1, 4, 16, 1, 2, 8, 1, (1, 2), (4,), 2, dropout=0.0)
    torch.manual_seed(0)
    model = M.DiER(cfg)
    model.encoder.to(memory_format=torch.channels_last)  # as on CUDA
    for layer in model.encoder.zero_initialised():
        layer.reset_parameters()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 999])
    before = model.encoder(x, t)
    flat = train.flatten(model)
    assert torch.allclose(model.encoder(x, t), before, atol=1e-6)
    assert len(flat) == M.count_parameters(model)
    assert model.encoder.stem.weight.is_contiguous(memory_format=torch.channels_last)
    flat.zero_()
    assert all(not p.any() for p in model.parameters())


def test_window_means_by_tenth_of_t():
    window = Window(torch.device("cpu"))
    t = torch.tensor([0, 99, 100, 999])
    window.add(1, torch.tensor([1.0, 3.0, 5.0, 7.0]), t, torch.tensor(2.0))
    window.add(2, torch.tensor([2.0, 2.0, 2.0, 2.0]), t, torch.tensor(float("inf")))
    got = window.read()
    assert got["loss"] == pytest.approx(3.0)
    assert got["loss_by_t"] == [2.0, 3.5, *[None] * 7, 4.5]
    assert got["grad_norm"] == 2.0 and got["skipped"] == 1
    assert "NaN" not in json.dumps(got)
    window.reset()
    assert window.read()["loss_by_t"] == [None] * 10 and window.read()["skipped"] == 1


def test_a_run_learns_and_leaves_what_the_docstring_says(folder, capsys):
    run("--data", folder, "--epochs", "80", "--batch-size", "16", "--lr", "3e-3", "--json")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == 200 and result["images"] == 3200
    log = rows("set")
    assert [r["step"] for r in log] == [*range(1, 21), 50, 100, 150, 200]
    assert log[0]["loss"] == pytest.approx(1.0, abs=0.12)  # 1,024 draws of eps^2
    assert log[-1]["loss"] < 0.6
    keys = {"step", "epoch", "images", "seconds", "loss", "loss_by_t", "lr", "images_per_s"}
    keys |= {"grad_norm", "skipped"}
    line = json.loads((runs.RUNS / "set/log.jsonl").read_text().splitlines()[0])
    assert set(line) == keys and len(line["loss_by_t"]) == 10
    config = json.loads((runs.RUNS / "set/config.json").read_text())
    assert config["data"] == folder and config["lr"] == 3e-3 and config["method"] == "dier"
    run("--data", folder, "--epochs", "1")
    assert (runs.RUNS / "set-2").is_dir()  # a second run does not touch the first


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_learns_on_a_cpu(folder, amp):
    run("--data", folder, "--epochs", "40", "--batch-size", "16", "--lr", "3e-3", "--amp", amp)
    log = rows("set")
    assert log[-1]["loss"] < 0.8 and all(math.isfinite(r["loss"]) for r in log)
    state = checkpoint("set")
    assert (state["scaler"] != {}) == (amp == "fp16")
    assert all(p.dtype == torch.float32 for p in state["model"].values())


def test_fp16_steps_that_overflow_are_skipped_and_counted(folder, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: real(device, 2.0**30, enabled=enabled)
    )
    run("--data", folder, "--epochs", "5", "--batch-size", "16", "--amp", "fp16")
    log = rows("set")
    assert log[-1]["skipped"] > 0 and math.isfinite(log[-1]["loss"])


# ---------------------------------------------------------------------------- resume

LONG = ["--batch-size", "16", "--dropout", "0.2", "--flip", "--seed", "5"]


def interrupt_at(step, monkeypatch):
    """Send SIGINT to this process in the middle of one step."""
    real = train.training_step

    def training_step(state, *args):
        if state.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        real(state, *args)

    monkeypatch.setattr(train, "training_step", training_step)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_resume_after_ctrl_c_is_bit_for_bit(folder, amp, monkeypatch, capsys):
    args = ["--data", folder, "--epochs", "22", "--amp", amp]  # 55 steps
    run(*args, *LONG, "--run", "straight")
    with monkeypatch.context() as m:
        interrupt_at(24, m)
        with pytest.raises(SystemExit) as stop:
            run(*args, *LONG, "--run", "cut")
    assert stop.value.code == 130
    assert "--run runs/cut --resume" in capsys.readouterr().out
    assert checkpoint("cut")["step"] == 25
    log = runs.RUNS / "cut/log.jsonl"  # as kill -9 leaves it: a row too many and a torn line
    log.write_text(log.read_text() + '{"step": 50, "loss": 9}\n{"step": 5')
    train.main(["--run", "cut", "--resume", "--device", "cpu", "--amp", amp])
    assert rows("cut") == rows("straight")
    assert_same(checkpoint("cut"), checkpoint("straight"))
    times = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    assert times == sorted(times)  # the clock goes on where the first call left it


@pytest.mark.slow
def test_resume_after_kill_9_is_bit_for_bit(folder, tmp_path):
    flags = ["--device", "cpu", *TINY, "--data", folder, "--epochs", "120", *LONG, "--run"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train; train.SAVE_SECONDS = 0.3;"
    code += "train.main(sys.argv[1:])"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *flags]
    child = subprocess.Popen([*command, "cut"], env=env, stdout=subprocess.DEVNULL)
    path = runs.RUNS / "cut/checkpoint.pt"
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert checkpoint("cut")["step"] < 300
    train.main(["--run", "cut", "--resume", "--device", "cpu"])  # in another process than the cut
    train.main([*flags, "straight"])
    assert rows("cut") == rows("straight")
    assert_same(checkpoint("cut"), checkpoint("straight"))


def test_resume_refuses_another_value_and_goes_on_with_more_epochs(folder, capsys):
    run("--data", folder, "--epochs", "2", "--batch-size", "16", "--lr", "1e-3")
    for flags, words in [
        (["--lr", "2e-3"], "--lr 0.002 differs from the checkpoint's 0.001"),
        (["--seed", "1"], "--seed 1 differs from the checkpoint's 0"),
        (["--data", "mnist"], "--data mnist differs from the checkpoint's set"),
        (["--model", "depth=2"], "differs from the checkpoint's"),
        (["--dropout", "0.5"], "--dropout 0.5 differs from the checkpoint's 0.0"),
        ([], "give a larger --epochs"),
    ]:
        with pytest.raises(SystemExit) as stop:
            train.main(["--run", "set", "--resume", *flags])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    train.main(["--run", "set", "--resume", "--epochs", "4", "--lr", "1e-3"])
    assert checkpoint("set")["step"] == 10


# ---------------------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    folder, monkeypatch, capsys
):
    run("--data", folder, "--epochs", "4", "--batch-size", "16")
    before = (runs.RUNS / "set/checkpoint.pt").read_bytes()
    real = train.eps_loss

    def eps_loss(eps_hat, eps):
        return real(eps_hat, eps) * torch.tensor([float("nan"), *[1.0] * 15])

    monkeypatch.setattr(train, "eps_loss", eps_loss)
    with pytest.raises(SystemExit) as stop:
        train.main(["--run", "set", "--resume", "--epochs", "8", "--device", "cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(r"since step 11 \(t in \d+-\d+; lr ", error)
    assert "smaller --lr" in error and len(error.splitlines()) == 1
    assert (runs.RUNS / "set/checkpoint.pt").read_bytes() == before


def test_bad_input_is_one_line_and_status_2(folder, capsys):
    run("--data", folder, "--epochs", "1", "--run", "done")
    files = {p: p.read_bytes() for p in runs.RUNS.rglob("*") if p.is_file()}
    capsys.readouterr()
    for flags, words in [
        (["--size", "30", "--model", "patch=4"], "image size 30 is not a multiple of patch 4"),
        (["--model", "width=3"], "'width' is not one of"),
        (["--model", "depth=x"], "'x' is not a whole number above 0"),
        (["--model", "depth=1,2"], "depth takes one number"),
        (["--data", "nowhere"], "'nowhere' is no folder of images and none of glyphs, mnist"),
        (["--run", "done"], "add --resume to go on, or choose another --run"),
        (["--run", "none", "--resume"], "no checkpoint in runs/none"),
        (["--device", "nonsense"], "--device nonsense does not work here"),
        (["--epochs", "0"], "0 is not a number above 0"),
        (["--batch-size", "2.5"], "2.5 is not a whole number above 0"),
        (["--ema", "1"], "1 is not in [0, 1)"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ]:
        with pytest.raises(SystemExit) as stop:
            train.run_main(
                lambda f=flags: train.main([*f, *["--data", folder][: 2 * ("--data" not in f)]])
            )
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error, flags
        assert len(error.splitlines()) == 1, flags
    assert files == {p: p.read_bytes() for p in runs.RUNS.rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_is_one_line(folder, capsys):
    run("--data", folder, "--epochs", "1")
    path = runs.RUNS / "set/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        train.main(["--run", "set", "--resume"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "cannot be read" in error and len(error.splitlines()) == 1


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    with pytest.raises(OSError), files.written_whole(path) as temporary:
        temporary.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------- the command line


def test_a_patch_too_large_for_its_token_is_said(capsys):
    train.main(["--data", "cifar10", "--preset", "cpu", "--dry-run"])
    assert "do not fit" not in capsys.readouterr().out
    train.main(["--data", "cifar10", "--preset", "cpu", "--dry-run", "--model", "patch=8"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert "192 values do not fit a token of 128: 33% of the noise stays" in line


@pytest.mark.parametrize("data", list(runs.INFOS))
@pytest.mark.parametrize("preset", ["paper", "cpu"])
def test_dry_run_needs_no_set_and_writes_nothing(data, preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--data", data, "--preset", preset, "--dry-run", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["parameters"]) == {"dit", "encoder"} and result["preset"] == preset
    info = runs.INFOS[data]
    assert result["channels"] == info.channels and result["classes"] == info.classes
    assert result["size"] == (
        info.side if preset == "paper" else {32: 16, 64: 32, 256: 64}[info.side]
    )
    assert result["epochs" if preset == "paper" else "minutes"] == (
        200 if preset == "paper" else 4 if data == "glyphs" else 30
    )
    if preset == "paper":
        assert result["lr"] == (1e-5 if info.side == 256 else 1e-4)
    assert list(tmp_path.iterdir()) == []


def test_epochs_or_minutes_replace_the_presets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, want in [
        (["--epochs", "3"], (3, None)),
        (["--minutes", "2"], (None, 2)),
        (["--epochs", "3", "--minutes", "2"], (3, 2)),
    ]:
        train.main([*flags, "--dry-run", "--json", "--preset", "paper"])
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (result["epochs"], result["minutes"]) == want


def test_auto_precision_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for amx, want in [(True, torch.bfloat16), (False, None)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx})
        assert runs.pick_amp("auto", cpu) == want
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert runs.pick_amp("auto", torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("module", [train, probe, bench, figures, recover, baselines])
def test_every_flag_has_help(module):
    for action in module.build_parser()._actions:
        assert action.help and len(action.help) > 5, action.option_strings


def imports(path):
    """Names of the modules that a file imports, without what follows a dot."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (name.split(".")[0] for name in names)


def test_nothing_is_imported_but_torch_numpy_pillow_and_the_standard_library():
    order = ["diffusion", "model", "files", "sets", "data", "parallel", "runs", "log", "features"]
    order += ["heads", "train", "probe"]  # each may import those before it; the appendix all
    assert sorted(order) == sorted(path.stem for path in ROOT.glob("*.py"))
    allowed = {"torch", "numpy", "PIL", *sys.stdlib_module_names}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("appendix/*.py")]:
        top_level = path.parent == ROOT
        own = set(order[: order.index(path.stem)]) if top_level else {*order, "appendix"}
        for name in imports(path):
            assert name in allowed | own, f"{path.name} imports {name}"
    for name in ("data", "diffusion", "model"):
        assert not {"data", "diffusion", "model"} & set(imports(ROOT / f"{name}.py"))
    assert "train" not in imports(ROOT / "probe.py")


def test_both_scripts_as_a_user_runs_them(folder, tmp_path):
    done = script("train.py", "--data", folder, *TINY, "--epochs", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "preset" in done.stdout and done.stdout.splitlines()[-1].endswith(
        "next: python probe.py"
    )
    done = script("probe.py", "--t", "400", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "chosen t = 400" in done.stdout, done.stdout
    assert "floors: pixels 100.00" in done.stdout, done.stdout


def test_no_run_yet(tmp_path):
    done = script("probe.py", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: no run in runs/: start with python train.py\n"


def test_cut_log_survives_a_torn_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_log(log, 2)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]
    assert np.all([p.name == "log.jsonl" for p in tmp_path.iterdir()])


def test_previews_show_the_images_and_leave_the_training_bits_unchanged(folder, monkeypatch):
    args = ["--data", folder, "--epochs", "20", "--batch-size", "16", "--dropout", "0.2"]
    run(*args, "--run", "few")
    monkeypatch.setattr(train, "SAVE_SECONDS", -1.0)  # a checkpoint and a preview at each step
    monkeypatch.setattr(train, "PREVIEW_SECONDS", -1.0)
    run(*args, "--run", "many")
    assert rows("few") == rows("many")
    assert_same(checkpoint("few"), checkpoint("many"))
    page = np.asarray(Image.open(runs.RUNS / "few/preview.png"))
    side, scale = 8 * 8 + 2, 8  # 8 pixels drawn at 8 x 8, two white ones between
    assert page.shape == (5 * side - 2, 12 * side - 2, 3)
    images = data.load(folder, "train", 8).images
    for k in range(4):  # x_0 stands in columns 0, 3, 6, 9 of each row
        for row in range(5):
            cell = page[row * side :, 3 * k * side :][:64:scale, :64:scale, 0]
            assert np.array_equal(cell, images[k, 0])
    means = [page[r * side :, side:][:64, :64].astype(float).std() for r in range(5)]
    assert means[0] != means[4]  # x_t differs from row to row
