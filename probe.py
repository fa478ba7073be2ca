"""The linear probe (Sec. 5.2, A.2): how well does a linear classifier read the class off v_t?

    python probe.py                     the newest run at t = 0, 100, ..., 900, 999
    python probe.py --t 400             one t; --t 100,400 two
    python probe.py --run mnist --data glyphs       the features of another set (transfer)
    python probe.py --norm none         the paper's stated protocol: features as they are

Each image is encoded once for each t; then the heads of all t are trained in one batched product.
A head is Linear(1024, K) under AdamW; head 0 of each t sees all training images and gives `top1`,
the others leave out a fold and give `held_out`, the accuracy on what they did not see. t is chosen
by `held_out`, which never looks at a test label; the paper reports the best t on the test set,
which stands here as `oracle`.

probe.json: rows [{t, top1, top5, knn, held_out}] (top5 null for 10 classes or fewer; top1_std with
--seeds), chosen_t, test_top1, oracle_t, oracle_top1, floors {pixels, untrained, random}, n_test,
protocol, run. Accuracies in percent. Other protocols write probe-SUFFIX.json.

Shapes: N images, B batch, V = 1024, K classes, S number of t, H heads of one t.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import Split, load, mix_seed
from diffusion import T
from features import encode, moments, pick, raw_pixels, standardise, to_channels
from files import written_whole
from parallel import (
    ALONE,
    World,
    ending_together,
    first_alone,
    join,
    share_from_first,
    world_from_environment,
)
from runs import (
    BASELINES,
    DIER,
    Method,
    Parser,
    Progress,
    count,
    fail,
    find_run,
    pick_amp,
    pick_device,
    positive,
    read_checkpoint,
    require_method,
    restore_model,
    run_main,
    whole,
)

TIMES = [*range(0, T, 100), T - 1]  # Sec. A.2: "11 times at intervals of 100 ... from 0 to 999"
FEW = 5_000  # with fewer training images one tenth is too small a sample to choose t by
WEIGHT_DECAY, WARMUP = 0.05, 10  # Sec. A.2; the warm-up in epochs
NEIGHBOURS = 20
FLOORS = ("untrained", "random")
KNN_BLOCK = 4_000  # images compared at once


# ---------------------------------------------------------------------------- folds


def make_folds(n: int, groups: np.ndarray | None, seed: int) -> np.ndarray:
    """Fold of each training image (n,): 0 .. F - 1 are held out in turn, -1 never.

    From 5,000 images on F = 1, one tenth; below, F = 5 and every image is held out once. Images of
    one group are never apart.
    """
    unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    order = np.random.default_rng(mix_seed(seed, 1)).permutation(unit.max() + 1)
    share = order[unit] / (unit.max() + 1)  # in [0, 1)
    if n >= FEW:
        return np.where(share < 0.1, 0, -1)
    return (share * 5).astype(np.int64)


# ---------------------------------------------------------------------------- heads


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up to the peak, then linear decay to 0 (Sec. A.2), by step in 0 .. total - 1."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / (total - warmup)


def train_heads(
    features: Tensor,
    labels: Tensor,
    folds: Tensor,
    classes: int,
    epochs: int,
    peak: float,
    batch_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Train all heads at once: features (N, S, V), labels (N,), folds (N,) in -1 .. F - 1
    -> weights (S, H * K, V) and biases (S, H * K, 1), H = 1 + F.

    Head 0 learns from every image, head f + 1 from those outside fold f: a mask on the loss, so
    that one gather and one product serve them all. Classes are rows of the logits, images columns:
    both products are twice as fast that way. After the last epoch, never the best of them.
    """
    n, s, width = features.shape
    heads, device = 2 + int(folds.max()), labels.device
    generator = torch.Generator().manual_seed(mix_seed(seed, 2))
    weight = 0.01 * torch.randn(s, heads * classes, width, generator=generator)  # normal(0.01)
    weight = weight.to(device).requires_grad_()
    bias = torch.zeros(s, heads * classes, 1, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], peak, weight_decay=WEIGHT_DECAY, fused=True)
    own = torch.arange(-1, heads - 1, device=device)  # the fold that head h leaves out
    batch_size = min(batch_size, n)
    per_epoch = n // batch_size  # the rest of a permutation is dropped: every batch is full
    total, warmup = epochs * per_epoch, min(WARMUP, epochs) * per_epoch
    progress, start = Progress(), time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator).to(device)
        for i in range(per_epoch):
            index = order[i * batch_size : (i + 1) * batch_size]
            optimizer.param_groups[0]["lr"] = learning_rate(
                epoch * per_epoch + i, total, warmup, peak
            )
            x = pick(features, index, device).transpose(1, 2)  # (S, V, B)
            logits = torch.baddbmm(bias, weight, x)  # (S, H * K, B)
            logits = logits.view(s * heads, classes, batch_size)
            target = labels[index].expand(s * heads, batch_size)
            loss = F.cross_entropy(logits, target, reduction="none")  # (S * H, B)
            mask = (folds[index] != own[:, None]) | (own[:, None] < 0)  # (H, B)
            loss = loss.view(s, heads, batch_size) * mask / mask.sum(1, keepdim=True).clamp(min=1)
            optimizer.zero_grad()
            loss.sum().backward()  # heads share no weight: a sum trains each as if alone
            optimizer.step()
        spent = time.monotonic() - start
        if spent > 2:
            left = spent / (epoch + 1) * (epochs - epoch - 1)
            progress.show(f"heads: epoch {epoch + 1} of {epochs}, {left:.0f} s left")
    return weight.detach(), bias.detach()


