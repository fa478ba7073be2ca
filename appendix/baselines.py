"""Train and probe what DiER is compared with: Table 1 for this machine.

    python -m appendix.baselines --data mnist --epochs 5 --seeds 3     the table: all methods
    python -m appendix.baselines --data mnist --method diffae mae      two of them
    python -m appendix.baselines --data mnist --method tokenizer       with a picture
    python -m appendix.baselines --data mnist --method dier dier-notime --out runs/time.json

    dier, diffae             the program's own; Diff-AE, the paper's baseline (unet.py)
    mae, lmim, lmim-swin     masked image modelling on a ViT and a Swin (masked.py, swin.py)
    cae, mage, dmjd          the same with codes of a tokenizer, or two views (tokens.py, dmjd.py)
    supervised               DiER's encoder at t = 0, trained on labels: a ceiling
    dier-notime              not of the table: an encoder that is always told that t = 0
    dier-unet                not of the table: DiER's encoder on Diff-AE's U-Net; dier-unet-notime
    tokenizer                not of the table: what cae and mage read, trained before them

Floors: `untrained` and `random` (probe.py) are DiER's encoder, `pixels` raw pixels, `pca` raw
pixels on at most 1,024 principal components of the probe's training images.

The same chance for all: the same images, batches, flips and epochs, Adam and the weights' average.
Each method has the learning rate that is best of 5e-4, 1e-3, 2e-3 and 4e-3 after a tenth of the
epochs, by the probe on held-out training images, seed 0; at an edge of these one more is tried. The
tokenizer has a tenth of the epochs too; its time and FLOPs are added to those of cae and mage.

A cell is one method with one seed. Its run, runs/baselines/TABLE-METHOD-SEED/, holds what train.py
leaves, a probe after a quarter, half and all of the epochs, and at the end cell.json; TABLE is the
name of the table's file, by default runs/baselines/DATA.json. After Ctrl-C or a crash type the
command again: what is done is never done again. Two commands may fill one table, each its methods,
cae and mage in the same one: they share a tokenizer.

"rows" of the file has for each method means over the seeds: parameters, encoder_parameters, width
(of the probed feature), seconds (of training), flops_per_image (forward and backward), flops (of
the training), images_seen, lr, top1, top1_std, oracle, knn, paper. top1 is the test accuracy at the
t that held-out training images choose, oracle that of the best t on the test set; knn is at the
chosen t; null is what a method does not have. Accuracies in percent. "cells" holds the single runs,
with the screened rates and the curve over the training.

Shapes: B batch, C channels, H W pixels, N images, V = 1024, K classes, P principal components.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import data
import probe
import train
from appendix import tokens
from appendix.chart import image_grid
from appendix.dmjd import build_dmjd
from appendix.masked import LMIM, MAE, vit_config
from appendix.swin import LMIMSwin, swin_config
from appendix.unet import build_dier_unet, build_diffae
from data import fail, write_json
from diffusion import T
from model import DiER, Encoder, ModelConfig, V
from train import RUNS, dier_loss, model_config

LABELS = 10_000  # training images that the probe sees, and test images
TIMES = [0, 100, 400, 999]
RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # of Adam, tried for every method
TOKENIZER_RATE = 1e-3  # as published for VQ-VAE
SCREEN, STAGES = 0.1, (0.25, 0.5, 1)  # shares of the epochs: of a screen; at which a run is probed
PAPER = Path(__file__).resolve().parent.parent / "results" / "paper.json"
PAPER_NAMES = {"dier": "DiER", "diffae": "Diff-AE", "mae": "MAE", "lmim": "LMIM-ViT"}
PAPER_NAMES |= {"lmim-swin": "LMIM-Swin", "dmjd": "DMJD", "cae": "CAE", "mage": "MAGE"}

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


def labels_by_step(split: data.Split, settings: dict, step: int) -> Callable[..., Tensor]:
    """`label_loss` for train.py's loop, which hands no labels over: which images a step takes
    follows from seed and step, so they are counted from `step` on."""
    labels = torch.from_numpy(split.labels).to(train.pick_device(settings["device"]))
    steps, batch, seed = itertools.count(step), settings["batch_size"], settings["seed"]

    def loss(net: nn.Module, x0: Tensor, *_: Tensor) -> Tensor:
        index = data.batch_index(len(labels), next(steps), batch, seed, labels.device)
        return label_loss(net, x0, labels[index])

    return loss


# name -> (settings -> a module whose `encoder` maps (x0, t) to v, the loss as train.py's loop calls
# it). The loss of `supervised` takes labels in the place of t: `labels_by_step` finds them.
METHODS: dict[str, tuple[Callable[[dict], nn.Module], Callable[..., Tensor]]] = {
    "dier": (train.build_dier, dier_loss),
    "dier-notime": (lambda s: DiER(model_config(s), TimelessEncoder), dier_loss),
    "dier-unet": (build_dier_unet, dier_loss),
    "dier-unet-notime": (partial(build_dier_unet, encoder=TimelessEncoder), dier_loss),
    "diffae": (build_diffae, dier_loss),
    "mae": (lambda s: MAE(vit_config(s)), own_loss),
    "lmim": (lambda s: LMIM(vit_config(s)), own_loss),
    "lmim-swin": (lambda s: LMIMSwin(swin_config(s)), own_loss),
    "dmjd": (build_dmjd, own_loss),
    "cae": (tokens.build_cae, own_loss),
    "mage": (tokens.build_mage, own_loss),
    "tokenizer": (tokens.build_tokenizer, own_loss),
    "supervised": (lambda s: Supervised(model_config(s), len(s["class_names"])), label_loss),
}
READERS = ("cae", "mage")  # of the tokenizer's codes
OTHERS = ("dier-notime", "dier-unet", "dier-unet-notime", "tokenizer")  # not rows of Table 1
FLOORS = ("untrained", "random", "pca", "pixels")
SEEDLESS = ("pca", "pixels")  # the same for every seed
# Their v does not depend on t, so they are probed at t = 0. `untrained` is among them because time
# enters through residual branches, which are off at initialisation.
TIMELESS = ("dier-notime", "dier-unet-notime", "diffae", "mae", "lmim", "lmim-swin", "dmjd", "cae")
TIMELESS += ("mage", "supervised", "untrained", "pca", "pixels")


def convolution_backward_flops(
    grad: list[int], x: list[int], weight: list[int], *rest: Any, **_: Any
) -> int:
    """FLOPs of a convolution's gradients, from the shapes of the output's gradient, of the input
    and of the weight: each wanted one costs what forward does. PyTorch's own rule takes a depthwise
    convolution, as DMJD has, for a dense one."""
    transposed, wanted = rest[4], rest[7]
    places = math.prod((x if transposed else grad)[2:])
    return 2 * x[0] * places * math.prod(weight) * sum(wanted[:2])


def flops_per_image(name: str, settings: dict) -> int:
    """Floating point operations of forward and backward for one training image, counted on the meta
    device, where tensors have shapes and no numbers."""
    with torch.device("meta"):
        net = METHODS[name][0](settings)
        x0 = torch.empty(2, settings["channels"], settings["size"], settings["size"])
        t, abar = torch.zeros(2, dtype=torch.int64), torch.empty(T)  # t stands for labels, too
    torch.manual_seed(0)  # the cost of a Swin varies a little with the mask
    rules = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=rules) as counter:
        METHODS[name][1](net, x0, t, x0, abar).mean().backward()
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------------------- floors without a net


class PCA(probe.Pixels):
    """Raw pixels on their first components, at most 1,024: (B, C, H, W), (B,) -> (B, P).

    pixels: float (N, C * h * w), those of the training images. P is at most their rank, which is
    below N: along any further component training images differ by rounding alone and test images
    do not, which a standardised probe takes for thousands of standard deviations.
    """

    def __init__(self, pixels: Tensor):
        super().__init__()
        pixels = pixels.double()
        mean = pixels.mean(0)
        values, vectors = torch.linalg.eigh((pixels - mean).T @ (pixels - mean))  # ascending
        rounding = values[-1] * max(pixels.shape) * torch.finfo(values.dtype).eps
        rank = int((values > rounding).sum())
        self.register_buffer("mean", mean)
        self.register_buffer("components", vectors.flip(1)[:, : min(rank, V)])

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        # In less than full precision the rounding of bright pixels drowns small components, and on
        # a GPU fp32 products may be less: TF32.
        with torch.autocast(x0.device.type, enabled=False):
            x = super().forward(x0, t).double()
            return ((x - self.mean) @ self.components).float()


def floor_encoder(name: str, settings: dict, split: data.Split) -> nn.Module:
    """The encoder of a row of FLOORS; `split` has the training images of the probe."""
    if name == "pixels":
        return probe.Pixels()
    if name == "pca":
        pixels = probe.encode(probe.Pixels(), split.images, 0, torch.device("cpu"), "pixels")
        return PCA(pixels.float())
    return probe.untrained_encoder(settings, name == "random")


# ---------------------------------------------------------------------------- a cell


@dataclass(frozen=True)
class Table:
    """What all cells of a table share."""

    path: Path  # its file; the runs are called after it
    split: data.Split  # trains
    probed: tuple[data.Split, data.Split]  # samples of both splits, which the probe sees
    epochs: float  # of every method
    origin: dict  # where the results come from

    def folder(self, settings: dict, more: str = "") -> Path:
        """The run of a method and seed, with its config.json; exits with one line where that folder
        holds a run of other settings."""
        name = f"{self.path.stem}-{settings['method']}-{settings['seed']}{more}"
        folder = RUNS / "baselines" / name
        refuse_other(folder, settings)
        write_json(folder / "config.json", settings)
        return folder


def refuse_other(folder: Path, settings: dict) -> None:
    """Exit with one line where a folder holds a run of other settings."""
    config = train.read_config(folder)
    for key, value in settings.items():
        if config and config.get(key) != value:
            fail(
                f"{folder} was made with {key} {config.get(key)}, not {value}: move or delete that "
                f"folder, or choose another --out"
            )


def finished(path: Path) -> dict | None:
    """The JSON file that a finished stage or cell has left, None where there is none; exits with
    one line where it cannot be read."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        fail(f"{path} cannot be read ({error}): delete {path.parent}, and it is made again")


