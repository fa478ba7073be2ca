"""The linear probe (Sec. 5.2, A.2): how well does a linear classifier read the class off v_t?

    python probe.py                     the newest run at t = 0, 100, ..., 900, 999
    python probe.py --t 400             one t; --t 100,400 two
    python probe.py --t auto            find a t by up to 15 trials on training images, probe it
    python probe.py --name mnist --data glyphs      the features of another set (transfer)
    python probe.py --norm none         the paper's stated protocol: features as they are

For each t: encode every image once, standardise, train the heads (linear classifiers: one on all
training images, one more for each fold, which it does not see), print a row. `top1` is the accuracy
on the test set, `held_out` on training images that a head did not see. t is chosen by `held_out`,
which never looks at a test label; the paper reports the best t on the test set, which stands here
as `oracle`. Floors stand beside the result: raw pixels, and encoders never trained.

probe.json holds the standard sweep: rows [{t, top1, top5, held_out, knn}] (top5 null for 10 classes
or fewer), chosen_t, test_top1, oracle_t, oracle_top1, floors {pixels, untrained, random}, n_train,
n_test, protocol, and where they come from: name, seed, epochs, command, commit, versions, machine,
seconds, and the same of the training. Accuracies are in percent. Any flag of the protocol unlike
its default puts its name and value into the file's: probe-t-400.json. `--t auto` adds search, rows
[{t, images, accuracy, explained, seconds}].

Shapes: N training and M test images, B batch, V = 1024, K classes, H heads.
"""

import argparse
import hashlib
import math
import os
import re
import sys
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
from data import Split, fail, load, mix_seed, progress, replace_file, sample, to_float, write_json
from diffusion import T
from train import (
    AMP,
    RUNS,
    Parser,
    build_dier,
    data_name,
    find_run,
    guard,
    load_model,
    natural,
    new_file,
    origin,
    pick_amp,
    pick_device,
    positive,
    positive_int,
)

TIMES = [*range(0, T, 100), T - 1]  # Sec. A.2: "11 times at intervals of 100 ... from 0 to 999"
WEIGHT_DECAY, EPOCHS = 0.05, 100  # of the heads (Sec. A.2)
UPDATES = 3_800  # of the heads, at least: 100 epochs of the paper's smallest set, BCCD, are as many
BATCH = 256  # of the heads; the paper does not say
FEW = 5_000  # with fewer training images one tenth is too small a sample to choose t by
PIXELS = 32  # raw pixels are compared at 32 x 32 at most: 256 x 256 are 196,608 weights a class
NEIGHBOURS = 20
BLOCK = 250  # images encoded at once, of up to 64 x 64 pixels; of larger ones as many pixels
STEP, FINEST = 125, 15  # --t auto: spacing of the first t, smallest distance of the last
RIDGE = 100.0  # ridge penalty |w|^2 of --t auto; the more images, the less it matters

# ---------------------------------------------------------------------------- features


