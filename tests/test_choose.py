"""appendix/choose.py: its t and its gain against NumPy, what is read of the labels, the command."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, copy_as, fails, write_folder
from PIL import Image

import data
import diffusion
import model as M
import probe
import train
from appendix import choose

CPU, TIMES = torch.device("cpu"), choose.TIMES
KEYS = {"t", "snr", "right", "wrong", "gain", "gain_low", "gain_high"}


def tiny_dier():
    """DiER on 8 x 8 pixels with all its layers open, as after training."""
    torch.manual_seed(0)
    net = M.DiER(M.ModelConfig(8, 1, 2, 16, 2, 2, 8, 1, (1, 2), (4,), 2, dropout=0.0))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


def pixels(n, side=8):
    """uint8 noise (n, 1, side, side)."""
    return np.random.default_rng(n).integers(0, 256, (n, 1, side, side), np.uint8)


# ---------------------------------------------------------------------------- t and gain


def high_power(image):
    """Power of an image (S, S) above half the Nyquist frequency: a plain DFT."""
    side, high = len(image), 0.0
    place = np.arange(side)
    for a in range(side):
        for b in range(side):
            wave = np.exp(-2j * np.pi * (a * place[:, None] + b * place) / side)
            if max(min(a, side - a), min(b, side - b)) / side > 0.25:
                high += abs((image * wave).sum()) ** 2 / side**2
    return high


@pytest.mark.parametrize("side", [6, 8, 9])
def test_the_fine_power_of_images_is_1_for_noise_and_a_plain_dft_for_the_rest(side):
    torch.manual_seed(0)
    x0 = torch.randn(4, 2, side, side)
    powers = [high_power(channel) for image in x0.numpy() for channel in image]
    distance = np.minimum(np.arange(side), side - np.arange(side))
    coefficients = (np.maximum.outer(distance, distance) > side / 4).sum()
    assert choose.fine_power(x0) == pytest.approx(np.mean(powers) / coefficients, rel=1e-5)
    assert choose.fine_power(torch.randn(500, 1, 16, 16)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("power", [0.003, 0.03, 0.8])
def test_t_is_where_noise_and_fine_detail_are_even(power):
    betas, abar, want = np.linspace(1e-4, 0.02, 1000), 1.0, []
    for beta in betas:
        abar *= 1 - beta
        want.append(power * abar / (1 - abar))
    assert np.allclose(choose.snr(power), want, rtol=1e-6)
    t = choose.even_t(power)
    assert want[t - 1] > 1 > want[t + 1] and 0 < t < 300
    assert choose.even_t(1e-9) == 0 and choose.even_t(1e9) == 999


@pytest.mark.parametrize("t", [0, 400, 999])
def test_a_row_against_one_image_at_a_time(t, monkeypatch):
    monkeypatch.setattr(choose, "BLOCK", 4)
    net, abar = tiny_dier(), diffusion.alphas_cumprod().float()
    x0 = data.to_float(torch.from_numpy(pixels(10)))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    got = choose.measure(net, x0, t, abar)
    right, wrong, when = [], [], torch.tensor([t])
    with torch.no_grad():
        v = [net.encoder(image[None], when) for image in x0]
        for i in range(10):
            x_t = abar[t].sqrt() * x0[i] + (1 - abar[t]).sqrt() * eps[i]
            for errors, k in ((right, i), (wrong, i - 1)):
                guess = net.dit(x_t[None], when, v[k])[0]
                errors.append((guess - eps[i]).square().mean().item())
    gain = np.array(wrong) - right
    half = 1.96 * gain.std(ddof=1) / math.sqrt(10)
    want = {"t": t, "right": np.mean(right), "wrong": np.mean(wrong), "gain": gain.mean()}
    want |= {"gain_low": gain.mean() - half, "gain_high": gain.mean() + half}
    assert got == pytest.approx(want, rel=1e-3, abs=1e-5)
    assert got.keys() == KEYS - {"snr"} and abs(gain.mean()) > 1e-3


def test_the_sample_of_images_is_shuffled_and_the_same_each_time():
    images = np.arange(500)[:, None, None, None]
    split = data.Split(images, np.repeat(np.arange(5), 100), None, list("abcde"))
    a, b = (choose.pick_images(split, 50).ravel() for _ in range(2))
    assert np.array_equal(a, b) and len(set(a)) == 50
    neighbours = split.labels[a] == split.labels[np.roll(a, 1)]
    assert neighbours.mean() < 0.5  # sorted by class they would be of one class
    assert len(choose.pick_images(split, 1000)) == 500


# ---------------------------------------------------------------------------- with few labels


def test_the_accuracy_of_ridge_against_numpy():
    generator = torch.Generator().manual_seed(0)
    y, y_test = torch.arange(60) % 3, torch.arange(90) % 3
    x, x_test = (
        torch.eye(3)[labels] @ torch.full((3, 5), 0.5).triu()
        + torch.randn(len(labels), 5, generator=generator)
        for labels in (y, y_test)
    )
    onehot = np.eye(3)[y] - 1 / 3
    stacked = np.vstack([x.numpy(), 10 * np.eye(5)])  # the penalty of 100 as rows of zero targets
    w = np.linalg.lstsq(stacked, np.vstack([onehot, np.zeros((5, 3))]), rcond=None)[0]
    assert np.allclose(probe.ridge(x, torch.from_numpy(onehot).float()), w, atol=1e-5)
    want = 100 * ((x_test.numpy() @ w).argmax(1) == y_test.numpy()).mean()
    got = choose.accuracy(x, x_test, y, y_test, 3)
    assert got == pytest.approx(want) and 40 < got < 100


def test_few_labels_are_drawn_anew_equal_over_classes_and_one_inside_the_other():
    labels = np.repeat([0, 1, 2], [9, 40, 300])
    each, draws = choose.draw_few(labels)
    assert each == [1, 5] and len(draws) == 5
    for draw in draws:
        assert draw.shape == (3, 5) and len(set(draw.ravel())) == 15
        assert np.array_equal(labels[draw], np.repeat([[0], [1], [2]], 5, 1))
    assert len({tuple(draw[:, 0]) for draw in draws}) == 5
    assert choose.draw_few(np.repeat([0, 1], 100))[0] == [1, 5, 10, 100]
    assert choose.draw_few(np.array([0, 1]))[0] == [1]


def test_few_labels_against_a_plain_classifier_of_each_draw():
    """With so many pixels over so few images, ridge is as good in its dual form."""
    rng, splits = np.random.default_rng(0), []
    for n in (120, 90):
        labels = rng.permutation(n) % 3
        images = rng.integers(0, 200, (n, 1, 8, 8), np.uint8)
        images[np.arange(n), 0, labels] += 40  # a hint of the class in a row of its own
        splits.append(data.Split(images, labels, None, list("abc")))
    net = tiny_dier()
    settings = {"seed": 0, "size": 8, "channels": 1, "patch": 2, "hidden": 16, "depth": 2}
    settings |= {"heads": 2, "base": 8, "blocks": 1, "mult": (1, 2), "attention": (4,)}
    settings |= {"enc_heads": 2, "dropout": 0.0}
    rows = choose.few_labels(net, settings, splits, 300, CPU)
    each, draws = choose.draw_few(splits[0].labels)
    pool = np.unique(draws)
    encoders = {"v": net.encoder, "random": probe.untrained_encoder(settings, random=True)}
    features = {
        kind: [probe.encode(encoder, s.images, 300, CPU, "") for s in splits]
        for kind, encoder in encoders.items()
    }
    features["pixels"] = [data.to_float(torch.from_numpy(s.images)).flatten(1) for s in splits]
    for kind, (x, x_test) in features.items():
        x, x_test = x.double().numpy(), x_test.double().numpy()
        mean, std = x[pool].mean(0), x[pool].std(0)
        x, x_test = (x - mean) / std, (x_test - mean) / std
        for n in each:
            row = next(row for row in rows if (row["features"], row["each"]) == (kind, n))
            for draw, got in zip(draws, row["draws"], strict=True):
                own = draw[:, :n].ravel()
                y = np.eye(3)[splits[0].labels[own]] - 1 / 3
                dual = np.linalg.solve(x[own] @ x[own].T + 100 * np.eye(len(own)), y)
                guess = (x_test @ x[own].T @ dual).argmax(1)
                assert got == pytest.approx(100 * (guess == splits[1].labels).mean(), abs=1.2)
    means = [row["accuracy"] for row in rows if row["features"] == "pixels"]
    assert means[-1] > means[0] + 5


# ---------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Sets with and without classes and a short run on each."""
    root = tmp_path_factory.mktemp("once")
    write_folder(root / "set")
    (root / "flat").mkdir()
    for i, path in enumerate((root / "set/train").rglob("*.png")):
        shutil.copy(path, root / f"flat/{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("flat", "set"):  # the newest is that with classes
            train.main(["--data", name, *TINY, "--epochs", "4"])
    return root


@pytest.fixture
def trained(once, tmp_path, monkeypatch):
    """The folder of the run with classes, in a current directory of the test's own."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choose, "TIMES", [0, 300, 999])
    return train.RUNS / "set"


def run(*args):
    """choose.main on the CPU."""
    choose.main(["--device", "cpu", *args])


def test_the_table_the_choice_and_the_next_command(trained, capsys):
    run()
    out = capsys.readouterr().out
    result = json.loads((trained / "choose.json").read_text())
    rows = result["rows"]
    assert [row["t"] for row in rows] == [0, 300, 999] and set(rows[0]) == KEYS
    x0 = data.to_float(torch.from_numpy(data.load("set", 8, 3, Path("data"))[0].images))
    power, t = choose.fine_power(x0), result["chosen_t"]
    assert result["power"] == pytest.approx(power) and t == choose.even_t(power)
    assert [row["snr"] for row in rows] == choose.snr(result["power"])[[0, 300, 999]].tolist()
    assert (result["name"], result["data"], result["images"]) == ("set", "set", 40)
    sources = ("step", "command", "commit", "versions", "machine")
    assert all(key in choose.__doc__ for key in [*result, *rows[0]] if key not in sources)
    table = [line.split() for line in out.splitlines()]
    shown = [(line[0], line[4]) for line in table if len(line) == 6 and line[0].isdigit()]
    assert shown == [(str(row["t"]), f"{row['gain']:.4f}") for row in rows]
    last = f"t = {t}: noise and fine detail are even; next: python probe.py --t {t} --device cpu"
    assert out.endswith(f"\n{last}\n")
    assert {path.name for path in trained.glob("*.json")} == {"config.json", "choose.json"}
    assert {0, 999} <= set(TIMES) <= set(range(1000)) and len(TIMES) == 20


def test_flat_images_are_not_said_to_be_even_with_the_noise(trained, capsys):
    for path in Path("set/train").rglob("*.png"):
        Image.new("L", (8, 8), 90).save(path)
    run()
    assert "\nt = 0: fine detail is below the noise; next: " in capsys.readouterr().out


def test_the_next_command_repeats_what_was_typed(trained, capsys):
    write_folder(Path("other/a set"), per_class=6)
    run("--data", "other/a set", "--name", "set", "--data-dir", "data")
    command = capsys.readouterr().out.splitlines()[-1].partition("; next: ")[2]
    flags = "--name set --data 'other/a set' --data-dir data --device cpu"
    assert command.startswith("python probe.py --t ") and command.endswith(flags)
    assert (trained / f"choose-data-{probe.file_word('other/a set')}.json").exists()


def test_no_label_is_read_without_a_flag_that_needs_it(trained, monkeypatch):
    class Poisoned(data.Split):
        @property
        def labels(self):
            raise AssertionError("a label was read")

        @labels.setter
        def labels(self, value):
            pass

    def load(*args):
        splits = data.load(*args)
        return tuple(Poisoned(s.images, s.labels, s.groups, s.class_names) for s in splits)

    monkeypatch.setattr(choose, "load", load)
    run()
    with pytest.raises(AssertionError, match="a label was read"):
        run("--few")


def test_few_labels_beside_pixels_and_a_random_encoder(trained, monkeypatch, capsys):
    monkeypatch.setattr(choose, "TESTED", 30)
    run("--few")
    result = json.loads((trained / "few.json").read_text())
    assert (
        result["images"] == 30 and json.loads((trained / "choose.json").read_text())["images"] == 40
    )
    rows = result["rows"]
    order = [(kind, n) for kind in ("v", "random", "pixels") for n in (1, 5, 10)]
    assert [(row["features"], row["each"]) for row in rows] == order  # of 20 images a class
    for row in rows:
        assert row.keys() == {"features", "each", "accuracy", "std", "draws"}
        assert row["accuracy"] == pytest.approx(np.mean(row["draws"])) and len(row["draws"]) == 5
        assert row["std"] == pytest.approx(np.std(row["draws"], ddof=1))
    assert rows[-1]["accuracy"] == 100  # a class is bright in its own quarter
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines()]
    start = table.index(["labelled", "images", "a", "class", "1", "5", "10"]) + 1
    names = [line[0] for line in table[start : start + 3]]
    assert names == [f"v_{result['chosen_t']}", "random", "pixels"]


def test_a_folder_without_labels_gets_a_t_and_an_export(trained, capsys):
    run("--name", "flat")
    *_, last = capsys.readouterr().out.splitlines()
    t = json.loads((train.RUNS / "flat/choose.json").read_text())["chosen_t"]
    command = "python -m appendix.choose --name flat --device cpu --export v.npz"
    assert last == f"t = {t}: noise and fine detail are even; next: {command}"
    choose.main(command.split()[3:])
    assert f"saved: v.npz\nt = {t}: noise and fine detail are even\n" in capsys.readouterr().out
    model, _ = train.load_model(train.RUNS / "flat")
    splits = data.load("flat", 8, 3, Path("data"))
    with np.load("v.npz") as file:
        assert set(file) == {f"x_train_{t}", f"x_test_{t}"}
        for split, kind in zip(splits, ("train", "test")):
            want = probe.encode(model.encoder, split.images, t, CPU, "")
            np.testing.assert_allclose(file[f"x_{kind}_{t}"], want.numpy(), atol=1e-3)
    run("--export", "new/v.npz")
    with np.load("new/v.npz") as file:
        assert {"y_train", "y_test"} < set(file)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--name", "flat", "--few"], "flat has no classes, and --few needs two: lay it out as"),
        (["--name", "none"], "no checkpoint in runs/none"),
        (["--name", "mae"], "runs/mae is a run of mae: see appendix.baselines"),
        (["--export", "new/"], "argument --export: 'new/' names no file"),
        (["--export", "set"], "argument --export: 'set' names no file: give one"),
        (["--data", "one"], "one has one test image, and the v of another needs two"),
        (["--data", "nowhere"], "'nowhere' is no folder of images"),
        (["--t", "400"], "unrecognized arguments: --t 400; --help lists the flags"),
    ],
)
def test_bad_input_is_one_line(trained, flags, words, monkeypatch, capsys):
    write_folder(Path("one"), per_class=1, classes=1)
    copy_as("mae", trained, train.RUNS / "mae")
    monkeypatch.setattr(choose, "measure", None)  # a call would be an error of another kind
    assert words in fails(capsys, run, *flags)
    assert not list(train.RUNS.glob("*/choose*.json"))


def test_two_lines_open_an_export_for_scikit_learn(trained):
    """Those of README.md; `fit(X, y)` takes NumPy arrays (N, V) and (N,)."""
    said = (ROOT / "README.md").read_text()
    lines = re.findall(r"`((?:v|X, y) = [^`]*v[^`]*)`", said)
    assert len(lines) == 2
    probe.main(["--t", "400", "--epochs", "1", "--device", "cpu", "--export", "v.npz"])
    names = {"numpy": np}
    exec("\n".join(lines), names)
    X, y = names["X"], names["y"]
    assert isinstance(X, np.ndarray) and isinstance(y, np.ndarray)
    assert X.shape == (40, 1024) and X.dtype == np.float16 and np.isfinite(X).all()
    assert y.shape == (40,) and y.dtype == np.int64 and set(y) == {0, 1}
