"""What tests share: a set of tiny images, the smallest model that trains on it in a second, a run
as a user starts it, the one line of an error, a full disk."""

import gc
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# 8 x 8 pixels, 16 tokens, an encoder of two levels
TINY = "--size 8 --patch 2 --hidden 16 --depth 1 --heads 2 --base 8 --mult 1 2 --attention 4"
TINY = [*TINY.split(), "--enc-heads", "2", "--blocks", "1", "--device", "cpu", "--amp", "off"]


def write_folder(folder: Path, per_class: int = 20, classes: int = 2) -> Path:
    """train/CLASS/*.png and test/CLASS/*.png: class k is bright in its own quarter."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k in range(classes):
            (folder / split / f"class{k}").mkdir(parents=True)
            for i in range(per_class):
                image = rng.integers(0, 60, (8, 8))
                image[4 * (k % 2) :][:4, 4 * (k // 2) :][:, :4] += 150
                name = folder / split / f"class{k}" / f"{i:02}.png"
                Image.fromarray(image.astype(np.uint8)).save(name)
    return folder


def copy_as(method: str, run: Path, to: Path) -> None:
    """Copy a run and call it one of another method."""
    shutil.copytree(run, to)
    saved = torch.load(to / "checkpoint.pt", weights_only=True)
    saved["settings"]["method"] = method
    torch.save(saved, to / "checkpoint.pt")
    (to / "config.json").write_text(json.dumps(saved["settings"]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of images named `set` in an empty current directory."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "set")
    return "set"


def script(*args: str, cwd: Path, **kw) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would, on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / args[0]), *args[1:]]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, **kw)


def fails(capsys, function, *args) -> str:
    """The one line with which a command ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1, error
    return error


@contextmanager
def full_disk(size):
    """No file grows beyond `size` bytes, as on a full disk."""
    import resource  # Unix alone has it

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors gain nothing from threads, and results must not depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def frozen_imports():
    """Python's collector passes over what was imported before the first test: all of torch."""
    gc.freeze()