@torch.no_grad()
def head_ranks(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """How many classes score above the right one, for each head: features (N, S, V),
    labels (N,) -> (S, H, N) int; 0 is a top-1 hit, below 5 a top-5 hit."""
    s, ranks = len(weight), []
    for first in range(0, len(labels), 2000):
        rows = slice(first, first + 2000)
        x, y = pick(features, rows, labels.device), labels[rows]
        logits = torch.baddbmm(bias, weight, x.transpose(1, 2))  # (S, H * K, B)
        logits = logits.view(s, -1, k, x.shape[1])  # (S, H, K, B)
        right = logits.gather(2, y.expand(s, logits.shape[1], 1, -1))  # (S, H, 1, B)
        ranks.append((logits > right).sum(2))
    return torch.cat(ranks, dim=2)


@torch.no_grad()
def knn_accuracy(
    train: Tensor, test: Tensor, s: int, y_train: Tensor, y_test: Tensor, k: int
) -> float:
    """Percent of test images whose 20 nearest training images at time number s, by cosine, vote
    for their class; of equal votes the lowest class wins. Reads the training images in blocks."""

    def rows(features: Tensor, first: int) -> Tensor:
        """A block of unit vectors (B, V)."""
        part = features[first : first + KNN_BLOCK, s].to(y_train.device).float()
        return F.normalize(part, dim=1)

    hits, n = 0, len(y_train)
    for first in range(0, len(y_test), KNN_BLOCK):
        x, y = rows(test, first), y_test[first : first + KNN_BLOCK]
        near = torch.empty(len(x), 0, device=x.device)
        index = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        for start in range(0, n, KNN_BLOCK):
            cosine = x @ rows(train, start).T  # (B, block)
            best, where = cosine.topk(min(NEIGHBOURS, cosine.shape[1]), dim=1)
            near, index = torch.cat([near, best], 1), torch.cat([index, where + start], 1)
            near, keep = near.topk(min(NEIGHBOURS, near.shape[1]), dim=1)
            index = index.gather(1, keep)
        votes = F.one_hot(y_train[index], k).sum(1)  # (B, K)
        hits += (votes.argmax(1) == y).sum().item()
    return 100.0 * hits / len(y_test)


@dataclass
class Task:
    """What stays the same for every set of features: labels, folds, and how heads are trained."""

    y_train: Tensor  # (N,)
    y_test: Tensor  # (M,)
    folds: Tensor  # (N,), -1 .. F - 1
    classes: int
    epochs: int
    lr: float
    batch_size: int
    seeds: int

    def evaluate(self, train: Tensor, test: Tensor) -> list[dict[str, float | None]]:
        """Train and score the heads of features (N, S, V) and (M, S, V): for each t top1, top5
        (None up to 10 classes), held_out, in percent; top1_std where there are several seeds."""
        runs = []
        for seed in range(self.seeds):
            weight, bias = train_heads(
                train, self.y_train, self.folds, self.classes, self.epochs, self.lr,
                self.batch_size, seed,
            )  # fmt: skip
            ranks = head_ranks(test, self.y_test, weight, bias, self.classes)[:, 0]  # (S, M)
            seen = head_ranks(train, self.y_train, weight, bias, self.classes)  # (S, H, N)
            held = self.folds >= 0
            own = seen[:, 1:][:, self.folds[held], held.nonzero()[:, 0]]  # by the head of its fold
            hits = [ranks == 0, ranks < 5, own == 0]
            runs.append(torch.stack([100 * hit.double().mean(1) for hit in hits]))
        stacked = torch.stack(runs)  # (seeds, 3, S)
        rows = []
        for top1, top5, held_out in stacked.mean(0).T.tolist():
            top5 = top5 if self.classes > 10 else None
            rows.append({"top1": top1, "top5": top5, "held_out": held_out})
            if self.seeds > 1:
                rows[-1]["top1_std"] = stacked[:, 0, len(rows) - 1].std().item()
        return rows

    def rows(self, train: Tensor, test: Tensor, times: list[int | None]) -> list[dict[str, Any]]:
        """The rows of probe.json: `evaluate` and kNN at each of the times."""
        rows = [{"t": t, **row} for t, row in zip(times, self.evaluate(train, test))]
        for s, row in enumerate(rows):
            row["knn"] = knn_accuracy(train, test, s, self.y_train, self.y_test, self.classes)
        return rows


def choose(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The row with the largest `key`, the smallest t of equals."""
    return max(rows, key=lambda row: (row[key], -(row["t"] or 0)))  # one row may have no t


def binomial_interval(percent: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval, in percent, of an accuracy measured on n images."""
    p, z = percent / 100, 1.96
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (centre - spread) / (1 + z * z / n), 100 * (centre + spread) / (1 + z * z / n)


# ---------------------------------------------------------------------------- floors


def untrained_encoder(settings: dict[str, Any], random: bool, method: Method = DIER) -> nn.Module:
    """The encoder as initialised; with `random` its zero convolutions are redrawn by PyTorch's
    default, since as initialised its residual branches are off."""
    torch.manual_seed(settings["seed"])
    encoder = method.build(settings).encoder
    if random:
        for layer in encoder.zero_initialised():
            layer.reset_parameters()
    return encoder


# ---------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its unit and default."""
    p = Parser(description="Linear probe of a DiER run.")
    p.add_argument("--t", help="times in 0..999, such as 400 or 100,400 (0, 100, ..., 900, 999)")
    p.add_argument("--run", help="name or path of a run (the newest)")
    p.add_argument("--data", help="another set than the run's: transfer")
    p.add_argument("--data-dir", type=Path, help="sets live here (the run's)")
    p.add_argument(
        "--norm",
        choices=["std", "none"],
        default="std",
        help="standardise features by the training set, or not, as the paper says (std)",
    )
    p.add_argument("--weights", choices=["ema", "raw"], default="ema", help="which weights (ema)")
    p.add_argument("--epochs", type=whole, default=100, help="epochs of the heads (100)")
    p.add_argument("--lr", type=positive, help="peak learning rate (2 x the paper's: 2e-4 or 2e-5)")
    p.add_argument("--batch-size", type=whole, default=256, help="of the heads (256)")
    p.add_argument("--seeds", type=whole, default=1, help="average over N seeds of the heads (1)")
    p.add_argument(
        "--limit",
        type=count,
        default=0,
        help="N training and N test images, equal over the classes (0 = all)",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    p.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="precision of the encoder (auto)",
    )
    p.add_argument(
        "--export",
        type=Path,
        metavar="FILE.npz",
        help="save features (S, N, V), labels, split (0 train, 1 test), t, mean, std, run",
    )
    return p  # fmt: skip


def parse_times(text: str | None) -> list[int]:
    """ "100,400" -> [100, 400]; None -> the eleven of the paper."""
    if text is None:
        return TIMES
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < T for part in parts):
        fail(f"--t {text}: give whole numbers in 0..{T - 1}, such as --t 100,400")
    return sorted({int(part) for part in parts})


def main(argv: list[str] | None = None) -> None:
    """Find DiER's run, probe it."""
    args = build_parser().parse_args(argv)
    run = find_run(args.run)
    state = read_checkpoint(run)
    require_method(run, state["settings"], DIER, f"{BASELINES} --probe")
    probe_run(run, state, args, DIER)


def probe_run(
    run: Path, state: dict[str, Any], args: argparse.Namespace, method: Method
) -> dict[str, Any] | None:
    """Probe the encoder of a run's checkpoint, and the floors; returns what probe.json holds."""
    settings, world = state["settings"], world_from_environment()
    if args.t and not method.timed:
        fail(f"--t {args.t}: the features of {method.name} do not depend on t; leave it out")
    times = parse_times(args.t) if method.timed else [None]
    if world.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, one process speaks for all
    model = restore_model(state, method, args.weights)
    floors = {
        kind: untrained_encoder(settings, kind == "random", method)
        for kind in FLOORS
        if kind != "random" or hasattr(model.encoder, "zero_initialised")
    }
    with ending_together(world, run):
        return probe(model.encoder, floors, times, args, settings, state["step"], run, world)


def probe(
    encoder: nn.Module,
    floors: dict[str, nn.Module],
    times: list[int | None],
    args: argparse.Namespace,
    settings: dict[str, Any],
    step: int,
    run: Path,
    world: World = ALONE,
) -> dict[str, Any] | None:
    """Encode, train the heads, print the table, write probe.json: the whole protocol for encoder
    and floors, each (B, C, H, W), (B,) -> (B, V), without time at [None]; returns probe.json."""
    device = join(world, pick_device(args.device))
    amp = pick_amp(args.amp, device)
    name = args.data or settings["data"]
    data_dir = args.data_dir or Path(settings["data_dir"])
    with first_alone(world):
        splits = [load(name, s, settings["size"], data_dir, args.limit) for s in ("train", "test")]
    if splits[0].labels is None:
        fail(f"{name} has no classes, and a probe needs them: lay it out as CLASS/* (see README)")
    images = [to_channels(split, settings["channels"]) for split in splits]
    task, protocol = make_task(splits, args, settings, device, step)

    def encode_both(encoder: nn.Module, at: list[int | None], what: str) -> list[Tensor]:
        """Features of the training and the test images."""
        encoder.to(device)
        parts = zip(images, ("train", "test"))
        return [encode(encoder, x, at, device, amp, f"{s}, {what}", run, world) for x, s in parts]

    n_train, n_test = len(task.y_train), len(task.y_test)
    print(f"run {run}, step {step:,}: {name}, {n_train:,} + {n_test:,} images, {device}")
    values, rows, path = encode_both(encoder, times, "v_t"), [], result_path(run, args)
    if world.rank == 0:
        if args.export:
            export(args.export, values, times, task, run)
        if args.norm == "std":
            standardise(*values)
        rows = merge_rows(path, task.rows(*values, times), protocol)
    del values
    both = [choose(rows, key) for key in ("held_out", "top1")] if rows else None
    chosen, oracle = share_from_first(world, both)
    sources = {"pixels": [raw_pixels(x) for x in images]}
    for kind, untrained in floors.items():
        sources[kind] = encode_both(untrained, [chosen["t"]], kind)
    if world.rank:
        return None
    scores = {}
    for kind, both in sources.items():
        if args.norm == "std":
            standardise(*both)
        scores[kind] = task.evaluate(*both)[0]["top1"]
    result = {
        "rows": rows, "chosen_t": chosen["t"], "test_top1": chosen["top1"],
        "oracle_t": oracle["t"], "oracle_top1": oracle["top1"], "floors": scores,
        "n_test": n_test, "protocol": protocol, "run": str(run),
    }  # fmt: skip
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result, n_train, path)
    return result


