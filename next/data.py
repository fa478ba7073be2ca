"""Images for the networks: every set as one uint8 array a split, and batches of it on a device.

    glyphs         ten digits drawn with Pillow's own font: needs no file
    mnist          {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]                  downloaded
    cifar10        cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin              downloaded
    cifar100       cifar-100-binary/{train,test}.bin                                  downloaded
    tiny-imagenet  tiny-imagenet-200/{train/CLASS/images,val/images}/*.JPEG           downloaded
    bccd           .../images/{TRAIN,TEST}/CLASS/_K_NNNN.jpeg (K: the source picture), else
                   .../JPEGImages/BloodImage_NNNNN.jpg with labels.csv, split 80/20   by hand
    oct2017        OCT2017/{train,test}/CLASS/CLASS-patient-n.jpeg                    by hand
    path/to/folder train/CLASS/* and test/CLASS/* (or val); or CLASS/*, split 80/20; or images
                   without classes: all of them train, and a fifth is the test set as well

A set lies in data/NAME/. The way of every one: `download` what is missing, `unpack` archives, list
the folder (`open_set`), `decode` each image once into one array, kept as data/cache/*.npy. `load`
goes that way; `get_batch` serves the array, from the device where it fits.

Shapes: N images, B batch, C channels, H W pixels, S = H = W.
"""

import csv
import hashlib
import http.client
import math
import os
import platform
import re
import shutil
import sys
import tarfile
import time
import urllib.request
import warnings
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

# ---------------------------------------------------------------------------- what all files need


def fail(message: str) -> NoReturn:
    """Print one line and exit with status 2: the way every command reports bad input."""
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks for all
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss; never negative."""
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def status(text: str) -> None:
    """Show a progress line: rewritten in place on a terminal, a new line in a file."""
    terminal = sys.stdout.isatty()
    print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)


def progress(
    items: Iterable, what: str, total: float, unit: str, done: Callable[[], float] | None = None
) -> Iterator:
    """Yield the items; after two seconds, show a progress line with count, rate and time left.

    `done` tells how much is done where that is not the number of items.
    """
    start, shown, terminal = time.monotonic(), 0.0, sys.stdout.isatty()
    for k, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - start > 2 and now - shown > (0.5 if terminal else 10):
            amount = k if done is None else done()
            rate = max(amount, 1e-9) / (now - start)
            left = f"{rate:,.0f} {unit}/s, {clock((total - amount) / rate)} left"
            status(f"{what}: {amount:,.0f} of {total:,.0f} {unit}, {left}")
            shown = now
    if shown and terminal:
        print()


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[Path], Any], temporary: Path | None = None) -> None:
    """Call write(temporary path); what it wrote gets its name only if that ends well.

    So a reader sees the old file or the new one, whole. The temporary name is fixed: what kill -9
    leaves is overwritten by the next call.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        temporary.replace(path)
    finally:  # Ctrl-C comes here too
        remove(temporary)


def private_name(path: Path) -> Path:
    """A temporary name beside `path` for this process alone, since two runs may decode the same
    set at once. Removes what dead processes of this machine have left there."""
    stem = f".{path.name}.{platform.node()}-"
    for old in path.parent.glob(f"{stem}*") if os.name == "posix" else ():
        try:
            os.kill(int(old.name.removeprefix(stem)), 0)  # signal 0 only asks: is it alive?
        except (ProcessLookupError, ValueError):
            remove(old)
        except PermissionError:
            pass  # another user's process, alive
    return path.with_name(f"{stem}{os.getpid()}")


# ---------------------------------------------------------------------------- the table of sets


class Facts(NamedTuple):
    """What is known about a set without reading it."""

    channels: int  # 1 or 3
    row: int  # of Table 4: 32, 64 or 256 pixels
    flip: bool  # random horizontal flips keep the label (not for digits)


