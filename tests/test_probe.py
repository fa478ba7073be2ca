"""probe.py: the heads against a plain loop, the honest choice of t, the floors, the files."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, write_folder

import features
import heads
import model as M
import probe
import runs
import train

SETTINGS = {"epochs": 30, "lr": 1e-2, "batch_size": 64, "seeds": 1}


def blobs(n, classes=4, width=16, seed=0, times=2):
    """Separable features (N, S, V) and labels (N,): a far-off corner for each class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, times, width, generator=generator) * 0.1 + 3 * F.one_hot(y, width)[:, None]
    return x, y


def fit(x, y, x_test, y_test, folds=None, classes=4, **change):
    folds = torch.from_numpy(heads.make_folds(len(y), None, 0)) if folds is None else folds
    task = heads.Task(y, y_test, folds, classes, **{**SETTINGS, **change})
    return task.evaluate(x, x_test)


def test_separable_features_reach_100_and_labels_without_a_pattern_chance():
    (x, y), (x_test, y_test) = blobs(400), blobs(200, seed=1)
    for row in fit(x, y, x_test, y_test):
        assert row["top1"] == 100 and row["held_out"] == 100 and row["top5"] is None
    generator = torch.Generator().manual_seed(0)
    x, x_test = (torch.randn(n, 2, 16, generator=generator) for n in (1000, 1000))
    y, y_test = torch.arange(1000) % 4, torch.arange(1000) % 4
    for row in fit(x, y, x_test, y_test):  # 25, give or take 1.4
        assert 20 < row["top1"] < 30 and 20 < row["held_out"] < 30


