"""The paper's figures from the folders of runs, drawn with Pillow.

    python -m appendix.figures                              the newest run
    python -m appendix.figures --run mnist                  into runs/mnist/
    python -m appendix.figures --run mnist cifar10          several runs, into results/

Fig. 4, fig4.png: probe accuracy against t (top-1 solid, top-5 dashed), the paper's Table 2 as a
thin line. Fig. 5, fig5.png: t-SNE of the test set at the chosen t; a grid method x data set for
several runs. Fig. 6, fig6.png: training MSE, and MSE by tenth of t. Fig. 7, fig7.png
(fig7-NAME.png for several): t-SNE at all 11 t, the chosen one framed. Figs. 4, 5 and 7 need
probe.json: run probe.py first.

v_t is standardised by mean and std of a seeded sample of training images. Of more than 20 classes
a seeded 20 are shown, as in the paper.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from appendix.chart import (
    COLOURS,
    Canvas,
    Series,
    class_legend,
    line_panel,
    scatter_panel,
)
from appendix.methods import method_of
from appendix.tsne import tsne
from data import Split, load, mix_seed
from features import encode, standardise, to_channels
from log import Progress
from probe import TIMES
from runs import (
    Parser,
    count,
    fail,
    find_run,
    pick_device,
    read_checkpoint,
    restore_model,
    run_main,
    whole,
)

PAPER = Path(__file__).resolve().parent.parent / "results" / "paper.json"
SHOWN = 20  # classes in Figs. 5 and 7, as in the paper
POINTS, POINTS_PANEL = 5_000, 1_000  # test images of Fig. 5 and of each panel of Fig. 7
STATISTICS = 5_000  # training images whose mean and std standardise the features
LEVELS = 200  # points of a training curve; more are averaged


# ---------------------------------------------------------------------------- reading runs


class Run:
    """What the figures need of a run's folder."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        self.state = read_checkpoint(path)
        self.settings = self.state["settings"]
        self.timed = method_of(self.settings).timed
        self.probe = read_json(path / "probe.json")
        log = path / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        self.log = [json.loads(line) for line in lines]

    def encoder(self) -> torch.nn.Module:
        """The encoder with its EMA weights."""
        return restore_model(self.state, method_of(self.settings)).encoder


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file, None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def thin_out(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """images and `key` of log rows, averaged so that at most LEVELS points are left; rows without
    a value are left out. `key` may be "loss" or a tenth of t."""
    picked = [(r["images"], r["loss"] if key == "loss" else r["loss_by_t"][int(key)]) for r in rows]
    picked = [(x, y) for x, y in picked if y is not None]
    parts = np.array_split(np.array(picked).reshape(-1, 2), min(LEVELS, max(1, len(picked))))
    means = [part.mean(0) for part in parts if len(part)]
    return [float(m[0]) for m in means], [float(m[1]) for m in means]


# ---------------------------------------------------------------------------- Figs. 4 and 6


def figure_4(runs: list[Run], path: Path) -> None:
    """Accuracy against t, a colour for each run; the paper's curve thin in the same colour."""
    paper = read_json(PAPER)
    series = []
    for k, run in enumerate(runs):
        rows, colour = run.probe["rows"], COLOURS[k % len(COLOURS)]
        if not run.timed:  # one row, the same for every t: a level line
            rows = [{**rows[0], "t": t} for t in (TIMES[0], TIMES[-1])]
        t = [row["t"] for row in rows]
        series.append(Series(f"{run.name}, top-1", t, [row["top1"] for row in rows], colour))
        if rows[0]["top5"] is not None:
            top5 = [row["top5"] for row in rows]
            series.append(Series(f"{run.name}, top-5", t, top5, colour, dashed=True))
    for data in dict.fromkeys(run.settings["data"] for run in runs):
        first = next(k for k, run in enumerate(runs) if run.settings["data"] == data)
        colour = COLOURS[first % len(COLOURS)]
        for key in ("top1", "top5") if data in paper["table2"] else ():
            if key in paper["table2"][data]:
                name = f"paper, {data}, top-{key[-1]}"
                y = paper["table2"][data][key]
                series.append(Series(name, paper["t"], y, colour, key == "top5", 1.0, None))
    canvas = Canvas(1000, 540)
    line_panel(
        canvas, (90, 60, 740, 450), series, "Linear probe accuracy by time (Fig. 4)",
        "t of v_t", "test accuracy, %", x_ticks=TIMES[::2] + TIMES[-1:],
    )  # fmt: skip
    canvas.save(path)


def figure_6(runs: list[Run], path: Path) -> None:
    """Training MSE and MSE by tenth of t against images seen, a row of panels for each run."""
    canvas = Canvas(1240, 400 * len(runs) + 20)
    for k, run in enumerate(runs):
        top, bottom = 60 + 400 * k, 340 + 400 * k
        rows = [row for row in run.log if row["step"] % 50 == 0] or run.log
        whole_loss = Series("", *thin_out(rows, "loss"), COLOURS[0], shape=None)
        denoises = method_of(run.settings).denoises
        what = (
            ("training MSE (Fig. 6)", "MSE of the noise") if denoises else ("training loss", "loss")
        )
        line_panel(
            canvas, (90, top, 540, bottom), [whole_loss], f"{run.name}: {what[0]}",
            "images seen", what[1], log_y=True,
        )  # fmt: skip
        if not denoises:  # its loss knows no t
            continue
        tenths = []
        for i in range(10):  # dark to light: the colour shows the order
            ends = ((0, 240), (68, 170), (120, 60))
            shade = "".join(f"{round(a + (b - a) * i / 9):02x}" for a, b in ends)
            x, y = thin_out(rows, str(i))
            if x:
                name = f"t = {100 * i} to {100 * i + 99}"
                tenths.append(Series(name, x, y, f"#{shade}", shape=None))
        line_panel(
            canvas, (640, top, 1060, bottom), tenths, "the same by tenth of t",
            "images seen", "MSE of the noise", log_y=True,
        )  # fmt: skip
    canvas.save(path)


# ---------------------------------------------------------------------------- Figs. 5 and 7


def some_classes(split: Split, limit: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Indices of a seeded sample of test images, equal over the shown classes, and these classes'
    names; labels of the sample are positions in that list."""
    rng = np.random.default_rng(mix_seed(seed, 5))
    classes = np.arange(len(split.class_names))
    if len(classes) > SHOWN:
        classes = np.sort(rng.choice(classes, SHOWN, replace=False))
    each = max(1, limit // len(classes))
    chosen = [rng.permutation(np.flatnonzero(split.labels == c))[:each] for c in classes]
    return np.sort(np.concatenate(chosen)), [split.class_names[c] for c in classes]


class Embedder:
    """v_t of a run's test images, standardised by its training images."""

    def __init__(self, run: Run, device: torch.device):
        settings = run.settings
        where = (settings["size"], Path(settings["data_dir"]))
        self.device, self.encoder = device, run.encoder().to(device)
        self.test = load(settings["data"], "test", *where)
        train = load(settings["data"], "train", *where, STATISTICS)
        self.images = to_channels(self.test, settings["channels"])
        self.train_images = to_channels(train, settings["channels"])

    def __call__(self, index: np.ndarray, t: int | None) -> Tensor:
        """(N, V) of the test images at `index`."""
        sets = [(self.train_images, "training sample"), (self.images[index], "test images")]
        values = [encode(self.encoder, x, [t], self.device, None, name) for x, name in sets]
        standardise(*values)
        return values[1][:, 0].float().cpu()


def embed(embedder: Embedder, limit: int, seed: int, t: int | None) -> tuple[np.ndarray, ...]:
    """t-SNE at t: points (N, 2), labels (N,) and the classes' names."""
    index, names = some_classes(embedder.test, limit, seed)
    order = {embedder.test.class_names.index(name): k for k, name in enumerate(names)}
    labels = np.array([order[label] for label in embedder.test.labels[index]])
    points = tsne(embedder(index, t), show=Progress().show)
    return points.numpy(), labels, names


def figure_5(runs: list[Run], embedders: list[Embedder], args: argparse.Namespace, path: Path):
    """t-SNE at the chosen t: one panel, or a grid with a row a method and a column a data set."""
    methods = list(dict.fromkeys(run.settings["method"] for run in runs))
    sets = list(dict.fromkeys(run.settings["data"] for run in runs))
    side, legend = (620, 190) if len(runs) == 1 else (420, 190)
    canvas = Canvas((side + legend) * len(sets) + 40, (side + 60) * len(methods) + 20)
    for run, embedder in zip(runs, embedders):
        points, labels, names = embed(embedder, args.limit or POINTS, args.seed, chosen_t(run))
        column, row = sets.index(run.settings["data"]), methods.index(run.settings["method"])
        left, top = 20 + column * (side + legend), 50 + row * (side + 60)
        title = f"{run.settings['data']}, {run.settings['method']}: t-SNE of v"
        title += f"_t at t = {chosen_t(run)}" if run.timed else ""
        title += f", {len(points):,} test images"
        scatter_panel(
            canvas, (left, top, left + side, top + side), points, labels, title,
            2.2 if len(points) > 2000 else 3.2,
        )  # fmt: skip
        class_legend(canvas, (left + side + 20, top + 14), names)
    canvas.save(path)


def figure_7(run: Run, embedder: Embedder, args: argparse.Namespace, path: Path) -> None:
    """t-SNE at all 11 t, the chosen one framed."""
    side, columns = 280, 4
    canvas = Canvas(columns * (side + 16) + 24, 3 * (side + 44) + 30)
    canvas.text((20, 18), f"{run.name}: t-SNE of v_t (Fig. 7), the chosen t framed", 16, "lm")
    for k, t in enumerate(TIMES):
        points, labels, names = embed(embedder, args.limit or POINTS_PANEL, args.seed, t)
        left, top = 20 + k % columns * (side + 16), 66 + k // columns * (side + 44)
        box = (left, top, left + side, top + side)
        top1 = {row["t"]: row["top1"] for row in run.probe["rows"]}.get(t)
        title = f"t = {t}" + (f", top-1 {top1:.1f}%" if top1 is not None else "")
        scatter_panel(canvas, box, points, labels, title, 2.2)
        if t == chosen_t(run):
            canvas.frame(box, COLOURS[1], 4)
    left, top = 20 + 3 * (side + 16), 66 + 2 * (side + 44)
    class_legend(canvas, (left + 16, top + 16), names, (len(names) + 1) // 2, side // 2)
    canvas.save(path)


def chosen_t(run: Run) -> int | None:
    """The t that the probe chose, None for a method without time."""
    return run.probe["chosen_t"]


# ---------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its unit and default."""
    p = Parser(prog="python -m appendix.figures", description="The paper's figures of runs.")
    p.add_argument("--run", nargs="+", metavar="RUN", help="names or paths (the newest)")
    p.add_argument("--limit", type=whole,
                   help=f"test images in t-SNE, equal over the classes ({POINTS:,} for Fig. 5, "
                   f"{POINTS_PANEL:,} for each panel of Fig. 7)")  # fmt: skip
    p.add_argument("--seed", type=count, default=0, help="of the samples (0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    return p


def main(argv: list[str] | None = None) -> None:
    """Draw what the runs' folders allow; say what is missing."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    runs = [Run(find_run(name)) for name in args.run or [None]]
    folder = runs[0].path if len(runs) == 1 else Path("results")
    if any(run.log for run in runs):
        figure_6([run for run in runs if run.log], folder / "fig6.png")
        print(f"saved: {folder / 'fig6.png'}")
    missing = [run.name for run in runs if run.probe is None]
    if missing:
        first = next(run for run in runs if run.probe is None)
        command = f"{method_of(first.settings).probe} --run {first.path}"
        fail(f"no probe.json in {', '.join(missing)}: python {command} first")
    figure_4(runs, folder / "fig4.png")
    print(f"saved: {folder / 'fig4.png'}")
    embedders = [Embedder(run, device) for run in runs]
    figure_5(runs, embedders, args, folder / "fig5.png")
    print(f"saved: {folder / 'fig5.png'}")
    for run, embedder in zip(runs, embedders):
        if not run.timed:
            print(f"no Fig. 7 of {run.name}: {run.settings['method']} has one v for all t")
            continue
        path = folder / ("fig7.png" if len(runs) == 1 else f"fig7-{run.name}.png")
        figure_7(run, embedder, args, path)
        print(f"saved: {path}")


if __name__ == "__main__":
    run_main(main)
