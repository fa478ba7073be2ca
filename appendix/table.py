"""Table 1 for one machine: every method at the same budget, probed in the same way.

A cell is one method and one seed. The file that baselines.py --table writes, by default
runs/table1-DATA.json (results/ has those that README.md shows), has in "rows" for each method
{method, parameters, flops_per_image, images_per_s, images_seen, top1, top1_std, oracle, knn, paper,
reported}: means over the seeds, top1 the test accuracy at the t that held-out training
images choose, oracle the best t on the test set, knn at the chosen t, paper the paper's number;
null is the std of one seed and what a method does not have. Accuracies in percent; flops_per_image
is forward and backward of training. "cells" holds what the rows are made of. `reported` rows are
the paper's numbers alone: CAE and MAGE need a tokenizer and LMIM-Swin a Swin, which are not here.

Floors are rows too: `untrained` and `random` (probe.py) are DiER's encoder, `pca` is raw pixels on
at most 1,024 principal components of the probe's training images, `pixels` raw pixels.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import probe
import train
from appendix.counts import flops_per_image
from appendix.methods import METHODS
from data import load
from features import raw_pixels, small_pixels
from files import written_whole
from model import V, count_parameters
from parallel import world_from_environment
from runs import RUNS, fail, parameter_counts, read_checkpoint, resolve, restore_model

LABELS = 10_000  # training images that the probe sees, and test images
TIMES = "0,100,400,999"
# Flags that --table does not take: it sets them for each cell, or not all methods know them.
FIXED = ("run", "resume", "method", "model", "dry_run", "json", "dropout", "checkpoint_activations")
# Flags that change what a cell is, beside those that are resolved; all cells of a file share them.
GIVEN = ("lr", "batch_size", "ema", "clip", "flip", "limit", "accum", "compile")
FLOORS = ("untrained", "random", "pca", "pixels")
SEEDLESS = ("pca", "pixels")  # the same for every seed
PAPER = Path(__file__).resolve().parent.parent / "results" / "paper.json"
PAPER_NAMES = {
    "dier": "DiER", "diffae": "Diff-AE", "mae": "MAE", "lmim": "LMIM-ViT", "dmjd": "DMJD",
    "CAE": "CAE", "MAGE": "MAGE", "LMIM-Swin": "LMIM-Swin",
}  # fmt: skip
REPORTED = ("CAE", "MAGE", "LMIM-Swin")
MEANS = ("images_per_s", "images_seen", "top1", "oracle", "knn")


# ---------------------------------------------------------------------------- floors without a net


class Pixels(nn.Module):
    """Raw pixels in the place of an encoder: (B, C, H, W), (B,) -> (B, C * h * w)."""

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        """As the class says, at 32 x 32 or less."""
        return small_pixels(x0)


class PCA(nn.Module):
    """Raw pixels on their first components, at most 1,024: (B, C, H, W), (B,) -> (B, P).

    images: float (N, D), the pixels of the training set.
    """

    def __init__(self, images: Tensor):
        super().__init__()
        images = images.double()
        mean = images.mean(0)
        _, vectors = torch.linalg.eigh((images - mean).T @ (images - mean))  # ascending
        self.register_buffer("mean", mean.float())
        self.register_buffer("components", vectors.flip(1)[:, :V].float())  # (D, P)

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        """As the class says."""
        return (small_pixels(x0) - self.mean) @ self.components


def floor_encoder(name: str, settings: dict[str, Any]) -> nn.Module:
    """What stands in the encoder's place for a row of FLOORS."""
    if name == "pixels":
        return Pixels()
    if name == "pca":
        where = (settings["size"], Path(settings["data_dir"]), LABELS)
        split = load(settings["data"], "train", *where)
        return PCA(raw_pixels(split.images)[:, 0].float())
    return probe.untrained_encoder(settings, name == "random")


# ---------------------------------------------------------------------------- cells


def cell_args(args: argparse.Namespace, name: str, seed: int) -> argparse.Namespace:
    """The flags of one cell's training: its run is a folder below runs/, named after the table."""
    run = RUNS / args.out.stem / f"{name}-{seed}"
    return argparse.Namespace(**{**vars(args), "run": str(run), "seed": seed, "json": False})