def train_run(table: Table, settings: dict, folder: Path, share: float) -> None:
    """Train the method of the settings for a share of their epochs, or go on with its run in that
    folder. Exits after saving where a signal stops it."""
    name, settings = settings["method"], {**settings, "epochs": share * settings["epochs"]}
    with train.claim(folder):
        saved = train.read_checkpoint(folder) if (folder / "checkpoint.pt").exists() else None
        torch.manual_seed(settings["seed"])
        net = METHODS[name][0](settings)
        if name in READERS and not saved:
            tokenizer = train.read_checkpoint(tokenizer_run(table, settings))
            train.restore(net.tokenizer, tokenizer["raw"])  # its buffers are not averaged
        keys = ("preset", "size", "batch_size", "lr", "epochs", "device", "amp")
        print(f"{folder}: " + " ".join(f"{key}={settings[key]}" for key in keys), flush=True)
        loss_fn = METHODS[name][1]
        if name == "supervised":
            loss_fn = labels_by_step(table.split, settings, saved["step"] if saved else 0)
        step, _, stopped = train.train(net, loss_fn, table.split.images, settings, folder, saved)
    if stopped:
        print(f"{folder} stopped at step {step:,}: the same command goes on")
        raise SystemExit(128 + stopped)


def probe_encoder(table: Table, settings: dict, encoder: nn.Module, step: int) -> dict:
    """What probe.py's protocol gives, at the few t of a table: all that `probe.probe` returns."""
    protocol = probe.standard_protocol(settings, len(table.probed[0].images)) | {"limit": LABELS}
    protocol |= {"classes": len(settings["class_names"]), "step": step}
    times = [0] if settings["method"] in TIMELESS else TIMES
    device = train.pick_device(settings["device"])
    return probe.probe(encoder, {}, times, table.probed, device, protocol)


