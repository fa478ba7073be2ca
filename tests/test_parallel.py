"""Two processes by torchrun and gloo: the same curve as one, stops, crashes and restarts."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, fails, script, write_folder

import train

FLAGS = [*TINY, "--batch-size", "16", "--dropout", "0"]


def torchrun(*args, cwd, launch=(), wait=True):
    """Start a script in two processes under torchrun, as a user would, on one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [*launch, str(ROOT / args[0]), *args[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    started = subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)
    if not wait:
        return started
    out, err = started.communicate(timeout=300)
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def log(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def read(path):
    return torch.load(path / "checkpoint.pt", weights_only=True)


@pytest.mark.slow  # half a minute: four starts of processes
def test_two_processes_learn_what_one_learns_and_runs_pass_between_them(tmp_path):
    write_folder(tmp_path / "set", per_class=24)
    one = [*FLAGS, "--data", "set", "--epochs", "7", "--name"]  # 21 steps
    assert script("train.py", *one, "one", cwd=tmp_path).returncode == 0
    done = torchrun("train.py", *one, "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images seen") == 1  # one process speaks
    a, b = log(tmp_path / "runs/one"), log(tmp_path / "runs/two")
    assert len(a) == len(b) == 21
    for x, y in zip(a, b):
        assert x["step"] == y["step"] and x["images"] == y["images"]
        assert y["loss"] == pytest.approx(x["loss"], abs=1e-4)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-2, abs=1e-4)
        for u, v in zip(x["loss_by_t"], y["loss_by_t"]):  # each image counted once
            assert (u is None) == (v is None) and (u is None or v == pytest.approx(u, abs=1e-4))
    files = "checkpoint.pt config.json log.jsonl preview.png"
    assert sorted(p.name for p in (tmp_path / "runs/two").iterdir()) == files.split()
    # a run of one process goes on with two, and the reverse
    more = ["train.py", "--resume", "--epochs", "17", "--name"]
    done = torchrun(*more, "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert script(*more, "two", cwd=tmp_path).returncode == 0
    a, b = (log(tmp_path / f"runs/{name}")[-1] for name in ("one", "two"))
    assert a["step"] == b["step"] == 51
    assert a["loss"] == pytest.approx(b["loss"], abs=3e-4)
    states = [read(tmp_path / f"runs/{name}") for name in ("one", "two")]
    for key, value in states[0]["raw"].items():
        assert torch.allclose(value, states[1]["raw"][key], atol=2e-3), key


@pytest.mark.slow
def test_a_run_stopped_between_two_rows_goes_on_with_two_processes(folder, tmp_path, monkeypatch):
    """Each image of the row that was cut counts once, whoever holds the sums so far."""
    flags = [*FLAGS, "--data", folder, "--epochs", "16", "--name"]  # 40 steps
    train.main([*flags, "straight"])
    real = train.draw

    def draw(seed, step, *args):
        if step == 35:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(seed, step, *args)

    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(train, "draw", draw)
        train.main([*flags, "cut"])
    done = torchrun("train.py", "--name", "cut", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = (log(tmp_path / "runs" / name)[-1] for name in ("straight", "cut"))
    assert a["step"] == b["step"] == 40
    assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)


def write_script(tmp_path):
    """train.py, but with a checkpoint every 0.3 s, and its process id in a file."""
    path = tmp_path / "train_often.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, train\n"
        "name = 'pid-' + os.environ['RANK'] + '-' + os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "open(name, 'w').write(str(os.getpid()))\n"
        "train.SAVE_SECONDS = 0.3\ntrain.SAVE_SHARE = 1\ntrain.guard(train.main)\n"
    )
    return str(path)


def start_and_wait(tmp_path, launch=()):
    """Two processes that save often, after their second checkpoint."""
    write_folder(tmp_path / "set", per_class=24)
    flags = [*FLAGS, "--data", "set", "--epochs", "300"]  # 900 steps
    started = torchrun(write_script(tmp_path), *flags, cwd=tmp_path, launch=launch, wait=False)
    path, until, first = tmp_path / "runs/set/checkpoint.pt", time.monotonic() + 60, None
    while time.monotonic() < until:
        if path.exists():
            first = first or path.stat().st_mtime
            if path.stat().st_mtime > first:
                break
        time.sleep(0.02)
    assert path.exists()
    return started


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_checkpoint_is_whole(tmp_path):
    started = start_and_wait(tmp_path)
    os.kill(int((tmp_path / "pid-1-0").read_text()), signal.SIGKILL)
    _, err = started.communicate(timeout=300)
    assert started.returncode != 0
    ours = err.split("torch/distributed/elastic")[0]
    assert not re.search("Traceback.*train.py", ours, re.DOTALL), ours
    steps = [row["step"] for row in log(tmp_path / "runs/set")]
    assert 0 < read(tmp_path / "runs/set")["step"] <= steps[-1] < 900


@pytest.mark.slow
def test_with_a_restart_training_goes_on_by_itself(tmp_path):
    started = start_and_wait(tmp_path, launch=["--max-restarts=1"])
    os.kill(int((tmp_path / "pid-1-0").read_text()), signal.SIGKILL)
    out, err = started.communicate(timeout=300)
    assert started.returncode == 0, err[-3000:]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["set"]  # not a second run
    steps = [row["step"] for row in log(tmp_path / "runs/set")]
    assert steps == sorted(set(steps)) and steps[-1] == 900 and "900 steps" in out
    assert (tmp_path / "pid-0-1").exists()


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_a_resume_goes_on(tmp_path):
    started = start_and_wait(tmp_path)
    for rank in (0, 1):  # a scheduler signals every process
        os.kill(int((tmp_path / f"pid-{rank}-0").read_text()), signal.SIGTERM)
    out, err = started.communicate(timeout=300)
    step = read(tmp_path / "runs/set")["step"]
    assert f"stopped at step {step:,}" in out and step % 20 == 0 or step < 20, err
    assert log(tmp_path / "runs/set")[-1]["step"] == step


def test_a_resumed_run_meets_on_the_device_it_had(folder, monkeypatch):
    train.main([*FLAGS, "--data", folder, "--epochs", "1"])
    asked = []
    monkeypatch.setattr(train, "join_processes", asked.append)
    for k, flags in enumerate(([], ["--device", "auto"], ["--device", "cpu"]), 2):
        train.main(["--data", folder, "--resume", "--epochs", str(k), *flags])
    train.main([*FLAGS, "--data", folder, "--device", "auto", "--dry-run", "--name", "new"])
    assert asked == ["cpu", "cpu", "cpu", "auto"]


def test_more_processes_than_gpus_get_one_line(monkeypatch, capsys):
    for key, value in zip([*train.WORLD, "LOCAL_WORLD_SIZE"], ("0", "3", "0", "1", "a", "3")):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = "3 processes, but 2 GPU(s) here: give --nproc_per_node=2"
    assert words in fails(capsys, train.join_processes, "auto")


def test_processes_that_would_share_one_gpu_get_one_line(monkeypatch, capsys):
    for key, value in zip(train.WORLD, ("0", "2", "0", "1", "a")):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = "each process takes its own GPU, not cuda:0: give --device cuda"
    assert words in fails(capsys, train.join_processes, "cuda:0")


@pytest.mark.parametrize(
    ("world", "want"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "1", "LOCAL_RANK": "1"}, (0, 1, 0)),  # of another program
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0)),
        (dict(zip(train.WORLD, ("3", "4", "1", "29500", "localhost"))), (3, 4, 1)),
        (dict(zip(train.WORLD, ("4", "4", "1", "29500", "localhost"))), None),
        (dict(zip(train.WORLD, ("-1", "4", "0", "29500", "localhost"))), None),
        (dict(zip(train.WORLD, ("3", "4", "1", "port", "localhost"))), None),
        (dict(zip(train.WORLD, ("3", "4", "1"))), None),  # nowhere to meet
        ({"WORLD_SIZE": "2"}, None),
        ({"WORLD_SIZE": "x", "RANK": "0", "LOCAL_RANK": "1"}, None),
    ],
)
def test_ranks_are_those_of_torchrun_or_of_one_process(monkeypatch, capsys, world, want):
    for key in train.WORLD:
        monkeypatch.delenv(key, raising=False)
    for key, value in world.items():
        monkeypatch.setenv(key, value)
    if want:
        assert train.ranks() == want
    else:
        assert "are not set as by torchrun: start with it, or unset" in fails(capsys, train.ranks)