def test_heads_equal_a_plain_loop_over_heads_and_times():
    """Each head alone: its own AdamW, its own mean over the images that it may see."""
    x, y = blobs(96, seed=3)
    folds = torch.arange(96) % 3
    weight, bias = heads.train_heads(x, y, folds, 4, 12, 5e-3, 32, seed=7)
    generator = torch.Generator().manual_seed(heads.mix_seed(7, 2))
    start = 0.01 * torch.randn(2, 16, 16, generator=generator)
    orders = [torch.randperm(96, generator=generator) for _ in range(12)]
    for s in range(2):
        for head in range(4):
            w = start[s, 4 * head : 4 * head + 4].T.clone().requires_grad_()
            b = torch.zeros(4, requires_grad=True)
            optimizer = torch.optim.AdamW([w, b], weight_decay=0.05)
            for step in range(36):
                index = orders[step // 3][step % 3 * 32 :][:32]
                lr = 5e-3 * (step + 1) / 30 if step < 30 else 5e-3 * (36 - step) / 6
                optimizer.param_groups[0]["lr"] = lr
                keep = index[folds[index] != head - 1]
                optimizer.zero_grad()
                F.cross_entropy(x[keep, s] @ w + b, y[keep]).backward()
                optimizer.step()
            assert torch.allclose(weight[s, 4 * head : 4 * head + 4].T, w, atol=5e-5)
            assert torch.allclose(bias[s, 4 * head : 4 * head + 4, 0], b, atol=5e-5)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [heads.learning_rate(i, 100, 10, 2.0) for i in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and max(rates) == 2.0
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.03


def test_top5_counts_the_first_five():
    x, labels = torch.eye(12)[:, None], torch.arange(12)
    weight = torch.arange(12.0).expand(12, 12).T[None].clone()  # class 11 wins, then 10, ...
    ranks = heads.head_ranks(x, labels, weight, torch.zeros(1, 12, 1), 12)
    assert ranks.shape == (1, 1, 12) and ranks[0, 0].tolist() == list(range(11, -1, -1))


def test_t_is_chosen_without_the_test_labels():
    (x, y), (x_test, y_test) = blobs(400, times=3), blobs(200, seed=1, times=3)
    for part in (x, x_test):  # t = 0 and 2 are noisier than t = 1
        for s, noise in ((0, 4.0), (2, 8.0)):
            generator = torch.Generator().manual_seed(s)
            part[:, s] += noise * torch.randn(part[:, s].shape, generator=generator)
    choices = []
    for labels in (y_test, (y_test + 1) % 4):  # poisoned: each test label is wrong
        rows = [{"t": t, **r} for t, r in zip((0, 500, 999), fit(x, y, x_test, labels))]
        choices.append((heads.choose(rows, "held_out")["t"], rows))
    assert choices[0][0] == choices[1][0] == 500
    held = [[r["held_out"] for r in rows] for _, rows in choices]
    assert held[0] == held[1]
    assert choices[1][1][1]["top1"] < 5  # the poison did reach the test accuracy


def test_folds_keep_groups_together_and_hold_everything_out_once():
    groups = np.random.default_rng(0).integers(0, 60, 1000)
    folds = heads.make_folds(1000, groups, 0)
    assert set(folds) == set(range(5))
    assert all(len(set(folds[groups == g])) == 1 for g in set(groups))
    big = heads.make_folds(10_000, np.arange(10_000) // 4, 0)
    assert set(big) == {-1, 0} and 0.08 < (big == 0).mean() < 0.12
    assert all(len(set(big[i : i + 4])) == 1 for i in range(0, 10_000, 4))
    alone = heads.make_folds(1000, None, 0)
    assert np.bincount(alone).tolist() == [200] * 5


def test_knn_against_numpy(monkeypatch):
    rng = np.random.default_rng(0)
    train_x, test_x = rng.normal(size=(150, 5)), rng.normal(size=(40, 5))
    y, y_test = rng.integers(0, 3, 150), rng.integers(0, 3, 40)
    hits = 0
    for x, label in zip(test_x, y_test):
        cosine = train_x @ x / np.linalg.norm(train_x, axis=1) / np.linalg.norm(x)
        votes = np.bincount(y[np.argsort(-cosine)[:20]], minlength=3)
        hits += votes.argmax() == label
    stored = [torch.from_numpy(x)[:, None].float() for x in (train_x, test_x)]
    labels = [torch.from_numpy(a) for a in (y, y_test)]
    for block in (7, 4000):  # in many blocks, smaller than 20 neighbours, and in one
        monkeypatch.setattr(heads, "KNN_BLOCK", block)
        assert heads.knn_accuracy(*stored, 0, *labels, 3) == pytest.approx(100 * hits / 40)


def test_standardising_uses_the_training_set_alone():
    x, x_test = torch.randn(5000, 2, 3) * 0.02 + 5, torch.randn(50, 2, 3)
    x[:, :, 2] = 1.0  # constant
    mean, std = features.moments(x)
    assert torch.allclose(mean[:, 0], x.double().mean(0).float(), atol=1e-6)
    assert torch.allclose(std[:, 0], x.double().std(0, correction=0).float(), atol=1e-6)
    want = (x_test[:, 0, 0] - mean[0, 0, 0]) / std[0, 0, 0]
    features.standardise(x, x_test)
    assert x.mean(0).abs().max() < 1e-3 and x[:, :, 2].abs().max() < 1e-3
    assert torch.allclose(x.std(0)[:, :2], torch.ones(2, 2), atol=0.01)
    assert torch.isfinite(x_test).all() and torch.allclose(x_test[:, 0, 0], want, atol=1e-4)


def test_features_that_do_not_fit_go_to_a_file_that_leaves_nothing(tmp_path, monkeypatch):
    (x, y), (x_test, y_test) = blobs(400), blobs(200, seed=1)
    folds, rows = torch.from_numpy(heads.make_folds(400, None, 0)), []
    for limit in (features.IN_MEMORY, 100):
        monkeypatch.setattr(features, "IN_MEMORY", limit)
        out = [features.room(part.shape, torch.device("cpu"), tmp_path) for part in (x, x_test)]
        for values, part in zip(out, (x, x_test)):
            assert values.dtype == torch.half and not values.any()
            values.copy_(part)
        assert list(tmp_path.iterdir()) == []
        features.standardise(*out)
        rows.append(heads.Task(y, y_test, folds, 4, **SETTINGS).evaluate(*out))
    assert rows[0] == rows[1] and rows[0][0]["top1"] == 100


def test_half_precision_changes_no_accuracy_by_more_than_a_third_of_a_point():
    """Overlapping classes, and features with the small spread off zero that v has."""
    (x, y), (x_test, y_test) = blobs(4000, seed=5), blobs(2000, seed=6)
    noise = torch.Generator().manual_seed(0)
    x, x_test = (0.3 + 0.02 * (p + 2 * torch.randn(p.shape, generator=noise)) for p in (x, x_test))
    folds, results = torch.from_numpy(heads.make_folds(4000, None, 0)), []
    for both in ([x, x_test], [x.half(), x_test.half()]):
        features.standardise(*both)
        results.append(heads.Task(y, y_test, folds, 4, **SETTINGS).evaluate(*both))
    for a, b in zip(*results):
        assert 60 < a["top1"] < 99 and abs(a["top1"] - b["top1"]) <= 0.3


def test_wilson_interval():
    low, high = heads.binomial_interval(90.0, 100)  # tabulated: 0.826 to 0.945
    assert low == pytest.approx(82.56, abs=0.02) and high == pytest.approx(94.48, abs=0.02)


def test_raw_pixels_are_averaged_to_32():
    image = np.zeros((1, 1, 64, 64), np.uint8)
    image[0, 0, 0, 0:2] = 255
    x = features.raw_pixels(image)
    assert x.shape == (1, 1, 1024) and x.dtype == torch.half
    assert x[0, 0, 0] == pytest.approx(0.0, abs=1e-3) and x[0, 0, 1] == -1
    assert features.raw_pixels(np.zeros((3, 3, 16, 16), np.uint8)).shape == (3, 1, 768)


def test_encoding_uses_eval_mode_and_leaves_the_weights_alone():
    cfg = M.ModelConfig(8, 1, 4, 16, 1, 2, 8, 1, (1, 2), (4,), 2, dropout=0.5)
    torch.manual_seed(0)
    encoder = M.Encoder(cfg).train()
    for layer in encoder.zero_initialised():
        layer.reset_parameters()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    images = np.random.default_rng(0).integers(0, 256, (300, 1, 8, 8), dtype=np.uint8)
    cpu = torch.device("cpu")
    a, b = (features.encode(encoder, images, [0, 999], cpu, None, "test") for _ in range(2))
    assert a.shape == (300, 2, 1024) and torch.equal(a, b) and not encoder.training
    assert not torch.allclose(a[:, 0], a[:, 1])
    alone = encoder(features.to_float(torch.from_numpy(images[299:])), torch.tensor([999]))
    assert torch.allclose(a[299, 1].float(), alone[0], atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_the_random_floor_opens_the_branches_that_untrained_has_off():
    cfg = M.ModelConfig(8, 1, 4, 16, 1, 2, 8, 1, (1, 2), (4,), 2)
    settings = {"seed": 0, "model": cfg.__dict__}
    off, on = (probe.untrained_encoder(settings, random) for random in (False, True))
    assert all(not layer.weight.any() for layer in off.zero_initialised())
    assert all(layer.weight.all() for layer in on.zero_initialised())
    assert torch.equal(off.stem.weight, on.stem.weight)


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def trained(folder):
    train.main(["--data", folder, *TINY, "--epochs", "4", "--device", "cpu"])
    return runs.RUNS / "set"


def run(*args):
    probe.main(["--device", "cpu", *args])


def test_probe_json_has_what_the_docstring_says(trained, capsys):
    run("--t", "0,400")
    out = capsys.readouterr().out
    result = json.loads((trained / "probe.json").read_text())
    keys = {"rows", "chosen_t", "test_top1", "oracle_t", "oracle_top1", "floors", "n_test"}
    keys |= {"protocol", "run"}
    assert set(result) == keys
    assert [r["t"] for r in result["rows"]] == [0, 400]
    assert set(result["rows"][0]) == {"t", "top1", "top5", "knn", "held_out"}
    assert set(result["floors"]) == {"pixels", "untrained", "random"}
    assert result["floors"]["pixels"] == 100 and result["n_test"] == 40
    assert result["protocol"]["epochs"] == 100 and result["protocol"]["lr"] == 2e-4
    assert result["protocol"]["held_out"] == "5-fold"
    for word in ("chosen t", "oracle t", "floors", "95% interval", "protocol", "40 test images"):
        assert word in out
    run("--t", "400,999")
    merged = json.loads((trained / "probe.json").read_text())
    assert [r["t"] for r in merged["rows"]] == [0, 400, 999]
    assert merged["rows"][0] == result["rows"][0]
    train.main(["--run", str(trained), "--resume", "--epochs", "8", "--device", "cpu"])
    run("--t", "100")  # another checkpoint: the old file is kept under its step
    assert [r["t"] for r in json.loads((trained / "probe.json").read_text())["rows"]] == [100]
    step = merged["protocol"]["step"]
    assert json.loads((trained / f"probe-{step}.json").read_text()) == merged


def test_other_protocols_go_to_other_files(trained, tmp_path):
    write_folder(tmp_path / "other", per_class=10, classes=3)
    run("--t", "400", "--epochs", "3", "--norm", "none", "--weights", "raw", "--limit", "12")
    run("--t", "400", "--epochs", "3", "--data", "other", "--seeds", "2")
    assert not (trained / "probe.json").exists()
    limited = json.loads((trained / "probe-none-raw-limit12-epochs3.json").read_text())
    assert limited["n_test"] == 12 and limited["protocol"]["norm"] == "none"
    other = json.loads((trained / "probe-other-epochs3-seeds2.json").read_text())
    assert other["n_test"] == 30 and other["rows"][0]["top1_std"] >= 0


def test_export_holds_features_in_order(trained, tmp_path):
    run("--t", "0,400", "--epochs", "1", "--export", "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        assert file["features"].shape == (2, 80, 1024) and file["features"].dtype == np.float16
        assert file["labels"].shape == (80,) and file["split"].tolist() == [0] * 40 + [1] * 40
        assert file["t"].tolist() == [0, 400] and str(file["run"]) == "runs/set"
        want = file["features"][:, :40].astype(np.float32).mean(1)
        np.testing.assert_allclose(file["mean"], want, atol=1e-3)
        assert file["std"].shape == (2, 1024)


def test_unlabelled_images_train_and_the_probe_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "set")
    (tmp_path / "flat").mkdir()
    for i, path in enumerate((tmp_path / "set/train").rglob("*.png")):
        path.rename(tmp_path / f"flat/{i}.png")
    train.main(["--data", "flat", *TINY, "--epochs", "2", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2 and "flat has no classes" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1000", "-1", "a", "1,,2", ""])
def test_times_outside_the_range_are_one_line(text, capsys):
    with pytest.raises(SystemExit) as stop:
        probe.parse_times(text)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_without_t_there_are_eleven():
    assert probe.parse_times(None) == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]