def scores(result: dict) -> dict:
    """{chosen_t, top1, held_out, knn, oracle, probe} of what `probe.probe` returns."""
    chosen = probe.choose(result["rows"], "held_out")
    found = {key: chosen[key] for key in ("top1", "held_out", "knn")}
    found |= {"chosen_t": chosen["t"], "oracle": result["oracle_top1"]}
    return found | {"probe": result["rows"]}


def run_stage(table: Table, settings: dict, folder: Path, share: float) -> dict:
    """Train a run up to a share of its epochs and probe it there, or read that from its folder:
    {epochs, images_seen, seconds} and `scores`."""
    path = folder / f"stage-{share:g}.json"
    done = finished(path)
    if done:
        return done
    train_run(table, settings, folder, share)
    net, saved = train.load_model(folder, METHODS[settings["method"]][0])
    result = probe_encoder(table, settings, net.encoder, saved["step"])
    write_json(folder / "probe.json", {"name": str(folder.relative_to(RUNS)), **result})
    row = {"epochs": share * settings["epochs"], "seconds": saved["seconds"]}
    row |= {"images_seen": saved["step"] * settings["batch_size"], **scores(result)}
    write_json(path, row)
    return row


def screen_rates(table: Table, settings: dict) -> dict[str, float]:
    """Held-out accuracy of each learning rate after a tenth of the epochs, seed 0, the best first:
    {"0.001": percent}, 0 where the loss was not finite."""
    found: dict[float, float] = {}

    def look(rate: float) -> None:
        """Train with that rate and note its held-out accuracy, in percent."""
        tried = {**settings, "lr": rate, "seed": 0, "epochs": SCREEN * settings["epochs"]}
        folder = table.folder(tried, f"-lr-{rate:g}")
        if settings["method"] in READERS:  # where it fails that is no fault of the rate
            tokenizer_run(table, tried)
        try:
            found[rate] = run_stage(table, tried, folder, 1)["held_out"]
        except train.NotFinite:
            found[rate] = 0.0
            write_json(folder / "stage-1.json", {"held_out": 0.0})  # done, as any other

    for rate in RATES:
        look(rate)
    best = max(found, key=found.get)
    if best == RATES[0]:
        look(best / 2)
    if best == RATES[-1]:
        look(best * 2)
    return {f"{rate:g}": found[rate] for rate in sorted(found, key=found.get, reverse=True)}


