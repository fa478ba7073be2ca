"""Which t? Chosen without a label, and what v does for the network at each t.

    python -m appendix.choose                   the newest run: a table over t, a t, what to do next
    python -m appendix.choose --name mnist --data glyphs        for the images of another set
    python -m appendix.choose --export v.npz    and save v_t at that t, of a set without labels too
    python -m appendix.choose --few             v_t with 1 to 100 labelled images a class

The t is the one at which noise and fine detail are even: abar_t / (1 - abar_t), times the images'
mean power above half the Nyquist frequency, is nearest to 1. It needs no network and no label, and
1,000 training images are enough. Four criteria that do need the network lost more accuracy on
glyphs, MNIST and CIFAR-10, and less on parts of two medical sets; results/README.md has all five.

The table shows at 20 t what v does for the network: its gain, the MSE of the noise with another
image's v_t less that with the right one, from the same x_t, over 1,000 test images.

The result is choose.json in the run's folder: name, data, images, power, chosen_t, rows [{t, snr,
right, wrong, gain, gain_low, gain_high}], right and wrong the two MSE, low and high the ends of a
95% interval, and where it comes from. With --few also few.json: images, power, chosen_t, and rows
[{features, each, accuracy, std, draws}].

Shapes: B batch, N images, C channels, H W pixels, V = 1024, K classes.
"""

import math
import re
import shlex
import statistics
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import probe
from appendix.recover import embed, predict_eps, standard_noise
from data import (
    Split,
    fail,
    load,
    mix_seed,
    progress,
    replace_file,
    sample,
    to_float,
    write_json,
)
from diffusion import alphas_cumprod, eps_loss, q_sample
from model import DiER
from train import (
    RUNS,
    Parser,
    data_name,
    find_run,
    guard,
    load_model,
    new_file,
    origin,
    pick_device,
)

TIMES = [0, 20, 50, *range(100, 801, 50), 900, 999]
IMAGES, BLOCK = 1_000, 25  # images behind t and behind the gain; at a time
TESTED = 4_000  # test images behind --few
EACH, DRAWS = (1, 5, 10, 100), 5  # of --few: labelled images a class; how often they are drawn

# ---------------------------------------------------------------------------- t


def fine_power(x0: Tensor) -> float:
    """Mean power of the Fourier coefficients of x0 (N, C, H, W) above half the Nyquist frequency,
    along rows or columns. In this scale the noise eps has power 1 at each frequency."""
    frequency = torch.fft.fftfreq(x0.shape[2], device=x0.device).abs()  # Nyquist is 1/2
    fine = torch.maximum(frequency[:, None], frequency[None]) > 0.25  # (H, W)
    power = torch.fft.fft2(x0, norm="ortho").abs().square().mean((0, 1))  # (H, W)
    return power[fine].mean().item()


def snr(power: float) -> Tensor:
    """Power of what is left of the images' fine detail in x_t over that of the noise: (1000,)."""
    abar = alphas_cumprod()
    return power * abar / (1 - abar)


def even_t(power: float) -> int:
    """The t at which fine detail and noise are nearest to even."""
    return snr(power).log().abs().argmin().item()


# ---------------------------------------------------------------------------- measuring


def pick_images(split: Split, n: int) -> np.ndarray:
    """A seeded sample of n images, uint8 (n, C, H, W), drawn without a look at labels. In random
    order: in a folder sorted by class the image before would be of the same class."""
    order = np.random.default_rng(mix_seed(0, 3)).permutation(len(split.images))
    return split.images[order[:n]]


@torch.no_grad()
def measure(model: DiER, x0: Tensor, t: int, abar: Tensor) -> dict:
    """The gain of v at one t, in full precision: a row of images x0 (N, C, H, W). Each image is
    denoised twice from the same x_t, with its own v and with that of the image before."""
    v = torch.cat([embed(model, part, t) for part in x0.split(BLOCK)])  # (N, V)
    right, wrong = [], []
    for part, eps, own, other in zip(
        *(x.split(BLOCK) for x in (x0, standard_noise(x0, 0), v, v.roll(1, 0)))
    ):
        x_t = q_sample(part, torch.full((len(part),), t, device=x0.device), eps, abar)
        right.append(eps_loss(predict_eps(model, x_t, t, own), eps))
        wrong.append(eps_loss(predict_eps(model, x_t, t, other), eps))
    right, wrong = torch.cat(right).double(), torch.cat(wrong).double()  # (N,) each
    gain = (wrong - right).mean().item()
    half = 1.96 * (wrong - right).std().item() / math.sqrt(len(x0))
    row = {"t": t, "right": right.mean().item(), "wrong": wrong.mean().item()}
    return row | {"gain": gain, "gain_low": gain - half, "gain_high": gain + half}


# ---------------------------------------------------------------------------- with few labels


def accuracy(train: Tensor, test: Tensor, y: Tensor, y_test: Tensor, classes: int) -> float:
    """Percent of test images (M, V) that a ridge classifier of training images (N, V) gets right;
    features are standardised already, labels (N,) and (M,)."""
    targets = F.one_hot(y, classes).float()
    scores = test.float() @ probe.ridge(train.float(), targets - targets.mean(0))  # (M, K)
    return 100 * (scores.argmax(1) == y_test).double().mean().item()


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
    model: DiER, settings: dict, splits: tuple[Split, Split], t: int, device: torch.device
) -> list[dict]:
    """Accuracy of a ridge classifier with few labelled images, on v_t, on that of an encoder with
    random weights, and on raw pixels: rows {features, each, accuracy, std, draws} on 4,000 test
    images at most. Features are standardised by all images ever drawn, which takes no label."""
    train, test = splits[0], sample(splits[1], TESTED, seed=0)
    each, draws = draw_few(train.labels)
    pool = np.unique(np.concatenate(draws))
    images = train.images[pool], test.images
    y, y_test = (torch.from_numpy(split.labels).to(device) for split in (train, test))
    encoders = {"v": model.encoder, "random": probe.untrained_encoder(settings, random=True)}
    encoders["pixels"] = probe.Pixels()
    rows = []
    for kind, encoder in encoders.items():
        x = [probe.encode(encoder, part, t, device, kind) for part in images]
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