def test_the_norm_of_all_processes_counts_once(monkeypatch):
    x, t, sums = torch.ones(4), torch.arange(4), torch.zeros(24)
    for rank in range(2):
        monkeypatch.setattr(train, "ranks", lambda rank=rank: (rank, 2, rank))
        train.add_sums(sums, x, t, torch.tensor(3.0))
        train.add_sums(sums, x, t, torch.tensor(float("inf")))
    assert train.means(sums.tolist())["skipped"] == 1 and sums[train.NORM] == 3
    assert sums[0] == sums[10] == 16


def test_a_batch_that_two_processes_cannot_share_names_the_way_out(folder, monkeypatch, capsys):
    train.main([*FLAGS, "--data", folder, "--epochs", "1", "--batch-size", "15"])
    monkeypatch.setattr(train, "join_processes", lambda device: None)
    monkeypatch.setattr(train, "ranks", lambda: (0, 2, 0))
    words = "15 is not a multiple of 2 process(es) x --accum 1: start another number of processes"
    assert words in fails(capsys, train.main, ["--data", folder, "--resume", "--epochs", "2"])


def test_only_a_restarted_process_of_the_same_launch_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default: the same each time
    mine = train.this_launch()
    for name, launch in (("old", f"none-{os.getppid() + 1}"), ("mine", mine), ("early", mine)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"launch": launch}))
        if name != "early":
            (tmp_path / name / "checkpoint.pt").touch()
    assert not train.restarted(tmp_path / "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.restarted(tmp_path / "mine")
    assert not train.restarted(tmp_path / "old") and not train.restarted(tmp_path / "early")
