"""probe.py: the heads against a plain loop, the honest choice of t, the floors, the files."""

import hashlib
import json
import math
import os
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, copy_as, fails, write_folder
from PIL import Image
from torch import nn

import data
import model as M
import probe
import train
from appendix import choose

CPU = torch.device("cpu")
PROTOCOL = {"classes": 4, "epochs": 30, "lr": 1e-2, "norm": "std"}


def blobs(n, seed=0, noise=0.1, classes=4, width=16):
    """Features (N, V) and labels (N,): a corner for each class, Gaussian noise around it."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return noise * torch.randn(n, width, generator=generator) + 3 * F.one_hot(y, width), y


def evaluate(train_set, test_set, **change):
    """probe.evaluate on two pairs of features and labels, in the folds of the program."""
    (x, y), (x_test, y_test) = train_set, test_set
    folds = torch.from_numpy(probe.make_folds(len(y), None))
    return probe.evaluate(x, x_test, [y, y_test], folds, {**PROTOCOL, **change})


# ---------------------------------------------------------------------------- features


@pytest.mark.parametrize("amp, tolerance", [("off", 1e-3), ("bf16", 3e-2)])
def test_encoding_uses_eval_mode_and_leaves_the_weights_alone(amp, tolerance, monkeypatch):
    monkeypatch.setattr(probe, "pick_amp", lambda name, device: amp)
    torch.manual_seed(0)
    encoder = M.Encoder(M.ModelConfig(8, 1, 4, 16, 1, 2, 8, 1, (1, 2), (4,), 2, dropout=0.5))
    for layer in encoder.train().zero_initialised():
        layer.reset_parameters()
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    images = np.random.default_rng(0).integers(0, 256, (probe.BLOCK + 50, 1, 8, 8), dtype=np.uint8)
    images.flags.writeable = False  # as a memory-mapped cache is
    shown = []

    def progress(items, what, total, unit, done):
        for item in items:
            yield item
            shown.append(f"{done()} of {total}")

    monkeypatch.setattr(probe, "progress", progress)
    v_0, again, v_999 = (probe.encode(encoder, images, t, CPU, "") for t in (0, 0, 999))
    assert shown == 3 * ["250 of 300", "300 of 300"]
    assert v_0.shape == (300, 1024) and v_0.dtype == torch.half and not v_0.requires_grad
    assert torch.equal(v_0, again) and not torch.allclose(v_0, v_999) and not encoder.training
    alone = encoder(data.to_float(torch.from_numpy(images[299:].copy())), torch.tensor([999]))
    assert torch.allclose(v_999[299].float(), alone[0], atol=tolerance)
    assert all(torch.equal(p, before[name]) for name, p in encoder.state_dict().items())


def test_raw_pixels_are_averaged_to_32():
    image = np.zeros((1, 1, 64, 64), np.uint8)
    image[0, 0, 0, 0:2] = 255
    x = probe.encode(probe.Pixels(), image, 0, CPU, "")
    assert x.shape == (1, 1024) and x.dtype == torch.half
    assert x[0, 0] == pytest.approx(0.0, abs=1e-3) and x[0, 1] == -1
    small = np.random.default_rng(0).integers(0, 256, (300, 3, 16, 16), np.uint8)
    x = probe.encode(probe.Pixels(), small, 0, CPU, "")
    assert torch.equal(x, data.to_float(torch.from_numpy(small)).flatten(1).half())


def test_standardising_uses_the_training_set_alone():
    torch.manual_seed(0)
    x, x_test = torch.randn(5000, 4) * 0.02 + 5, torch.randn(50, 4)
    x[:, 2] = 1.0  # constant
    x[:, 3] = 0.0
    x[0, 3], x_test[0, 3] = 1e-3, 50  # nearly constant: 50 would be beyond half precision
    got, got_test = probe.standardise(x.half(), x_test.half())
    assert got.dtype == got_test.dtype == torch.half
    assert got.float().mean(0).abs().max() < 1e-3 and not got[:, 2].any()
    assert torch.allclose(got.float().std(0)[:2], torch.ones(2), atol=0.01)
    y = x.half().double()[:, 0]
    want = (x_test.half().double()[:, 0] - y.mean()) / y.std(correction=0)
    assert torch.allclose(got_test[:, 0].double(), want, rtol=1e-3)
    assert torch.isfinite(got_test).all() and got_test[0, 3] > 6e4
    few = torch.arange(4.0)[:, None]  # by N, as batch norm does, and not by N - 1
    assert probe.standardise(few, few)[0][3].item() == pytest.approx(1.5 / 1.25**0.5, rel=1e-3)


def test_half_precision_changes_no_accuracy_by_more_than_a_third_of_a_point():
    """Overlapping classes, and features with the small spread off zero that v has."""
    pairs = [blobs(n, seed, noise=2.0) for n, seed in ((2000, 5), (2000, 6))]
    results = []
    for dtype in (torch.float32, torch.half):
        x, x_test = ((0.3 + 0.02 * features).to(dtype) for features, _ in pairs)
        if dtype == torch.half:
            x, x_test = probe.standardise(x, x_test)
        else:
            mean, std = x.mean(0), x.std(0, correction=0)
            x, x_test = (x - mean) / std, (x_test - mean) / std
        results.append(evaluate((x, pairs[0][1]), (x_test, pairs[1][1]), epochs=10))
    assert 60 < results[0]["top1"] < 99 and abs(results[0]["top1"] - results[1]["top1"]) <= 0.3


# ---------------------------------------------------------------------------- heads


def test_separable_features_reach_100_and_labels_without_a_pattern_chance():
    row = evaluate(blobs(400), blobs(200, seed=1))
    assert row == {"top1": 100, "top5": None, "held_out": 100}
    ten = [blobs(n, seed, classes=10, width=40) for n, seed in ((400, 0), (200, 1))]
    assert evaluate(*ten, classes=10) == row  # top-5 begins with eleven
    generator = torch.Generator().manual_seed(0)
    x, x_test = torch.randn(2, 1000, 16, generator=generator)
    y = torch.arange(1000) % 4
    row = evaluate((x, y), (x_test, y))  # 25, give or take 1.4
    assert 20 < row["top1"] < 30 and 20 < row["held_out"] < 30


@pytest.mark.parametrize("epochs", [20, 3])
def test_heads_equal_a_plain_loop(epochs, monkeypatch):
    """Each head alone: its own AdamW, its own mean over the images that it may see."""
    monkeypatch.setattr(probe, "BATCH", 32)
    x, y = blobs(100, seed=3)  # three batches of 32; four images of each permutation are left out
    folds = torch.arange(100) % 4 - 1  # -1 is never held out
    layer = probe.train_heads(x, y, folds, 4, epochs, 5e-3)
    generator = torch.Generator().manual_seed(data.mix_seed(0, 2))
    start = 0.01 * torch.randn(16, 16, generator=generator)
    orders = [torch.randperm(100, generator=generator) for _ in range(epochs)]
    total, warmup = 3 * epochs, 3 * epochs // 10
    for head in range(4):
        mine = slice(4 * head, 4 * head + 4)
        weight, bias = start[mine].clone().requires_grad_(), torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, bias], weight_decay=0.05)
        for step in range(total):
            index = orders[step // 3][step % 3 * 32 :][:32]
            rise, fall = (step + 1) / max(1, warmup), (total - step) / (total - warmup)
            optimizer.param_groups[0]["lr"] = 5e-3 * (rise if step < warmup else fall)
            seen = index[(folds[index] != head - 1) | (head == 0)]
            optimizer.zero_grad()
            F.cross_entropy(x[seen] @ weight.T + bias, y[seen]).backward()
            optimizer.step()
        assert torch.allclose(layer.weight[mine], weight, atol=5e-5)
        assert torch.allclose(layer.bias[mine], bias, atol=5e-5)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [probe.learning_rate(i, 100, 10, 2.0) for i in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and max(rates) == 2.0
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.03
    assert [probe.learning_rate(i, 4, 0, 4.0) for i in range(4)] == [4, 3, 2, 1]  # no warm-up


def test_heads_on_few_images_have_as_many_updates_as_on_the_papers_smallest_set():
    assert [probe.head_epochs(n) for n in (60_000, 10_000, 9_957, 9_728)] == [100] * 4
    assert [probe.head_epochs(n) for n in (9_727, 880, 202, 2)] == [103, 1267, 3800, 3800]


def test_top1_and_top5_of_head_0_and_held_out_of_the_head_that_did_not_see(monkeypatch):
    """Heads that always rank their classes alike: of twelve, head h prefers class h, h + 1, ..."""
    y, folds = torch.arange(24) % 12, torch.arange(24) % 2
    layer = nn.Linear(3, 36)
    scores = [[-((k - h) % 12) for k in range(12)] for h in range(3)]
    nn.init.zeros_(layer.weight)
    layer.bias.data = torch.tensor(scores).float().flatten()
    monkeypatch.setattr(probe, "train_heads", lambda *args: layer.requires_grad_(False))
    x, y_test = torch.zeros(24, 3), torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    row = probe.evaluate(x, x[:8], [y, y_test], folds, {**PROTOCOL, "classes": 12})
    assert row["top1"] == 25 and row["top5"] == 75
    # Fold 0 has the even labels and is guessed as 1, fold 1 the odd ones, guessed as 2.
    assert row["held_out"] == 0
    layer.bias.data = torch.tensor([scores[0], scores[2], scores[1]]).float().flatten()
    row = probe.evaluate(x, x[:8], [y, y_test], folds, {**PROTOCOL, "classes": 12})
    assert row["held_out"] == pytest.approx(100 / 6)
    layer.bias.data = torch.tensor([scores[0], scores[2], scores[2]]).float().flatten()
    row = probe.evaluate(x, x[:8], [y, y_test], folds, {**PROTOCOL, "classes": 12})
    assert row["held_out"] == pytest.approx(100 / 12)  # both folds count


def test_folds_keep_groups_together_and_hold_everything_out_once(capsys):
    groups = np.random.default_rng(0).integers(0, 60, 1000)
    folds = probe.make_folds(1000, groups)
    assert set(folds) == set(range(5))
    assert all(len(set(folds[groups == g])) == 1 for g in set(groups))
    alone = probe.make_folds(1000, None)
    assert np.bincount(alone).tolist() == [200] * 5
    assert set(probe.make_folds(probe.FEW - 1, None)) == set(range(5))
    assert "of one group" in fails(capsys, probe.make_folds, 60, np.zeros(60))
    many = probe.make_folds(probe.FEW, np.arange(probe.FEW) // 4)
    assert set(many) == {-1, 0} and 0.08 < (many == 0).mean() < 0.12
    assert all(len(set(many[i : i + 4])) == 1 for i in range(0, probe.FEW, 4))


def test_knn_against_numpy():
    rng = np.random.default_rng(0)
    x, x_test = rng.normal(size=(150, 5)), rng.normal(size=(1100, 5))  # more than one block
    y, y_test = rng.integers(0, 3, 150), rng.integers(0, 3, 1100)
    cosine = x_test @ x.T / np.linalg.norm(x_test, axis=1)[:, None] / np.linalg.norm(x, axis=1)
    near = np.argsort(-cosine, axis=1)
    for n in (150, 12):  # with 12 images all of them vote
        kept = [row[row < n][:20] for row in near]
        votes = [np.bincount(y[row], minlength=3).argmax() for row in kept]
        stored = [torch.from_numpy(part).float() for part in (x[:n], x_test)]
        labels = [torch.from_numpy(part) for part in (y[:n], y_test)]
        assert probe.knn(*stored, labels, 3) == pytest.approx(100 * np.mean(votes == y_test))


def test_wilson_interval():
    low, high = probe.wilson(90.0, 100)  # tabulated: 0.826 to 0.945
    assert low == pytest.approx(82.56, abs=0.02) and high == pytest.approx(94.48, abs=0.02)
    for n in range(1, 200):  # rounding must not print "-0.00 to"
        assert probe.wilson(0.0, n)[0] >= 0 and probe.wilson(100.0, n)[1] <= 100


# ---------------------------------------------------------------------------- the choice of t


class Noisy(nn.Module):
    """Stands for an encoder: pixels under noise whose std depends on t."""

    NOISE = {0: 4.0, 500: 0.5, 900: 0.5, 999: 8.0}

    def forward(self, x0, t):
        return x0.flatten(1) + self.NOISE[int(t[0])] * torch.randn(len(x0), x0[0].numel())


def pictures(n, seed):
    """A Split of n images 4 x 4 in four classes, each bright in a row of its own."""
    images = np.random.default_rng(seed).integers(0, 60, (n, 1, 4, 4), dtype=np.uint8)
    labels = np.arange(n) % 4
    images[np.arange(n), 0, labels] += 150
    return data.Split(images, labels, None, list("abcd"))


def test_t_is_chosen_without_the_test_labels(capsys):
    results = []
    for shift in (0, 1):  # poisoned: with 1 each test label is wrong
        test = pictures(200, 1)
        test.labels = (test.labels + shift) % 4
        torch.manual_seed(0)
        splits = pictures(400, 0), test
        results.append(probe.probe(Noisy(), {}, list(Noisy.NOISE), splits, CPU, PROTOCOL))
    clean, poisoned = results
    assert clean["chosen_t"] == poisoned["chosen_t"] == 500  # the smallest t of equals
    for a, b in zip(clean["rows"], poisoned["rows"]):
        assert a["held_out"] == b["held_out"]
    assert clean["rows"][1]["top1"] > 95 and poisoned["test_top1"] < 5  # the poison did reach it
    assert poisoned["oracle_t"] in (0, 999) and poisoned["oracle_top1"] > 5


def test_each_row_is_printed_before_the_next_t_is_encoded(monkeypatch, capsys):
    real, printed = probe.encode, {}

    def encode(encoder, images, t, device, what):
        printed[what] = printed.get("", "") + capsys.readouterr().out
        printed[""] = printed[what]
        return real(encoder, images, t, device, what)

    monkeypatch.setattr(probe, "encode", encode)
    splits = pictures(60, 0), pictures(20, 1)
    result = probe.probe(Noisy(), {"random": Noisy()}, [0, 500], splits, CPU, PROTOCOL)
    assert printed["train images, v_0"].split() == ["t", "held-out", "top-1", "kNN"]
    assert printed["test images, v_0"] == printed["train images, v_0"]
    *_, row = printed["train images, v_500"].splitlines()
    first = result["rows"][0]
    assert row.split() == ["0", *(f"{first[key]:.2f}" for key in ("held_out", "top1", "knn"))]
    *_, row = printed["train images, random"].splitlines()
    assert row.split()[0] == "500"


class Faint(nn.Module):
    """Stands for an encoder: pixels whose spread is small beside their mean, as v's is."""

    def forward(self, x0, t):
        return 1 + 0.01 * x0.flatten(1)