def make_task(
    splits: list[Split],
    args: argparse.Namespace,
    settings: dict[str, Any],
    device: torch.device,
    step: int,
) -> tuple[Task, dict[str, Any]]:
    """The task of the heads, and the protocol as probe.json states it."""
    y_train, y_test = (torch.from_numpy(split.labels).to(device) for split in splits)
    folds = torch.from_numpy(make_folds(len(y_train), splits[0].groups, 0)).to(device)
    lr, classes = args.lr or (2e-5 if settings["row"] == 256 else 2e-4), splits[0].class_names
    task = Task(y_train, y_test, folds, len(classes), args.epochs, lr, args.batch_size, args.seeds)
    return task, {
        "epochs": args.epochs, "lr": lr, "batch_size": args.batch_size, "seeds": args.seeds,
        "norm": args.norm, "weights": args.weights, "data": args.data or settings["data"],
        "limit": args.limit, "held_out": "a tenth" if len(y_train) >= FEW else "5-fold",
        "step": step,
    }  # fmt: skip


def export(path: Path, features: list[Tensor], times: list[int], task: Task, run: Path) -> None:
    """Write the features as they come from the encoder, in half precision, train before test, with
    the mean and std (S, V) of the training part."""
    mean, std = (x[:, 0] for x in moments(features[0]))
    arrays = {
        "features": torch.cat(features).transpose(0, 1),
        "labels": torch.cat([task.y_train, task.y_test]),
        "split": torch.arange(2).repeat_interleave(
            torch.tensor([len(task.y_train), len(task.y_test)])
        ),
        "t": torch.tensor([-1 if t is None else t for t in times]),  # -1: without time
        "mean": mean, "std": std,
    }  # fmt: skip

    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, run=str(run), **{k: v.cpu().numpy() for k, v in arrays.items()})
    print(f"features: {path}")


