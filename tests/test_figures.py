"""Charts and figures by content: known points on known pixels, axes that span the data; t-SNE."""

import functools
import json
import math
import types

import numpy as np
import pytest
import torch
from conftest import TINY, fails, write_folder
from PIL import Image

import data
import probe
import train
from appendix import chart, figures, tsne

CPU = torch.device("cpu")


def pixels(path):
    """A picture as int (H, W, 3)."""
    return np.asarray(Image.open(path)).astype(int)


def page_of(canvas, tmp_path):
    canvas.save(tmp_path / "page.png")
    return pixels(tmp_path / "page.png")


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
    page = page_of(canvas, tmp_path)
    assert colour_at(page, axes.pixel(2.5, 5)) == blue  # on the line
    assert colour_at(page, axes.pixel(5, 7)) == red  # the marker
    assert colour_at(page, axes.pixel(2.3, 6.1)) == "#FFFFFF"  # beside both
    assert colour_at(page, (418 + 30, 60)) == blue  # the legend names the first series only
    assert colour_at(page, (418 + 30, 84)) == "#FFFFFF"


def test_a_log_axis_puts_equal_ratios_at_equal_distances_and_is_for_positive_values():
    axes = chart.Axes((0, 0, 100, 300), (0, 1), (1, 1000), log_y=True)
    assert [axes.pixel(0, 10.0**k)[1] for k in range(4)] == pytest.approx([300, 200, 100, 0])
    for lowest, log in ((0.1, True), (0.0, False)):
        series = [chart.Series("", [0, 1], [lowest, 1.0], "#000000")]
        canvas, box = chart.Canvas(300, 300), (80, 50, 250, 200)
        assert chart.line_panel(canvas, box, series, "", "x", "y", log_y=True).log_y is log


def test_ticks_are_round_and_inside():
    assert chart.nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert chart.nice_ticks(86.3, 94.9) == [88, 90, 92, 94]
    assert chart.log_ticks(0.01, 1) == pytest.approx([0.01, 0.1, 1])
    for low, high in ((0.03, 0.2), (0.04, 0.09), (1, 1e6), (0.11, 0.13)):
        ticks = chart.log_ticks(low, high)
        assert len(ticks) >= 2 and all(low * 0.99 <= v <= high * 1.01 for v in ticks)
    for low, high in ((-3.2, 0.1), (0.001, 0.0017), (5, 5.1), (0, 1e7)):
        ticks = chart.nice_ticks(low, high)
        assert 2 <= len(ticks) <= 8 and low - 1e-9 <= ticks[0] and ticks[-1] <= high + 1e-9
    assert chart.padded([3.0], False)[0] < 3 < chart.padded([3.0], False)[1]
    labels = [chart.tick_label(v) for v in (0.05, 999, 20_000, 1_500_000)]
    assert labels == ["0.05", "999", "20,000", "1.5M"]


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
    page = page_of(canvas, tmp_path)
    for k, shape in enumerate(chart.SHAPES):
        part = page[10:30, 20 * k : 20 * k + 20]
        assert colour_at(page, (10 + 20 * k, 20)) == "#D55E00"
        area = {"circle": 123, "square": 169, "triangle": 85, "diamond": 78, "cross": 77}[shape]
        assert (part[:, :, 2] < 130).sum() == pytest.approx(area, rel=0.1), shape


def test_a_legend_in_two_columns_goes_on_counting_and_shortens_names(tmp_path):
    canvas = chart.Canvas(300, 120)
    chart.class_legend(canvas, (20, 20), ["a", "W" * 40, "c", "d"], rows=2, wide=140)
    page = page_of(canvas, tmp_path)
    for k, at in enumerate(((20, 20), (20, 42), (160, 20), (160, 42))):
        assert colour_at(page, at) == chart.COLOURS[k]
    ink = (page[32:52] < 128).all(2).any(0)
    assert ink[100:140].any() and not ink[144:150].any()