def tokenizer_run(table: Table, settings: dict) -> Path:
    """The folder of the tokenizer for the seed of the settings, trained for a tenth of the table's
    epochs and checked on test images; it has cell.json and reconstruction.png."""
    changed = {"method": "tokenizer", "lr": TOKENIZER_RATE, "epochs": SCREEN * table.epochs}
    settings = settings | changed
    folder = table.folder(settings)
    if (folder / "cell.json").exists():
        return folder
    train_run(table, settings, folder, 1)
    net, saved = train.load_model(folder, METHODS["tokenizer"][0], "raw")
    images = table.probed[1].images
    cell = {"method": "tokenizer", "seed": settings["seed"], "epochs": settings["epochs"]}
    cell |= cost("tokenizer", settings, saved) | {"parameters": count_parameters(net)}
    cell |= table.origin
    cell |= tokens.check(net, images, train.pick_device(settings["device"]))
    net, some = net.cpu(), np.array(images[:12])
    with torch.no_grad():
        decoded = net.decode(net.codes(data.to_float(torch.from_numpy(some))))
    decoded = data.to_uint8(decoded).numpy()
    rows = [("test image", some), ("from its codes", decoded)]
    image_grid(rows, [], folder / "reconstruction.png")
    write_json(folder / "cell.json", cell)
    return folder


def cost(name: str, settings: dict, saved: dict) -> dict:
    """What a training took: {seconds, images_seen, images_per_s, flops_per_image, flops}."""
    seen, flops = saved["step"] * settings["batch_size"], flops_per_image(name, settings)
    found = {"seconds": saved["seconds"], "images_seen": seen}
    found |= {"images_per_s": seen / saved["seconds"]}
    return found | {"flops_per_image": flops, "flops": flops * seen}


def count_parameters(net: nn.Module) -> int:
    """All of them, frozen ones too."""
    return sum(p.numel() for p in net.parameters())