def test_features_are_standardised_unless_the_norm_is_none(capsys):
    """In few epochs heads reach faint features only when these are standardised; floors too."""
    splits, top1 = (pictures(400, 0), pictures(200, 1)), {}
    for norm in ("std", "none"):
        protocol = {**PROTOCOL, "epochs": 3, "norm": norm}
        found = probe.probe(Faint(), {"random": Faint()}, [0], splits, CPU, protocol)
        top1[norm] = found["rows"][0]["top1"]
        assert found["floors"]["random"] == top1[norm]
    assert top1["std"] > 95 and top1["none"] < 60


class Planted(nn.Module):
    """Stands for an encoder: noise, and the pixels with it the more, the nearer t is to `best`.
    Counts the images that it sees at each t."""

    def __init__(self, best, width=150.0):
        super().__init__()
        self.best, self.width, self.seen = best, width, {}

    def forward(self, x0, t):
        t = int(t[0])
        self.seen[t] = self.seen.get(t, 0) + len(x0)
        noise = torch.randn(x0.flatten(1).shape, generator=torch.Generator().manual_seed(t))
        return 0.3 * noise + math.exp(-(((t - self.best) / self.width) ** 2)) * x0.flatten(1)


@pytest.mark.parametrize("best", [0, 40, 437, 700, 999])
def test_the_search_finds_a_planted_t_and_makes_the_encodings_that_it_says(best, capsys):
    encoder = Planted(best)
    rows = probe.search(encoder, pictures(1000, 0), CPU, 4)
    found = probe.choose(rows, "explained")
    assert abs(found["t"] - best) <= 40 and found["accuracy"] > 90
    assert all(row.keys() == {"t", "images", "accuracy", "explained", "seconds"} for row in rows)
    assert {row["t"]: row["images"] for row in rows} == encoder.seen and len(rows) <= 15
    assert {0, 125, 250, 375, 500, 625, 750, 875, 999} < set(encoder.seen) <= set(range(1000))
    assert set(encoder.seen.values()) == {800}
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert printed == [
        [str(row["t"]), "800", f"{row['accuracy']:.2f}", f"{row['explained']:.4f}"] for row in rows
    ]