@pytest.mark.parametrize(
    "name, shown",
    [
        ("T-cell (2)", "T-cell (2)"),
        ("日本", r"\u65e5\u672c"),
        ("cat 😀", r"cat \U0001f600"),
        ("two\nlines", r"two\nlines"),  # Pillow draws these itself, but not with every anchor
        ("caf\u00e9", r"caf\xe9"),
        ("\udcff", r"\udcff"),  # of a file name that is not UTF-8
    ],
)
def test_names_that_the_font_cannot_show_are_escaped(name, shown, tmp_path):
    assert chart.shown(name) == shown and chart.shown(shown) == shown
    pages = []
    for k, text in enumerate((name, shown)):
        canvas, series = chart.Canvas(500, 400), [chart.Series(text, [0, 1], [0, 1], "#000000")]
        chart.line_panel(canvas, (100, 50, 250, 150), series, text, text, text)
        chart.class_legend(canvas, (20, 250), [text])
        pages.append(page_of(canvas, tmp_path))
        chart.image_grid(
            [(text, np.zeros((1, 1, 8, 8), np.uint8))], [text], tmp_path / f"{k}", text
        )
    assert np.array_equal(*pages)
    assert np.array_equal(pixels(tmp_path / "0"), pixels(tmp_path / "1"))
    assert chart.shorten(name, 14, 1000) == shown
    cut = chart.shorten(name * 9, 14, 90)
    assert "..." in cut and cut[0] == shown[0] and cut[-1] == shown[-1]
    assert 70 < chart.text_width(cut, 14) <= 90


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side, drawn", [(8, 64), (28, 56), (100, 100)])
def test_a_grid_has_every_image_at_its_place(side, drawn, channels, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, channels, side, side), dtype=np.uint8)
    path = tmp_path / "new/grid.png"
    chart.image_grid([("", images[0]), ("", images[1, :2])], ["", "", ""], path)
    page, margin, pitch = pixels(path), chart.MARGIN, drawn + chart.GAP
    assert page.shape[:2] == (pitch + drawn + 2 * margin, 2 * pitch + drawn + 2 * margin)
    for r, k in ((0, 0), (0, 2), (1, 1)):
        got = page[margin + r * pitch :, margin + k * pitch :][:drawn, :drawn]
        got = got[:: drawn // side, :: drawn // side]
        assert np.array_equal(got, np.broadcast_to(images[r, k].transpose(1, 2, 0), got.shape))
    assert (page[-margin - 1, -margin - 1] == 255).all()  # the second row is shorter


def test_labels_heads_and_title_of_a_grid_stand_around_its_images(tmp_path):
    noise = np.random.default_rng(0).integers(0, 2, (3, 1, 16, 16)).astype(np.uint8) * 100
    heads, title = ["x", "", "y"], "a title that is wider than three images are"
    rows, margin = [("one", noise), ("", noise)], chart.MARGIN
    chart.image_grid(rows, ["", ""], tmp_path / "bare.png")
    chart.image_grid(rows, heads, tmp_path / "full.png", title)
    dark = (pixels(tmp_path / "full.png") < 200).any(2)
    left, top = np.argmax(dark.sum(0) >= 128), np.argmax(dark.sum(1) >= 192)  # of the images
    bare = (pixels(tmp_path / "bare.png") < 200).any(2)
    assert np.array_equal(dark[top:, left : left + 200], bare[margin:, left:][:, :200])
    image = pixels(tmp_path / "full.png")[top : top + 64, left : left + 64, 0]
    assert np.array_equal(image, noise[0, 0].repeat(4, 0).repeat(4, 1))  # sharp
    assert not dark[:, :margin].any() and not dark[:, -margin:].any()  # nothing is cut off
    assert not dark[top - 3 : top].any() and not dark[:, left - 6 : left][top:].any()
    label, lower = dark[top:, :left][:64], dark[top:, :left][64:]
    assert label.any() and not lower.any()
    above = dark[:top, left:]
    first, second, third = (above[margin + 20 :, 68 * k : 68 * k + 64] for k in range(3))
    assert first.any() and not second.any() and third.any()
    assert dark[:, left + 204 + margin :].any()  # the page is as wide as its title
    chart.image_grid(rows, ["", "a long head", ""], tmp_path / "wide.png")
    wide = (pixels(tmp_path / "wide.png") < 200).any(2)
    assert not wide[:margin].any() and wide[-margin - 1].sum() == 3 * 64
    assert wide.shape[1] > bare.shape[1] + 20


# ---------------------------------------------------------------------------- t-SNE


def clusters(n=150, k=3, width=10):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % k
    return torch.randn(n, width, generator=generator) + 8 * torch.eye(width)[y], y


def test_the_joint_distribution_has_the_perplexity_asked_for():
    x, _ = clusters()
    distances = tsne.squared_distances(x, x)
    p = tsne.conditional(distances, 20.0, torch.arange(len(x))).double()
    entropy = -(p * p.clamp(min=1e-300).log()).sum(1)
    assert torch.allclose(entropy.exp(), torch.full((150,), 20.0, dtype=torch.float64), rtol=1e-3)
    joint = tsne.joint(x, 20.0)
    assert torch.equal(joint, joint.T) and joint.sum().item() == pytest.approx(1, abs=1e-5)
    assert not joint.diagonal().any()
    for unit in (1e-5, 1e5):  # in which x is measured does not matter
        assert torch.allclose(tsne.joint(unit * x, 20.0), joint, rtol=1e-3, atol=1e-9)


def test_momentum_and_gains_equal_a_plain_loop():
    """Twelve iterations, coordinate by coordinate: three of them exaggerated twelve times."""
    x, _ = clusters(24)
    p = tsne.joint(x, 5.0).clamp(min=1e-12)
    y = tsne.pca(x, 2)
    y = 1e-4 * y / y[:, 0].std()
    velocity, gains = [[0.0, 0.0] for _ in y], [[1.0, 1.0] for _ in y]
    for k in range(12):
        g, _ = tsne.gradient(y, p, 12.0 if k < 3 else 1.0)
        y = y.clone()
        for i in range(24):
            for j in range(2):
                same = (g[i, j] > 0) == (velocity[i][j] > 0)
                gains[i][j] = max(0.01, gains[i][j] * 0.8 if same else gains[i][j] + 0.2)
                momentum = 0.5 if k < 3 else 0.8
                velocity[i][j] = momentum * velocity[i][j] - 50 * gains[i][j] * g[i, j].item()
                y[i, j] += velocity[i][j]
        y -= y.mean(0)
    assert torch.allclose(tsne.tsne(x, 5.0, 12), y, rtol=1e-2, atol=1e-3 * y.abs().max().item())


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


def trustworthiness(x, y, k=12):
    """How many of the k nearest neighbours in y (N, 2) are near in x (N, D) too, 1 for all
    (Venna and Kaski, 2001). Needs k < N / 2."""
    n = len(x)
    rank = tsne.squared_distances(x, x).fill_diagonal_(-1.0)
    rank = rank.argsort(1).argsort(1)  # own: 0, nearest: 1
    near = tsne.squared_distances(y, y).fill_diagonal_(math.inf).topk(k, 1, largest=False).indices
    excess = (rank.gather(1, near) - k).clamp(min=0).sum().item()
    return 1.0 - 2.0 / (n * k * (2 * n - 3 * k - 1)) * excess


def test_planted_clusters_are_found_and_neighbours_kept():
    x, y = clusters(240)
    points = tsne.tsne(x, iterations=500)
    assert points.shape == (240, 2) and torch.isfinite(points).all()
    near = torch.cdist(points, points).fill_diagonal_(math.inf).topk(10, largest=False).indices
    assert (y[near] == y[:, None]).float().mean() > 0.99
    assert trustworthiness(x, points) > 0.85
    noise = torch.randn(240, 2, generator=torch.Generator().manual_seed(1))
    assert trustworthiness(x, noise) < 0.6 < trustworthiness(x, x[:, :2])
    assert torch.equal(points, tsne.tsne(x, iterations=500))  # no randomness in it


def test_the_edges_of_tsne(monkeypatch):
    assert torch.equal(tsne.tsne(torch.ones(6, 3), iterations=20), torch.zeros(6, 2))  # collapsed
    with pytest.raises(ValueError, match="3 points are too few"):
        tsne.tsne(torch.randn(3, 5))
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tsne.pca(x, 2), tsne.pca(x[:, torch.randperm(8)], 2), atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(9, 1024, generator=generator)  # of rank 8, so badly conditioned
    _, _, axes = torch.linalg.svd((few - few.mean(0)).double(), full_matrices=False)
    want = ((few - few.mean(0)).double() @ axes[:8].T).abs()
    assert torch.allclose(tsne.pca(few, 8).double().abs(), want, atol=1e-5)
    asked, joint = [], tsne.joint
    monkeypatch.setattr(tsne, "joint", lambda x, p: asked.append(p) or joint(x, p))
    for n in (4, 31, 200):  # few points have few neighbours
        tsne.tsne(torch.randn(n, 3), iterations=1)
    assert asked == [1, 10, 30]


def test_trustworthiness_against_a_plain_loop():
    x, _ = clusters(30)
    y, k, total = torch.randn(30, 2), 4, 0
    for i in range(30):
        by_x = sorted((j for j in range(30) if j != i), key=lambda j: (x[i] - x[j]).norm().item())
        by_y = sorted((j for j in range(30) if j != i), key=lambda j: (y[i] - y[j]).norm().item())
        total += sum(max(0, by_x.index(j) + 1 - k) for j in by_y[:k])
    want = 1 - 2 / (30 * k * (2 * 30 - 3 * k - 1)) * total
    assert trustworthiness(x, y, k) == pytest.approx(want)


# ---------------------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def panels_stay_apart(monkeypatch):
    """No panel of a figure covers another one or leaves the page."""
    seen = []

    def checked(draw, canvas, box, *args, **kw):
        left, top, right, bottom = box
        assert 0 < left < right < canvas.size[0] and 0 < top < bottom < canvas.size[1]
        for other in (other for page, other in seen if page is canvas):
            beside = right < other[0] or other[2] < left
            assert beside or bottom < other[1] or other[3] < top, (box, other)
        seen.append((canvas, box))
        return draw(canvas, box, *args, **kw)

    for name in ("line_panel", "scatter_panel"):
        monkeypatch.setattr(figures, name, functools.partial(checked, getattr(figures, name)))


def train_and_probe(monkeypatch, name, data, *flags):
    """A tiny run in runs/NAME with its probe.json, after one epoch of the heads; t-SNE is short:
    it sees 64 features, as the PCA of 1,024 takes longer than all the rest."""
    monkeypatch.setattr(figures, "tsne", lambda x: tsne.tsne(x[:, :64], iterations=20))
    monkeypatch.setattr(probe, "EPOCHS", 1)
    monkeypatch.setattr(probe, "UPDATES", 0)
    train.main(["--data", data, "--name", name, *TINY, "--epochs", "4", *flags])
    probe.main(["--name", name, "--device", "cpu"])
    return train.RUNS / name


@pytest.fixture
def probed(folder, monkeypatch):
    return train_and_probe(monkeypatch, "set", folder)


def drawn(folder):
    return sorted(path.name for path in folder.glob("fig*.png"))


def test_one_run_gets_four_figures_and_the_chosen_t_is_framed(probed):
    result = json.loads((probed / "probe.json").read_text())
    (probed / "probe.json").write_text(json.dumps({**result, "chosen_t": 300}))
    figures.main(["--limit", "20", "--device", "cpu"])
    assert drawn(probed) == ["fig4.png", "fig5.png", "fig6.png", "fig7.png"]
    page = pixels(probed / "fig7.png")
    orange = np.abs(page - [0xD5, 0x5E, 0x00]).max(2) < 3
    for k, t in enumerate(probe.TIMES):  # the upper edge of each panel, away from its corners
        left, top = 20 + k % 4 * 296, 66 + k // 4 * 324
        assert orange[top, left + 20 : left + 260].all() == (t == 300), t


def test_what_v_does_and_few_labels_are_drawn_where_they_were_measured(tmp_path, monkeypatch):
    """The gain has its interval beside it and stands below Fig. 4; each set of few.json has a panel
    whose ticks are the numbers of labels."""
    drawn, real = [], figures.line_panel

    def keep(*args, **kw):
        drawn.append((args[1], args[2], list(kw["x_ticks"].values())))
        return real(*args, **kw)

    monkeypatch.setattr(figures, "line_panel", keep)
    monkeypatch.setattr(train, "RUNS", tmp_path)
    files = {"config": {"method": "dier", "data": "glyphs"}}
    files["probe"] = {"rows": [{"t": t, "top1": 50.0 + t, "top5": None} for t in (0, 999)]}
    files["choose"] = {"rows": [{"t": 5, "gain": 0.5, "gain_low": 0.4, "gain_high": 0.7}]}
    cells = (("v", 1, 30.0), ("v", 5, 60.0), ("pixels", 1, 20.0), ("pixels", 5, 25.0))
    files["few"] = {"rows": [dict(zip(("features", "each", "accuracy"), cell)) for cell in cells]}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    run = figures.read_run(tmp_path)
    monkeypatch.setattr(figures, "RUNS", tmp_path.parent)
    figures.figure_4([run], tmp_path / "fig4.png")
    figures.figure_few([run, run], tmp_path / "few.png")
    (_, top, _), (box, gains, _), *panels = drawn
    assert box[0] == 90 and box[1] > 450 and [line.y for line in top][0] == [50.0, 1049.0]
    assert [(line.x, line.y) for line in gains] == [([5], [0.5]), ([5], [0.4]), ([5], [0.7])]
    assert len(panels) == 2 and Image.open(tmp_path / "fig4.png").height == 830
    for _, lines, ticks in panels:
        assert ticks == ["1", "5"] and [line.x for line in lines] == [[0, 1], [0, 1]]
        assert [line.y for line in lines] == [[30.0, 60.0], [20.0, 25.0]]
    assert [line.name for line in panels[1][1]] == ["v", "pixels"]
    bare = figures.Run(tmp_path, run.settings, [], run.probe, [], [])
    figures.figure_4([bare], tmp_path / "fig4.png")
    assert Image.open(tmp_path / "fig4.png").height == 510


def test_features_are_standardised_by_a_sample_of_training_images(probed, monkeypatch):
    monkeypatch.setattr(figures, "STATISTICS", 20)
    index, vectors = np.array([0, 5, 7]), []
    embedder = figures.Embedder(figures.read_run(probed), CPU)
    model, _ = train.load_model(probed)
    for split in data.load("set", 8, 3, probed.parent.parent / "data"):
        images = split.images if vectors else data.sample(split, 20, 0).images
        vectors.append(probe.encode(model.encoder, images, 400, CPU, "").float())
    std = vectors[0].std(0, correction=0)
    want = (vectors[1][index] - vectors[0].mean(0)) / std
    wide = std > std.median()  # half precision blurs the narrow ones
    got = embedder.features(index, 400)
    assert torch.allclose(got[:, wide], want[:, wide], atol=1e-2)
    points, labels, names = embedder.embed(20, 0, 400)
    assert len(points) == 20 and names == ["class0", "class1"]
    assert np.array_equal(np.bincount(labels), [10, 10])


def test_several_runs_go_to_runs_in_a_grid(probed, tmp_path, monkeypatch):
    write_folder(tmp_path / "more", per_class=10, classes=3)
    train_and_probe(monkeypatch, "others/more", "more")
    monkeypatch.setattr(figures, "TIMES", [0, 400, 999])
    figures.main(["--name", "set", "others/more", "--limit", "15", "--device", "cpu"])
    assert not drawn(probed) and drawn(tmp_path / "runs") == [
        "fig4.png",
        "fig5.png",
        "fig6.png",
        f"fig7-{probe.file_word('others/more')}.png",
        "fig7-set.png",
    ]
    wide = Image.open(tmp_path / "runs/fig5.png")
    assert wide.width > 1200 > wide.height  # two columns, one for each set


def test_runs_of_one_method_and_set_do_not_cover_each_other(tmp_path):
    runs = []
    for method, name in (("dier", "a"), ("mae", "a"), ("dier", "b"), ("dier", "a"), ("dier", "b")):
        settings = {"method": method, "data": f"at/{name}"}
        runs.append(figures.Run(tmp_path, settings, [], None, [], []))
    assert figures.places(runs) == [(0, 0), (1, 0), (0, 1), (2, 0), (2, 1)]


def test_a_method_without_time_has_a_level_line_and_no_fig_7(probed, monkeypatch, capsys):
    """The encoder is DiER's, so only the names say that it knows no time."""
    still = (train.build_dier, lambda net, x0, *_: net(x0))
    monkeypatch.setattr(figures, "METHODS", {**figures.METHODS, "still": still})
    monkeypatch.setattr(figures, "TIMELESS", {"still"})
    config = json.loads((probed / "config.json").read_text())
    result = json.loads((probed / "probe.json").read_text())
    (probed / "config.json").write_text(json.dumps({**config, "method": "still"}))
    one = {**result, "rows": [{**result["rows"][0], "t": 0, "top1": 50.0}], "chosen_t": 0}
    (probed / "probe.json").write_text(json.dumps(one))
    figures.main(["--name", "set", "--limit", "20", "--device", "cpu"])
    assert drawn(probed) == ["fig4.png", "fig5.png", "fig6.png"]
    assert "no Fig. 7 of set: still has one v for all t" in capsys.readouterr().out
    page, blue = pixels(probed / "fig4.png"), (0, 0x72, 0xB2)
    line = (page[:, 120:720] == blue).all(2)  # between the markers at both ends
    assert line.all(1).any() and line.any(1).sum() <= 3
    loss = pixels(probed / "fig6.png")
    assert (loss[:, :600] < 128).any() and not (loss[:, 600:] < 128).any()  # no tenths of t
    (probed / "probe.json").unlink()
    assert "its table's command, when stage-1.json" in fails(
        capsys, figures.main, ["--name", "set"]
    )


def test_one_row_of_a_log_is_a_point_in_fig_6(folder):
    train.main(["--data", folder, *TINY, "--batch-size", "16", "--epochs", "0.1"])
    with pytest.raises(SystemExit):  # for lack of a probe
        figures.main(["--device", "cpu"])
    loss = pixels(train.RUNS / "set/fig6.png")[60:340, 90:540]
    assert (loss == (0, 0x72, 0xB2)).all(2).sum() > 10  # the colour of the first series


def test_a_folder_has_no_curve_of_the_paper(probed):
    run = figures.read_run(probed)
    drawn = []
    for name in ("mnist", "own/mnist"):
        run.settings["data"] = name
        figures.figure_4([run], probed / "fig4.png")
        drawn.append(pixels(probed / "fig4.png").shape[1])  # the legend's longest line
    assert drawn[0] > drawn[1]


def test_without_a_probe_it_draws_fig_6_and_names_the_command(folder, capsys):
    train.main(["--data", folder, *TINY, "--epochs", "4"])
    run = train.RUNS / "set"
    (run / "probe-t-400.json").write_text("{}")  # not the standard sweep
    for text in (None, b"{damaged", b"[]", b'{"\xff'):
        if text:
            (run / "probe.json").write_bytes(text)
        error = fails(capsys, figures.main, ["--device", "cpu"])
        assert "no runs/set/probe.json: python probe.py --name set makes it" in error
        assert drawn(run) == ["fig6.png"]
    figures.read_run(run)
    assert capsys.readouterr().out == "runs/set/probe.json is left out: it cannot be read\n"
    log = run / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 9, "ima')  # cut by a crash
    assert [row["step"] for row in figures.read_run(run).log] == [1, 2, 3]


def test_what_it_cannot_draw_gets_one_line(probed, capsys, tmp_path, monkeypatch):
    assert "no checkpoint in runs/other" in fails(capsys, figures.main, ["--name", "other"])
    assert "2 points are too few" in fails(capsys, figures.main, ["--limit", "1"])
    result = json.loads((probed / "probe.json").read_text())
    result["protocol"]["step"] = 1
    (probed / "probe.json").write_text(json.dumps(result))
    figures.Embedder(figures.read_run(probed), CPU)
    assert "python probe.py --name set probes anew" in capsys.readouterr().out
    (probed / "choose.json").write_text("{}")
    assert figures.read_run(probed).gain == []
    assert capsys.readouterr().out == "runs/set/choose.json is left out: it cannot be read\n"
    (probed / "choose.json").unlink()
    (probed / "few.json").write_text(json.dumps({"step": 3, "rows": []}))
    figures.read_run(probed)
    said = "runs/set/few.json is of step 3, probe.json of step 1\n"
    assert capsys.readouterr().out == said
    (probed / "log.jsonl").unlink()
    (tmp_path / "set/train/class1").rename(tmp_path / "train1")
    (tmp_path / "set/test/class1").rename(tmp_path / "test1")
    with pytest.raises(SystemExit) as stop:
        figures.main(["--device", "cpu"])
    out, error = capsys.readouterr()
    assert "set is not in Fig. 6: runs/set/log.jsonl has no rows\n" in out
    said = "error: set has no classes any more, and Figs. 5 and 7 need them\n"
    assert (stop.value.code, error) == (2, said)
    config = train.read_config(probed)
    (probed / "probe.json").rename(tmp_path / "probe.json")
    (probed / "config.json").write_text(json.dumps(config | {"class_names": []}))
    error = fails(capsys, figures.main, ["--name", "set"])
    assert "set has no classes, and Figs. 4, 5 and 7 need them" in error
    (probed / "config.json").write_text('{"method": "tokenizer"}')
    assert "set is a tokenizer, which makes" in fails(capsys, figures.main, ["--name", "set"])
    (probed / "config.json").write_text('{"method": "gan"}')
    assert "a run of gan, which is none of" in fails(capsys, figures.main, ["--name", "set"])
    (probed / "config.json").write_text('{"method": "di')
    words = "runs/set/config.json is not there or cannot be read"
    assert words in fails(capsys, figures.main, ["--name", "set"])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    words = "error: no run in runs/: start with python train.py\n"
    assert fails(capsys, figures.main, []) == words


def test_a_command_that_is_named_can_be_pasted(tmp_path):
    run = figures.Run(train.RUNS / "my run", {"method": "dier"}, [], None, [], [])
    assert figures.probe_command(run) == "python probe.py --name 'my run'"


def test_classes_that_the_font_cannot_show_are_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "set", per_class=5)
    for split in ("train", "test"):
        for k, name in enumerate(("日本", "😀")):
            (tmp_path / "set" / split / f"class{k}").rename(tmp_path / "set" / split / name)
    run = train_and_probe(monkeypatch, "日本", "set")
    figures.main(["--limit", "10", "--device", "cpu"])
    assert drawn(run) == ["fig4.png", "fig5.png", "fig6.png", "fig7.png"]
    page = pixels(run / "fig5.png")  # the legend, beside the panel
    first, second = (page[66 + 14 + 22 * k - 9 :][:18, 20 + 620 + 30 :] for k in range(2))
    assert (first < 128).any() and (second < 128).any() and not np.array_equal(first, second)