SETS = {
    "glyphs": Facts(1, 32, False),
    "mnist": Facts(1, 32, False),
    "cifar10": Facts(3, 32, True),
    "cifar100": Facts(3, 32, True),
    "tiny-imagenet": Facts(3, 64, True),
    "bccd": Facts(3, 256, True),
    "oct2017": Facts(1, 256, True),
}
DOWNLOADS = {  # set -> (mirrors in the order to try, {file: md5})
    "mnist": (
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "cifar10": (
        ("https://www.cs.toronto.edu/~kriz/",),
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    ),
    "cifar100": (
        ("https://www.cs.toronto.edu/~kriz/",),
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
    ),
    "tiny-imagenet": (
        ("http://cs231n.stanford.edu/",),
        {"tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de"},
    ),
}
BY_HAND = {
    "bccd": "dataset2-master from https://www.kaggle.com/datasets/paultimothymooney/blood-cells",
    "oct2017": "OCT2017 from https://data.mendeley.com/datasets/rscbjbr9sj/2",
}
PATTERNS = {  # where the images of a set lie; root is whatever the archive's maker put around it
    "tiny-imagenet": r"(?P<root>.*/)?(?P<split>train|val)/(?:(?P<label>n\d+)/)?(?:images/)?[^/]+",
    "bccd": r"(?P<root>.*/)?images/"
    r"(?P<group>(?P<split>TRAIN|TEST)/(?P<label>[A-Z]+)/_\d+)_\d+\.\w+",
    "oct2017": r"(?P<root>(?:.*/)?(?:OCT2017 ?|OCT)/)?"
    r"(?P<split>train|test)/(?P<label>[A-Z]+)/[A-Z]+-(?P<group>\d+)-\d+\.\w+",
}
BCCD_ORIGINALS = r"(?P<root>.*/)?JPEGImages/BloodImage_(?P<number>\d+)\.\w+"
BCCD_CLASSES = ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")  # Sec. 5.1; not BASOPHIL
TRAIN, HELD = ("train", "training"), ("test", "testing", "val", "valid", "validation")
NO_PICTURES = ("EPS", "WMF", "HDF5", "GRIB", "BUFR", "MPEG")  # opened by Pillow, but not decoded


@dataclass
class Split:
    """The training or the test images of a set."""

    images: Any  # uint8 (N, C, S, S), maybe a read-only np.memmap; before `decode` also paths
    labels: np.ndarray | None  # int64 (N,); None: unlabelled
    groups: np.ndarray | None  # int64 (N,), equal for images of one source picture or patient
    class_names: list[str]
    files: list[Path]  # where the images come from: if they change, they are decoded again


# ---------------------------------------------------------------------------- download and unpack

TIMEOUT, TRIES = 8.0, 3  # seconds a server may be silent
BROKEN = (OSError, EOFError, RuntimeError, ValueError, NotImplementedError, zlib.error)
BROKEN += (zipfile.BadZipFile, tarfile.TarError, http.client.HTTPException)


def download(name: str, folder: Path) -> None:
    """Fetch the files of a set that are not in its folder, each in at most TRIES tries over its
    mirrors. A file gets its name only when it is whole and its md5 is right."""
    mirrors, md5s = DOWNLOADS[name]
    for file in (file for file in md5s if not (folder / file).exists()):
        path, reason = folder / file, ""
        for attempt in range(TRIES):
            url = mirrors[attempt % len(mirrors)] + file
            try:
                write = partial(fetch, url, md5s[file])
                replace_file(path, write, private_name(path))
                break
            except BROKEN as error:
                if getattr(error, "errno", None) == 28:  # a full disk is no fault of the mirror
                    raise
                reason = f"{url}: {error}"
                time.sleep(attempt)  # a short pause: 0, 1, 2 seconds
        else:
            fail(
                f"{name} is not in {folder} and could not be downloaded ({reason}): put "
                f"{', '.join(md5s)} from {mirrors[0]} there; or `python train.py` needs no data"
            )


def fetch(url: str, md5: str, path: Path) -> None:
    """Write the file at url to path. Raises OSError where it broke off or its md5 is another."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, path.open("wb") as out:
        total, digest = int(answer.headers.get("Content-Length", 0)), hashlib.md5()
        chunks = iter(lambda: answer.read(2**16), b"")
        for chunk in progress(chunks, url, total / 1e6, "MB", lambda: out.tell() / 1e6):
            digest.update(chunk)
            out.write(chunk)
        if out.tell() < total:
            raise OSError(f"broke off after {out.tell():,} of {total:,} bytes")
        if digest.hexdigest() != md5:
            raise OSError(f"its md5 is {digest.hexdigest()}, not {md5}")


def unpack(folder: Path) -> None:
    """Unpack each archive in a set's folder once, NAME.zip into NAME/, which appears only when it
    is whole. tarfile's `filter="data"` and zipfile keep every member inside that folder."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        stem = re.sub(r"\.(zip|tar|tar\.gz|tgz)$", "", path.name, flags=re.IGNORECASE)
        target = path.with_name(stem)
        if stem == path.name or path.name.startswith(".") or not path.is_file() or target.exists():
            continue
        extract = extract_zip if path.suffix.lower() == ".zip" else extract_tar
        try:
            replace_file(target, partial(extract, path), private_name(target))
        except BROKEN as error:
            if getattr(error, "errno", None):  # a full disk, a read-only folder: not its fault
                raise
            fail(f"{path} is damaged ({error}): delete it, then run or get it again")


def extract_zip(path: Path, folder: Path) -> None:
    """All members of a .zip."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in progress(members, f"unpacking {path.name}", len(members), "files"):
            archive.extract(member, folder)


def extract_tar(path: Path, folder: Path) -> None:
    """All members of a .tar or .tar.gz. Raises EOFError where it is cut between two members, which
    tarfile takes for the end: a whole one ends in zeros."""
    with path.open("rb") as raw, tarfile.open(fileobj=raw) as archive:
        size = path.stat().st_size / 1e6
        shown = progress(archive, f"unpacking {path.name}", size, "MB", lambda: raw.tell() / 1e6)
        archive.extractall(folder, members=shown, filter="data")
        archive.fileobj.seek(archive.offset)
        if len(archive.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise EOFError("it ends too early")


def list_files(folder: Path, parents: tuple[Path, ...] = ()) -> Iterator[str]:
    """The paths of all files below a folder, relative to it, with slashes; hidden ones are left
    out. Links are followed, but one back to a parent folder ends the walk there."""
    here = folder.resolve()
    if here in parents:
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            below = list_files(Path(entry.path), (*parents, here))
            yield from (f"{entry.name}/{name}" for name in below)
        elif entry.is_file():
            yield entry.name


# ---------------------------------------------------------------------------- sets of arrays


def draw_glyphs(split: str) -> Split:
    """10,000 train or 2,000 test digits in Pillow's font, uint8 (N, 1, 28, 28), white on black.

    Each is scaled, rotated, sheared, shifted, drawn thin or bold, dimmed and covered with noise, so
    that pixels alone do not tell them apart. The recipe was fixed by raw pixels alone.
    """
    n, side, big = {"train": 10_000, "test": 2_000}[split], 28, 28 * 3  # drawn at 3 x, averaged
    rng = np.random.default_rng([0, split == "train"])
    stamps, font = {}, ImageFont.load_default(size=22 * 3)
    for digit, stroke in np.ndindex(10, 4):
        stamps[digit, stroke] = Image.new("L", (big, big))
        pen, middle = ImageDraw.Draw(stamps[digit, stroke]), (big / 2, big / 2)
        pen.text(middle, f"{digit}", 255, font, anchor="mm", stroke_width=stroke)
    labels, out = rng.permutation(np.arange(n) % 10), np.empty((n, 1, side, side), np.uint8)
    for i, digit in enumerate(labels):
        scale, angle = rng.uniform(0.7, 1.1, 2), np.deg2rad(rng.uniform(-25, 25))
        shear, shift = rng.uniform(-0.3, 0.3), rng.uniform(-3, 3, 2) * 3
        cos, sin = np.cos(angle), np.sin(angle)
        forward = np.array([[cos, -sin], [sin, cos]]) @ [[1, shear], [0, 1]] @ np.diag(scale)
        back = np.linalg.inv(forward)  # Pillow asks where each output pixel comes from
        offset = big / 2 - back @ (big / 2 + shift)
        affine = (*back[0], offset[0], *back[1], offset[1])
        stamp = stamps[digit, rng.integers(4)]
        image = stamp.transform(
            stamp.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
        )
        pixels = np.asarray(image.reduce(3), np.float32) * rng.uniform(0.6, 1.0)
        pixels += rng.normal(0, rng.uniform(0, 25), pixels.shape)
        out[i] = pixels.clip(0, 255).round()
    return Split(out, labels, None, [str(digit) for digit in range(10)], [])


def read_bytes(folders: list[Path], *names: str) -> tuple[Path, bytes] | None:
    """(path, content) of the first file with one of these names in any of the folders, that of a
    .gz decompressed."""
    for folder in (folder for folder in folders if folder.is_dir()):
        for file in list_files(folder):
            if file.rsplit("/", 1)[-1] in names:
                path = folder / file
                try:
                    raw = path.read_bytes()
                    return path, zlib.decompress(raw, 31) if file.endswith(".gz") else raw
                except zlib.error as error:
                    fail(f"{path} is damaged ({error}): delete it, then run or get it again")
    return None


def read_mnist(folders: list[Path], split: str) -> Split | None:
    """Two idx files: 0, 0, 8, d, then d big-endian sizes of 4 bytes, then the bytes."""
    prefix, arrays, files = "train" if split == "train" else "t10k", [], []
    for name, d in ((f"{prefix}-images-idx3-ubyte", 3), (f"{prefix}-labels-idx1-ubyte", 1)):
        found = read_bytes(folders, name, f"{name}.gz")
        if found is None:
            return None
        path, raw = found
        head = 4 + 4 * d
        shape = [int.from_bytes(raw[k : k + 4], "big") for k in range(4, head, 4)]
        if raw[:4] != bytes([0, 0, 8, d]):
            fail(f"{path} is damaged: it starts with {raw[:4].hex()}, not with 000008{d:02d}")
        if len(raw) != head + math.prod(shape) or 0 in shape:
            fail(f"{path} is damaged: {len(raw):,} bytes for the dimensions {shape}")
        arrays.append(np.frombuffer(raw, np.uint8, offset=head).reshape(shape))
        files.append(path)
    images, labels = arrays
    if len(images) != len(labels) or labels.max() > 9:
        fail(f"{path} is damaged: {len(labels):,} labels to {labels.max()}, {len(images):,} digits")
    return Split(images[:, None], labels, None, [str(digit) for digit in range(10)], files)


def read_cifar(name: str, folders: list[Path], split: str) -> Split | None:
    """Records of one label byte (cifar100: coarse, then fine; the fine one is used) and 3072 bytes,
    the R, G and B planes, row-major."""
    head, classes, meta, names = 2, 100, "fine_label_names.txt", [f"{split}.bin"]
    if name == "cifar10":
        head, classes, meta, names = 1, 10, "batches.meta.txt", ["test_batch.bin"]
        if split == "train":
            names = [f"data_batch_{k}.bin" for k in range(1, 6)]
    records, files = [], []
    for file in names:
        found = read_bytes(folders, file)
        if found is None:
            return None
        path, raw = found
        if not raw or len(raw) % (head + 3072):
            fail(f"{path} is damaged: {len(raw):,} bytes are not whole records of {head + 3072}")
        records.append(np.frombuffer(raw, np.uint8).reshape(-1, head + 3072))
        if records[-1][:, head - 1].max() >= classes:
            fail(f"{path} is damaged: label {records[-1][:, head - 1].max()} of {classes} classes")
        files.append(path)
    data, found = np.concatenate(records), read_bytes(folders, meta)
    class_names = found[1].decode().split() if found else [str(k) for k in range(classes)]
    return Split(data[:, head:].reshape(-1, 3, 32, 32), data[:, head - 1], None, class_names, files)


# ---------------------------------------------------------------------------- folders of images


class Picture(NamedTuple):
    """One image file of a set."""

    file: str  # relative to the set's folder
    split: str | None  # train or test; None: to be split 80/20
    label: str | None
    group: str | None  # source picture or patient; None: on its own


LeftOut = dict[str, list[str]]  # reason -> files


@lru_cache
def suffixes() -> frozenset[str]:
    """Suffixes of the files that Pillow decodes: .png, .jpg, .jfif, .webp, ..."""
    known = Image.registered_extensions()
    return frozenset(s for s, f in known.items() if f in Image.OPEN and f not in NO_PICTURES)


def is_image(file: str) -> bool:
    """Does the name end like that of an image, in any case?"""
    return os.path.splitext(file)[1].lower() in suffixes()


def split_80_20(pictures: list[Picture]) -> list[Picture]:
    """Deterministic 80/20 split: in each class, the fifth of the files with the smallest name hash
    is the test set. Without classes nothing is probed, so these train as well."""

    def name_hash(picture: Picture) -> bytes:
        return hashlib.sha256(picture.file.split("/")[-1].encode()).digest()

    by_class = defaultdict(list)
    for picture in sorted(pictures, key=name_hash):
        by_class[picture.label].append(picture)
    result = []
    for label, members in by_class.items():
        fifth = max(len(members) // 5, int(len(members) > 1))
        result += [p._replace(split="test") for p in members[:fifth]]
        result += [p._replace(split="train") for p in (members[fifth:] if label else members)]
    return result


def list_own(files: list[str], left_out: LeftOut) -> list[Picture]:
    """The pictures of a user's folder; adds what is not used to left_out, by reason."""
    has_train = any(file.split("/")[0].lower() in TRAIN for file in files if "/" in file)
    by_split: dict[str, list[Picture]] = defaultdict(list)
    for file in files:
        *folders, _ = file.split("/")
        split = folders.pop(0).lower() if has_train and folders else ""
        if not is_image(file):
            left_out["of an unread suffix"].append(file)
        elif has_train and split not in TRAIN + HELD:
            left_out["outside train and test"].append(file)
        elif len(folders) > 1:
            left_out["too deep"].append(file)
        else:
            split = "train" if split in ("", *TRAIN) else split
            by_split[split].append(Picture(file, split, folders[0] if folders else None, None))
    labelled = len({p.label for p in by_split["train"]} - {None}) > 1
    for split, pictures in by_split.items():
        if not labelled:  # one folder is no class
            by_split[split] = [p._replace(label=None) for p in pictures]
            continue
        by_split[split] = [p for p in pictures if p.label]
        loose = [p.file for p in pictures if not p.label]
        if loose:
            left_out["without a class folder"] += loose
    train = by_split.pop("train")
    held = next((split for split in HELD if by_split.get(split)), None)
    if held is None:
        return split_80_20(train)
    for split, pictures in by_split.items():
        if split != held and pictures:
            left_out[f"in {split}, a third split"] += [p.file for p in pictures]
    return train + [p._replace(split="test") for p in by_split[held]]


def list_named(name: str, folder: Path, files: list[str], left_out: LeftOut) -> list[Picture]:
    """The pictures of tiny-imagenet, bccd or oct2017; adds other images to left_out."""
    files = [file for file in files if is_image(file)]
    matches = match(PATTERNS[name], files)
    if name == "bccd" and not matches:
        pictures = list_bccd_originals(folder, match(BCCD_ORIGINALS, files))
    else:
        pictures = []
        for m in matches:
            split = "train" if m["split"].lower() == "train" else "test"
            pictures.append(Picture(m.string, split, m["label"], m.groupdict().get("group")))
    if name == "tiny-imagenet" and pictures:
        notes = folder / f"{matches[0]['root'] or ''}val/val_annotations.txt"
        lines = notes.read_text().splitlines() if notes.is_file() else []
        labels = dict(line.split("\t")[:2] for line in lines if "\t" in line)
        known = {p.label for p in pictures if p.split == "train"}
        labelled = [p.label or labels.get(p.file.split("/")[-1]) for p in pictures]
        pictures = [p._replace(label=x) for p, x in zip(pictures, labelled) if x in known]
    used = {p.file for p in pictures}
    for file in files:
        if file not in used:
            unused = next((part for part in file.split("/") if part.lower() in HELD), None)
            reason = f"in {unused}, a third split" if unused and not matches else "not of the set"
            left_out[reason].append(file)
    return pictures


def match(pattern: str, files: list[str]) -> list[re.Match]:
    """The files whose whole path matches. Kaggle's archives hold some sets twice: those with the
    shortest root count."""
    found = [m for m in (re.fullmatch(pattern, file, re.IGNORECASE) for file in files) if m]
    root = min((m["root"] or "" for m in found), key=len, default="")
    return [m for m in found if (m["root"] or "") == root]


def list_bccd_originals(folder: Path, matches: list[re.Match]) -> list[Picture]:
    """The originals: rows of labels.csv with a picture and exactly one of the four classes."""
    table = folder / f"{matches[0]['root'] or ''}labels.csv" if matches else folder
    if not table.is_file():
        return []
    try:
        with table.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["Category"]]
        labels = {int(row["Image"]): row["Category"].strip() for row in rows}
    except (KeyError, ValueError, TypeError) as error:
        fail(f"{table} is damaged (Image, Category expected: {error}): get it again")
    pictures = [Picture(m.string, None, labels.get(int(m["number"])), None) for m in matches]
    return split_80_20([p for p in pictures if p.label in BCCD_CLASSES])


