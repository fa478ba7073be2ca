"""The data sets: six real ones, one drawn on the spot, any folder of images; batches; pictures.

Every set becomes one uint8 array (N, C, S, S), read here by hand, from data/NAME/:

    glyphs         ten digits drawn with Pillow's own font; needs no file
    mnist          {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]                    downloaded
    cifar10        cifar-10-binary.tar.gz, or the folder cifar-10-batches-bin           downloaded
    cifar100       cifar-100-binary.tar.gz, or the folder cifar-100-binary              downloaded
    tiny-imagenet  tiny-imagenet-200.zip, or that folder                                downloaded
    bccd           dataset2-master/images/{TRAIN,TEST}/CLASS/_K_NNNN.jpeg, or dataset-master/
                   JPEGImages with labels.csv; as folders, one .zip or one .tar.gz      by hand
    oct2017        OCT2017/{train,test}/CLASS/CLASS-patient-n.jpeg; likewise            by hand
    path/to/folder train/CLASS/* and test/CLASS/*, or CLASS/* (split 80/20), or images alone

Archives are read in place, never unpacked. What fails raises DataError with one line to print.
Shapes: N images, B batch, C channels, S S (or H W) pixels.
"""

import csv
import gzip
import hashlib
import io
import os
import re
import sys
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
MAX_MEMBER = 256 * 2**20  # bytes of one file in an archive: none of the sets comes near
MAX_MEMBERS = 1_000_000  # files in an archive: oct2017, the largest, has 110,000
CACHE_FILES = 2_000  # with more files to decode than this, a memory-mapped cache pays
SPLIT_SEED = 0  # of every 80/20 split: part of the set, so that train and probe always agree


class DataError(Exception):
    """One line for the user: what happened, the offending value, the way out."""


@dataclass(frozen=True)
class Info:
    """What is known about a set before it is read."""

    name: str
    channels: int
    classes: int | None  # None: unlabelled
    side: int  # its row of Table 4: 32, 64 or 256
    flip: bool  # is a mirrored image still one of the set? Not for digits


INFOS = {
    "glyphs": Info("glyphs", 1, 10, 32, False),
    "mnist": Info("mnist", 1, 10, 32, False),
    "cifar10": Info("cifar10", 3, 10, 32, True),
    "cifar100": Info("cifar100", 3, 100, 32, True),
    "tiny-imagenet": Info("tiny-imagenet", 3, 200, 64, True),
    "bccd": Info("bccd", 3, 4, 256, True),
    "oct2017": Info("oct2017", 1, 4, 256, True),
}


@dataclass
class Split:
    """The training or the test images of a set, in memory or memory-mapped."""

    images: np.ndarray  # uint8 (N, C, S, S)
    labels: np.ndarray | None  # int64 (N,); None: unlabelled
    groups: np.ndarray | None  # int64 (N,): equal for images of one source picture or patient
    class_names: list[str]


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed out of several numbers; their order matters."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ---------------------------------------------------------------------------- downloads