def run_cell(table: Table, settings: dict) -> dict:
    """Screen the rate, train and probe; or read the cell from its folder, which holds it from then
    on."""
    name, seed = settings["method"], settings["seed"]
    rates = screen_rates(table, settings)
    settings = {**settings, "lr": float(next(iter(rates)))}
    folder = table.folder(settings)
    path = folder / "cell.json"
    done = finished(path)
    if done:
        return done
    curve = [run_stage(table, settings, folder, share) for share in STAGES]
    net, saved = train.load_model(folder, METHODS[name][0])
    cell = {"method": name, "seed": seed, "lr": settings["lr"], "rates": rates}
    cell |= {"parameters": count_parameters(net), **cost(name, settings, saved), **curve[-1]}
    cell |= {"encoder_parameters": count_parameters(net.encoder), **table.origin}
    earlier = 0
    if name in READERS:
        cell["tokenizer"] = finished(tokenizer_run(table, settings) / "cell.json")
        earlier = cell["tokenizer"]["flops"]
        cell["seconds"] += cell["tokenizer"]["seconds"]
        cell["flops"] += earlier
    keys = ("epochs", "top1", "oracle", "knn", "chosen_t")
    cell["curve"] = [{key: row[key] for key in keys} for row in curve]
    for row, seen in zip(cell["curve"], curve):
        row["flops"] = earlier + cell["flops_per_image"] * seen["images_seen"]
    x0 = data.to_float(torch.from_numpy(np.array(table.probed[1].images[:1])))
    with torch.no_grad():
        cell["width"] = net.encoder(x0, torch.zeros(1, dtype=torch.int64)).shape[1]
    write_json(path, cell)
    return cell


def run_floor(table: Table, settings: dict) -> dict:
    """Probe a floor, or read its cell from its folder."""
    settings = {**settings, "lr": None}
    path = table.folder(settings) / "cell.json"
    done = finished(path)
    if done:
        return done
    encoder = floor_encoder(settings["method"], settings, table.probed[0])
    cell = {"method": settings["method"], "seed": settings["seed"]}
    cell["encoder_parameters"] = count_parameters(encoder)
    cell |= scores(probe_encoder(table, settings, encoder, 0)) | table.origin
    write_json(path, cell)
    return cell


# ---------------------------------------------------------------------------- the table


def make_rows(cells: list[dict], name: str) -> list[dict]:
    """A row for each method that has a cell, in the order of METHODS and FLOORS; means over the
    seeds, with the paper's number for the set of that name."""
    paper = {key: row.get(name) for key, row in json.loads(PAPER.read_text())["table1"].items()}
    rows = []
    for method in [*METHODS, *FLOORS]:
        own = [cell for cell in cells if cell["method"] == method]
        if not own:
            continue
        row: dict = {"method": method, "seeds": len(own)}
        for key in ("parameters", "encoder_parameters", "flops_per_image"):
            row[key] = own[0].get(key)  # alike for all seeds
        for key in ("width", "seconds", "flops", "images_seen", "lr", "top1", "oracle", "knn"):
            values = [cell[key] for cell in own if cell.get(key) is not None]
            row[key] = statistics.mean(values) if values else None
        row["top1_std"] = statistics.stdev(cell["top1"] for cell in own) if len(own) > 1 else None
        rows.append(row | {"paper": paper.get(PAPER_NAMES.get(method))})
    return rows


def print_rows(rows: list[dict]) -> None:
    """The table as text, - where a method has no such number."""
    columns = {  # heading -> (key, unit, format)
        "M params": ("parameters", 1e6, ".2f"),
        "encoder": ("encoder_parameters", 1e6, ".2f"),
        "width": ("width", 1, ".0f"),
        "minutes": ("seconds", 60, ".1f"),
        "MFLOP": ("flops_per_image", 1e6, ",.1f"),
        "TFLOP": ("flops", 1e12, ",.1f"),
        "1000 seen": ("images_seen", 1e3, ",.0f"),
        "top-1": ("top1", 1, ".2f"),
        "std": ("top1_std", 1, ".2f"),
        "oracle": ("oracle", 1, ".2f"),
        "kNN": ("knn", 1, ".2f"),
        "lr": ("lr", 1, "g"),
        "paper": ("paper", 1, ".1f"),
    }
    print(f"\n{'method':16}" + "".join(f"{heading:>10}" for heading in columns))
    for row in rows:
        numbers = ((row[key], unit, form) for key, unit, form in columns.values())
        texts = ("-" if n is None else f"{n / unit:{form}}" for n, unit, form in numbers)
        print(f"{row['method']:16}" + "".join(f"{text:>10}" for text in texts))


