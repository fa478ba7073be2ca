"""Train and probe what DiER is compared with: Table 1 for this machine.

    python -m appendix.baselines --data mnist                  all methods, the preset's epochs
    python -m appendix.baselines --data mnist --method diffae mae
    python -m appendix.baselines --data mnist --epochs 1000 --minutes 3 --seeds 2    equal time
    python -m appendix.baselines --data mnist --method dier dier-notime --out runs/time.json

    dier                the program's own
    dier-notime         the same network, its encoder always told that t = 0: one v for all noise
    dier-unet           DiER's encoder on Diff-AE's U-Net; dier-unet-notime: told that t = 0
    diffae              Diff-AE, the paper's baseline (unet.py)
    mae, lmim, dmjd     masked image modelling on a ViT (masked.py)
    supervised          DiER's encoder at t = 0, trained on labels: a ceiling, not a competitor

Floors: `untrained` and `random` (probe.py) are DiER's encoder, `pixels` raw pixels, `pca` raw
pixels on at most 1,024 principal components of the probe's training images.

A cell is one method with one seed. Its run, runs/baselines/TABLE-METHOD-SEED/, holds what train.py
and probe.py leave; TABLE is the name of the table's file, by default runs/baselines/DATA.json. The
file is written after each cell. After Ctrl-C or a crash type the command again: a finished cell is
not run again, the cell in work goes on from its checkpoint.

"rows" of the file has for each method {method, parameters, flops_per_image, images_per_s,
images_seen, top1, top1_std, oracle, knn, paper, reported}, means over the seeds: top1 is the test
accuracy at the t that held-out training images choose, oracle that of the best t on the test set,
knn is at the chosen t, paper the paper's number; null is the std of one seed and what a method does
not have. Accuracies in percent; FLOPs of forward and backward. `reported` rows are the paper's
numbers alone: CAE and MAGE need a tokenizer, LMIM-Swin a Swin. "cells" holds the single runs.

Shapes: B batch, C channels, H W pixels, N images, V = 1024, K classes, P principal components.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import data
import probe
import train
from appendix.masked import DMJD, LMIM, MAE, vit_config
from appendix.unet import build_dier_unet, build_diffae
from data import fail, replace_file
from diffusion import T
from model import DiER, Encoder, ModelConfig, V
from train import RUNS, dier_loss, model_config

CPU_LR = 1e-3  # of preset cpu, but for dier, dier-notime and supervised
LABELS = 10_000  # training images that the probe sees, and test images
TIMES = [0, 100, 400, 999]
PAPER = Path(__file__).resolve().parent.parent / "results" / "paper.json"
PAPER_NAMES = {"dier": "DiER", "diffae": "Diff-AE", "mae": "MAE", "lmim": "LMIM-ViT"}
PAPER_NAMES |= {"dmjd": "DMJD", "CAE": "CAE", "MAGE": "MAGE", "LMIM-Swin": "LMIM-Swin"}
REPORTED = ("CAE", "MAGE", "LMIM-Swin")

# ---------------------------------------------------------------------------- methods


class TimelessEncoder(Encoder):
    """DiER's encoder with the same parameters, always told that t = 0: (B, C, H, W), (B,) ->
    (B, V), the same for every t."""

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        return super().forward(x0, torch.zeros_like(t))


class Supervised(nn.Module):
    """DiER's encoder at t = 0 and a linear classifier on v: x0 (B, C, H, W) -> logits (B, K)."""

    def __init__(self, cfg: ModelConfig, classes: int):
        super().__init__()
        self.encoder = TimelessEncoder(cfg)
        self.classifier = nn.Linear(V, classes)

    def forward(self, x0: Tensor) -> Tensor:
        t = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
        return self.classifier(self.encoder(x0, t))


def own_loss(net: nn.Module, x0: Tensor, *_: Tensor) -> Tensor:
    """The loss of a method that computes its own: net(x0), x0 (B, C, H, W) -> (B,)."""
    return net(x0)


