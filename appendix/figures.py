"""The paper's figures from the folders of runs.

    python -m appendix.figures                              the newest run
    python -m appendix.figures --name mnist                 into runs/mnist/
    python -m appendix.figures --name mnist cifar10         several runs, into runs/
    python -m appendix.figures --table results/table1-mnist.json    its curves, beside that file

Fig. 4, fig4.png: probe accuracy against t (top-1 solid, top-5 dashed), the paper's Table 2 as a
thin line; below it what v does for the network, of runs with choose.json. few.png: accuracy with
few labels, of runs with few.json (appendix.choose makes both). Fig. 5, fig5.png: t-SNE of the test
set at the chosen t; a grid method x data set for several runs. Fig. 6, fig6.png: training MSE, and
MSE by tenth of t. Fig. 7, fig7.png (fig7-NAME.png for several): t-SNE at all 11 t, the chosen one
framed. Figs. 4, 5 and 7 need probe.json: run probe.py first.

v_t is standardised by mean and std of a seeded sample of training images. Of more than 20 classes
a seeded 20 are shown, as in the paper.

Shapes: N images, V = 1024.
"""

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import train
from appendix.baselines import METHODS, PAPER, TIMELESS
from appendix.chart import (
    COLOURS,
    PALE,
    Canvas,
    Series,
    class_legend,
    line_panel,
    scatter_panel,
    style,
    text_width,
)
from appendix.tsne import tsne
from data import Split, fail, load, mix_seed, read_lines, sample
from probe import TIMES, encode, file_word, standardise
from train import RUNS, dier_loss, find_run, guard, load_model, pick_device, read_config

SHOWN = 20  # classes in Figs. 5 and 7, as in the paper
POINTS, POINTS_PANEL = 5_000, 1_000  # test images of Fig. 5 and of each panel of Fig. 7
STATISTICS = 5_000  # training images whose mean and std standardise the features
LEVELS = 200  # points of a training curve; more rows are averaged

# ---------------------------------------------------------------------------- reading runs


@dataclass
class Run:
    """What the figures need of a run's folder."""

    folder: Path
    settings: dict
    log: list[dict]  # rows of log.jsonl
    probe: dict | None  # probe.json, None where there is none
    gain: list[dict]  # rows of choose.json
    few: list[dict]  # rows of few.json

    @property
    def name(self) -> str:
        """NAME of runs/NAME."""
        return str(self.folder.relative_to(RUNS))

    @property
    def data(self) -> str:
        """The set's name; of a folder of images, its last part."""
        return Path(self.settings["data"]).name

    @property
    def timed(self) -> bool:
        """Does v depend on t?"""
        return self.settings["method"] not in TIMELESS

    @property
    def denoises(self) -> bool:
        """Is the loss that of Eq. 4.6, at a drawn t?"""
        return METHODS[self.settings["method"]][1] is dier_loss