def test_training_curves_average_by_images_and_skip_empty_tenths(monkeypatch):
    images = [*range(1, 21), *range(40, 2001, 20)]  # train.py's rows
    rows = [
        {"images": n, "loss": float(n), "loss_by_t": [None, n * 2.0, *[None] * 8]} for n in images
    ]
    x, y = figures.thin_out(rows, "loss")
    assert x == y and x[0] == pytest.approx(5) and x[-1] == 2000  # part 0: 1 to 9
    assert figures.thin_out(rows, "0") == ([], []) == figures.thin_out([], "loss")
    assert figures.thin_out(rows, "1")[1][0] == pytest.approx(10)
    many = [{"images": n, "loss": 1.0 * (n > 5000)} for n in range(10, 10_001, 10)]
    x, y = figures.thin_out(many, "loss")
    assert len(x) == figures.LEVELS and y == pytest.approx([0.0] * 100 + [0.8] + [1.0] * 99)
    monkeypatch.setattr(figures, "LEVELS", 1)  # ten images, then thirty
    two = [{"images": n, "loss": loss} for n, loss in ((10, 1.0), (40, 5.0))]
    assert figures.thin_out(two, "loss") == ([32.5], [4.0])


def test_only_twenty_classes_are_shown_and_equally():
    labels, names = np.repeat(np.arange(30), 10), [f"c{k}" for k in range(30)]
    split = types.SimpleNamespace(labels=labels, class_names=names)
    index, classes = figures.some_classes(split, 100, 0)
    assert len(classes) == 20 and len(index) == 100 and classes == sorted(classes)
    counts = np.bincount(labels[index], minlength=30)
    assert sorted(set(counts)) == [0, 5] and np.flatnonzero(counts).tolist() == classes
    again, _ = figures.some_classes(split, 100, 0)
    other, _ = figures.some_classes(split, 100, 1)
    assert np.array_equal(index, again) and not np.array_equal(index, other)


