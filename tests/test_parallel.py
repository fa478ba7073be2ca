"""Two processes by torchrun and gloo: the same curve as one, and an end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, script, write_folder

from parallel import World, agree, restarted_run

FLAGS = ["--device", "cpu", *TINY, "--batch-size", "16", "--dropout", "0", "--amp", "off"]


def torchrun(*args, cwd, processes=2, launch=(), wait=True):
    """Start a script under torchrun, as a user would, on one thread a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", *launch, "--", str(ROOT / args[0]), *args[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if not wait:
        return started
    out, err = started.communicate(timeout=120)
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def alone(*args, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True)


def log(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_parts_of_a_batch_cover_it_once():
    parts = [World(rank, 4).part(12) for rank in range(4)]
    assert sorted(i for p in parts for i in range(12)[p]) == list(range(12))
    assert agree(World(), 3, True, False) == [True, False]


@pytest.mark.slow  # half a minute: four starts of processes
def test_two_processes_learn_what_one_learns_and_runs_pass_between_them(tmp_path):
    write_folder(tmp_path / "set", per_class=24)
    one = [*FLAGS, "--data", "set", "--epochs", "7", "--run"]  # 21 steps
    alone(*one, "one", cwd=tmp_path)
    done = torchrun("train.py", *one, "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images seen") == 1  # one process speaks
    a, b = log(tmp_path / "runs/one"), log(tmp_path / "runs/two")
    assert len(a) == len(b) == 20
    for x, y in zip(a, b):
        assert x["step"] == y["step"] and x["images"] == y["images"]
        assert y["loss"] == pytest.approx(x["loss"], abs=1e-4)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-2, abs=1e-4)
        for u, v in zip(x["loss_by_t"], y["loss_by_t"]):  # each image counted once
            assert (u is None) == (v is None) and (u is None or v == pytest.approx(u, abs=1e-4))
    assert sorted(p.name for p in (tmp_path / "runs/two").iterdir()) == [
        "checkpoint.pt", "config.json", "log.jsonl", "preview.png",
    ]  # fmt: skip
    # a run of one process goes on with two, which save at every agreement, and the reverse
    often = write_script(tmp_path, -1.0)
    more = ["train.py", "--device", "cpu", "--amp", "off", "--resume", "--epochs", "17", "--run"]
    done = torchrun(often, *more[1:], "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone(*more[1:], "two", cwd=tmp_path)
    a, b = (log(tmp_path / f"runs/{name}")[-1] for name in ("one", "two"))
    assert a["step"] == b["step"] == 50  # the window began before the resumption, at step 21
    assert a["loss"] == pytest.approx(b["loss"], abs=3e-4)
    for x, y in zip(a["loss_by_t"], b["loss_by_t"]):
        assert x == pytest.approx(y, abs=1e-3)
    states = [
        torch.load(tmp_path / f"runs/{n}/checkpoint.pt", weights_only=True) for n in ("one", "two")
    ]
    assert states[0]["step"] == states[1]["step"] == 51
    for key, value in states[0]["model"].items():
        assert torch.allclose(value, states[1]["model"][key], atol=2e-3), key


def test_a_batch_that_cannot_be_shared_is_one_clear_line(tmp_path):
    write_folder(tmp_path / "set")
    flags = ["--device", "cpu", *TINY, "--data", "set", "--batch-size", "9", "--accum", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--batch-size 9 is not a multiple of 1 process(es) x --accum 2; use 10" in done.stderr


def write_script(tmp_path, seconds):
    """train.py, but with a checkpoint every so many seconds, and its process id in a file."""
    path = tmp_path / "train_often.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, train\n"
        "open(f'pid-{os.environ[\"RANK\"]}-{os.environ[\"TORCHELASTIC_RESTART_COUNT\"]}', 'w')"
        ".write(str(os.getpid()))\n"
        f"train.SAVE_SECONDS = {seconds}\ntrain.run_main(train.main)\n"
    )
    return str(path)


def kill_one(tmp_path, launch=()):
    """Start two processes that save every 0.3 s, and kill rank 1 after the first checkpoint."""
    write_folder(tmp_path / "set", per_class=24)
    often = write_script(tmp_path, 0.3)
    flags = [*FLAGS, "--data", "set", "--epochs", "200"]  # 600 steps
    started = torchrun(often, *flags, cwd=tmp_path, launch=launch, wait=False)
    path, until = tmp_path / "runs/set/checkpoint.pt", time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert path.exists()
    os.kill(int((tmp_path / "pid-1-0").read_text()), signal.SIGKILL)
    out, err = started.communicate(timeout=100)
    return started.returncode, out, err


def test_a_killed_process_ends_the_others_with_one_line(tmp_path):
    code, _, err = kill_one(tmp_path)
    assert code != 0
    ours = [line for line in err.splitlines() if "another process ended" in line]
    assert len(ours) == 1 and "rank 0" in ours[0] and "runs/set/checkpoint.pt" in ours[0]
    assert not re.search("Traceback.*train.py", err.split("another process ended")[0], re.DOTALL)
    steps = [row["step"] for row in log(tmp_path / "runs/set")]
    assert steps[-1] < 600
    checkpoint = torch.load(tmp_path / "runs/set/checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["step"] < 600


@pytest.mark.slow
def test_with_a_restart_training_goes_on_by_itself(tmp_path):
    code, out, err = kill_one(tmp_path, launch=["--max-restarts=1"])
    assert code == 0, err
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["set"]  # not a second run
    steps = [row["step"] for row in log(tmp_path / "runs/set")]
    assert steps == sorted(set(steps)) and steps[-1] == 600 and "600 steps" in out
    assert (tmp_path / "pid-0-1").exists()


def test_only_a_restarted_process_looks_for_a_run(tmp_path, monkeypatch):
    for name, launch in (("old", "a"), ("mine", "b"), ("early", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"launch": launch}))
        if name != "early":
            (tmp_path / name / "checkpoint.pt").touch()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    assert restarted_run(tmp_path.glob("*")) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted_run(tmp_path.glob("*")) == tmp_path / "mine"
    assert restarted_run([tmp_path / "old"]) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "c")
    assert restarted_run(tmp_path.glob("*")) is None


@pytest.mark.slow
def test_the_probe_encodes_in_parallel_with_the_same_result(tmp_path):
    write_folder(tmp_path / "set", per_class=24)
    alone(*FLAGS, "--data", "set", "--epochs", "6", cwd=tmp_path)
    flags = ["--device", "cpu", "--t", "0,400", "--epochs", "5"]
    path = tmp_path / "runs/set/probe-epochs5.json"
    results = []
    for run in (
        lambda: torchrun("probe.py", *flags, cwd=tmp_path),
        lambda: script("probe.py", *flags, cwd=tmp_path),
    ):  # fmt: skip
        done = run()
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("chosen t") == 1
        results.append(json.loads(path.read_text()))
        path.unlink()
    assert results[0] == results[1]