def read_json(text: str) -> dict | None:
    """The object that a JSON text holds, None where it is damaged."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_run(folder: Path) -> Run:
    """Read the files of a run; says which cannot be read, and where they are of other steps than
    its probe. Exits where there is no config.json or it is of no method of this program."""
    settings = read_config(folder)
    if not settings:
        fail(f"{folder / 'config.json'} is not there or cannot be read: train that run anew")
    method = settings.get("method")
    if method not in METHODS:
        fail(f"{folder} is a run of {method}, which is none of {', '.join(METHODS)}")
    log = folder / "log.jsonl"
    rows = [read_json(line) for line in read_lines(log)]
    found = {}
    for stem in ("probe", "choose", "few"):
        path = folder / f"{stem}.json"
        text = "\n".join(read_lines(path))
        value = read_json(text)
        found[stem] = value if value and "rows" in value else None
        if text and found[stem] is None:
            print(f"{path} is left out: it cannot be read")
    probed = ((found["probe"] or {}).get("protocol") or {}).get("step")
    for stem in ("choose", "few"):
        step = (found[stem] or {}).get("step")
        if None not in (step, probed) and step != probed:
            print(f"{folder}/{stem}.json is of step {step:,}, probe.json of step {probed:,}")
    more = [(found[stem] or {}).get("rows", []) for stem in ("choose", "few")]
    return Run(folder, settings, [row for row in rows if row], found["probe"], *more)


def thin_out(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """Images seen and `key`, "loss" or a tenth of t, of log rows; where there are more, rows are
    averaged over LEVELS equal parts of the training, each by the number of its images. Rows
    without a value are left out."""
    if not rows:
        return [], []
    seen = np.array([row["images"] for row in rows])
    part = np.minimum(seen * LEVELS // seen[-1], LEVELS - 1)
    weight = np.diff(seen, prepend=0)
    values = [row["loss"] if key == "loss" else row["loss_by_t"][int(key)] for row in rows]
    y = np.array([np.nan if value is None else value for value in values], float)
    there = np.isfinite(y)
    groups = [np.flatnonzero(there & (part == k)) for k in np.unique(part[there])]
    xs = [float(np.average(seen[group], weights=weight[group])) for group in groups]
    ys = [float(np.average(y[group], weights=weight[group])) for group in groups]
    return xs, ys


# ---------------------------------------------------------------------------- Figs. 4 and 6


def save(canvas: Canvas, path: Path) -> None:
    """Write a figure and say where it is."""
    canvas.save(path)
    print(f"saved: {path}", flush=True)


def figure_4(runs: list[Run], path: Path) -> None:
    """Accuracy against t, a colour for each run; the paper's curve thin in the same colour. Below
    it the gain of v where it was measured, its 95% interval between thin lines."""
    paper, series, gains, colours = json.loads(PAPER.read_text()), [], [], {}
    for k, run in enumerate(runs):
        rows, (colour, shape) = run.probe["rows"], style(k)
        # The paper's curve has the colour of the set's first run; a folder has no such curve.
        colours.setdefault(run.settings["data"], colour)
        if not run.timed:  # one row, the same for every t: a level line
            rows = [{**rows[0], "t": t} for t in (TIMES[0], TIMES[-1])]
        for key in ("top1", "top5"):
            if rows[0][key] is not None:
                name, dashed = f"{run.name}, top-{key[-1]}", key == "top5"
                x, y = [row["t"] for row in rows], [row[key] for row in rows]
                series.append(Series(name, x, y, colour, dashed, shape=shape))
        for key in ("gain", "gain_low", "gain_high") if run.gain else ():
            x, y = [row["t"] for row in run.gain], [row[key] for row in run.gain]
            look = (2.0, shape) if key == "gain" else (0.7, None)
            gains.append(Series("", x, y, colour, False, *look))
    for data, colour in colours.items():
        curves = paper["table2"].get(data, {})
        for key in (key for key in ("top1", "top5") if key in curves):
            name, dashed = f"paper, {data}, top-{key[-1]}", key == "top5"
            series.append(Series(name, paper["t"], curves[key], colour, dashed, 1.0, None))
    legend = max(text_width(s.name, 14) for s in series)
    ticks = {t: str(t) for t in TIMES[::2]}
    canvas = Canvas(820 + legend, max(830 if gains else 510, 90 + 24 * len(series)))
    title, labels = "Linear probe accuracy by time (Fig. 4)", ("t of v_t", "test accuracy, %")
    line_panel(canvas, (90, 60, 740, 450), series, title, *labels, x_ticks=ticks)
    if gains:
        title, labels = "What v does: MSE with another image's v less its own", ("t", "gain of v")
        line_panel(canvas, (90, 550, 740, 770), gains, title, *labels, x_ticks=ticks)
    save(canvas, path)


def figure_few(runs: list[Run], path: Path) -> None:
    """Accuracy against labelled images a class, a panel for each run with few.json."""
    canvas = Canvas(400 * len(runs) + 120, 400)
    for k, run in enumerate(runs):
        each = sorted({row["each"] for row in run.few})
        ticks, series = {place: str(n) for place, n in enumerate(each)}, []
        for i, kind in enumerate(dict.fromkeys(row["features"] for row in run.few)):
            y = [row["accuracy"] for row in run.few if row["features"] == kind]
            colour, shape = style(i)
            name = kind if run is runs[-1] else ""
            series.append(Series(name, list(ticks), y, colour, kind != "v", shape=shape))
        box, labels = (400 * k + 90, 60, 400 * k + 390, 340), ("labelled images a class", "")
        line_panel(canvas, box, series, f"{run.name}: accuracy, %", *labels, x_ticks=ticks)
    save(canvas, path)


def figure_6(runs: list[Run], path: Path) -> None:
    """Training MSE and MSE by tenth of t against images seen, a row of panels for each run."""
    canvas = Canvas(1240, 400 * len(runs) + 20)
    for k, run in enumerate(runs):
        top, bottom = 60 + 400 * k, 340 + 400 * k
        title, unit = "training loss", "loss"
        if run.denoises:
            title, unit = "training MSE (Fig. 6)", "MSE of the noise"
        mean = Series("", *thin_out(run.log, "loss"), COLOURS[0], shape=None)
        box, labels = (90, top, 540, bottom), ("images seen", unit)
        line_panel(canvas, box, [mean], f"{run.name}: {title}", *labels, log_y=True)
        if not run.denoises:  # its loss knows no t
            continue
        tenths = []
        for i in range(10):
            x, y = thin_out(run.log, str(i))
            ends = ((0, 240), (68, 170), (120, 60))  # dark to light: the colour shows the order
            shade = "".join(f"{round(a + (b - a) * i / 9):02x}" for a, b in ends)
            name = f"t = {100 * i} to {100 * i + 99}"
            tenths.append(Series(name, x, y, f"#{shade}", shape=None))
        box = (640, top, 1060, bottom)
        line_panel(canvas, box, tenths, "the same by tenth of t", *labels, log_y=True)
    save(canvas, path)


def figure_table(path: Path) -> None:
    """Accuracy against FLOPs of training for each method of a table, means over its seeds, and its
    floors as dashed lines; written beside the table's file."""
    if path.suffix == ".png":  # the picture's own name
        fail(f"{path}: a table's file does not end in .png: rename it")
    try:
        table = json.loads(path.read_text())
        rows, cells = table["rows"], table["cells"]
        curves = {row["method"]: [] for row in rows if row["flops"]}
        for cell in cells:
            if cell["method"] in curves:
                curves[cell["method"]].append(cell["curve"])
    except (ValueError, KeyError, TypeError):
        fail(f"{path} is no table of appendix.baselines")
    if not curves:
        fail(f"{path} has no method that was trained yet")
    series = []
    for k, (method, runs) in enumerate(curves.items()):
        colour, shape = style(k)
        stages = list(zip(*runs))  # of each the points of all seeds
        x = [np.mean([point["flops"] / 1e12 for point in points]) for points in stages]
        y = [np.mean([point["top1"] for point in points]) for points in stages]
        series.append(Series(method, x, y, colour, shape=shape))
    most = max(x for line in series for x in line.x)
    floors = {row["method"]: row["top1"] for row in rows if not row["flops"]}
    for y in floors.values():
        series.append(Series("", [0, most], [y, y], PALE, True, 1.0, None))
    canvas = Canvas(820 + max(text_width(line.name, 14) for line in series), 560)
    title = f"{table['data']}: top-1 after a quarter, half and all of {table['epochs']:g} epochs"
    labels = ("TFLOP of training, forward and backward", "test accuracy, %")
    axes = line_panel(canvas, (90, 60, 740, 490), series, title, *labels)
    for k, (name, y) in enumerate(floors.items()):  # side by side, as floors lie close together
        x, y = axes.pixel(most, y)
        canvas.text((x - 80 * k, y - 2), name, 13, "rb")
    save(canvas, path.with_suffix(".png"))