@pytest.mark.parametrize("n, used", [(60, 60), (2000, 800), (14_400, 1200), (48_000, 3000)])
def test_the_search_takes_a_twelfth_of_the_training_images(n, used, monkeypatch, capsys):
    monkeypatch.setattr(probe, "STEP", probe.FINEST - 1)  # nothing is tried
    monkeypatch.setattr(probe, "make_folds", lambda n, groups: sizes.append(n) or np.zeros(n))
    sizes = []
    split = data.Split(np.zeros((n, 1, 1, 1), np.uint8), np.arange(n) % 4, None, list("abcd"))
    assert probe.search(Planted(0), split, CPU, 4) == [] and sizes == [used]


class Flat(nn.Module):
    """Stands for an encoder: the pixels at every t."""

    def forward(self, x0, t):
        return x0.flatten(1)


def test_the_search_scores_every_image_by_those_of_other_groups(monkeypatch, capsys):
    """Every group has pixels of its own, so that the features say whose they are."""
    split = pictures(600, 0)
    split.groups = np.arange(600) // 12
    split.images = np.broadcast_to(
        split.groups.astype(np.uint8)[:, None, None, None], (600, 1, 4, 4)
    )
    real, fitted = probe.ridge, []

    def ridge(x, y):
        fitted.append(sorted(x[:, 0].tolist()))
        return real(x, y)

    monkeypatch.setattr(probe, "ridge", ridge)
    monkeypatch.setattr(probe, "standardise", lambda x, test: (x, test))
    probe.search(Flat(), split, CPU, 4)
    assert len(fitted) % 5 == 0
    for values in fitted[:5]:
        counts = np.unique(values, return_counts=True)[1]
        assert set(counts) == {12} and 30 <= len(counts) < 50  # whole groups, a fifth left out
    left_out = [set(range(50)) - {round(127.5 * (v + 1)) for v in values} for values in fitted[:5]]
    assert sorted(group for groups in left_out for group in groups) == list(range(50))