@torch.no_grad()
def encode(
    encoder: nn.Module, images: np.ndarray, t: int, device: torch.device, what: str
) -> Tensor:
    """v_t of uint8 images (N, C, H, W) -> (N, V) in half precision, on the device; `what` names
    them in the progress line. The encoder is moved there and put into eval mode: no dropout.
    """
    encoder = encoder.to(device).eval()
    amp = pick_amp("auto", device)
    parts: list[Tensor] = []
    size = max(1, min(BLOCK, BLOCK * 64**2 // math.prod(images.shape[2:])))
    blocks = range(0, len(images), size)
    for first in progress(
        blocks, f"encoding {what}", len(images), "images", lambda: sum(map(len, parts))
    ):
        block = np.array(images[first : first + size])  # a copy: torch wants no read-only memory
        x0 = to_float(torch.from_numpy(block).to(device))
        times = torch.full((len(x0),), t, device=device)
        with torch.autocast(device.type, AMP[amp], enabled=amp != "off"):
            parts.append(encoder(x0, times).half())
    return torch.cat(parts)


class Pixels(nn.Module):
    """Raw pixels in the place of an encoder: (B, C, H, W), (B,) -> (B, C * h * w),
    averaged to h = w = 32 where the images are larger."""

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        if x0.shape[2] > PIXELS:
            x0 = F.interpolate(x0, (PIXELS, PIXELS), mode="area")
        return x0.flatten(1)


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the training mean and divide by the training std, as the batch norm of MAE's probe
    does: (N, V), (M, V) -> the same shapes in half precision. A constant feature becomes 0."""
    mean, std = train.float().mean(0), train.float().std(0, correction=0)
    std = torch.where(std > 1e-6, std, 1.0)
    # Where training images hardly differ, a test image may lie beyond half precision.
    largest = torch.finfo(torch.half).max
    both = [((x.float() - mean) / std).clamp(-largest, largest).half() for x in (train, test)]
    return both[0], both[1]


# ---------------------------------------------------------------------------- heads


def make_folds(n: int, groups: np.ndarray | None) -> np.ndarray:
    """Fold of each training image, int64 (n,): 0 .. F - 1 are held out in turn, -1 never.

    From 5,000 images on F = 1, about one tenth; below, F = 5 and every image is held out once.
    Images of one group (a patient, a source picture) are never apart: few or large groups make the
    folds uneven, and fewer than five leave some empty. Exits where there is one group.
    """
    unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    if unit.max() == 0:
        fail("all training images are of one group, and held-out ones need another")
    order = np.random.default_rng(mix_seed(0, 1)).permutation(unit.max() + 1)
    share = order[unit] / (unit.max() + 1)  # in [0, 1)
    if n >= FEW:
        return np.where(share < 0.1, 0, -1)
    return (share * 5).astype(np.int64)


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up to the peak, then linear decay to 0 (Sec. A.2), by step in 0 .. total - 1."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / (total - warmup)


def head_epochs(n: int) -> int:
    """Epochs of the heads on n training images: 100 (Sec. A.2), and on fewer than 9,728 as many as
    make 3,800 updates. At the paper's small rates heads on hundreds of images would else end nearly
    where they begin: on raw pixels of 200 digits, at 2e-5, top-1 is 17 after 100 updates and 79
    after 3,800."""
    return max(EPOCHS, math.ceil(UPDATES / (n // min(BATCH, n))))


def train_heads(
    x: Tensor, y: Tensor, folds: Tensor, classes: int, epochs: int, peak: float
) -> nn.Linear:
    """All heads of one t as one linear layer (V -> H * K), H = 1 + folds; x (N, V), y, folds (N,).

    Head 0 learns from every image, head f + 1 from all but those of fold f: there its target is
    cross_entropy's ignore_index, -100. The loss is the sum over heads of the mean over images, so
    each learns as if alone. The weights are those after the last epoch: nothing is selected.
    """
    n, width = x.shape
    heads = 2 + int(folds.max())
    generator = torch.Generator().manual_seed(mix_seed(0, 2))
    layer = nn.Linear(width, heads * classes, device=x.device)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(layer.weight.shape, generator=generator))
        layer.bias.zero_()
    optimizer = torch.optim.AdamW(layer.parameters(), peak, weight_decay=WEIGHT_DECAY, fused=True)

    targets = y[:, None].repeat(1, heads)  # (N, H)
    for fold in range(heads - 1):
        targets[folds == fold, fold + 1] = -100
    batch = min(BATCH, n)
    steps = n // batch  # an epoch; the rest of a permutation is dropped, so every batch is full
    total = epochs * steps
    warmup = total // 10  # Sec. A.2: 10 of 100 epochs
    for epoch in progress(range(epochs), "linear classifiers", epochs, "epochs"):
        order = torch.randperm(n, generator=generator).to(x.device)
        for step, index in enumerate(order[: steps * batch].split(batch)):
            rate = learning_rate(epoch * steps + step, total, warmup, peak)
            optimizer.param_groups[0]["lr"] = rate
            rows = x.index_select(0, index)  # copies whole rows, which x[index] does not
            logits = layer(rows.float()).view(batch, heads, classes)  # (B, H, K)
            target = targets[index]  # (B, H)
            loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")  # (B, H)
            loss = loss.sum(0) / (target >= 0).sum(0).clamp(min=1)  # (H,)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    return layer.requires_grad_(False)


def evaluate(
    train: Tensor, test: Tensor, labels: list[Tensor], folds: Tensor, protocol: dict
) -> dict[str, float | None]:
    """Train the heads on features (N, V), score them on (M, V) and on the folds that they did not
    see: {top1, top5 (None up to 10 classes), held_out} in percent. Of equal scores the first class
    is the guess, so features without information give chance."""
    y_train, y_test = labels
    classes = protocol["classes"]
    layer = train_heads(train, y_train, folds, classes, protocol["epochs"], protocol["lr"])
    scores = layer(test.float())[:, :classes]  # (M, K) of head 0
    top5 = None
    if classes > 10:
        hits = (scores.topk(5, dim=1).indices == y_test[:, None]).any(1)
        top5 = 100 * hits.double().mean().item()
    held = (folds >= 0).nonzero()[:, 0]  # (n,)
    logits = torch.cat([layer(part.float()) for part in train[held].split(5000)])  # (n, H * K)
    guesses = logits.view(len(held), -1, classes).argmax(2)  # (n, H)
    unseen = guesses.gather(1, folds[held, None] + 1)[:, 0]  # (n,), of the head that leaves it out
    return {
        "top1": 100 * (scores.argmax(1) == y_test).double().mean().item(),
        "top5": top5,
        "held_out": 100 * (unseen == y_train[held]).double().mean().item(),
    }


def knn(train: Tensor, test: Tensor, labels: list[Tensor], classes: int) -> float:
    """Percent of test images (M, V) whose 20 nearest training images (N, V), by cosine, vote for
    their class; of equal votes the lowest class wins."""
    y_train, y_test = labels
    train = F.normalize(train.float(), dim=1)
    hits = 0
    for x, y in zip(test.split(1000), y_test.split(1000)):
        cosine = F.normalize(x.float(), dim=1) @ train.T  # (1000, N)
        near = cosine.topk(min(NEIGHBOURS, len(train)), dim=1).indices  # (1000, 20)
        votes = F.one_hot(y_train[near], classes).sum(1)  # (1000, K)
        hits += (votes.argmax(1) == y).sum().item()
    return 100 * hits / len(y_test)


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The weights (V, K) that minimise |x w - y|^2 + 100 |w|^2 for standardised features x (N, V)
    and centred one-hot labels y (N, K): a linear classifier in closed form."""
    gram = x.T @ x  # (V, V)
    gram.diagonal().add_(RIDGE)
    return torch.linalg.solve(gram, x.T @ y)


def wilson(percent: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval, in percent, of an accuracy measured on n images."""
    p, z = percent / 100, 1.96
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * edge / (1 + z * z / n) for edge in (centre - spread, centre + spread))
    return max(0.0, low), min(100.0, high)


# ---------------------------------------------------------------------------- the probe


def choose(rows: list[dict], key: str) -> dict:
    """The row with the largest `key`, the smallest t of equals."""
    return max(rows, key=lambda row: (row[key], -row["t"]))


def search(encoder: nn.Module, split: Split, device: torch.device, classes: int) -> list[dict]:
    """Coarse-to-fine search for the t whose v_t tells most about the class: t = 0, 125, ..., 875,
    999, then the best so far +- 62, +- 31, +- 15. On a twelfth of the training images, but at least
    800 (or all) and at most 3,000. Returns rows {t, images, accuracy, explained, seconds}.

    Each t is scored by a ridge classifier, cross-validated in five folds. `explained` is R^2 of the
    one-hot labels on held-out images: smooth in t, where accuracy jumps by chance.
    """
    split = sample(split, min(3_000, max(800, len(split.images) // 12)), seed=0)
    n = len(split.images)
    folds = torch.from_numpy(make_folds(n, split.groups)).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    y = F.one_hot(labels, classes).float()  # (n, K)
    y = y - y.mean(0)
    rows: list[dict] = []
    step, times = STEP, [*range(0, T, STEP), T - 1]
    print("\n   t  images  accuracy  explained", flush=True)
    while step >= FINEST:
        for t in times:
            start = time.monotonic()
            x = encode(encoder, split.images, t, device, f"v_{t}")
            x = standardise(x, x)[0].float()
            guess = torch.empty_like(y)
            for fold in folds.unique():
                held = folds == fold
                guess[held] = x[held] @ ridge(x[~held], y[~held])
            accuracy = 100 * (guess.argmax(1) == labels).double().mean().item()
            explained = 1 - ((guess - y).square().sum() / y.square().sum()).item()
            row = {"t": t, "images": n, "accuracy": accuracy, "explained": explained}
            rows.append({**row, "seconds": time.monotonic() - start})
            print(f"{t:>4}  {n:6,}  {accuracy:8.2f}  {explained:9.4f}", flush=True)
        best = choose(rows, "explained")["t"]
        step //= 2
        times = [t for t in (best - step, best + step) if 0 <= t < T]
    return rows


def untrained_encoder(settings: dict, random: bool) -> nn.Module:
    """An encoder that was never trained. At initialisation the last convolution of each residual
    branch is zero, so its branches are off; `random` re-initialises those too."""
    torch.manual_seed(settings["seed"])
    encoder = build_dier(settings).encoder
    if random:
        for layer in encoder.zero_initialised():
            layer.reset_parameters()
    return encoder


def probe(
    encoder: nn.Module,
    floors: dict[str, nn.Module],
    times: list[int],
    splits: tuple[Split, Split],
    device: torch.device,
    protocol: dict,
    export: Path | None = None,
) -> dict:
    """The whole protocol at each of the times for an encoder that maps images (B, C, H, W) and t
    (B,) to v (B, V); prints each row when it is known. Then probes `floors`, more such encoders, at
    the chosen t. Returns the results of probe.json; `main` adds where they come from.

    `protocol` has norm, epochs, lr and classes. With `export`, v_t is written there as well, as an
    .npz: x_train_T (N, V) and x_test_T (M, V) in half precision for each time T, y_train, y_test.
    """
    labels = [torch.from_numpy(split.labels).to(device) for split in splits]
    folds = torch.from_numpy(make_folds(len(labels[0]), splits[0].groups)).to(device)
    classes = protocol["classes"]

    def features(encoder: nn.Module, t: int, what: str) -> list[Tensor]:
        """v_t of the training and of the test images."""
        kinds = zip(splits, ("train", "test"))
        return [encode(encoder, x.images, t, device, f"{kind} images, {what}") for x, kind in kinds]

    def score(train: Tensor, test: Tensor) -> dict:
        """What a row says of features (N, V) and (M, V)."""
        if protocol["norm"] == "std":
            train, test = standardise(train, test)
        row = evaluate(train, test, labels, folds, protocol)
        return {**row, "knn": knn(train, test, labels, classes)}

    rows = []
    print(f"\n   t  held-out   top-1{'   top-5' if classes > 10 else ''}     kNN", flush=True)
    with zipfile.ZipFile(export, "w") if export else nullcontext() as archive:
        for t in times:
            train, test = features(encoder, t, f"v_{t}")
            if archive:
                write_arrays(archive, {f"x_train_{t}": train, f"x_test_{t}": test})
            row = {"t": t, **score(train, test)}
            rows.append(row)
            numbers = (row["held_out"], row["top1"], row["top5"], row["knn"])
            print(f"{t:>4}  " + "".join(f"{x:8.2f}" for x in numbers if x is not None), flush=True)
        if archive:
            write_arrays(archive, {"y_train": labels[0], "y_test": labels[1]})

    chosen, oracle = choose(rows, "held_out"), choose(rows, "top1")
    scores = {}
    for kind, floor in floors.items():
        scores[kind] = score(*features(floor, chosen["t"], kind))["top1"]
    result = {"rows": rows, "floors": scores, "protocol": protocol}
    result |= {"chosen_t": chosen["t"], "test_top1": chosen["top1"]}
    result |= {"oracle_t": oracle["t"], "oracle_top1": oracle["top1"]}
    return result | {"n_train": len(labels[0]), "n_test": len(labels[1])}


def write_arrays(archive: zipfile.ZipFile, arrays: dict[str, Tensor]) -> None:
    """Add arrays to an open .npz, which is a .zip of .npy files."""
    for name, array in arrays.items():
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, array.cpu().numpy())


def print_summary(result: dict) -> None:
    """Print the choice of t, the oracle, the floors and the protocol of what `probe` returns."""
    n_train, n_test, p = result["n_train"], result["n_test"], result["protocol"]
    top1 = result["test_top1"]
    low, high = wilson(top1, n_test)
    several = len(result["rows"]) > 1
    tried = result.get("search")
    which = "chosen by held-out training images" if several else "given"
    if tried:
        which = "found by the search on training images"
    print(
        f"\nt = {result['chosen_t']} ({which}): test top-1 {top1:.2f}%, 95% interval {low:.2f} to "
        f"{high:.2f} ({n_test:,} test images)"
    )
    if several:
        print(
            f"oracle, the best t on the test set (the paper's protocol): t = {result['oracle_t']}, "
            f"{result['oracle_top1']:.2f}%"
        )
    if tried:
        images, seconds = (sum(row[key] for row in tried) for key in ("images", "seconds"))
        sweep = len(TIMES) * (n_train + n_test)
        print(
            f"search: {images:,} images encoded, {images / sweep:.1%} of a sweep's {sweep:,}, in "
            f"{seconds:.0f} s"
        )
    print("floors: " + ", ".join(f"{kind} {value:.2f}" for kind, value in result["floors"].items()))
    print(
        f"protocol: {p['weights']} weights at step {p['step']:,}, norm {p['norm']}, AdamW lr "
        f"{p['lr']:g}, decay {WEIGHT_DECAY}, batch {min(BATCH, n_train)},\n"
        f"  {p['epochs']:,} epochs (a tenth is warm-up, then linear to 0), "
        f"{n_train:,} training images, held-out {'a tenth' if n_train >= FEW else '5-fold'}"
    )


# ---------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its unit and default."""
    p = Parser(__doc__)
    add = p.add_argument
    times = "times in 0..999, such as 400 or 100,400; auto: find one (0, 100, ..., 900, 999)"
    add("--t", type=parse_times, help=times)
    add("--name", help="the run in runs/NAME (the newest)")
    add("--data", type=data_name, help="another set than the run's: transfer")
    add("--data-dir", help="sets live here (the run's)")
    norm = "standardise features by the training set, or not, as the paper says (std)"
    add("--norm", choices=["std", "none"], help=norm)
    add("--weights", choices=["ema", "raw"], help="the weights' average, or the weights (ema)")
    add("--epochs", type=positive_int, help="epochs of the heads (100; few images: more)")
    add("--lr", type=positive, help="peak learning rate (2 x the paper's: 2e-4 or 2e-5)")
    add("--limit", type=natural, help="N training and N test images, equal over classes (0 = all)")
    add("--device", help="auto, cpu, cuda, cuda:1 (auto: cuda if any)")
    export = "save v_t as well: x_train_400, ..., y_train, y_test"
    add("--export", type=new_file, metavar="FILE.npz", help=export)
    return p


def parse_times(text: str) -> list[int] | str:
    """The times of --t, sorted: "400,100" -> [100, 400]; "auto" stays; argparse's error outside
    0..999."""
    if text == "auto":
        return text
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < T for part in parts):
        numbers = f"whole numbers in 0..{T - 1}, as in 100,400"
        raise argparse.ArgumentTypeError(f"{text}: give {numbers}, or auto")
    return sorted({int(part) for part in parts})


def standard_protocol(settings: dict, n: int) -> dict:
    """The protocol on n training images, a flag each: epochs and rate of Sec. A.2; std and ema are
    chosen here."""
    return {
        "data": settings["data"],
        "limit": 0,
        "norm": "std",
        "epochs": head_epochs(n),
        "lr": 2e-5 if settings["data"] in ("bccd", "oct2017") else 2e-4,  # twice the paper's
        "weights": "ema",
    }


def result_path(folder: Path, typed: dict, standard: dict) -> Path:
    """probe.json for the standard sweep; a flag unlike its default adds its name and value."""
    words = ["probe"]
    for key, default in standard.items():
        value = typed.get(key, default)
        if value != default:
            values = value if isinstance(value, list) else [value]
            words += [key, file_word("-".join(map(str, values)))]
    return folder / ("-".join(words) + ".json")


def file_word(text: str) -> str:
    """The value of a flag as a part of a file's name, another for each value: a hash stands for
    what no name can hold, such as slashes, and for too many of the 255 bytes that it may have."""
    code = hashlib.sha256(os.fsencode(text)).hexdigest()
    word = re.sub(r"[^\w.-]+", "_", text)
    if len(os.fsencode(word)) > 60:
        return code[:16]
    return word if word == text else f"{word}-{code[:8]}"


def main(argv: list[str] | None = None) -> None:
    """Find the run, probe it, print and write the result."""
    typed = vars(build_parser().parse_args(argv))
    folder = find_run(typed.pop("name", None))
    export = typed.get("export")
    model, saved = load_model(folder, weights=typed.get("weights", "ema"))
    settings = saved["settings"]
    device = pick_device(typed.get("device", "auto"))
    name, limit = typed.get("data", settings["data"]), typed.get("limit", 0)
    print(f"{folder}, step {saved['step']:,}, {device}")
    data_dir = Path(typed.get("data_dir", settings["data_dir"]))
    splits = load(name, settings["size"], settings["channels"], data_dir, limit)
    standard = {"t": TIMES, **standard_protocol(settings, len(splits[0].images))}
    protocol = {key: typed.get(key, value) for key, value in standard.items()}
    times = protocol.pop("t")
    path = result_path(folder, typed, standard)
    data.check_writable(path, export)
    classes = len(splits[0].class_names)
    if classes < 2:
        fail(
            f"{name} has no classes, and a probe needs two: lay it out as CLASS/*; or python -m "
            "appendix.choose finds a t without them"
        )
    if len(np.unique(splits[0].labels)) < 2:
        what = f"--limit {limit} leaves" if limit else f"{name} has training"
        fail(f"{what} images of one class, and a probe needs two classes")
    protocol |= {"classes": classes, "step": saved["step"]}
    floors = {"pixels": Pixels(), "untrained": untrained_encoder(settings, random=False)}
    floors["random"] = untrained_encoder(settings, random=True)

    seen = saved["step"] * settings["batch_size"] / settings["images"]
    result = {"name": str(folder.relative_to(RUNS)), "seed": settings["seed"], "epochs": seen}
    result |= {"training": {**(settings.get("origin") or {}), "seconds": saved["seconds"]}}
    command = ["probe.py", *(sys.argv[1:] if argv is None else argv)]
    result |= origin(command, str(device))
    start = time.monotonic()
    if times == "auto":
        result["search"] = search(model.encoder, splits[0], device, classes)
        times = [choose(result["search"], "explained")["t"]]

    def run(to: Path | None = None) -> None:
        result.update(probe(model.encoder, floors, times, splits, device, protocol, to))

    if export:
        replace_file(export, run, private=re.escape(export.name))
    else:
        run()
    result["seconds"] = time.monotonic() - start
    print_summary(result)
    write_json(path, result)
    print(f"saved: {path}" + (f", {export}" if export else ""))


if __name__ == "__main__":
    guard(main, "a smaller --limit")
