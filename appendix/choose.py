"""Which t? Chosen without a label, and what v does for the network at each t.

    python -m appendix.choose                   the newest run: a table over t, a t, what to do next
    python -m appendix.choose --name mnist --data glyphs        for the images of another set
    python -m appendix.choose --export v.npz    and save v_t at that t, of a set without labels too
    python -m appendix.choose --labels          beside the truth: what each criterion loses
    python -m appendix.choose --few             v_t with 1 to 100 labelled images a class

All criteria look at the same 1,000 test images, never at their labels, at 20 t:

    rank      effective rank of v_t: how many directions it uses (RankMe, arXiv 2210.02885)
    gain      MSE of the noise with another image's v_t less that with the right one, same x_t
    relative  the same, in units of the MSE with the right one
    high      share of high frequencies in the DiT's tokens (as A-SelecT does, arXiv 2603.25758)
    snr       no network: abar_t / (1 - abar_t), times the images' mean power above half the Nyquist
              frequency; at 1 the noise is as strong as their fine detail

A criterion takes the t where it is largest, snr that where it is nearest to 1. The result is
choose.json in the run's folder: name, data, images, chosen_t, criterion, criteria {name: {t}}, rows
[{t, rank, right, wrong, gain, gain_low, gain_high, relative, relative_low, relative_high, high,
snr}], right and wrong the two MSE, low and high the ends of 95% intervals, and where it comes from.
With --labels it is choose-labels.json: rows have accuracy too, that of a ridge classifier in
percent, and criteria spearman, the rank correlation with it, and lost, the points lost at its t.
With --few it is few.json: images, chosen_t, and rows [{features, each, accuracy, std, draws}].

Shapes: B batch, N images, C channels, H W pixels, S side of the grid of tokens, D width,
V = 1024, K classes.
"""

import math
import re
import shlex
import statistics
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import probe
from appendix.baselines import write_json
from appendix.recover import encode, predict_eps, standard_noise
from data import Split, fail, load, mix_seed, progress, replace_file, sample, to_float
from diffusion import alphas_cumprod, eps_loss, q_sample
from model import DiER
from train import RUNS, Parser, find_run, guard, load_model, origin, pick_device, read_config

TIMES = [0, 20, 50, *range(100, 801, 50), 900, 999]
IMAGES, BLOCK = 1_000, 100  # test images that the criteria see; at a time
DEFAULT = "snr"  # the criterion that chooses: it loses least on glyphs and MNIST
LABELLED, TESTED = 4_000, 4_000  # training and test images behind --labels and --few
EACH, DRAWS = (1, 5, 10, 100), 5  # of --few: labelled images a class; how often they are drawn

# ---------------------------------------------------------------------------- criteria


def effective_rank(v: Tensor) -> float:
    """RankMe: exp of the entropy of the singular values of v (N, V), which sum to 1: from 1, all
    rows are multiples of one, to min(N, V). In float64: the rounding of half precision looks like
    hundreds of small directions."""
    p = torch.linalg.svdvals(v.double())
    p = p / p.sum()
    return torch.special.entr(p).sum().exp().item()


def ratio(top: Tensor, bottom: Tensor) -> tuple[float, float, float]:
    """mean(top) / mean(bottom) over the images, (N,) each, and the ends of its 95% interval by the
    delta method; with a bottom of ones it is the mean of top and its usual interval."""
    value = top.mean() / bottom.mean()
    error = (top - value * bottom).std() / bottom.mean() / math.sqrt(len(top))
    return value.item(), (value - 1.96 * error).item(), (value + 1.96 * error).item()


def fine(side: int) -> Tensor:
    """Which coefficients of a side x side Fourier transform lie above half the Nyquist frequency,
    along rows or columns: bool (side, side)."""
    frequency = torch.fft.fftfreq(side).abs()  # cycles a pixel; Nyquist is 1/2
    return torch.maximum(frequency[:, None], frequency[None]) > 0.25