def print_rows(rows: list[dict]) -> None:
    """The table over t."""
    print("\n   t       snr   MSE, own v  another's     gain +-")
    for row in rows:
        print(
            f"{row['t']:>4}  {row['snr']:8.3g}  {row['right']:11.4f}  {row['wrong']:9.4f}  "
            f"{row['gain']:7.4f} {row['gain_high'] - row['gain']:.4f}"
        )


def print_few(rows: list[dict], t: int) -> None:
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
                v = probe.encode(model.encoder, split.images, t, device, f"{kind} images, v_{t}")
                probe.write_arrays(archive, {f"x_{kind}_{t}": v})
                if split.labels is not None:
                    probe.write_arrays(archive, {f"y_{kind}": torch.from_numpy(split.labels)})

    replace_file(path, write, private=re.escape(path.name))
    print(f"saved: {path}")


def build_parser() -> Parser:
    """Every flag, with its default."""
    p = Parser(__doc__, prog="python -m appendix.choose")
    p.add_argument("--name", help="the run in runs/NAME (the newest)")
    p.add_argument("--data", type=data_name, help="another set than the run's")
    p.add_argument("--data-dir", help="sets live here (the run's)")
    p.add_argument("--device", help="auto, cpu, cuda, cuda:1 (auto: cuda if any)")
    name = {"type": new_file, "metavar": "FILE.npz"}
    p.add_argument("--export", **name, help="save v_t at the chosen t")
    p.add_argument("--few", action="store_true", help="accuracy with few labels at the chosen t")
    return p


def open_run(typed: dict, device: torch.device) -> tuple[Path, DiER, dict, tuple[Split, Split]]:
    """The run's folder, its networks, its checkpoint and the images; exits where one of them does
    not allow what the flags ask for."""
    folder = find_run(typed.get("name"))
    model, saved = load_model(folder)
    settings = saved["settings"]
    name, data_dir = typed.get("data", settings["data"]), typed.get("data_dir")
    where = Path(data_dir or settings["data_dir"])
    splits = load(name, settings["size"], settings["channels"], where)
    if "few" in typed and len(splits[0].class_names) < 2:
        fail(f"{name} has no classes, and --few needs two: lay it out as CLASS/*")
    if len(splits[1].images) < 2:
        fail(f"{name} has one test image, and the v of another needs two")
    return folder, model.to(device), saved, splits


def next_command(typed: dict, t: int, labelled: bool) -> str:
    """What makes use of t: the probe, or without labels an export, which finds the same t."""
    words = ["probe.py", "--t", str(t)] if labelled else ["-m", "appendix.choose"]
    for key in ("name", "data", "data_dir", "device"):
        if key in typed:
            words += [f"--{key.replace('_', '-')}", typed[key]]
    return shlex.join(["python", *words, *([] if labelled else ["--export", "v.npz"])])


def main(argv: list[str] | None = None) -> None:
    """Choose t, measure the gain of v, say what comes next."""
    argv = sys.argv[1:] if argv is None else argv
    typed = vars(build_parser().parse_args(argv))
    device = pick_device(typed.get("device", "auto"))
    folder, model, saved, splits = open_run(typed, device)
    data.check_writable(folder / "choose.json", typed.get("export"))
    settings, labelled = saved["settings"], len(splits[0].class_names) > 1
    x0_train, x0 = (to_float(torch.from_numpy(pick_images(split, IMAGES))) for split in splits)
    print(f"{folder}, step {saved['step']:,}, {device}: {len(x0):,} test images")
    x0, abar = x0.to(device), alphas_cumprod().to(device, torch.float32)
    power = fine_power(x0_train)
    t, ratios = even_t(power), snr(power)
    rows = []
    for each in progress(TIMES, "gain of v", len(TIMES), "times"):
        rows.append({"snr": ratios[each].item()} | measure(model, x0, each, abar))
    print_rows(rows)
    name = typed.get("data", settings["data"])
    result = {"name": str(folder.relative_to(RUNS)), "data": name}
    result |= {"power": power, "chosen_t": t, "step": saved["step"]}
    result |= origin(["-m", "appendix.choose", *argv], str(device))
    files = {"choose": {"images": len(x0), "rows": rows}}
    if "few" in typed:
        few = few_labels(model, settings, splits, t, device)
        files["few"] = {"images": min(TESTED, len(splits[1].images)), "rows": few}
        print_few(few, t)
    other = "" if name == settings["data"] else f"-data-{probe.file_word(name)}"
    for stem, content in files.items():
        path = folder / f"{stem}{other}.json"
        write_json(path, result | content)
        print(f"saved: {path}")
    if "export" in typed:
        export(typed["export"], model, splits, t, device)
    after = "" if "export" in typed else f"; next: {next_command(typed, t, labelled)}"
    even = "noise and fine detail are even" if ratios[0] >= 1 else "fine detail is below the noise"
    print(f"t = {t}: {even}{after}")


if __name__ == "__main__":
    guard(main)