def write_table(table: Table, common: dict) -> list[dict]:
    """Write the table's file with all cells that are there, of this command or another; returns its
    rows."""
    keys = ("data", "preset", "size", "epochs", "batch_size", "device", "amp", "images")
    shared, cells = {key: common[key] for key in keys}, []
    names = [name for name in [*METHODS, *FLOORS] if name != "tokenizer"]
    known = {f"{table.path.stem}-{name}": name for name in names}
    for path in (RUNS / "baselines").glob("*/cell.json"):
        run, _, seed = path.parent.name.rpartition("-")
        if run in known and seed.isdecimal():
            refuse_other(path.parent, shared)
            cells.append((names.index(known[run]), int(seed), finished(path)))
    cells = [cell for _, _, cell in sorted(cells, key=lambda found: found[:2])]
    rows = make_rows(cells, common["data"])
    times = ", ".join(map(str, TIMES))
    labels = len(table.probed[0].images)
    head = {
        "what": "Table 1 on one machine: equal epochs for each method, linear probe",
        **shared,
        "threads": torch.get_num_threads(),
        "probe": f"t = {times} for methods with time, {labels:,} labels, "
        f"{probe.head_epochs(labels)} epochs",
    }
    write_json(table.path, {**head, "rows": rows, "cells": cells}, shared=True)
    return rows


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its unit and default."""
    p = train.Parser(__doc__, prog="python -m appendix.baselines")
    add, names = p.add_argument, [*METHODS, *FLOORS]
    sets = f"{', '.join(data.SETS)}, or a folder of images (glyphs)"
    add("--data", type=train.data_name, help=sets)
    usual = f"all but {', '.join(OTHERS)}"
    shown = f"of {', '.join(names)} ({usual})"
    add("--method", nargs="+", choices=names, metavar="NAME", help=shown)
    add("--epochs", type=train.positive, help="passes over the training set (the preset's)")
    add("--seeds", type=train.positive_int, help="runs of each method, with seeds 0 to N - 1 (1)")
    add("--out", type=train.new_file, help="file of the table (runs/baselines/DATA.json)")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the cells that are not there yet, and print the table. A training that is not finite ends
    its own cell, and after all others the command, with status 2."""
    argv = sys.argv[1:] if argv is None else argv
    typed = vars(build_parser().parse_args(argv))
    if train.ranks()[1] > 1:
        fail("one process makes a table: start it without torchrun")
    usual = [name for name in [*METHODS, *FLOORS] if name not in OTHERS]
    methods, seeds = dict.fromkeys(typed.pop("method", usual)), typed.pop("seeds", 1)
    name = typed.setdefault("data", train.DEFAULTS["data"])
    out = typed.pop("out", RUNS / "baselines" / f"{Path(name).resolve().name}.json")
    common = train.resolve(typed)
    where = (name, common["size"], common["channels"], Path(common["data_dir"]))
    split, _ = data.load(*where)
    probed = data.load(*where, LABELS)
    if len(split.class_names) < 2:
        fail(f"{name} has no classes, and a probe needs two: lay it out as CLASS/*")
    common |= {"images": len(split.images), "class_names": split.class_names}
    command = train.origin(["-m", "appendix.baselines", *argv], common["device"])
    table = Table(out, split, probed, common["epochs"], command)
    write_table(table, common)  # where it cannot be written, nothing is trained
    ended = []  # cells whose training was not finite; the others go on
    for seed in range(seeds):
        for method in methods:
            if seed and method in SEEDLESS:
                continue
            print(f"\n=== {method}, seed {seed}", flush=True)
            settings = {**common, "method": method, "seed": seed}
            try:
                if method == "tokenizer":
                    tokenizer_run(table, settings)
                else:
                    (run_floor if method in FLOORS else run_cell)(table, settings)
            except train.NotFinite:
                ended.append(f"{method} with seed {seed}")
            write_table(table, common)
    print_rows(write_table(table, common))
    print(f"saved: {out}")
    if ended:
        print(f"without a result, as their training was not finite: {', '.join(ended)}")
        raise SystemExit(2)


if __name__ == "__main__":
    train.guard(main)