def read_folder(name: str, folder: Path) -> tuple[Split, Split, LeftOut] | None:
    """Both splits of a folder of images, undecoded, and the files left out; None where there is
    no image.

    Groups (source pictures, patients) are numbered over both splits, classes by name (those of
    tiny-imagenet in the order of wnids.txt). A class of test that train lacks is an error.
    """
    if not folder.is_dir():
        return None
    left_out, files = defaultdict(list), sorted(list_files(folder))
    if name in SETS:
        pictures = list_named(name, folder, files, left_out)
    else:
        pictures = list_own(files, left_out)
    if not pictures:
        return None
    order = {}
    if name == "tiny-imagenet":
        root = folder / re.sub(r"(train|val)/.*", "", pictures[0].file)
        wnids = (root / "wnids.txt").read_text().split() if (root / "wnids.txt").exists() else []
        order = {wnid: k for k, wnid in enumerate(wnids)}
    pictures = sorted(pictures, key=lambda p: (order.get(p.label, 0), p.label or "", p.file))
    classes = list(dict.fromkeys(p.label for p in pictures if p.label and p.split == "train"))
    unknown = {p.label for p in pictures if p.label} - set(classes)
    if unknown:
        names = ", ".join(sorted(unknown))
        fail(f"{folder}: test has classes that train ({', '.join(classes)}) lacks: {names}")
    groups = np.unique([p.group or "" for p in pictures], return_inverse=True)[1]
    splits = []
    for split in ("train", "test"):
        mine = [k for k, p in enumerate(pictures) if p.split == split]
        if not mine:
            fail(f"{folder} has no {split} images of {name}: the layouts are at the top of data.py")
        paths = [folder / pictures[k].file for k in mine]
        labels = np.array([classes.index(pictures[k].label) for k in mine]) if classes else None
        grouped = groups[mine] if pictures[0].group else None
        splits.append(Split(paths, labels, grouped, classes, paths))
    return *splits, left_out