def high_share(tokens: Tensor) -> Tensor:
    """Share of the power above half the Nyquist frequency of the token grid, over all channels:
    tokens (B, S * S, D) in row-major order -> (B,)."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.float().transpose(1, 2).unflatten(2, (side, side))  # (B, D, S, S)
    power = torch.fft.fft2(grid).abs().square().sum(1)  # (B, S, S)
    high = fine(side).to(power.device)
    return (power * high).sum((1, 2)) / power.sum((1, 2))


def fine_power(x0: Tensor) -> float:
    """Mean power of the coefficients of x0 (N, C, H, W) above half the Nyquist frequency. The scale
    is that in which the noise eps has power 1 at each frequency."""
    power = torch.fft.fft2(x0, norm="ortho").abs().square().mean((0, 1))  # (H, W)
    return power[fine(x0.shape[2]).to(power.device)].mean().item()


CRITERIA = {  # name -> what is to be largest, of a row
    "rank": lambda row: row["rank"],
    "gain": lambda row: row["gain"],
    "relative": lambda row: row["relative"],
    "high": lambda row: row["high"],
    "snr": lambda row: -abs(math.log(row["snr"])),
}


def chosen(rows: list[dict[str, Any]], criterion: str) -> int:
    """The t that a criterion chooses, the smallest of equals."""
    score = CRITERIA[criterion]
    return max(rows, key=lambda row: (score(row), -row["t"]))["t"]


# ---------------------------------------------------------------------------- measuring


def pick_images(split: Split, n: int) -> np.ndarray:
    """A seeded sample of n images, uint8 (n, C, H, W), drawn without a look at labels. In random
    order: in a folder sorted by class the image before would be of the same class."""
    order = np.random.default_rng(mix_seed(0, 3)).permutation(len(split.images))
    return split.images[order[:n]]


@torch.no_grad()
def measure(model: DiER, x0: Tensor, t: int, abar: Tensor) -> dict[str, Any]:
    """All criteria but snr at one t, in full precision: a row of images x0 (N, C, H, W). Each image
    is denoised twice from the same x_t, with its own v and with that of the image before."""
    v = torch.cat([encode(model, part, t) for part in x0.split(BLOCK)])  # (N, V)
    parts = [x.split(BLOCK) for x in (x0, standard_noise(x0, 0), v, v.roll(1, 0))]
    right, wrong, high, tokens = [], [], [], []
    last = model.dit.blocks[-1]
    with last.register_forward_hook(lambda block, inputs, output: tokens.append(output)):
        for part, eps, own, other in zip(*parts):
            x_t = q_sample(part, torch.full((len(part),), t, device=x0.device), eps, abar)
            right.append(eps_loss(predict_eps(model, x_t, t, own), eps))
            high.append(high_share(tokens.pop()))
            wrong.append(eps_loss(predict_eps(model, x_t, t, other), eps))
            tokens.clear()
    right, wrong = torch.cat(right).double(), torch.cat(wrong).double()  # (N,) each
    row = {"t": t, "rank": effective_rank(v), "high": torch.cat(high).mean().item()}
    row |= {"right": right.mean().item(), "wrong": wrong.mean().item()}
    for key, unit in (("gain", torch.ones_like(right)), ("relative", right)):
        ends = (key, f"{key}_low", f"{key}_high")
        row |= dict(zip(ends, ratio(wrong - right, unit)))
    return row


def measure_all(model: DiER, images: np.ndarray, device: torch.device) -> list[dict[str, Any]]:
    """The row of each of the 20 t for uint8 images (N, C, H, W)."""
    x0, abar = to_float(torch.from_numpy(images).to(device)), alphas_cumprod()
    power, rows = fine_power(x0), []
    for t in progress(TIMES, "criteria", len(TIMES), "times"):
        row = measure(model, x0, t, abar.to(x0))
        rows.append({**row, "snr": (power * abar[t] / (1 - abar[t])).item()})
    return rows


# ---------------------------------------------------------------------------- with labels


def accuracy(train: Tensor, test: Tensor, y: Tensor, y_test: Tensor, classes: int) -> float:
    """Percent of test images (M, V) that a ridge classifier of training images (N, V) gets right;
    features are standardised already, labels (N,) and (M,)."""
    targets = F.one_hot(y, classes).float()
    scores = test.float() @ probe.ridge(train.float(), targets - targets.mean(0))  # (M, K)
    return 100 * (scores.argmax(1) == y_test).double().mean().item()


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation of two lists, in [-1, 1]; equal values share the mean of their ranks, and a
    constant list correlates with nothing: 0."""
    ranks = []
    for values in (np.array(a), np.array(b)):
        below = (values[:, None] > values).sum(1)
        ranks.append(below + ((values[:, None] == values).sum(1) - 1) / 2)
    ranks = [rank - rank.mean() for rank in ranks]
    length = math.prod(math.sqrt((rank**2).sum()) for rank in ranks)
    return float(ranks[0] @ ranks[1] / length) if length else 0.0


def add_truth(
    rows: list[dict[str, Any]], model: DiER, splits: tuple[Split, Split], device: torch.device
) -> None:
    """Put the accuracy at its t into each row: ridge on 4,000 training images, measured on 4,000
    test images, equal over classes."""
    images, labels = [], []
    for split, n in zip(splits, (LABELLED, TESTED)):
        index = sample(split.labels, len(split.images), n, 0)
        images.append(split.images[index])
        labels.append(torch.from_numpy(split.labels[index]).to(device))
    for row in rows:
        t = row["t"]
        v = [probe.encode(model.encoder, part, t, device, f"v_{t}") for part in images]
        row["accuracy"] = accuracy(*probe.standardise(*v), *labels, len(splits[0].class_names))