def test_the_papers_tables_are_there_once_and_agree():
    paper = json.loads(figures.PAPER.read_text())
    assert paper["t"] == probe.TIMES
    for name, row in paper["table2"].items():
        assert len(row["top1"]) == 11
        best = row["top1"][paper["t"].index(row["best_t"])]
        assert best == max(row["top1"]) == paper["table1"]["DiER"][name]


def test_a_table_is_drawn_with_a_line_a_method_and_its_floors(tmp_path, monkeypatch, capsys):
    """Points are means over the seeds, at TFLOP; a floor is a level line, its name just above."""
    drawn, written, real, text = [], {}, figures.line_panel, figures.Canvas.text
    monkeypatch.setattr(figures, "line_panel", lambda *a: drawn.extend(a[2]) or real(*a))

    def write(canvas, at, name, *args, **kwargs):
        written[name] = at
        text(canvas, at, name, *args, **kwargs)

    monkeypatch.setattr(figures.Canvas, "text", write)
    curves = [[{"flops": k * 1e12, "top1": k + seed} for k in (1, 2, 4)] for seed in (0, 2)]
    cells = [{"method": "mae", "curve": curve} for curve in curves]
    rows = [{"method": "mae", "flops": 4e12}, {"method": "pixels", "flops": None, "top1": 3.0}]
    rows.append({"method": "pca", "flops": None, "top1": 4.0})
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"data": "mnist", "epochs": 4.0, "rows": rows, "cells": cells}))
    figures.main(["--table", str(path)])
    with Image.open(tmp_path / "table.png") as image:
        assert image.size[1] == 560
    assert [(line.name, list(line.x), list(line.y)) for line in drawn] == [
        ("mae", [1, 2, 4], [2, 3, 5]), ("", [0, 4], [3, 3]), ("", [0, 4], [4, 4])
    ]  # fmt: skip
    low, high = written["pixels"], written["pca"]
    assert high[1] == pytest.approx(written["4"][1] - 2)  # of the axis
    assert low[1] > high[1] + 50 and high[0] == low[0] - 80
    for text, words in (("[]", "no table of appendix"), ('{"rows": [], "cells": []}', "no method")):
        path.write_text(text)
        assert words in fails(capsys, figures.main, ["--table", str(path)])
    own = path.rename(tmp_path / "table.png")  # the picture would take its place
    assert "does not end in .png" in fails(capsys, figures.main, ["--table", str(own)])
    assert own.read_text() == text