def run_cell(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train one method with one seed from the start and probe it; returns the cell."""
    own = cell_args(args, name, seed)
    run = Path(own.run)
    if run.exists():  # left by a table that was stopped here
        shutil.rmtree(run)
    cell: dict[str, Any] = {"method": name, "seed": seed}
    if name in FLOORS:
        settings, step = resolve(own), 0
        encoder = floor_encoder(name, settings)
        cell |= {"parameters": count_parameters(encoder), "flops_per_image": None}
        cell |= {"images_per_s": None, "images_seen": 0}
        timed = name == "random"  # the branches of `untrained` are off, so it has no time either
    else:
        method = METHODS[name]
        result = train.start(own, method)
        state = read_checkpoint(run)
        settings, step, timed = state["settings"], state["step"], method.timed
        encoder = restore_model(state, method).encoder
        cell |= {"parameters": sum(parameter_counts(settings, method).values())}
        cell |= {"flops_per_image": flops_per_image(settings, method)}
        cell |= {"images_per_s": result["images"] / result["seconds"]}
        cell |= {"images_seen": result["images"]}
    return cell | scores(args, encoder, timed, settings, step, run)


def scores(
    args: argparse.Namespace,
    encoder: nn.Module,
    timed: bool,
    settings: dict[str, Any],
    step: int,
    run: Path,
) -> dict[str, Any]:
    """Probe the encoder at TIMES, or once; returns top1, oracle, knn, chosen_t and the rows."""
    flags = ["--limit", str(LABELS), "--device", args.device, "--amp", args.amp]
    times = probe.parse_times(TIMES) if timed else [None]
    found = probe.probe(
        encoder, {}, times, probe.build_parser().parse_args(flags), settings, step, run
    )
    chosen = next(row for row in found["rows"] if row["t"] == found["chosen_t"])
    return {
        "top1": chosen["top1"], "oracle": found["oracle_top1"], "knn": chosen["knn"],
        "chosen_t": chosen["t"], "probe": found["rows"],
    }  # fmt: skip


# ---------------------------------------------------------------------------- the table


def make_rows(cells: list[dict[str, Any]], data: str) -> list[dict[str, Any]]:
    """A row for each method that has a cell, in the order of METHODS and FLOORS, then the rows
    that the paper alone reports."""
    paper = {name: row.get(data) for name, row in json.loads(PAPER.read_text())["table1"].items()}
    rows = []
    for name in [*METHODS, *FLOORS, *REPORTED]:
        own = [cell for cell in cells if cell["method"] == name]
        if not own and name not in REPORTED:
            continue
        row: dict[str, Any] = {"method": name}
        for key in ("parameters", "flops_per_image"):
            row[key] = own[0][key] if own else None
        for key in MEANS:
            values = [cell[key] for cell in own if cell[key] is not None]
            row[key] = statistics.mean(values) if values else None
        row["top1_std"] = statistics.stdev(c["top1"] for c in own) if len(own) > 1 else None
        row |= {"paper": paper.get(PAPER_NAMES.get(name)), "reported": name in REPORTED}
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table as text, - where a method has no such number."""

    def text(value: float | None, form: str, unit: float = 1.0) -> str:
        """A number of nine places."""
        return f"{'-':>9}" if value is None else f"{value / unit:{form}}".rjust(9)

    print(f"\n{'method':18}{'M params':>9}{'MFLOP':>9}{'images/s':>9}{'1000 seen':>10}"
          f"{'top-1':>9}{'std':>9}{'oracle':>9}{'kNN':>9}{'paper':>9}")  # fmt: skip
    for r in rows:
        print(
            f"{r['method']:18}{text(r['parameters'], '.2f', 1e6)}"
            f"{text(r['flops_per_image'], ',.1f', 1e6)}{text(r['images_per_s'], ',.0f')}"
            f" {text(r['images_seen'], ',.0f', 1e3)}{text(r['top1'], '.2f')}"
            f"{text(r['top1_std'], '.2f')}{text(r['oracle'], '.2f')}{text(r['knn'], '.2f')}"
            f"{text(r['paper'], '.1f')}" + " (reported, not run)" * r["reported"]
        )


def parse_names(text: str | None) -> list[str]:
    """ "dier,mae" -> the methods and floors of the table; None -> all of them."""
    known = [*METHODS, *FLOORS]
    names = text.split(",") if text is not None else known
    for name in names:
        if name not in known:
            fail(f"--methods {text}: {name!r} is not one of {', '.join(known)}")
    return list(dict.fromkeys(names))


def head(args: argparse.Namespace) -> dict[str, Any]:
    """What the whole table has in common, and what a table that goes on must agree with."""
    settings = resolve(argparse.Namespace(**vars(args)))
    keys = ("data", "preset", "size", "minutes", "epochs", "device", "amp")
    common = {key: settings[key] for key in keys}
    common |= {"given": {key: getattr(args, key) for key in GIVEN}}
    return {
        "what": "Table 1 on one machine: equal time or epochs for each method, linear probe",
        **common,
        "threads": torch.get_num_threads(),
        "probe": f"t = {TIMES} for methods with time, {LABELS:,} labels, 100 epochs, standardised",
    }


def read_cells(path: Path, common: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of a table that was begun; exits where it was begun with other settings."""
    if not path.exists():
        return []
    try:
        table = json.loads(path.read_text())
        cells, old = table["cells"], {key: table.get(key) for key in common}
    except (ValueError, KeyError, TypeError):
        fail(f"{path} is not a table of this command: choose another --out")
    for key, value in common.items():
        if old[key] != value:
            fail(f"{path} was begun with {key} {old[key]}, not {value}: choose another --out")
    return cells


def make_table(args: argparse.Namespace, names: list[str]) -> None:
    """Run the cells that the file does not have yet, one by one; write and print the table."""
    for flag in FIXED:
        if getattr(args, flag) not in (None, "") and getattr(args, flag) is not False:
            fail(f"--table chooses --{flag.replace('_', '-')} itself: leave it out")
    if args.seed is not None or world_from_environment().size > 1:
        fail("--table runs seeds 0 .. N - 1 of --seeds N, in one process")
    args.data = args.data or "glyphs"
    args.out = args.out or RUNS / f"table1-{Path(args.data).name}.json"
    common, command = head(args), "python -m appendix.baselines " + " ".join(sys.argv[1:])
    cells = read_cells(args.out, common)
    order = [(seed, name) for seed in range(args.seeds or 1) for name in names]
    for seed, name in order:
        done = any((cell["seed"], cell["method"]) == (seed, name) for cell in cells)
        if done or (seed and name in SEEDLESS):
            continue
        print(f"\n=== {name}, seed {seed}", flush=True)
        cells.append(run_cell(args, name, seed))
        seeds = 1 + max(cell["seed"] for cell in cells)
        table = {
            **common,
            "command": command,
            "seeds": seeds,
            "rows": make_rows(cells, args.data),
            "cells": cells,
        }
        with written_whole(args.out) as temporary:
            temporary.write_text(json.dumps(table, indent=1) + "\n")
    print_rows(make_rows(cells, args.data))
    print(f"saved: {args.out}")