def result_path(run: Path, args: argparse.Namespace) -> Path:
    """probe.json for the standard protocol, else probe-SUFFIX.json."""
    suffix = [Path(args.data).name] if args.data else []
    suffix += ["none"] if args.norm == "none" else []
    suffix += ["raw"] if args.weights == "raw" else []
    suffix += [f"limit{args.limit}"] if args.limit else []
    suffix += [f"epochs{args.epochs}"] if args.epochs != 100 else []
    suffix += [f"lr{args.lr:g}"] if args.lr else []
    suffix += [f"batch{args.batch_size}"] if args.batch_size != 256 else []
    suffix += [f"seeds{args.seeds}"] if args.seeds > 1 else []
    return run / ("-".join(["probe", *suffix]) + ".json")


def merge_rows(path: Path, rows: list[dict], protocol: dict) -> list[dict]:
    """Old rows of other t join where checkpoint and protocol are the same; else the old file is
    kept as probe-STEP.json."""
    if not path.exists():
        return rows
    old = json.loads(path.read_text())
    if old["protocol"] != protocol:
        path.replace(path.with_name(f"{path.stem}-{old['protocol']['step']}.json"))
        return rows
    merged = {row["t"]: row for row in old["rows"] + rows}
    return [merged[t] for t in sorted(merged)]