def open_set(name: str, data_dir: Path) -> tuple[Split, Split, LeftOut]:
    """Both splits of any set, undecoded, and the files left out; downloads and unpacks what has to
    be. Exits where the set is not found."""
    if name == "glyphs":
        return draw_glyphs("train"), draw_glyphs("test"), {}
    folder = data_dir / name if name in SETS else Path(name)
    folders = [folder, data_dir / "MNIST"]  # where torchvision puts it

    def read() -> tuple[Split, Split, LeftOut] | None:
        """The set as it lies there now."""
        if name == "mnist":
            both = [read_mnist(folders, split) for split in ("train", "test")]
        elif name in ("cifar10", "cifar100"):
            both = [read_cifar(name, [folder], split) for split in ("train", "test")]
        else:
            return read_folder(name, folder)
        return None if None in both else (*both, {})

    found = read()
    if found is None and name in SETS:
        unpack(folder)
        found = read()
    if found is None and name in DOWNLOADS:
        download(name, folder)
        unpack(folder)
        found = read()
    if found is None and name in SETS:
        what = BY_HAND.get(name) or f"{', '.join(DOWNLOADS[name][1])} from {DOWNLOADS[name][0][0]}"
        fail(f"{name} is not in {folder}: put {what} there; or `python train.py` needs no data")
    if found is None:
        fail(f"no images in {name}: the layouts are at the top of data.py")
    return found