MNIST_MIRRORS = [
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
]
TORONTO = ["https://www.cs.toronto.edu/~kriz/"]
# set -> [(file, mirrors, md5)]
SOURCES: dict[str, list[tuple[str, list[str], str]]] = {
    "mnist": [
        ("train-images-idx3-ubyte.gz", MNIST_MIRRORS, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        ("train-labels-idx1-ubyte.gz", MNIST_MIRRORS, "d53e105ee54ea40749a09fcbcd1e9432"),
        ("t10k-images-idx3-ubyte.gz", MNIST_MIRRORS, "9fb629c4189551a2d022fa330f9573f3"),
        ("t10k-labels-idx1-ubyte.gz", MNIST_MIRRORS, "ec29112dd5afa0611ce80d1b7f02629c"),
    ],
    "cifar10": [("cifar-10-binary.tar.gz", TORONTO, "c32a1d4ab5d03f1284b67883e8d87530")],
    "cifar100": [("cifar-100-binary.tar.gz", TORONTO, "03b5dce01913d631647c71ecec9e9cb8")],
    "tiny-imagenet": [
        (
            "tiny-imagenet-200.zip",
            ["http://cs231n.stanford.edu/"],
            "90528d7ca1a48142e341f4ef8d21d0de",
        )
    ],
}
BY_HAND = {
    "bccd": "dataset2-master (or its .zip) from kaggle.com/datasets/paultimothymooney/blood-cells",
    "oct2017": "OCT2017 (or its archive) from data.mendeley.com/datasets/rscbjbr9sj or "
    "kaggle.com/datasets/paultimothymooney/kermany2018",
}
TIMEOUT = 10.0  # seconds without a byte
TRIES = 3


class Progress:
    """A line on stderr with count, rate and time left, from the third second on."""

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self.start = self.shown = time.monotonic()

    def show(self, done: float) -> None:
        """Rewrite the line, twice a second at most."""
        now = time.monotonic()
        if now - self.start > 2 and now - self.shown > 0.5:
            rate = done / (now - self.start)
            left = (self.total - done) / rate if rate and self.total else 0
            text = f"{self.what}: {done:.0f} of {self.total:.0f} {self.unit}, {rate:.1f}/s"
            print(f"\r{text}, {left:.0f} s left \033[K", end="", file=sys.stderr, flush=True)
            self.shown = now

    def close(self) -> None:
        """End the line if one was shown."""
        if self.shown > self.start:
            print(file=sys.stderr)


def download(file: Path, mirrors: list[str], md5: str) -> None:
    """Fetch mirrors[k] + file.name in at most 3 tries; a wrong md5 is a failed try.

    The file appears under its name only when it is whole. Raises OSError with the last reason.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    reason = "no mirror"
    for k in range(TRIES):
        url = mirrors[k % len(mirrors)] + file.name
        try:
            digest = hashlib.md5()
            with urllib.request.urlopen(url, timeout=TIMEOUT) as source, part.open("wb") as out:
                total = int(source.headers.get("Content-Length") or 0)
                progress, done = Progress(file.name, total / 1e6, "MB"), 0
                while chunk := source.read(2**16):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    progress.show(done / 1e6)
                progress.close()
            if total and done < total:
                raise OSError(f"broke off after {done} of {total} bytes")
            if digest.hexdigest() != md5:
                raise OSError(f"md5 {digest.hexdigest()} is not the official {md5}")
            os.replace(part, file)
            return
        except (OSError, ValueError) as error:  # http.client's errors are OSErrors or ValueErrors
            reason = f"{url}: {getattr(error, 'reason', None) or error}"
        finally:
            part.unlink(missing_ok=True)
    raise OSError(reason)


def fetch(name: str, folder: Path, accept: Callable[[str], bool]) -> None:
    """Download the files of a set that `accept` does not find; DataError says what to do by hand."""
    if name in BY_HAND:
        raise DataError(
            f"{name} is not in {folder}: its licence or size forbids a download here; put "
            f"{BY_HAND[name]} there; or `python train.py` needs no data"
        )
    files = SOURCES[name]
    for file, mirrors, md5 in files:
        if accept(file):
            continue
        try:
            download(folder / file, mirrors, md5)
        except OSError as error:
            names = ", ".join(f for f, _, _ in files)
            raise DataError(
                f"{name} is not in {folder} and could not be downloaded ({error}): put "
                f"{'this file' if len(files) == 1 else f'these {len(files)} files'} there: {names} "
                f"from {mirrors[0]}; or `python train.py` needs no data"
            ) from None


# ---------------------------------------------------------------------------- files and archives


class Store:
    """The files below a folder, or inside a .zip or .tar(.gz), read in place.

    names are POSIX paths relative to it, hidden files left out. Raises DataError where the archive
    is damaged, or holds more or larger members than any of the sets.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            if path.is_dir():
                files = (p for p in path.rglob("*") if p.is_file())
                sizes = {p.relative_to(path).as_posix(): p.stat().st_size for p in files}
            elif path.suffix == ".zip":
                with zipfile.ZipFile(path) as z:
                    sizes = {i.filename: i.file_size for i in z.infolist() if not i.is_dir()}
            else:
                with tarfile.open(path) as tar:
                    sizes = {m.name: m.size for m in tar if m.isfile()}
        except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
            raise self.damaged(str(error)) from None
        if len(sizes) > MAX_MEMBERS:
            raise self.damaged(f"{len(sizes):,} files are more than {MAX_MEMBERS:,}")
        for name, size in sizes.items():
            if size > MAX_MEMBER:
                raise self.damaged(f"{name} has {size:,} bytes, more than {MAX_MEMBER:,}")
        hidden = re.compile(r"(^|/)(\.|__MACOSX/)")
        self.sizes = {n: s for n, s in sorted(sizes.items()) if not hidden.search(n)}
        self.names = list(self.sizes)

    def damaged(self, reason: str) -> DataError:
        """The error for this store."""
        return DataError(f"{self.path} cannot be read ({reason}): delete it and get it again")

    def read(self, names: list[str]) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of the files asked for, in the order in which they are stored."""
        wanted = set(names)
        try:
            if self.path.is_dir():
                for name in names:
                    yield name, (self.path / name).read_bytes()
            elif self.path.suffix == ".zip":
                with zipfile.ZipFile(self.path) as z:
                    for name in names:
                        yield name, z.read(name)
            else:
                with tarfile.open(self.path) as tar:
                    for member in tar:
                        if member.name in wanted and member.isfile():
                            yield member.name, tar.extractfile(member).read()
        except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
            raise self.damaged(str(error)) from None

    def find(self, *endings: str) -> str | None:
        """The first name that is one of `endings` or ends in / and one of them."""
        for ending in endings:
            for name in self.names:
                if name == ending or name.endswith("/" + ending):
                    return name
        return None

    def text(self, name: str) -> str:
        """One file as text."""
        return next(self.read([name]))[1].decode("utf-8", errors="replace")


def open_store(name: str, folder: Path) -> Store:
    """The store of a set: an archive in its folder where no folder is, downloaded if need be."""

    def candidates() -> list[Path]:
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        inside = [p for p in inside if not p.name.startswith(".")]
        archives = [p for p in inside if p.name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))]
        return [folder] if any(p.is_dir() for p in inside) else archives

    found = candidates()
    if not found:
        fetch(name, folder, lambda file: (folder / file).exists())
        found = candidates()
    return Store(found[0])


# ---------------------------------------------------------------------------- binary sets


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes, gzipped or not: 0, 0, 8, d, d big-endian sizes, the bytes."""
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            raw = file.read(MAX_MEMBER + 1)
    except (OSError, EOFError, ValueError, gzip.zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it and get it again") from None
    head = 4 + 4 * dimensions
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path} is not an idx file of {dimensions} dimensions: get it again")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dimensions, 4))
    if len(raw) - head != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path} has {len(raw) - head} bytes for {shape}: delete it, get it again")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def load_mnist(split: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """uint8 (N, 1, 28, 28), labels (N,), class names."""
    folders = [data_dir / "mnist", data_dir / "mnist/MNIST/raw", data_dir / "MNIST/raw"]

    def path(file: str) -> Path | None:
        options = [f / n for f in folders for n in (file, file.removesuffix(".gz"))]
        return next((p for p in options if p.is_file()), None)

    fetch("mnist", folders[0], lambda file: path(file) is not None)
    prefix = "train" if split == "train" else "t10k"
    images_path = path(f"{prefix}-images-idx3-ubyte.gz")
    images, labels_path = read_idx(images_path, 3), path(f"{prefix}-labels-idx1-ubyte.gz")
    labels = read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} has {len(images)} images, {labels_path} {len(labels)}")
    if labels.size and labels.max() > 9:
        raise DataError(f"{labels_path} holds label {labels.max()}: delete it and get it again")
    return images[:, None], labels, [str(digit) for digit in range(10)]


def load_cifar(name: str, split: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """uint8 (N, 3, 32, 32), labels (N,), class names, from the binary version: a record is one
    label byte (cifar100: coarse, then fine), then 3072 bytes: R, G, B planes, row-major."""
    folder, classes = data_dir / name, INFOS[name].classes
    if list(folder.glob("*python*")) + list(folder.glob("*batches-py")):
        if not list(folder.glob("*bin*")):
            file, mirrors, _ = SOURCES[name][0]
            raise DataError(
                f"{folder} holds the pickle version of {name}, which is never loaded: put "
                f"{file} from {mirrors[0]} there"
            )
    store = open_store(name, folder)
    if name == "cifar10":
        files = [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else None
        files, head, names_file = files or ["test_batch.bin"], 1, "batches.meta.txt"
    else:
        files, head, names_file = [f"{split}.bin"], 2, "fine_label_names.txt"
    records = []
    for file in files:
        member = store.find(file)
        if member is None:
            raise DataError(f"{file} is not in {store.path}: delete it and get it again")
        raw = np.frombuffer(next(store.read([member]))[1], np.uint8)
        if raw.size == 0 or raw.size % (head + 3072):
            raise DataError(
                f"{member} in {store.path} has {raw.size} bytes, not a multiple of "
                f"{head + 3072}: delete it and get it again"
            )
        records.append(raw.reshape(-1, head + 3072))
    data = np.concatenate(records)
    labels, images = data[:, head - 1], data[:, head:].reshape(-1, 3, 32, 32)
    if labels.max() >= classes:
        raise DataError(
            f"{store.path} holds label {labels.max()}, not below {classes}: get it again"
        )
    member = store.find(names_file)
    names = store.text(member).split() if member else [str(k) for k in range(classes)]
    return images, labels, names


GLYPH_SIDE, GLYPH_SCALE = 28, 3  # glyphs are drawn three times as large, then averaged


def load_glyphs(split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """uint8 (N, 1, 28, 28), labels (N,), names: digits in Pillow's font, 10,000 train, 2,000 test.

    Each is scaled, rotated, sheared, shifted, drawn thin or bold, dimmed and covered with noise, so
    that pixels alone do not tell the digits apart. The recipe was fixed before anything was trained.
    """
    n = 10_000 if split == "train" else 2_000
    rng = np.random.default_rng([seed, split == "train"])
    big = GLYPH_SIDE * GLYPH_SCALE
    font = ImageFont.load_default(size=22 * GLYPH_SCALE)
    stamps = {}
    for digit in range(10):
        for stroke in range(4):
            stamps[digit, stroke] = stamp = Image.new("L", (big, big))
            ImageDraw.Draw(stamp).text(
                (big / 2, big / 2), str(digit), 255, font, anchor="mm", stroke_width=stroke
            )
    labels = rng.permutation(np.arange(n) % 10)
    out = np.empty((n, GLYPH_SIDE, GLYPH_SIDE), np.uint8)
    for i, digit in enumerate(labels):
        scale, angle = rng.uniform(0.7, 1.1, 2), np.deg2rad(rng.uniform(-25, 25))
        shear, shift = rng.uniform(-0.3, 0.3), rng.uniform(-3, 3, 2) * GLYPH_SCALE
        cos, sin = np.cos(angle), np.sin(angle)
        forward = np.array([[cos, -sin], [sin, cos]]) @ [[1, shear], [0, 1]] @ np.diag(scale)
        back = np.linalg.inv(forward)  # Pillow asks where each output pixel comes from
        offset = big / 2 - back @ (big / 2 + shift)
        affine = (*back[0], offset[0], *back[1], offset[1])
        stamp = stamps[int(digit), int(rng.integers(4))]
        image = stamp.transform(
            (big, big), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
        )
        pixels = np.asarray(image.reduce(GLYPH_SCALE), np.float32) * rng.uniform(0.6, 1.0)
        pixels += rng.normal(0, rng.uniform(0, 25), pixels.shape)
        out[i] = pixels.clip(0, 255).round()
    return out[:, None], labels, [str(digit) for digit in range(10)]


# ---------------------------------------------------------------------------- image sets

Entries = list[tuple[str, str | None, str]]  # (file, class or None, source picture or patient)


def split_80_20(entries: Entries, split: str) -> Entries:
    """A seeded split within each class; the groups of one class stay on one side."""
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = []
    for label in sorted({e[1] or "" for e in entries}):
        groups = sorted({g for _, c, g in entries if (c or "") == label})
        test = set(rng.permutation(groups)[: max(1, round(len(groups) / 5))].tolist())
        chosen += [
            e for e in entries if (e[1] or "") == label and (e[2] in test) == (split == "test")
        ]
    return sorted(chosen)


def list_tiny_imagenet(store: Store, split: str) -> Entries:
    """train/WNID/images/*, and val/images/* by val_annotations.txt as the test images."""
    train = [re.search(r"(?:^|/)train/([^/]+)/images/[^/]+$", n) for n in store.names]
    train = [(m.string, m[1], m.string) for m in train if m]
    if split == "train":
        return train
    annotations = store.find("val/val_annotations.txt")
    if annotations is None:
        raise DataError(f"val/val_annotations.txt is not in {store.path}: get it again")
    wnid = dict(
        line.split("\t")[:2] for line in store.text(annotations).splitlines() if "\t" in line
    )
    known = {label for _, label, _ in train}
    val = [n for n in store.names if re.search(r"(?:^|/)val/images/[^/]+$", n)]
    found = [(n, wnid.get(PurePosixPath(n).name), n) for n in val]
    return [e for e in found if e[1] in known]


def list_bccd(store: Store, split: str) -> Entries:
    """The augmented pictures by their folders, else the originals by labels.csv, split 80/20."""
    pattern = rf"images/{split.upper()}/([A-Z]+)/(_\d+)_[^/]+$"
    found = [re.search(pattern, n) for n in store.names]
    if any(found):
        return [(m.string, m[1], f"{split}/{m[1]}/{m[2]}") for m in found if m]
    pictures = {
        int(m[1]): n for n in store.names if (m := re.search(r"JPEGImages/\D*(\d+)\.jpg$", n))
    }
    labels = store.find("dataset-master/labels.csv", "labels.csv")
    if not pictures or labels is None:
        return []
    four = {"EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL"}
    rows = csv.DictReader(io.StringIO(store.text(labels)))
    rows = [(pictures.get(int(r["Image"])), r["Category"].strip()) for r in rows if r.get("Image")]
    return split_80_20([(name, c, name) for name, c in rows if name and c in four], split)


def list_oct2017(store: Store, split: str) -> Entries:
    """train/CLASS/* and test/CLASS/*; the patient is in the name: CLASS-patient-n.jpeg."""
    found = [
        re.search(rf"(?:^|/){split}/([A-Z]+)/[A-Z]+-(\d+)-\d+\.jpe?g$", n) for n in store.names
    ]
    return [(m.string, m[1], m[2]) for m in found if m]


def list_folder(store: Store, split: str) -> Entries:
    """train/CLASS/* and test/CLASS/* (or val, valid), else CLASS/* or images alone, split 80/20."""
    images = [n for n in store.names if PurePosixPath(n).suffix.lower() in SUFFIXES]
    tops = {n.split("/")[0] for n in images if "/" in n}
    held = next((name for name in ("test", "val", "valid") if name in tops), None)
    if "train" in tops and held:
        images = [n for n in images if n.split("/")[0] == ("train" if split == "train" else held)]
        parts = [(n, n.split("/")[1:]) for n in images]
        return [(n, rest[0] if len(rest) > 1 else None, n) for n, rest in parts]
    entries = [(n, n.split("/")[0] if "/" in n else None, n) for n in images]
    return split_80_20(entries, split)


LISTS = {"tiny-imagenet": list_tiny_imagenet, "bccd": list_bccd, "oct2017": list_oct2017}


def resize(image: Image.Image, size: int) -> Image.Image:
    """To size x size, aspect not kept (Sec. 5.1); Pillow's bilinear filter averages when it shrinks
    and cannot overshoot."""
    return (
        image
        if image.size == (size, size)
        else image.resize((size, size), Image.Resampling.BILINEAR)
    )


def decode(store: Store, names: list[str], size: int, channels: int, out: np.ndarray) -> None:
    """Read the images `names` into out, uint8 (N, C, S, S). A damaged file raises DataError."""
    place = {name: i for i, name in enumerate(names)}
    progress = Progress(f"decoding {store.path}", len(names), "images")
    for done, (name, raw) in enumerate(store.read(names)):
        try:
            with Image.open(io.BytesIO(raw)) as image:
                pixels = np.asarray(resize(image.convert("L" if channels == 1 else "RGB"), size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{store.path}/{name} is damaged ({error}): replace or delete it"
            ) from None
        out[place[name]] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
        progress.show(done)
    progress.close()


def decode_cached(
    store: Store, names: list[str], size: int, channels: int, cache: Path
) -> np.ndarray:
    """The decoded images; many of them are decoded once, into a memory-mapped file under cache.

    The file's name holds a fingerprint of the list of files, so that a changed set is read anew.
    """
    shape = (len(names), channels, size, size)
    if len(names) <= CACHE_FILES:
        decode(store, names, size, channels, out := np.empty(shape, np.uint8))
        return out
    stamp = store.path.stat().st_mtime_ns
    listing = repr([(n, store.sizes[n]) for n in names]) + f"{store.path} {stamp}"
    path = cache / f"{hashlib.md5(listing.encode()).hexdigest()[:16]}-{channels}x{size}.npy"
    try:
        found = np.load(path, mmap_mode="r")
        if found.shape == shape and found.dtype == np.uint8:
            return found
    except (OSError, ValueError, EOFError):
        pass  # absent or damaged: decode
    temporary = path.with_suffix(".tmp")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        out = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        decode(store, names, size, channels, out)
        out.flush()
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{cache} cannot be written ({error}): use another --data-dir") from None
    finally:
        temporary.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


# ---------------------------------------------------------------------------- any set


def folder_store(name: str) -> Store:
    """The store of a folder of images; DataError where there is none."""
    path = Path(name)
    if not path.is_dir():
        raise DataError(f"--data {name}: neither a folder of images nor one of {', '.join(INFOS)}")
    return Store(path)


def describe(name: str) -> Info:
    """What is known before reading: a known name touches no disk, of a folder the headers are read.

    Raises DataError where `name` is neither, or a folder holds no image.
    """
    if name in INFOS:
        return INFOS[name]
    store = folder_store(name)
    entries = list_folder(store, "train")
    sides, grey = [], True
    for file, _, _ in entries:
        try:
            with Image.open(store.path / file) as image:
                sides.append(min(image.size))
                grey = grey and image.mode in ("1", "L", "LA", "I", "I;16", "F")
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"{store.path}/{file} is damaged ({error}): replace or delete it"
            ) from None
    if not sides:
        raise DataError(f"no image in {name}: it needs train/CLASS/* and test/CLASS/*, or CLASS/*")
    side = next((s for s in (32, 64) if np.median(sides) <= s), 256)
    labels = {c for _, c, _ in entries}
    classes = None if None in labels else len(labels)
    return Info(store.path.resolve().name, 1 if grey else 3, classes, side, True)


def sample(labels: np.ndarray | None, n: int, limit: int, seed: int) -> np.ndarray:
    """Sorted indices of `limit` of n images, as equal over the classes as they allow."""
    order = np.random.default_rng(seed).permutation(n)
    if labels is not None:  # the k-th image of each class before the (k + 1)-th of any
        rank = np.empty(n, np.int64)
        for label in np.unique(labels):
            mine = order[labels[order] == label]
            rank[mine] = np.arange(len(mine))
        order = order[np.argsort(rank[order], kind="stable")]
    return np.sort(order[:limit])


def load(
    name: str,
    split: str,
    size: int,
    data_dir: Path = Path("data"),
    limit: int = 0,
    seed: int = 0,
) -> Split:
    """The "train" or "test" images of a set at size x size; limit > 0 takes a seeded sample of them.

    Raises DataError, whose text is one line for the user.
    """
    data_dir, groups = Path(data_dir), None
    if name in ("glyphs", "mnist", "cifar10", "cifar100"):
        if name == "glyphs":
            images, labels, names = load_glyphs(split)
        elif name == "mnist":
            images, labels, names = load_mnist(split, data_dir)
        else:
            images, labels, names = load_cifar(name, split, data_dir)
        keep = np.arange(len(images)) if not limit else sample(labels, len(images), limit, seed)
        images, labels = images[keep], labels[keep].astype(np.int64)
        if images.shape[2] != size:
            images = np.stack([[resize(Image.fromarray(c), size) for c in x] for x in images])
        return Split(images, labels, None, names)
    store = open_store(name, data_dir / name) if name in INFOS else folder_store(name)
    lister = LISTS.get(name, list_folder)
    entries = lister(store, split)
    if not entries:
        raise DataError(f"no {split} image of {name} in {store.path}: see the layouts in data.py")
    train = entries if split == "train" else lister(store, "train")
    names = sorted({c for _, c, _ in train if c is not None})
    labels = None
    if all(c is not None for _, c, _ in train + entries):
        number = {c: k for k, c in enumerate(names)}
        unknown = {c for _, c, _ in entries} - number.keys()
        if unknown:
            raise DataError(f"class {min(unknown)} of {name} has test images but none to train on")
        labels = np.array([number[c] for _, c, _ in entries], np.int64)
    if limit:
        keep = sample(labels, len(entries), limit, seed)
        entries, labels = [entries[i] for i in keep], None if labels is None else labels[keep]
    if len({g for _, _, g in entries}) < len(entries):
        groups = np.unique([g for _, _, g in entries], return_inverse=True)[1].astype(np.int64)
    channels = describe(name).channels
    files = [file for file, _, _ in entries]
    images = decode_cached(store, files, size, channels, data_dir / "cache")
    return Split(images, labels, groups, names)


# ---------------------------------------------------------------------------- batches


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_float`: float (B, C, H, W), clipped to [-1, 1] -> uint8, rounded."""
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def permutation_stream(n: int, start: int, count: int, seed: int) -> Tensor:
    """Entries start .. start + count - 1 of an endless stream of permutations of range(n) -> int64
    (count,). A pure function, so that nothing has to be saved to resume it."""
    parts = []
    while count > 0:
        epoch, offset = divmod(start, n)
        generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
        part = torch.randperm(n, generator=generator)[offset : offset + count]
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return torch.cat(parts)


class Batches:
    """Batches of a uint8 array (N, C, S, S) on a device, as float32 in [-1, 1].

    The array moves to the device once if it fits there (in half of a GPU's free memory); otherwise
    each batch is copied.
    """

    def __init__(
        self, images: np.ndarray, batch_size: int, seed: int, device: torch.device, flip: bool
    ):
        self.batch_size, self.seed, self.device, self.flip = batch_size, seed, device, flip
        self.images: Tensor | np.ndarray = images
        self.count = len(images)
        if isinstance(images, np.memmap):
            return  # stays on disk: pages are read as batches need them
        fits = device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] // 2
        self.images = torch.tensor(images, device=device) if fits else images

    def __len__(self) -> int:
        return self.count

    def __call__(self, step: int, flips: Tensor | None = None, part: slice = slice(None)) -> Tensor:
        """Batch number `step` -> (b, C, S, S): `part` of its images, mirrored where flips (B,)."""
        index = permutation_stream(self.count, step * self.batch_size, self.batch_size, self.seed)
        index = index[part]
        if isinstance(self.images, Tensor):
            x = self.images[index.to(self.device)]
        else:
            x = torch.from_numpy(self.images[index.numpy()]).to(self.device)
        x = to_float(x)
        if self.flip and flips is not None:
            x = torch.where(flips[part].view(-1, 1, 1, 1), x.flip(3), x)
        return x


def save_grid(rows: Tensor, path: Path, columns: int, scale: int = 1) -> None:
    """Images (N, C, H, W), uint8 or float in [-1, 1], as one PNG: `columns` a row, 2 pixels of white
    between, each pixel drawn scale x scale."""
    images = rows if rows.dtype == torch.uint8 else to_uint8(rows)
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).cpu()
    n, c, h, w = images.shape
    lines = -(-n // columns)
    page = np.full((lines * (h + 2) - 2, columns * (w + 2) - 2, 3), 255, np.uint8)
    for i, image in enumerate(images.expand(n, 3, h, w).permute(0, 2, 3, 1).numpy()):
        y, x = i // columns * (h + 2), i % columns * (w + 2)
        page[y : y + h, x : x + w] = image
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(page).save(temporary, format="PNG")
    os.replace(temporary, path)