# ---------------------------------------------------------------------------- Figs. 5 and 7


def some_classes(split: Split, limit: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Sorted indices of a seeded sample of test images, equal over the shown classes, and these
    classes."""
    rng = np.random.default_rng(mix_seed(seed, 5))
    classes = np.arange(len(split.class_names))
    if len(classes) > SHOWN:
        classes = np.sort(rng.choice(classes, SHOWN, replace=False))
    each = max(1, limit // len(classes))
    chosen = [rng.permutation(np.flatnonzero(split.labels == c))[:each] for c in classes]
    return np.sort(np.concatenate(chosen)), classes.tolist()


class Embedder:
    """v_t of a run's test images, standardised by its training images, and mapped to the plane."""

    def __init__(self, run: Run, device: torch.device):
        settings = run.settings
        model, saved = load_model(run.folder, METHODS[settings["method"]][0])
        if run.probe["protocol"].get("step", saved["step"]) != saved["step"]:
            print(f"{run.folder} was trained on after its probe: {probe_command(run)} probes anew")
        self.encoder, self.device = model.encoder, device
        where = (settings["size"], settings["channels"], Path(settings["data_dir"]))
        split, self.test = load(settings["data"], *where)
        if len(split.class_names) < 2:
            fail(f"{settings['data']} has no classes any more, and Figs. 5 and 7 need them")
        self.images = sample(split, STATISTICS, seed=0).images

    def features(self, index: np.ndarray, t: int) -> Tensor:
        """v_t of the test images at `index`, standardised: (N, V) fp32 on the CPU."""
        known = encode(self.encoder, self.images, t, self.device, f"train images, v_{t}")
        test = encode(self.encoder, self.test.images[index], t, self.device, f"test images, v_{t}")
        return standardise(known, test)[1].float().cpu()

    def embed(self, limit: int, seed: int, t: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """t-SNE at t: points (N, 2), labels (N,) in 0 .. len(names) - 1, and the classes' names."""
        index, classes = some_classes(self.test, limit, seed)
        labels = np.searchsorted(classes, self.test.labels[index])
        try:
            points = tsne(self.features(index, t))
        except ValueError as error:
            fail(f"{error}: give a larger --limit, if the set has more")
        return points.numpy(), labels, [self.test.class_names[c] for c in classes]


def places(runs: list[Run]) -> list[tuple[int, int]]:
    """(row, column) of each run in Fig. 5: a column for each data set, a row for each method, and
    further rows for further runs of both."""
    keys, sets = [], list(dict.fromkeys(run.data for run in runs))
    for run in runs:
        key = (run.settings["method"], 0, run.data)
        while key in keys:
            key = (key[0], key[1] + 1, key[2])
        keys.append(key)
    rows = list(dict.fromkeys(key[:2] for key in keys))
    return [(rows.index(key[:2]), sets.index(key[2])) for key in keys]


def figure_5(runs: list[Run], embedders: list[Embedder], limit: int, seed: int, path: Path) -> None:
    """t-SNE at the chosen t: one panel, or a grid with a row a method and a column a data set."""
    cells = places(runs)
    side, legend = (620 if len(runs) == 1 else 450), 190
    rows, columns = 1 + max(row for row, _ in cells), 1 + max(column for _, column in cells)
    canvas = Canvas((side + legend) * columns + 30, (side + 50) * rows + 40)
    canvas.text((20, 18), "t-SNE of v_t at the chosen t (Fig. 5)", 16, "lm")
    for run, embedder, (row, column) in zip(runs, embedders, cells):
        t = run.probe["chosen_t"]
        points, labels, names = embedder.embed(limit, seed, t)
        left, top = 20 + column * (side + legend), 66 + row * (side + 50)
        title = f"{run.name}, t = {t}" if run.timed else f"{run.name}, the same v for all t"
        title += f", {len(points):,} test images"
        radius = 2.2 if len(points) > 2000 else 3.2
        scatter_panel(canvas, (left, top, left + side, top + side), points, labels, title, radius)
        class_legend(canvas, (left + side + 20, top + 14), names)
    save(canvas, path)


def figure_7(run: Run, embedder: Embedder, limit: int, seed: int, path: Path) -> None:
    """t-SNE at all 11 t, the chosen one framed."""
    side, columns = 280, 4
    canvas = Canvas(columns * (side + 16) + 24, 3 * (side + 44) + 30)
    title = f"{run.name}: t-SNE of v_t (Fig. 7), the chosen t framed"
    canvas.text((20, 18), title, 16, "lm", room=canvas.size[0] - 40)
    top1 = {row["t"]: row["top1"] for row in run.probe["rows"]}
    for k, t in enumerate(TIMES):
        points, labels, names = embedder.embed(limit, seed, t)
        left, top = 20 + k % columns * (side + 16), 66 + k // columns * (side + 44)
        box = (left, top, left + side, top + side)
        title = f"t = {t}, top-1 {top1[t]:.1f}%" if t in top1 else f"t = {t}"
        scatter_panel(canvas, box, points, labels, title, 2.2)
        if t == run.probe["chosen_t"]:
            canvas.frame(box, COLOURS[1], 4)
    left, top = 20 + 3 * (side + 16), 66 + 2 * (side + 44)  # the twelfth place
    wide = side if len(names) <= SHOWN // 2 else side / 2
    class_legend(canvas, (left + 16, top + 16), names, SHOWN // 2, wide)
    save(canvas, path)


# ---------------------------------------------------------------------------- command line


def probe_command(run: Run) -> str:
    """What makes the probe.json of a run."""
    if run.settings["method"] != "dier":
        return "its table's command, when stage-1.json and cell.json there are deleted,"
    return f"python probe.py --name {shlex.quote(run.name)}"


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its unit and default."""
    p = train.Parser(__doc__, prog="python -m appendix.figures")
    add = p.add_argument
    add("--name", nargs="+", help="runs in runs/NAME (the newest)")
    add("--table", type=Path, help="draw the curves of this file of appendix.baselines, no run")
    limit = f"test images in t-SNE, equal over the classes ({POINTS}; {POINTS_PANEL} in Fig. 7)"
    add("--limit", type=train.positive_int, help=limit)
    add("--seed", type=train.natural, help="of the samples (0)")
    add("--device", help="auto, cpu, cuda (auto)")
    return p


def main(argv: list[str] | None = None) -> None:
    """Draw what the runs' folders allow; say what is missing."""
    typed = vars(build_parser().parse_args(argv))
    if "table" in typed:
        figure_table(typed["table"])
        return
    device, seed = pick_device(typed.get("device", "auto")), typed.get("seed", 0)
    runs = [read_run(find_run(name)) for name in dict.fromkeys(typed.get("name", [None]))]
    folder = runs[0].folder if len(runs) == 1 else RUNS
    for run in runs:
        if not run.log:
            print(f"{run.name} is not in Fig. 6: {run.folder / 'log.jsonl'} has no rows")
    if logged := [run for run in runs if run.log]:
        figure_6(logged, folder / "fig6.png")
    for run in runs:
        if run.settings["method"] == "tokenizer":
            fail(f"{run.name} is a tokenizer, which makes codes and no v to probe")
        if run.probe is None:
            if run.settings.get("class_names") == []:
                fail(f"{run.name} has no classes, and Figs. 4, 5 and 7 need them")
            fail(f"no {run.folder / 'probe.json'}: {probe_command(run)} makes it")
    figure_4(runs, folder / "fig4.png")
    if few := [run for run in runs if run.few]:
        figure_few(few, folder / "few.png")
    embedders = [Embedder(run, device) for run in runs]
    figure_5(runs, embedders, typed.get("limit", POINTS), seed, folder / "fig5.png")
    for run, embedder in zip(runs, embedders):
        if not run.timed:
            print(f"no Fig. 7 of {run.name}: {run.settings['method']} has one v for all t")
            continue
        name = "fig7.png" if len(runs) == 1 else f"fig7-{file_word(run.name)}.png"
        figure_7(run, embedder, typed.get("limit", POINTS_PANEL), seed, folder / name)


if __name__ == "__main__":
    guard(main, "a smaller --limit")