def label_loss(net: nn.Module, x0: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
    """Cross entropy in fp32 for each image: x0 (B, C, H, W), labels (B,) -> (B,)."""
    return F.cross_entropy(net(x0).float(), labels, reduction="none")


# name -> (settings -> a module whose `encoder` maps (x0, t) to v, the loss as train.py's loop calls
# it). The loss of `supervised` takes labels in the place of t: it has a loop of its own below.
METHODS: dict[str, tuple[Callable[[dict], nn.Module], Callable[..., Tensor]]] = {
    "dier": (train.build_dier, dier_loss),
    "dier-notime": (lambda s: DiER(model_config(s), TimelessEncoder), dier_loss),
    "dier-unet": (build_dier_unet, dier_loss),
    "dier-unet-notime": (partial(build_dier_unet, encoder=TimelessEncoder), dier_loss),
    "diffae": (build_diffae, dier_loss),
    "mae": (lambda s: MAE(vit_config(s)), own_loss),
    "lmim": (lambda s: LMIM(vit_config(s)), own_loss),
    "dmjd": (lambda s: DMJD(vit_config(s)), own_loss),
    "supervised": (lambda s: Supervised(model_config(s), len(s["class_names"])), label_loss),
}
FLOORS = ("untrained", "random", "pca", "pixels")
SEEDLESS = ("pca", "pixels")  # the same for every seed
# Their v does not depend on t, so they are probed at t = 0. `untrained` is among them because time
# enters through residual branches, which are off at initialisation.
TIMELESS = ("dier-notime", "dier-unet-notime", "diffae", "mae", "lmim", "dmjd", "supervised")
TIMELESS += ("untrained", "pca", "pixels")


def method_settings(name: str, typed: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a run of METHODS or FLOORS, as train.py resolves what was typed. The sizes
    of U-Nets and ViTs are not among them: unet.py and masked.py have a table each."""
    settings = train.resolve(typed) | {"method": name}
    if settings["preset"] == "cpu" and name not in ("dier", "dier-notime", "supervised"):
        settings["lr"] = CPU_LR
    return settings


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    """The module of a method; exits where its sizes do not fit."""
    try:
        return METHODS[name][0](settings)
    except ValueError as error:
        fail(f"{name}: {error}")


def flops_per_image(name: str, settings: dict[str, Any]) -> int:
    """Floating point operations of forward and backward for one training image, counted on the meta
    device, where tensors have shapes and no numbers."""
    with torch.device("meta"):
        net = build(name, settings)
        x0 = torch.empty(2, settings["channels"], settings["size"], settings["size"])
        t, abar = torch.zeros(2, dtype=torch.int64), torch.empty(T)  # t stands for labels, too
    with FlopCounterMode(display=False) as counter:
        METHODS[name][1](net, x0, t, x0, abar).mean().backward()
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------------------- floors without a net


class Pixels(nn.Module):
    """Raw pixels in the place of an encoder: (B, C, H, W), (B,) -> (B, C * h * w), averaged to
    32 x 32 if they are more."""

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        if x0.shape[2] > probe.PIXELS:
            x0 = F.interpolate(x0, (probe.PIXELS, probe.PIXELS), mode="area")
        return x0.flatten(1)


class PCA(Pixels):
    """Raw pixels on their first components, at most 1,024: (B, C, H, W), (B,) -> (B, P).

    pixels: float (N, C * h * w), those of the training images.
    """

    def __init__(self, pixels: Tensor):
        super().__init__()
        pixels = pixels.double()
        mean = pixels.mean(0)
        _, vectors = torch.linalg.eigh((pixels - mean).T @ (pixels - mean))  # ascending
        self.register_buffer("mean", mean.float())
        self.register_buffer("components", vectors.flip(1)[:, :V].float())  # (C * h * w, P)

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        # In half precision the rounding of bright pixels would drown the small components.
        with torch.autocast(x0.device.type, enabled=False):
            return (super().forward(x0, t) - self.mean) @ self.components


def floor_encoder(name: str, settings: dict[str, Any], split: data.Split) -> nn.Module:
    """The encoder of a row of FLOORS; `split` has the training images of the probe."""
    if name == "pixels":
        return Pixels()
    if name == "pca":
        return PCA(probe.raw_pixels(split.images).float())
    return probe.untrained_encoder(settings, name == "random")


# ---------------------------------------------------------------------------- a cell


def train_supervised(
    net: nn.Module, split: data.Split, settings: dict, folder: Path, saved: dict | None = None
) -> tuple[int, float, int]:
    """train.py's `train`, shorter, for the loss that needs labels: one process, the same batches,
    update, log and checkpoint. It saves at rows only, where the sums have just been read."""
    batch, seed, amp = (settings[key] for key in ("batch_size", "seed", "amp"))
    device, n = train.pick_device(settings["device"]), len(split.images)
    images = data.on_device(split.images, device)
    labels = torch.from_numpy(split.labels).to(device)
    parts = train.make_parts(net.to(device), settings, device, saved)
    params, ema_params = list(net.parameters()), list(parts["ema"].parameters())
    optimizer, scaler, sums = parts["optimizer"], parts["scaler"], torch.zeros(24, device=device)
    step, earlier, log_size = (saved[k] if saved else 0 for k in ("step", "seconds", "log_size"))
    last, limit = math.ceil(settings["epochs"] * n / batch), 60 * settings["minutes"]
    log, row_step, first = train.open_log(folder, log_size, rank=0), step, step
    start = row_time = time.monotonic()
    saved_at, stop, stops = -math.inf, False, []
    train.on_signal(stops)
    net.train()
    while step < last and not stop:
        # The label comes with its image; t only sorts the loss into the tenths of the log.
        t, flips, _ = train.draw(seed, step, (batch, *images.shape[1:]), device)
        index = data.batch_index(n, step, batch, seed, images.device)
        x0 = data.get_batch(images, index, device, flips if settings["flip"] else None)
        with torch.autocast(device.type, train.AMP[amp], enabled=amp != "off"):
            loss = label_loss(net, x0, labels[index.to(device)])
        scaler.scale(loss.mean()).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(params, settings["clip"] or math.inf, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        train.update_ema(ema_params, params, train.ema_decay(settings["ema"], step))
        train.add_sums(sums, loss.detach(), t, norm)

        # A row as in train.py, and one where a signal or the limit ends the call.
        now = time.monotonic()
        stop = bool(stops) or 0 < limit <= now - start
        ends = stop or step == last
        if step <= train.ROW_STEPS or step % train.ROW_STEPS == 0 or ends:
            values, seconds = sums.tolist(), earlier + now - start
            train.check_finite(values, settings, row_step + 1, step, folder)
            row = {"step": step, "epoch": step * batch / n, "images": step * batch}
            row |= {"seconds": seconds, **train.read_sums(values)}
            row["images_per_s"] = (step - row_step) * batch / (now - row_time)
            log.write(json.dumps(row).encode() + b"\n")
            row_step, row_time = step, now
            sums.zero_()
            if ends or now - saved_at > train.SAVE_SECONDS:
                counters = {"step": step, "row_step": step, "log_size": log.tell()}
                counters |= {"seconds": seconds, "sums": sums.cpu(), "settings": settings}
                train.save(folder, parts, counters)
                left = train.time_left(step - first, last - first, now - start, limit)
                train.show_row(row, last, left)
                saved_at = now
    train.on_signal()
    log.close()
    return step, time.monotonic() - start, stops[0] if stops else 0


def train_cell(name: str, settings: dict[str, Any], folder: Path, split: data.Split) -> None:
    """Train a method, or go on with its run in that folder. Exits after saving where a signal stops
    it, and with one line where the folder holds a run of other settings."""
    minutes, saved = settings["minutes"], None
    if (folder / "checkpoint.pt").exists():
        saved, config = train.read_checkpoint(folder), train.read_config(folder)
        for key, value in settings.items():
            if config.get(key) != value:
                fail(
                    f"{folder} was trained with {key} {config.get(key)}, not {value}: move or "
                    f"delete that folder, or choose another --out"
                )
        if minutes:  # they count over all calls, so that each method has the same
            minutes -= saved["seconds"] / 60
            if minutes <= 0:
                return
    keys = ("preset", "size", "batch_size", "lr", "epochs", "minutes", "device", "amp")
    print(f"{folder}: " + " ".join(f"{key}={settings[key]}" for key in keys), flush=True)
    write_json(folder / "config.json", settings)
    torch.manual_seed(settings["seed"])
    net, settings = build(name, settings), {**settings, "minutes": minutes}
    if name == "supervised":
        step, _, stopped = train_supervised(net, split, settings, folder, saved)
    else:
        loss_fn = METHODS[name][1]
        step, _, stopped = train.train(net, loss_fn, split.images, settings, folder, saved)
    if stopped:
        print(f"{folder} stopped at step {step:,}: the same command goes on")
        raise SystemExit(128 + stopped)


def run_cell(
    name: str, settings: dict[str, Any], folder: Path, split: data.Split, probed: tuple
) -> dict[str, Any]:
    """Train on a split, or take a floor, and probe on two others; returns the cell {method, seed,
    parameters, flops_per_image, images_per_s, images_seen, top1, oracle, knn, chosen_t, probe}."""
    cell: dict[str, Any] = {"method": name, "seed": settings["seed"]}
    if name in FLOORS:
        net = encoder = floor_encoder(name, settings, probed[0])
        step, flops, images_per_s = 0, None, None
    else:
        train_cell(name, settings, folder, split)
        net, saved = train.load_model(folder, METHODS[name][0])
        encoder, step, flops = net.encoder, saved["step"], flops_per_image(name, settings)
        images_per_s = step * settings["batch_size"] / saved["seconds"]
    cell |= {"parameters": sum(p.numel() for p in net.parameters()), "flops_per_image": flops}
    cell |= {"images_per_s": images_per_s, "images_seen": step * settings["batch_size"]}

    protocol = {"data": settings["data"], "limit": LABELS, "norm": "std", "epochs": probe.EPOCHS}
    protocol |= {"lr": 2e-5 if settings["row"] == 256 else 2e-4, "weights": "ema"}
    protocol |= {"classes": len(settings["class_names"]), "step": step}
    times, device = [0] if name in TIMELESS else TIMES, train.pick_device(settings["device"])
    result = probe.probe(encoder, {}, times, probed, device, protocol)
    if name not in FLOORS:
        write_json(folder / "probe.json", {"name": str(folder.relative_to(RUNS)), **result})
    chosen = probe.choose(result["rows"], "held_out")
    cell |= {"top1": chosen["top1"], "oracle": result["oracle_top1"], "knn": chosen["knn"]}
    return cell | {"chosen_t": chosen["t"], "probe": result["rows"]}


# ---------------------------------------------------------------------------- the table


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    replace_file(path, lambda to: to.write_text(json.dumps(value, indent=1) + "\n"))


def make_rows(cells: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """A row for each method that has a cell, in the order of METHODS and FLOORS, then the rows that
    the paper alone reports for the set of that name."""
    paper = {key: row.get(name) for key, row in json.loads(PAPER.read_text())["table1"].items()}
    rows = []
    for method in [*METHODS, *FLOORS, *REPORTED]:
        own = [cell for cell in cells if cell["method"] == method]
        if not own and method not in REPORTED:
            continue
        row: dict[str, Any] = {"method": method}
        for key in ("parameters", "flops_per_image"):
            row[key] = own[0][key] if own else None
        for key in ("images_per_s", "images_seen", "top1", "oracle", "knn"):
            values = [cell[key] for cell in own if cell[key] is not None]
            row[key] = statistics.mean(values) if values else None
        row["top1_std"] = statistics.stdev(cell["top1"] for cell in own) if len(own) > 1 else None
        row |= {"paper": paper.get(PAPER_NAMES.get(method)), "reported": method in REPORTED}
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table as text, - where a method has no such number."""
    columns = {  # heading -> (key, unit, format)
        "M params": ("parameters", 1e6, ".2f"),
        "MFLOP": ("flops_per_image", 1e6, ",.1f"),
        "images/s": ("images_per_s", 1, ",.0f"),
        "1000 seen": ("images_seen", 1e3, ",.0f"),
        "top-1": ("top1", 1, ".2f"),
        "std": ("top1_std", 1, ".2f"),
        "oracle": ("oracle", 1, ".2f"),
        "kNN": ("knn", 1, ".2f"),
        "paper": ("paper", 1, ".1f"),
    }
    print(f"\n{'method':18}" + "".join(f"{heading:>10}" for heading in columns))
    for row in rows:
        numbers = ((row[key], unit, form) for key, unit, form in columns.values())
        texts = ("-" if n is None else f"{n / unit:{form}}" for n, unit, form in numbers)
        note = "  (reported, not run)" if row["reported"] else ""
        print(f"{row['method']:18}" + "".join(f"{text:>10}" for text in texts) + note)


def table_head(common: dict[str, Any], images: int) -> dict[str, Any]:
    """What all cells of a table have in common."""
    keys = ("data", "preset", "size", "epochs", "minutes", "device", "amp")
    times = ", ".join(map(str, TIMES))
    return {
        "what": "Table 1 on one machine: equal epochs or time for each method, linear probe",
        **{key: common[key] for key in keys},
        "images": images,
        "threads": torch.get_num_threads(),
        "probe": f"t = {times} for methods with time, {LABELS:,} labels, {probe.EPOCHS} epochs",
    }


def read_cells(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of a table that was begun; exits where it was begun with other settings."""
    if not path.exists():
        return []
    try:
        table = json.loads(path.read_text())
        cells, begun = table["cells"], {key: table.get(key) for key in head}
        make_rows(cells, head["data"])
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f"{path} is no table of this command: choose another --out")
    for key, value in head.items():
        if begun[key] != value:
            fail(f"{path} was begun with {key} {begun[key]}, not {value}: choose another --out")
    return cells


def write_table(path: Path, head: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Write the table's file: head, seeds, rows and cells."""
    seeds = 1 + max((cell["seed"] for cell in cells), default=0)
    rows = make_rows(cells, head["data"])
    write_json(path, {**head, "seeds": seeds, "rows": rows, "cells": cells})


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its unit and default."""
    p = train.Parser(__doc__, prog="python -m appendix.baselines")
    add, names = p.add_argument, [*METHODS, *FLOORS]
    add("--data", help=f"{', '.join(data.SETS)}, or a folder of images (glyphs)")
    add("--method", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)} (all)")
    add("--epochs", type=train.positive, help="passes over the training set (the preset's)")
    add("--minutes", type=train.not_negative, help="at most so long for each run (0 = no limit)")
    add("--seeds", type=train.whole, help="runs of each method, with seeds 0 to N - 1 (1)")
    add("--out", type=Path, help="file of the table (runs/baselines/DATA.json)")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the cells that the table's file does not have yet, and print the table."""
    argv = sys.argv[1:] if argv is None else argv
    typed = vars(build_parser().parse_args(argv))
    if train.ranks()[1] > 1:
        fail("one process makes a table: start it without torchrun")
    methods, seeds = typed.pop("method", [*METHODS, *FLOORS]), typed.pop("seeds", 1)
    name = typed.setdefault("data", train.DEFAULTS["data"])
    out = typed.pop("out", RUNS / "baselines" / f"{Path(name).resolve().name}.json")
    common = train.resolve(typed)
    where = (name, common["size"], common["channels"], Path(common["data_dir"]))
    split, _ = data.load(*where)
    probed = data.load(*where, LABELS)
    if len(split.class_names) < 2:
        fail(f"{name} has no classes, and a probe needs two: lay it out as CLASS/*")
    found = {"images": len(split.images), "class_names": split.class_names}
    head = table_head(common, len(split.images))
    cells = read_cells(out, head)
    head["command"] = shlex.join(["python", "-m", "appendix.baselines", *argv])
    write_table(out, head, cells)  # where it cannot be written, nothing is trained
    for seed in range(seeds):
        for method in dict.fromkeys(methods):
            done = any((cell["method"], cell["seed"]) == (method, seed) for cell in cells)
            if done or (seed and method in SEEDLESS):
                continue
            print(f"\n=== {method}, seed {seed}", flush=True)
            settings = {**method_settings(method, {**typed, "seed": seed}), **found}
            folder = RUNS / "baselines" / f"{out.stem}-{method}-{seed}"
            cells.append(run_cell(method, settings, folder, split, probed))
            write_table(out, head, cells)
    print_rows(make_rows(cells, name))
    print(f"saved: {out}")


if __name__ == "__main__":
    train.guard(main)
