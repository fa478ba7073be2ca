"""Charts and figures by content: known points on known pixels, axes that span the data; t-SNE."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, write_folder
from PIL import Image

import data
import features
import probe
import runs
import train
from appendix import chart, figures, tsne


def pixels(canvas, tmp_path):
    canvas.save(tmp_path / "page.png")
    return np.asarray(Image.open(tmp_path / "page.png")).astype(int)


def colour_at(page, at):
    return "#%02X%02X%02X" % tuple(page[round(at[1]), round(at[0])])  # noqa: UP031


# ---------------------------------------------------------------------------- charts


def test_known_points_land_on_known_pixels(tmp_path):
    canvas = chart.Canvas(600, 400)
    blue, red = chart.COLOURS[:2]
    series = [
        chart.Series("up", [0, 10], [5, 5], blue, width=3),
        chart.Series("", [5], [7], red, width=6),
    ]
    axes = chart.line_panel(canvas, (100, 50, 400, 350), series, "title", "x", "y")
    assert axes.pixel(axes.x_range[0], axes.y_range[0]) == (100, 350)
    assert axes.pixel(axes.x_range[1], axes.y_range[1]) == (400, 50)
    assert axes.x_range[0] < 0 and axes.x_range[1] > 10  # the axes span the data
    page = pixels(canvas, tmp_path)
    assert colour_at(page, axes.pixel(2.5, 5)) == blue  # on the line
    assert colour_at(page, axes.pixel(5, 7)) == red  # the marker
    assert colour_at(page, axes.pixel(2.3, 6.1)) == "#FFFFFF"  # beside both
    assert colour_at(page, (418 + 30, 60)) == blue  # the legend names the first series only
    assert colour_at(page, (418 + 30, 84)) == "#FFFFFF"


def test_a_log_axis_puts_equal_ratios_at_equal_distances():
    axes = chart.Axes((0, 0, 300, 100), (1, 1000), (0, 1), log_x=True)
    assert [axes.pixel(10.0**k, 0)[0] for k in range(4)] == pytest.approx([0, 100, 200, 300])


def test_ticks_are_round_and_inside():
    assert chart.nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert chart.nice_ticks(86.3, 94.9) == [88, 90, 92, 94]
    assert chart.log_ticks(0.01, 1) == pytest.approx([0.01, 0.1, 1])
    for low, high in ((0.03, 0.2), (0.04, 0.09), (1, 1e6), (0.11, 0.13)):
        ticks = chart.log_ticks(low, high)
        assert all(low * 0.99 <= v <= high * 1.01 for v in ticks)
    for low, high in ((-3.2, 0.1), (0.001, 0.0017), (5, 5.1), (0, 1e7)):
        ticks = chart.nice_ticks(low, high)
        assert 2 <= len(ticks) <= 8 and low - 1e-9 <= ticks[0] and ticks[-1] <= high + 1e-9
    assert chart.span([3.0], False)[0] < 3 < chart.span([3.0], False)[1]


def test_dashes_cover_half_of_a_line_and_carry_on_around_a_corner():
    pieces = chart.dashes([(0, 0), (50, 0), (50, 50)], 10, 10)
    length = sum(math.dist(a, b) for p in pieces for a, b in zip(p, p[1:]))
    assert length == pytest.approx(50) and len(pieces) == 5
    assert [tuple(p) for p in pieces[0]] == [(0, 0), (10, 0)]


def test_the_first_forty_styles_differ_and_every_marker_is_seen(tmp_path):
    assert len({chart.style(k) for k in range(40)}) == 40
    canvas = chart.Canvas(100, 40)
    for k, shape in enumerate(chart.SHAPES):
        canvas.marker((10 + 20 * k, 20), "#D55E00", shape, 6)
    page = pixels(canvas, tmp_path)
    for k, shape in enumerate(chart.SHAPES):
        part = page[10:30, 20 * k : 20 * k + 20]
        assert colour_at(page, (10 + 20 * k, 20)) == "#D55E00"
        area = {"circle": 123, "square": 169, "triangle": 85, "diamond": 78, "cross": 77}[shape]
        assert (part[:, :, 2] < 130).sum() == pytest.approx(area, rel=0.1), shape


def test_a_legend_in_two_columns_goes_on_counting(tmp_path):
    canvas = chart.Canvas(300, 120)
    chart.class_legend(canvas, (20, 20), list("abcd"), rows=2, wide=140)
    page = pixels(canvas, tmp_path)
    for k, at in enumerate(((20, 20), (20, 42), (160, 20), (160, 42))):
        assert colour_at(page, at) == chart.COLOURS[k]


# ---------------------------------------------------------------------------- t-SNE


def clusters(n=150, k=3, width=10):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % k
    return torch.randn(n, width, generator=generator) + 8 * torch.eye(width)[y], y


def test_the_joint_distribution_has_the_perplexity_asked_for():
    x, _ = clusters()
    p = torch.cat([
        tsne.conditional(tsne.squared_distances(x[i : i + 1], x), 20.0, torch.tensor([i]))
        for i in range(len(x))
    ]).double()  # fmt: skip
    entropy = -(p * p.clamp(min=1e-300).log()).sum(1)
    assert torch.allclose(entropy.exp(), torch.full((150,), 20.0, dtype=torch.float64), rtol=1e-3)
    joint = tsne.joint(x, 20.0)
    assert torch.equal(joint, joint.T) and joint.sum().item() == pytest.approx(1, abs=1e-5)
    assert not joint.diagonal().any()


def test_the_gradient_is_that_of_the_divergence(monkeypatch):
    monkeypatch.setattr(tsne, "ROWS", 7)  # several blocks
    x, _ = clusters(20)
    p = tsne.joint(x.double(), 5.0)
    y = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    q = 1 / (1 + ((y[:, None] - y[None]) ** 2).sum(2))
    q = q * (1 - torch.eye(20, dtype=torch.float64))
    off = ~torch.eye(20, dtype=torch.bool)
    (p[off] * (p[off] / (q / q.sum())[off]).log()).sum().backward()
    got, z = tsne.gradient(y.detach(), p, 1.0)
    assert torch.allclose(got, y.grad, atol=1e-12) and z.item() == pytest.approx(q.sum().item())


def test_planted_clusters_are_found_and_neighbours_kept():
    x, y = clusters(240)
    lines = []
    points = tsne.tsne(x, iterations=500, show=lines.append)
    assert points.shape == (240, 2) and torch.isfinite(points).all()
    near = torch.cdist(points, points).fill_diagonal_(math.inf).topk(10, largest=False).indices
    assert (y[near] == y[:, None]).float().mean() > 0.99
    assert tsne.trustworthiness(x, points) > 0.85
    noise = torch.randn(240, 2, generator=torch.Generator().manual_seed(1))
    assert tsne.trustworthiness(x, noise) < 0.6 < tsne.trustworthiness(x, x[:, :2])
    assert torch.equal(points, tsne.tsne(x, iterations=500))  # no randomness in it
    with pytest.raises(ValueError, match="too few"):
        tsne.tsne(x[:3])


def test_trustworthiness_against_a_plain_loop():
    x, _ = clusters(30)
    y, k, total = torch.randn(30, 2), 4, 0
    for i in range(30):
        by_x = sorted((j for j in range(30) if j != i), key=lambda j: (x[i] - x[j]).norm().item())
        by_y = sorted((j for j in range(30) if j != i), key=lambda j: (y[i] - y[j]).norm().item())
        total += sum(max(0, by_x.index(j) + 1 - k) for j in by_y[:k])
    want = 1 - 2 / (30 * k * (2 * 30 - 3 * k - 1)) * total
    assert tsne.trustworthiness(x, y, k) == pytest.approx(want)


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def probed(folder):
    train.main(["--data", folder, *TINY, "--epochs", "10", "--batch-size", "32", "--device", "cpu"])
    probe.main(["--device", "cpu"])
    return runs.RUNS / "set"


def test_one_run_gets_four_figures_and_the_chosen_t_is_framed(probed, monkeypatch):
    short = functools.partial(tsne.tsne, iterations=50)
    monkeypatch.setattr(figures, "tsne", short)  # 12 of them
    result = json.loads((probed / "probe.json").read_text())
    (probed / "probe.json").write_text(json.dumps({**result, "chosen_t": 300}))
    figures.main(["--limit", "20", "--device", "cpu"])
    assert sorted(p.name for p in probed.glob("*.png") if p.name.startswith("fig")) == [
        "fig4.png", "fig5.png", "fig6.png", "fig7.png",
    ]  # fmt: skip
    page = np.asarray(Image.open(probed / "fig7.png")).astype(int)
    orange = np.abs(page - [0xD5, 0x5E, 0x00]).max(2) < 3
    for k, t in enumerate(probe.TIMES):  # the upper edge of each panel, away from its corners
        left, top = 20 + k % 4 * 296, 66 + k // 4 * 324
        assert orange[top, left + 20 : left + 260].all() == (t == 300), t


def test_features_are_standardised_by_training_images(probed):
    run, cpu = figures.Run(probed), torch.device("cpu")
    got, vectors = figures.Embedder(run, cpu)(np.array([0, 5, 7]), 400), []
    for split in ("train", "test"):
        images = data.load("set", split, 8).images
        vectors.append(features.encode(run.encoder(), images, [400], cpu, None, "")[:, 0].float())
    std = vectors[0].std(0, correction=0)
    want = (vectors[1][[0, 5, 7]] - vectors[0].mean(0)) / std
    wide = std > std.median()  # half precision blurs the narrow ones
    assert torch.allclose(got[:, wide], want[:, wide], atol=1e-2)


def test_several_runs_go_to_results_in_a_grid(probed, tmp_path, monkeypatch):
    short = functools.partial(tsne.tsne, iterations=50)
    monkeypatch.setattr(figures, "tsne", short)  # 24 of them
    write_folder(tmp_path / "more", per_class=10, classes=3)
    train.main(["--data", "more", *TINY, "--epochs", "4", "--device", "cpu"])
    probe.main(["--device", "cpu", "--t", "0,999"])
    figures.main(["--run", "set", "more", "--limit", "15", "--device", "cpu"])
    names = {p.name for p in (tmp_path / "results").iterdir()}
    assert names == {"fig4.png", "fig5.png", "fig6.png", "fig7-set.png", "fig7-more.png"}
    one = Image.open(tmp_path / "results/fig5.png")
    assert one.width > 1200  # two columns, one for each set


def test_without_a_probe_it_draws_fig_6_and_names_the_command(folder, capsys):
    train.main(["--data", folder, *TINY, "--epochs", "4", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        figures.main(["--device", "cpu"])
    assert stop.value.code == 2 and (runs.RUNS / "set/fig6.png").exists()
    assert "python probe.py --run runs/set first" in capsys.readouterr().err


def test_training_curves_average_and_skip_empty_tenths():
    rows = [{"images": k, "loss": float(k), "loss_by_t": [None, k * 2.0] + [None] * 8}
            for k in range(1000)]  # fmt: skip
    x, y = figures.thin_out(rows, "loss")
    assert len(x) == figures.LEVELS and x == y and x[0] == pytest.approx(2.0)
    assert figures.thin_out(rows, "0") == ([], [])
    assert figures.thin_out(rows, "1")[1][0] == pytest.approx(4.0)


def test_only_twenty_classes_are_shown_and_equally():
    class Split:
        labels = np.repeat(np.arange(30), 10)
        class_names = [f"c{k}" for k in range(30)]

    index, names = figures.some_classes(Split, 100, 0)
    assert len(names) == 20 and len(index) == 100
    counts = np.bincount(Split.labels[index], minlength=30)
    assert sorted(set(counts)) == [0, 5] and (counts > 0).sum() == 20
    again, _ = figures.some_classes(Split, 100, 0)
    assert np.array_equal(index, again)


def test_the_papers_tables_are_there_once_and_agree():
    paper = json.loads(figures.PAPER.read_text())
    assert paper["t"] == probe.TIMES
    for name, row in paper["table2"].items():
        assert len(row["top1"]) == 11
        best = row["top1"][paper["t"].index(row["best_t"])]
        assert best == max(row["top1"]) == paper["table1"]["DiER"][name]