def test_the_search_against_a_plain_cross_validation(monkeypatch, capsys):
    split, encoder = pictures(300, 0), Planted(500)
    row = next(r for r in probe.search(encoder, split, CPU, 4) if r["t"] == 250)
    x = probe.encode(encoder, split.images, 250, CPU, "").double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    y = np.eye(4)[split.labels] - 0.25
    folds, guess = probe.make_folds(300, None), np.empty((300, 4))
    for fold in range(5):
        a, b = x[folds != fold], y[folds != fold]
        guess[folds == fold] = (
            x[folds == fold] @ np.linalg.inv(a.T @ a + 100 * np.eye(16)) @ a.T @ b
        )
    assert row["explained"] == pytest.approx(1 - ((guess - y) ** 2).sum() / (y**2).sum(), abs=1e-3)
    hits = guess.argmax(1) == split.labels
    assert row["accuracy"] == pytest.approx(100 * hits.mean(), abs=0.7)


# ---------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder with a set of two classes and a run of four epochs on it."""
    root = tmp_path_factory.mktemp("once")
    write_folder(root / "set")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train.main(["--data", "set", *TINY, "--epochs", "4"])
    return root


@pytest.fixture
def trained(once, tmp_path, monkeypatch):
    """The folder of the run, in a current directory of the test's own; few images have no more
    epochs of the heads than many."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "UPDATES", 0)
    return train.RUNS / "set"


def run(*args):
    """probe.main on the CPU."""
    probe.main(["--device", "cpu", *args])


def results(folder):
    """The results of the probe in a run's folder, without what differs from call to call:
    {name: text}."""
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("probe*.json")}
    changing = ("command", "machine", "seconds")
    return {
        name: json.dumps({key: value for key, value in result.items() if key not in changing})
        for name, result in found.items()
    }


def test_probe_json_has_what_the_docstring_says(trained, capsys):
    run()
    out = capsys.readouterr().out
    result = json.loads((trained / "probe.json").read_text())
    keys = {"rows", "chosen_t", "test_top1", "oracle_t", "oracle_top1", "floors", "protocol"}
    sources = {"command", "commit", "versions", "machine", "seconds"}
    assert set(result) == keys | sources | {
        "n_train",
        "n_test",
        "name",
        "seed",
        "epochs",
        "training",
    }
    assert set(result["training"]) == sources
    assert (result["seed"], result["epochs"]) == (0, 3 * 64 / 40)
    assert set(result["rows"][0]) == {"t", "top1", "top5", "held_out", "knn"}
    assert set(result["floors"]) == {"pixels", "untrained", "random"}
    assert all(key in probe.__doc__ for part in (result, result["rows"][0]) for key in part)
    times = [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]
    assert [row["t"] for row in result["rows"]] == times == probe.TIMES
    assert result["floors"]["pixels"] == 100 and result["name"] == "set"
    assert result["n_train"] == result["n_test"] == 40 and 0 < result["seconds"] < 300
    assert out.startswith("runs/set, step 3, cpu\n") and "\n   t  held-out   top-1     kNN\n" in out
    protocol = {"data": "set", "limit": 0, "norm": "std", "epochs": 100, "lr": 2e-4}
    assert result["protocol"] == protocol | {"weights": "ema", "classes": 2, "step": 3}
    for words in (
        f"t = {result['chosen_t']} (chosen by held-out training images): test top-1 ",
        f"oracle, the best t on the test set (the paper's protocol): t = {result['oracle_t']}, ",
        "(40 test images)",
        "floors: pixels 100.00, untrained ",
        "100 epochs (a tenth is warm-up, then linear to 0), 40 training images, held-out 5-fold",
    ):
        assert words in out


def test_one_t_is_no_choice_and_epochs_unlike_those_for_few_images_are_another_result(
    trained, monkeypatch, capsys
):
    monkeypatch.setattr(probe, "UPDATES", 5)  # 40 images: an update an epoch
    monkeypatch.setattr(probe, "EPOCHS", 3)
    for flags in ([], ["--epochs", "3"]):
        run("--t", "400", *flags)
        out = capsys.readouterr().out
        assert "t = 400 (given): test top-1 " in out and "95% interval" in out
        assert "oracle" not in out and f"  {3 if flags else 5} epochs (a tenth is warm-up" in out
    assert sorted(results(trained)) == ["probe-t-400-epochs-3.json", "probe-t-400.json"]


def test_t_auto_searches_without_the_test_labels_and_probes_the_t_found(
    trained, monkeypatch, capsys
):
    """While the search runs, a look at a test label is an error."""
    real, read = probe.search, []

    class Poisoned(data.Split):
        @property
        def labels(self):
            read.append(searching)
            return self.hidden

        @labels.setter
        def labels(self, value):
            self.hidden = value

    def load(*args):
        first, second = data.load(*args)
        return first, Poisoned(second.images, second.labels, second.groups, second.class_names)

    def search(*args):
        nonlocal searching
        searching = True
        rows = real(*args)
        searching = False
        return rows

    searching = False
    monkeypatch.setattr(probe, "load", load)
    monkeypatch.setattr(probe, "search", search)
    run("--t", "auto", "--epochs", "2", "--export", "v.npz")
    assert read and not any(read)
    out = capsys.readouterr().out
    result = json.loads((trained / "probe-t-auto-epochs-2.json").read_text())
    t = probe.choose(result["search"], "explained")["t"]
    assert [row["t"] for row in result["rows"]] == [result["chosen_t"]] == [t]
    assert f"t = {t} (found by the search on training images): test top-1 " in out
    assert "oracle" not in out
    images = sum(row["images"] for row in result["search"])
    assert images == 40 * len(result["search"])
    assert f"search: {images:,} images encoded, {images / 880:.1%} of a sweep's 880, in " in out
    assert sum(row["seconds"] for row in result["search"]) < result["seconds"]
    assert all(key in probe.__doc__ for key in ("search", *result["search"][0]))
    with np.load("v.npz") as file:
        assert f"x_train_{t}" in file


WORD = f"other_set-{hashlib.sha256(b'other/set').hexdigest()[:8]}"


def test_each_value_of_a_flag_has_a_name_of_its_own_that_a_file_can_have():
    values = ["p/q", "p_q", "p q", "p", "日" * 30, "日" * 31, "x/" * 200, "x_" * 200, "a\udcff"]
    words = [probe.file_word(value) for value in values]
    assert len(set(words)) == len(values) and words[1] == "p_q"
    assert all("/" not in word and len(os.fsencode(word)) <= 70 for word in words)


def test_no_call_destroys_the_result_of_another(trained, tmp_path):
    write_folder(tmp_path / "other" / "set", per_class=6, classes=3)  # also a transfer
    kept = {}
    for flags, name in [
        ([], "probe-t-400-epochs-2.json"),
        (["--limit", "12", "--norm", "none"], "probe-t-400-limit-12-norm-none-epochs-2.json"),
        (["--weights", "raw", "--lr", "0.001"], "probe-t-400-epochs-2-lr-0.001-weights-raw.json"),
        (["--data", "other/set"], f"probe-t-400-data-{WORD}-epochs-2.json"),
        (["--limit", "0", "--norm", "std", "--lr", "2e-4", "--data", "./set/"], None),  # defaults
    ]:
        run("--t", "400", "--epochs", "2", *flags)
        found = results(trained)
        assert found.keys() - kept.keys() == ({name} if name else set())
        assert kept.items() <= found.items()
        kept = found
    limited = json.loads(kept["probe-t-400-limit-12-norm-none-epochs-2.json"])
    assert limited["n_train"] == limited["n_test"] == 12 and limited["protocol"]["norm"] == "none"
    other = json.loads(kept[f"probe-t-400-data-{WORD}-epochs-2.json"])
    assert other["n_test"] == 18 and other["protocol"]["classes"] == 3


def test_the_rate_of_the_heads_is_twice_that_of_the_papers_training(tmp_path, monkeypatch, capsys):
    """2e-5 for its two sets of 256 pixels, else 2e-4; above ten classes there is a top-5."""
    for name, rate in {"bccd": 2e-5, "oct2017": 2e-5, "mnist": 2e-4, "large": 2e-4}.items():
        assert probe.standard_protocol({"data": name}, 10_000)["lr"] == rate
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "large", per_class=2, classes=11)
    for path in (tmp_path / "large").rglob("*.png"):
        Image.open(path).resize((80, 80)).save(path)
    train.main(["--data", "large", *TINY, "--epochs", "1"])
    capsys.readouterr()
    run("--t", "0", "--epochs", "1")
    result = json.loads((train.RUNS / "large/probe-t-0-epochs-1.json").read_text())
    assert result["protocol"]["lr"] == 2e-4 and result["rows"][0]["top5"] is not None
    assert result["command"] == "python probe.py --device cpu --t 0 --epochs 1"
    out = capsys.readouterr().out
    assert "\n   t  held-out   top-1   top-5     kNN\n" in out and "AdamW lr 0.0002" in out


def test_the_random_floor_opens_the_branches_that_untrained_has_off(trained, monkeypatch):
    handed = {}

    def spy(encoder, floors, *_):
        handed.update(floors)
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "probe", spy)
    with pytest.raises(KeyboardInterrupt):
        run("--t", "400")
    assert list(handed) == ["pixels", "untrained", "random"]
    off, on = handed["untrained"], handed["random"]
    assert all(not layer.weight.any() for layer in off.zero_initialised())
    assert all(layer.weight.all() for layer in on.zero_initialised())
    assert torch.equal(off.stem.weight, on.stem.weight)


def test_export_holds_v_t_as_the_encoder_gives_it(trained, capsys):
    train.Path("set/test/class0/00.png").unlink()
    run("--t", "0,400", "--epochs", "1", "--export", "new/out.npz")
    assert capsys.readouterr().out.endswith(".json, new/out.npz\n")
    model, _ = train.load_model(trained)
    splits = data.load("set", 8, 3, train.Path("data"))
    with np.load("new/out.npz") as file:
        assert set(file) == {
            "x_train_0",
            "x_test_0",
            "x_train_400",
            "x_test_400",
            "y_train",
            "y_test",
        }
        for split, kind in zip(splits, ("train", "test")):
            assert np.array_equal(file[f"y_{kind}"], split.labels)
            for t in (0, 400):
                v = file[f"x_{kind}_{t}"]
                assert v.shape == (len(split.images), 1024) and v.dtype == np.float16
                want = probe.encode(model.encoder, split.images, t, CPU, "")
                np.testing.assert_allclose(v, want.numpy(), atol=1e-3)
    assert [path.name for path in train.Path("new").iterdir()] == ["out.npz"]


def test_two_exports_to_one_name_are_written_apart(trained, monkeypatch):
    names, real = [], zipfile.ZipFile

    def opened(path, mode):
        names.append(path.name)
        return real(path, mode)

    monkeypatch.setattr(zipfile, "ZipFile", opened)
    run("--t", "0", "--epochs", "1", "--export", "v.npz")
    choose.main(["--device", "cpu", "--export", "v.npz"])
    assert len(names) == 2 and all(name.endswith(f"-{os.getpid()}") for name in names)


@pytest.mark.parametrize("where", ["set/train/class0/00.png/out.npz", "set"])
def test_an_export_that_cannot_be_written_is_one_line_before_any_work(
    trained, where, monkeypatch, capsys
):
    monkeypatch.setattr(probe, "encode", None)  # a call would be an error of another kind
    error = fails(capsys, train.guard, lambda: run("--export", where))
    assert where.removesuffix("/out.npz") in error and not results(trained)


def test_the_table_is_printed_before_a_file_that_cannot_be_written(trained, capsys):
    (trained / "probe-t-400-epochs-1.json").mkdir()
    with pytest.raises(SystemExit) as stop:
        train.guard(lambda: run("--t", "400", "--epochs", "1"))
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and "(given): test top-1 " in out and "saved" not in out
    assert len(error.splitlines()) == 1 and "Is a directory" in error


def test_many_times_get_a_short_name_of_their_own(tmp_path):
    lists = (list(range(0, 991, 10)), list(range(0, 992, 10)), list(range(1, 992, 10)))
    names = [probe.result_path(tmp_path, {"t": t}, {"t": probe.TIMES}).name for t in lists]
    assert names[0] == names[1] != names[2] and all(len(name) < 40 for name in names)


def test_large_images_are_encoded_few_at_a_time():
    """As many pixels at once as 250 images of 64 x 64 have, and every image once."""
    seen = []

    def encoder(x0, t):
        seen.append(len(x0))
        return x0.flatten(1)[:, :1]

    for side, n, want in ((64, 300, [250, 50]), (256, 20, [15, 5]), (8, 300, [250, 50])):
        images = (np.arange(n) % 256).astype(np.uint8)[:, None, None, None]
        images = np.broadcast_to(images, (n, 1, side, side))
        module = type("Net", (nn.Module,), {"forward": staticmethod(encoder)})()
        v = probe.encode(module, images, 0, CPU, "v")
        assert seen == want and torch.equal(
            v, probe.to_float(torch.from_numpy(images[:, :, 0, 0].copy())).half()
        )
        seen.clear()


def test_a_collapsed_encoder_reads_chance(tmp_path, monkeypatch, capsys):
    """Equal grey pictures: features are constant, all scores are tied, and a tie is no hit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "UPDATES", 0)
    for name in "abcd":
        (tmp_path / "grey" / name).mkdir(parents=True)
        for k in range(20):
            Image.new("L", (8, 8), 128).save(tmp_path / "grey" / name / f"{k}.png")
    train.main(["--data", "grey", *TINY, "--epochs", "1"])
    run("--t", "0,400")
    result = json.loads((train.RUNS / "grey" / "probe-t-0-400.json").read_text())
    assert result["n_train"] == 64 and result["n_test"] == 16
    for row in result["rows"]:
        assert row["top1"] == row["knn"] == 25 and row["held_out"] < 50
    assert result["floors"] == {"pixels": 25, "untrained": 25, "random": 25}