def compare(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What each criterion says: {name: {t}}, and beside the truth {name: {t, spearman, lost}}."""
    found = {}
    for name, score in CRITERIA.items():
        found[name] = {"t": chosen(rows, name)}
        if "accuracy" in rows[0]:
            truth = {row["t"]: row["accuracy"] for row in rows}
            found[name]["spearman"] = spearman([score(row) for row in rows], list(truth.values()))
            found[name]["lost"] = max(truth.values()) - truth[found[name]["t"]]
    return found


def draw_few(labels: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """How many labelled images a class the set allows, and DRAWS arrays (K, most) of indices, a
    class a row: its first column has one image a class, its first five have five, ..."""
    classes = np.unique(labels)
    smallest = min((labels == k).sum() for k in classes)
    each = [n for n in EACH if n <= smallest]
    draws = []
    for d in range(DRAWS):
        rng = np.random.default_rng(mix_seed(0, 4, d))
        own = [rng.permutation(np.flatnonzero(labels == k))[: each[-1]] for k in classes]
        draws.append(np.stack(own))
    return each, draws


def few_labels(
    model: DiER, settings: dict[str, Any], splits: tuple[Split, Split], t: int, device: torch.device
) -> list[dict[str, Any]]:
    """Accuracy of a ridge classifier with few labelled images, on v_t, on that of an encoder with
    random weights, and on raw pixels: rows {features, each, accuracy, std, draws} on 4,000 test
    images. Features are standardised by all images ever drawn, which takes no label."""
    train, test = splits
    each, draws = draw_few(train.labels)
    pool = np.unique(np.concatenate(draws))
    index = sample(test.labels, len(test.images), TESTED, 0)
    images = train.images[pool], test.images[index]
    y, y_test = (torch.from_numpy(x).to(device) for x in (train.labels, test.labels[index]))
    encoders = {"v": model.encoder, "random": probe.untrained_encoder(settings, random=True)}
    rows = []
    for kind in ("v", "random", "pixels"):
        if kind == "pixels":
            x = [probe.raw_pixels(part).to(device) for part in images]
        else:
            x = [probe.encode(encoders[kind], part, t, device, kind) for part in images]
        x, x_test = probe.standardise(*x)
        for n in each:
            scores = []
            for draw in draws:
                own = draw[:, :n].ravel()
                place = torch.from_numpy(np.searchsorted(pool, own)).to(device)
                labels = y[torch.from_numpy(own).to(device)]
                scores.append(accuracy(x[place], x_test, labels, y_test, len(train.class_names)))
            row = {"features": kind, "each": n, "accuracy": statistics.mean(scores)}
            rows.append({**row, "std": statistics.stdev(scores), "draws": scores})
    return rows


# ---------------------------------------------------------------------------- command line


def print_rows(rows: list[dict[str, Any]], criteria: dict[str, dict[str, float]]) -> None:
    """The table over t, and what each criterion says."""
    truth = "accuracy" in rows[0]
    print(f"\n   t    rank     gain +-       relative +-     high       snr{'  accuracy' * truth}")
    for row in rows:
        gain, relative = (row[f"{key}_high"] - row[key] for key in ("gain", "relative"))
        print(
            f"{row['t']:>4}  {row['rank']:6.2f}  {row['gain']:7.4f} {gain:.4f}  "
            f"{row['relative']:8.2f} {relative:5.2f}  {row['high']:7.4f}  {row['snr']:8.3g}"
            + (f"  {row['accuracy']:8.2f}" if truth else "")
        )
    print(f"\ncriterion     t{'  correlation  points lost' * truth}")
    for name, found in criteria.items():
        more = f"  {found['spearman']:11.2f}  {found['lost']:11.2f}" if truth else ""
        print(f"{name:10} {found['t']:4}{more}")


def print_few(rows: list[dict[str, Any]], t: int) -> None:
    """Accuracy with few labels, features by images a class."""
    each = sorted({row["each"] for row in rows})
    print(f"\nlabelled images a class{''.join(f'{n:>14}' for n in each)}")
    for kind in dict.fromkeys(row["features"] for row in rows):
        own = [row for row in rows if row["features"] == kind]
        name = f"v_{t}" if kind == "v" else kind
        cells = "".join(f"{row['accuracy']:8.2f} +-{row['std']:4.1f}" for row in own)
        print(f"{name:23}{cells}")


def export(
    path: Path, model: DiER, splits: tuple[Split, Split], t: int, device: torch.device
) -> None:
    """Write v_t of all images as probe.py's --export does; y_train and y_test where there are
    labels."""

    def write(to: Path) -> None:
        with zipfile.ZipFile(to, "w") as archive:
            for kind, split in zip(("train", "test"), splits):
                v = probe.encode(model.encoder, split.images, t, device, f"v_{t} of {kind}")
                probe.write_arrays(archive, {f"x_{kind}_{t}": v})
                if split.labels is not None:
                    probe.write_arrays(archive, {f"y_{kind}": torch.from_numpy(split.labels)})

    replace_file(path, write)
    print(f"saved: {path}")


def build_parser() -> Parser:
    """Every flag, with its default."""
    p = Parser(__doc__, prog="python -m appendix.choose")
    p.add_argument("--name", help="the run in runs/NAME (the newest)")
    p.add_argument("--data", help="another set than the run's")
    p.add_argument("--data-dir", help="sets live here (the run's)")
    p.add_argument("--device", help="auto, cpu, cuda, cuda:1 (auto: cuda if any)")
    p.add_argument("--export", metavar="FILE.npz", help="save v_t at the chosen t")
    p.add_argument("--labels", action="store_true", help="compare with the accuracy at each t")
    p.add_argument("--few", action="store_true", help="accuracy with few labels at the chosen t")
    return p


def open_run(
    typed: dict[str, Any], device: torch.device
) -> tuple[Path, DiER, dict[str, Any], tuple[Split, Split]]:
    """The run's folder, its networks, its checkpoint and the images; exits where one of them does
    not allow what the flags ask for."""
    folder = find_run(typed.get("name"))
    method = read_config(folder).get("method", "dier")
    if method != "dier":
        fail(f"{folder} is a run of {method}: t is chosen for runs of dier alone")
    export_to = Path(typed.get("export", "v.npz"))
    if export_to.is_dir():
        fail(f"--export {export_to} is a folder: name a file, such as {export_to / 'v.npz'}")
    model, saved = load_model(folder)
    settings = saved["settings"]
    name, data_dir = typed.get("data", settings["data"]), typed.get("data_dir")
    where = Path(data_dir or settings["data_dir"])
    splits = load(name, settings["size"], settings["channels"], where)
    for flag in ("labels", "few"):
        if flag in typed and len(splits[0].class_names) < 2:
            fail(f"{name} has no classes, and --{flag} needs two: lay it out as CLASS/*")
    if len(splits[1].images) < 2:
        fail(f"{name} has one test image, and the v of another needs two")
    return folder, model.to(device), saved, splits


def next_command(typed: dict[str, Any], t: int, labelled: bool) -> str:
    """What makes use of t: the probe, or without labels an export, which finds the same t."""
    words = ["probe.py", "--t", str(t)] if labelled else ["-m", "appendix.choose"]
    for key in ("name", "data", "data_dir", "device"):
        if key in typed:
            words += [f"--{key.replace('_', '-')}", typed[key]]
    return shlex.join(["python", *words, *([] if labelled else ["--export", "v.npz"])])


def main(argv: list[str] | None = None) -> None:
    """Measure the criteria on a run, choose t, say what comes next."""
    argv = sys.argv[1:] if argv is None else argv
    typed = vars(build_parser().parse_args(argv))
    device = pick_device(typed.get("device", "auto"))
    folder, model, saved, splits = open_run(typed, device)
    settings, labelled = saved["settings"], len(splits[0].class_names) > 1
    images = pick_images(splits[1], IMAGES)
    print(f"{folder}, step {saved['step']:,}, {device}: {len(images):,} test images")
    rows = measure_all(model, images, device)
    if "labels" in typed:
        add_truth(rows, model, splits, device)
    criteria = compare(rows)
    print_rows(rows, criteria)
    t, name = criteria[DEFAULT]["t"], typed.get("data", settings["data"])
    result = {"name": str(folder.relative_to(RUNS)), "data": name, "images": len(images)}
    result |= {"chosen_t": t, "criterion": DEFAULT, "step": saved["step"]}
    result |= origin(["-m", "appendix.choose", *argv])
    files = {
        "choose-labels" if "labels" in typed else "choose": {"criteria": criteria, "rows": rows}
    }
    if "few" in typed:
        few = few_labels(model, settings, splits, t, device)
        print_few(few, t)
        files["few"] = {"rows": few}
    other = "" if name == settings["data"] else re.sub(r"[^\w.-]+", "_", f"-data-{name}")
    for stem, content in files.items():
        path = folder / f"{stem}{other}.json"
        write_json(path, result | content)
        print(f"saved: {path}")
    if "export" in typed:
        export(Path(typed["export"]), model, splits, t, device)
    after = "" if "export" in typed else f"; next: {next_command(typed, t, labelled)}"
    print(f"t = {t} by {DEFAULT}{after}")


if __name__ == "__main__":
    guard(main)