# ---------------------------------------------------------------------------- decode


class Unreadable(Exception):
    """One line: which file, why, and the way out."""


def read_picture(path: Path) -> tuple[Image.Image, int | None, bool]:
    """(image, brightest, several): the picture as a viewer shows it: upright by EXIF, transparency
    on white, 16 bits scaled to 8 by 1/257; of several pages or frames the first.

    `brightest` is the largest value of a 16-bit image, else None. Raises Unreadable.
    """
    try:
        with Image.open(path) as file:
            several = file.format != "MPO" and getattr(file, "n_frames", 1) > 1  # MPO: iPhones'
            image = ImageOps.exif_transpose(file)
    except Image.DecompressionBombError:
        raise Unreadable(f"{path} is too large to decode: shrink it") from None
    except Exception as error:  # Pillow's decoders raise nearly anything
        if getattr(error, "errno", None):  # no permission, a lost disk: nothing is wrong with it
            raise
        raise Unreadable(f"{path} is damaged ({error}): delete it or get it again") from None
    brightest = None
    if image.mode == "F":
        raise Unreadable(f"{path} has floating-point pixels, whose range is unknown: save 8 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        brightest = int(pixels.max())
        if brightest > 65535 or pixels.min() < 0:
            raise Unreadable(f"{path} has pixels beyond 0..65,535: save it in 8 or 16 bits")
        image = Image.fromarray((pixels / 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image, brightest, several


def fit(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """An image -> uint8 (C, S, S), aspect not kept. Pillow's bilinear filter averages over all
    pixels when it shrinks, so nothing aliases, and unlike bicubic it cannot overshoot."""
    image = image.convert("L" if channels == 1 else "RGB")
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def decode(split: Split, size: int, channels: int, what: str) -> Iterator[np.ndarray]:
    """Yield each image of a split as uint8 (C, S, S), in order; then say what was odd."""
    deep, pages = [], 0

    def one(item: Path | np.ndarray) -> tuple[np.ndarray, int | None, bool]:
        if isinstance(item, Path):
            image, brightest, several = read_picture(item)
            return fit(image, size, channels), brightest, several
        pixels = item[0] if len(item) == 1 else item.transpose(1, 2, 0)
        return fit(Image.fromarray(pixels), size, channels), None, False

    blocks = [split.images[k : k + 256] for k in range(0, len(split.images), 256)]
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        run = pool.map if isinstance(split.images, list) else map  # threads pay for real decoding
        results = (result for block in blocks for result in run(one, block))
        for result in progress(results, f"decoding {what}", len(split.images), "images"):
            pixels, brightest, several = result
            yield pixels
            pages += several
            if brightest is not None and len(deep) < 100:
                deep.append(brightest)
    if deep and max(deep) < 65536 / 8:
        print(
            f"warning: {what}: 16-bit images reach only {max(deep):,} of 65,535 and will look "
            "nearly black: stretch them first"
        )
    if pages:
        print(f"{what}: {pages:,} files have several pages or frames, of which the first is read")


def decode_once(split: Split, size: int, channels: int, what: str, cache: Path) -> np.ndarray:
    """Decode and keep as .npy, uint8 (N, C, S, S), memory-mapped. The file's name has a hash of the
    images' names, sizes and modification times, so changed files are decoded again. Where the
    cache cannot be written, into memory."""
    shape = (len(split.images), channels, size, size)
    key = hashlib.sha256(repr((shape, PIL.__version__)).encode())
    if isinstance(split.images, np.ndarray):
        key.update(np.ascontiguousarray(split.images).data)
    for file in split.files:
        stat = file.stat()
        key.update(repr((str(file.resolve()), stat.st_size, stat.st_mtime_ns)).encode())
    path = cache / f"{what.replace(' ', '-')}-{size}-{key.hexdigest()[:16]}.npy"
    try:
        kept = np.load(path, mmap_mode="r")
        if kept.shape == shape and kept.dtype == np.uint8:
            return kept
    except (OSError, ValueError, EOFError):
        pass  # not there, or cut short

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for pixels in decode(split, size, channels, what):
                file.write(pixels.tobytes())

    try:
        replace_file(path, write, private_name(path))
        return np.load(path, mmap_mode="r")
    except Unreadable as error:
        fail(str(error))
    except OSError as error:
        print(f"no cache in {cache} ({error}): decoding into memory", file=sys.stderr)
    try:
        return np.stack(list(decode(split, size, channels, what)))
    except Unreadable as error:
        fail(str(error))


def sample(labels: np.ndarray | None, n: int, limit: int, seed: int) -> np.ndarray:
    """Sorted indices of a seeded sample of n images, as equal over the classes as they allow."""
    order = np.random.default_rng(mix_seed(seed)).permutation(n)
    if limit and labels is not None:  # first one image of each class, then a second of each, ...
        turn = np.empty(n, np.int64)
        for label in np.unique(labels):
            turn[labels[order] == label] = np.arange((labels == label).sum())
        order = order[np.argsort(turn, kind="stable")]
    return np.sort(order[: limit or n])


def load(
    name: str, size: int, channels: int, data_dir: Path, limit: int = 0, seed: int = 0
) -> tuple[Split, Split]:
    """The training and the test images of a set as uint8 (N, C, S, S), resized and converted; says
    what there is and what was left out.

    limit > 0 takes that many of each, a seeded sample as equal over the classes as can be.
    """
    *splits, left_out = open_set(name, data_dir)
    label, classes = Path(name).name or "folder", len(splits[0].class_names)
    counts = " + ".join(f"{len(split.images):,}" for split in splits)
    line = f"{label}: {counts} images (train + test), {classes or 'no'} classes"
    if left_out:
        parts = [f"{len(files):,} {why} ({files[0]})" for why, files in left_out.items()]
        line += f"; left out: {', '.join(parts)}"
    print(line, flush=True)
    if 0 < limit < classes:
        print(f"--limit {limit} is below the {classes} classes: some have no image")
    loaded = []
    for kind, split in zip(("train", "test"), splits):
        chosen = sample(split.labels, len(split.images), limit, seed)
        if isinstance(split.images, list):
            images = [split.images[k] for k in chosen]
            split = replace(split, images=images, files=images)
        elif limit:
            split = replace(split, images=split.images[chosen])
        images = decode_once(split, size, channels, f"{label} {kind}", data_dir / "cache")
        labels, groups = (
            None if x is None else x[chosen].astype(np.int64) for x in (split.labels, split.groups)
        )
        loaded.append(replace(split, images=images, labels=labels, groups=groups))
    return tuple(loaded)


def set_facts(name: str) -> Facts:
    """Channels, row of Table 4, flips. A known name touches no disk. Any folder is read as colour,
    its row is that of the median shorter side of a hundred images. Exits where it has none."""
    if name in SETS:
        return SETS[name]
    found = read_folder(name, Path(name))
    if not Path(name).is_dir():
        fail(f"{name!r} is no folder of images and none of {', '.join(SETS)}")
    if found is None:
        fail(f"no images in {name}: the layouts are at the top of data.py")
    paths, sides = found[0].files, []
    for path in paths[:: max(1, len(paths) // 100)]:
        try:
            with Image.open(path) as image:  # reads no more than the header
                sides.append(min(image.size))
        except Exception as error:
            fail(f"{path} is damaged ({error}): delete it or get it again")
    row = next((row for row in (32, 64) if np.median(sides) <= row), 256)
    return Facts(3, row, True)


# ---------------------------------------------------------------------------- batches


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed out of several numbers; their order and their count matter."""
    digest = hashlib.sha256(",".join(str(int(n)) for n in numbers).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Float (B, C, H, W), clipped to [-1, 1] -> uint8, rounded: the inverse of `to_float`."""
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def on_device(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 images (N, C, S, S) as a tensor, moved to a GPU once where they fit into half of its
    free memory: then a step copies nothing from the host."""
    with warnings.catch_warnings():  # torch warns of read-only arrays; these are never written
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.from_numpy(images)
    fits = device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
    return tensor.to(device) if fits else tensor


@lru_cache(maxsize=2)  # every step of an epoch asks for the same one
def permutation(n: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The order of one epoch, int64 (n,): drawn on the CPU, so that it is the same everywhere."""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    return torch.randperm(n, generator=generator).to(device)


def batch_index(n: int, step: int, batch: int, seed: int, device: torch.device) -> Tensor:
    """Which of n images make batch number `step`, int64 (B,): cut from one endless stream of
    permutations, one an epoch, so every batch is full and n may be below B. A pure function: a
    resumed run has nothing to restore."""
    start, end, pieces = step * batch, (step + 1) * batch, []
    for epoch in range(start // n, end // n + 1):
        begin = epoch * n
        pieces.append(permutation(n, seed, epoch, device)[max(0, start - begin) : end - begin])
    return torch.cat(pieces)


def get_batch(
    images: Tensor, index: Tensor, device: torch.device, flips: Tensor | None = None
) -> Tensor:
    """images[index] as float32 in [-1, 1] on the device, mirrored left-right where flips (B,) says.

    Images that stayed on the host go through pinned memory, so that the copy runs while the device
    is still busy with the step before.
    """
    if images.device == device:
        x = images[index]
    else:
        shape = (len(index), *images.shape[1:])
        x = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        x = torch.index_select(images, 0, index, out=x).to(device, non_blocking=True)
    x = to_float(x)
    if flips is not None:
        x = torch.where(flips[:, None, None, None], x.flip(-1), x)
    return x