def print_table(result: dict[str, Any], n_train: int, path: Path) -> None:
    """The table: a row and a bar for each t, the choice, the oracle, the floors, the protocol."""
    top5 = result["rows"][0]["top5"] is not None
    print(f"\n   t  held-out   top-1{'   top-5' if top5 else ''}     kNN")
    low = min(row["top1"] for row in result["rows"]) - 1
    high = max(row["top1"] for row in result["rows"])
    for row in result["rows"]:
        bar = "#" * round(30 * (row["top1"] - low) / (high - low))
        spread = f" +- {row['top1_std']:.2f}" if "top1_std" in row else ""
        five = f"{row['top5']:8.2f}" if top5 else ""
        t = "-" if row["t"] is None else row["t"]
        print(
            f"{t:>4}  {row['held_out']:8.2f}{row['top1']:8.2f}{five}{row['knn']:8.2f}  "
            f"{bar}{spread}"
        )
    n, best = result["n_test"], result["test_top1"]
    lower, upper = binomial_interval(best, n)
    timed = result["chosen_t"] is not None
    chosen = f"chosen t = {result['chosen_t']} (by held-out training images): " if timed else ""
    print(f"\n{chosen}test top-1 {best:.2f}%")
    print(f"  95% interval {lower:.2f} to {upper:.2f} ({n:,} test images)")
    if timed:
        print(f"oracle t = {result['oracle_t']} (best on the test set, as the paper reports): "
              f"{result['oracle_top1']:.2f}%")  # fmt: skip
    floors = ", ".join(f"{kind} {top1:.2f}" for kind, top1 in result["floors"].items())
    print(f"floors: {floors}")
    p = result["protocol"]
    print(
        f"protocol: {p['weights']} weights at step {p['step']:,}, features norm {p['norm']}, AdamW "
        f"lr {p['lr']:g} decay {WEIGHT_DECAY}, batch {p['batch_size']}, {p['epochs']} epochs "
        f"(warm-up {WARMUP}, linear to 0), {n_train:,} training images, held-out {p['held_out']}, "
        f"{p['seeds']} seed(s); bars from {low:.1f}%"
    )
    print(f"saved: {path}")


if __name__ == "__main__":
    run_main(main)