def test_unlabelled_images_train_and_the_probe_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "set")
    (tmp_path / "flat").mkdir()
    for i, path in enumerate((tmp_path / "set/train").rglob("*.png")):
        path.rename(tmp_path / f"flat/{i}.png")
    train.main(["--data", "./flat/", *TINY, "--epochs", "2"])
    assert train.read_config(train.RUNS / "flat")["data"] == "flat"
    assert capsys.readouterr().out.endswith("; next: python -m appendix.choose\n")
    for flags in ([], ["--t", "auto"]):
        error = fails(capsys, run, *flags)
        assert "flat has no classes, and a probe needs two" in error
        assert "python -m appendix.choose finds a t without them" in error
    assert not results(train.RUNS / "flat")


def test_a_folder_that_cannot_be_written_is_found_before_the_work(trained, tmp_path, monkeypatch):
    """As root every folder can be."""
    (tmp_path / "v").mkdir()
    monkeypatch.setattr(probe, "probe", None)
    choosing = partial(choose.main, ["--device", "cpu", "--export", "v/v.npz"])
    for shut, command, path in [
        (trained, partial(run, "--t", "400"), "runs/set/probe-t-400.json"),
        (Path("v"), partial(run, "--export", "v/v.npz"), "v/v.npz"),
        (trained, choosing, "runs/set/choose.json"),
        (Path("v"), choosing, "v/v.npz"),
    ]:
        monkeypatch.setattr(os, "access", lambda path, mode, shut=shut: path != shut)
        with pytest.raises(PermissionError) as error:
            command()
        assert error.value.filename == path and not list(trained.glob("*.json"))[1:]


@pytest.mark.parametrize("flags", [[], ["--t", "auto"]])
def test_a_limit_that_leaves_one_class_is_refused(trained, flags, capsys):
    error = fails(capsys, run, "--limit", "1", *flags)
    assert "--limit 1 leaves images of one class, and a probe needs two classes" in error
    assert not results(trained)


def test_a_set_of_one_class_is_refused(trained, monkeypatch, capsys):
    def one_class(*args):
        splits = data.load(*args)
        for split in splits:
            split.labels[:] = 1
        return splits

    monkeypatch.setattr(probe, "load", one_class)
    error = fails(capsys, run)
    assert "set has training images of one class, and a probe needs two classes" in error


def test_runs_of_other_methods_are_refused_by_name(trained, capsys):
    copy_as("mae", trained, train.RUNS / "baselines/mae")
    error = fails(capsys, run, "--name", "baselines/mae")
    assert "runs/baselines/mae is a run of mae: see appendix.baselines" in error


@pytest.mark.parametrize("text", ["1000", "-1", "a", "1,,2", "", "0.5", "auto,100"])
def test_times_outside_the_range_are_one_line(text, capsys):
    error = fails(capsys, run, "--t", text)
    assert f"{text}: give whole numbers in 0..999, as in 100,400, or auto" in error
    assert probe.parse_times("400, 100,400,0999") == [100, 400, 999]
    assert probe.parse_times("auto") == "auto"
