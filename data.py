"""Images for the networks: every set as one uint8 array a split, and batches of it on a device.

    glyphs         ten digits drawn with Pillow's own font: needs no file
    mnist          {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]                  downloaded
    cifar10        cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin              downloaded
    cifar100       cifar-100-binary/{train,test}.bin                                  downloaded
    tiny-imagenet  tiny-imagenet-200/{train/CLASS/images,val/images}/*.JPEG           downloaded
    bccd           .../images/{TRAIN,TEST}/CLASS/_K_NNNN.jpeg (K: the source picture) by hand
    oct2017        OCT2017/{train,test}/CLASS/CLASS-patient-n.jpeg                    by hand
    path/to/folder train/CLASS/* and test/CLASS/* (or val); or CLASS/*, split 80/20; or images
                   without classes: all of them train, and a fifth is the test set as well

A set lies in data/NAME/. `open_set` lists what is there, and unpacks or downloads what is missing;
`decode_once` turns the images into one array a set, kept as data/cache/*.npy; `load` calls both;
`get_batch` cuts batches from the array, which lies on the device where it fits.

Shapes: N images, B batch, C channels, H W pixels, S = H = W.
"""

import errno
import gzip
import hashlib
import http.client
import json
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
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch import Tensor

warnings.filterwarnings("ignore", module="PIL")  # of odd metadata, and of images that are large

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
DOWNLOADS = {  # set -> {file: md5}
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "cifar10": {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    "cifar100": {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
    "tiny-imagenet": {"tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de"},
}
MIRRORS = {  # set -> addresses in the order to try
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/",),
    "tiny-imagenet": ("http://cs231n.stanford.edu/",),
}
BY_HAND = {
    "bccd": "dataset2-master from https://www.kaggle.com/datasets/paultimothymooney/blood-cells",
    "oct2017": "OCT2017 from https://data.mendeley.com/datasets/rscbjbr9sj/2",
}
PATTERNS = {  # where the images of a set lie; root is whatever the archive's maker put around it
    "tiny-imagenet": r"(?P<root>(.*/)?)(?P<split>train|val)/((?P<label>n\d+)/)?(images/)?[^/]+",
    "bccd": r"(?P<root>(.*/)?)images/"
    r"(?P<group>(?P<split>TRAIN|TEST)/(?P<label>[A-Z]+)/_\d+)_\d+\.\w+",
    "oct2017": r"(?P<root>((?!.*chest_xray/).*/)?)"  # chest_xray: beside OCT in ZhangLabData
    r"(?P<split>train|test)/(?P<label>[A-Z]+)/[A-Z]+-(?P<group>\d+)-\d+\.\w+",
}
TRAIN = ("train", "training")  # names of a split's folder
TEST = ("test", "testing", "val", "valid", "validation")
UPRIGHT = {  # what EXIF's orientation asks a viewer to do with the picture
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_270,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_90,
}
NO_PICTURES = ("EPS", "WMF", "HDF5", "GRIB", "BUFR", "MPEG")  # opened by Pillow, but not decoded
SUFFIXES = frozenset(  # .png, .jpg, .jfif, .webp, ...; .mpo is opened by the reader of .jpg
    suffix
    for suffix, kind in [*Image.registered_extensions().items(), (".mpo", "JPEG")]
    if kind in Image.OPEN and kind not in NO_PICTURES
)


@dataclass
class Split:
    """The training or the test images of a set."""

    images: np.ndarray  # uint8 (N, C, S, S), maybe a read-only memmap; before `decode` also paths
    labels: np.ndarray | None  # (N,), int64 after `load`; None: unlabelled
    groups: np.ndarray | None  # likewise, equal for images of one source picture or patient
    class_names: list[str]


class Unreadable(Exception):
    """One line: which file cannot be read, why, and the way out."""


class Missing(Exception):
    """A set, or a part of it, is not in its folder."""


def damage(path: Path, reason: object) -> str:
    """The line for a file whose content cannot be right."""
    reason = " ".join(str(reason).split())
    return f"{path} is damaged ({reason}): delete it, then run or get it again"


# ---------------------------------------------------------------------------- download and unpack

TIMEOUT = 8.0  # seconds a server may be silent
TRIES = 3  # over all mirrors of a file
# what a disk or a path answers: a fault of no server and no archive
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
DISK += (errno.EIO, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)


def not_there(name: str, folder: Path, why: str = "") -> NoReturn:
    """Exit: a named set has to be put into its folder by hand, or unpacked anew."""
    for file in DOWNLOADS.get(name, ()):
        unpacked = folder / file.partition(".")[0]
        if (folder / file).exists() and unpacked.is_dir():
            fail(f"{unpacked} does not hold all of {name}: delete it, and {file} is unpacked again")
    what = BY_HAND.get(name) or f"{', '.join(DOWNLOADS[name])} from {MIRRORS[name][0]}"
    fail(f"{name} is not in {folder}{why}: put {what} there; or `python train.py` needs no data")


def download(name: str, folder: Path) -> None:
    """Fetch the files of a set that are not in its folder; leaves no empty folder behind."""
    new = [place for place in (folder, folder.parent) if not place.exists()]
    try:
        for file, md5 in DOWNLOADS.get(name, {}).items():
            if not (folder / file).exists():
                download_file(name, folder / file, md5)
    finally:
        for place in new:
            with suppress(OSError):  # it is not empty
                place.rmdir()


def download_file(name: str, path: Path, md5: str) -> None:
    """Fetch one file of a set, in at most TRIES tries over its mirrors. It gets its name only when
    it is whole and its md5 is right."""
    reason = ""
    for attempt in range(TRIES):
        url = MIRRORS[name][attempt % len(MIRRORS[name])] + path.name
        try:
            replace_file(path, partial(fetch, url, md5), private=".*")
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in DISK:
                raise
            reason = f"{url}: {error}"
        time.sleep(attempt)  # a short pause: 0, 1, 2 seconds
    not_there(name, path.parent, f" and could not be downloaded ({reason})")


def fetch(url: str, md5: str, path: Path) -> None:
    """Write the file at url to path. Raises OSError where it broke off or its md5 is another."""
    digest = hashlib.md5()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, path.open("wb") as out:
        total = int(answer.headers.get("Content-Length", 0))
        chunks = iter(partial(answer.read, 2**16), b"")
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
    for path in sorted(folder.glob("*")):
        parts = re.fullmatch(r"([^.].*)\.(zip|tar|tar\.gz|tgz)", path.name, re.IGNORECASE)
        if parts is None or not path.is_file() or path.with_name(parts[1]).exists():
            continue
        target = path.with_name(parts[1])
        try:
            replace_file(target, partial(extract, path), private=".*")
        except Exception as error:  # of damaged archives the two libraries raise nearly anything
            if target.is_dir():  # another run was quicker
                continue
            if getattr(error, "errno", None) in DISK:
                raise
            fail(damage(path, error))


def extract(path: Path, folder: Path) -> None:
    """All members of an archive. Raises EOFError where a .tar is cut, or a header is damaged,
    between two members, which tarfile takes for the end: a whole one ends in zeros."""
    what = f"unpacking {path.name}"
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            archive.extractall(folder, progress(members, what, len(members), "files"))
        return
    if not hasattr(tarfile, "data_filter"):
        fail(
            f"{path} cannot be unpacked safely by Python {platform.python_version()}, but by "
            "3.10.12, 3.11.4, 3.12 and later: update, or unpack it there by hand, with tar -xf"
        )
    with path.open("rb") as raw, tarfile.open(fileobj=raw) as archive:
        size = path.stat().st_size / 1e6
        members = progress(archive, what, size, "MB", lambda: raw.tell() / 1e6)
        archive.extractall(folder, members=members, filter="data")
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("it ends too early")
        while archive.fileobj.read(2**20):  # to the end of a .gz, where its checksum is
            pass


def list_files(folder: Path, parents: tuple[Path, ...] = ()) -> Iterator[str]:
    """The paths of all files below a folder, relative to it, with slashes; hidden ones are left
    out. Links are followed, but one back to a parent folder ends the walk there."""
    here = folder.resolve()
    if here in parents or not folder.is_dir():
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            below = list_files(Path(entry.path), (*parents, here))
            yield from (f"{entry.name}/{name}" for name in below)
        elif entry.is_file() or entry.is_symlink():  # a broken link too, to be named
            yield entry.name


# ---------------------------------------------------------------------------- sets of arrays


def draw_glyphs(split: str) -> Split:
    """10,000 train or 2,000 test digits in Pillow's font, uint8 (N, 1, 28, 28), white on black.

    Each is scaled, rotated, sheared, shifted, drawn thin or bold, dimmed and covered with noise, so
    that pixels alone do not tell them apart (how much was chosen by the accuracy of raw pixels).
    """
    n = {"train": 10_000, "test": 2_000}[split]
    side, big = 28, 28 * 3  # drawn at 3 x, averaged
    rng = np.random.default_rng([0, split == "train"])
    font = ImageFont.load_default(size=22 * 3)
    stamps = {}
    for digit, stroke in np.ndindex(10, 4):
        stamps[digit, stroke] = Image.new("L", (big, big))
        pen = ImageDraw.Draw(stamps[digit, stroke])
        pen.text((big / 2, big / 2), f"{digit}", 255, font, anchor="mm", stroke_width=stroke)
    labels = rng.permutation(np.arange(n) % 10)
    out = np.empty((n, 1, side, side), np.uint8)
    for i, digit in enumerate(labels):
        scale = rng.uniform(0.7, 1.1, 2)
        angle = np.deg2rad(rng.uniform(-25, 25))
        shear = rng.uniform(-0.3, 0.3)
        shift = rng.uniform(-3, 3, 2) * 3
        cos, sin = np.cos(angle), np.sin(angle)
        forward = np.array([[cos, -sin], [sin, cos]]) @ [[1, shear], [0, 1]] @ np.diag(scale)
        back = np.linalg.inv(forward)  # Pillow asks where each output pixel comes from
        offset = big / 2 - back @ (big / 2 + shift)
        affine = (*back[0], offset[0], *back[1], offset[1])
        stamp = stamps[digit, rng.integers(4)]
        image = stamp.transform(stamp.size, Image.AFFINE, affine, Image.BILINEAR)
        pixels = np.asarray(image.reduce(3), np.float32) * rng.uniform(0.6, 1.0)
        pixels += rng.normal(0, rng.uniform(0, 25), pixels.shape)
        out[i] = pixels.clip(0, 255).round()
    return Split(out, labels, None, [str(digit) for digit in range(10)])


def read_bytes(folders: list[Path], *names: str) -> tuple[Path, bytes]:
    """(path, content) of the first file with one of these names in any of the folders, that of a
    .gz decompressed. Raises Missing."""
    for path in (folder / file for folder in folders for file in list_files(folder)):
        if path.name in names:
            raw = path.read_bytes()
            try:
                return path, gzip.decompress(raw) if path.suffix == ".gz" else raw
            except (OSError, EOFError, zlib.error) as error:
                fail(damage(path, error))
    raise Missing


def read_mnist(folders: list[Path], split: str) -> Split:
    """Two idx files: 0, 0, 8, d, then d big-endian sizes of 4 bytes, then the bytes. Raises
    Missing."""
    prefix = "train" if split == "train" else "t10k"
    arrays = []
    for name, d in ((f"{prefix}-images-idx3-ubyte", 3), (f"{prefix}-labels-idx1-ubyte", 1)):
        path, raw = read_bytes(folders, name, f"{name}.gz")
        head = 4 + 4 * d
        shape = [int.from_bytes(raw[k : k + 4], "big") for k in range(4, head, 4)]
        if raw[:4] != bytes([0, 0, 8, d]):
            fail(damage(path, f"it starts with {raw[:4].hex()}, not with 000008{d:02d}"))
        if len(raw) != head + math.prod(shape) or 0 in shape:
            fail(damage(path, f"{len(raw):,} bytes for the dimensions {shape}"))
        arrays.append(np.frombuffer(raw, np.uint8, offset=head).reshape(shape))
    images, labels = arrays
    if len(images) != len(labels) or labels.max() > 9:
        fail(damage(path, f"{len(labels):,} labels to {labels.max()}, {len(images):,} digits"))
    return Split(images[:, None], labels, None, [str(digit) for digit in range(10)])


def read_cifar(name: str, folder: Path, split: str) -> Split:
    """Records of one label byte (cifar100: coarse, then fine; the fine one is used) and 3072 bytes,
    the R, G and B planes, row-major. Raises Missing."""
    head, classes, meta, files = 2, 100, "fine_label_names.txt", [f"{split}.bin"]
    if name == "cifar10":
        head, classes, meta, files = 1, 10, "batches.meta.txt", ["test_batch.bin"]
        if split == "train":
            files = [f"data_batch_{k}.bin" for k in range(1, 6)]
    parts = []
    for file in files:
        path, raw = read_bytes([folder], file)
        if not raw or len(raw) % (head + 3072):
            fail(damage(path, f"{len(raw):,} bytes are not whole records of {head + 3072}"))
        records = np.frombuffer(raw, np.uint8).reshape(-1, head + 3072)
        highest = records[:, head - 1].max()
        if highest >= classes:
            fail(damage(path, f"label {highest} of {classes} classes"))
        parts.append(records)
    records = np.concatenate(parts)
    names = []
    with suppress(Missing):
        names = read_bytes([folder], meta)[1].decode(errors="replace").split()
    if len(names) != classes:
        names = [str(k) for k in range(classes)]
    return Split(records[:, head:].reshape(-1, 3, 32, 32), records[:, head - 1], None, names)


# ---------------------------------------------------------------------------- folders of images


class Picture(NamedTuple):
    """One image file of a set."""

    file: str  # relative to the set's folder
    split: str  # train or test
    label: str | None
    group: str | None = None  # source picture or patient; None: on its own


LeftOut = dict[str, list[str]]  # reason -> files
Found = tuple[Split, Split, str]  # train, test, and a text on what was left out


def split_80_20(pictures: list[Picture]) -> list[Picture]:
    """Deterministic 80/20 split: in each class, the fifth of the files with the smallest name hash
    is the test set. Without classes nothing is probed, so these train as well."""
    by_class = defaultdict(list)
    for picture in pictures:
        by_class[picture.label].append(picture)
    result = []
    for label, members in by_class.items():
        members.sort(key=lambda p: hashlib.sha256(os.fsencode(p.file.split("/")[-1])).digest())
        fifth = max(len(members) // 5, int(len(members) > 1))
        result += [p._replace(split="test") for p in members[:fifth]]
        result += members[fifth:] if label else members
    return result


def list_own(folder: Path, left_out: LeftOut) -> list[Picture]:
    """The pictures of a user's folder; adds what is not used to left_out, by reason."""
    files = list(list_files(folder))
    has_train = any(file.split("/")[0].lower() in TRAIN for file in files if "/" in file)
    found = []
    for file in files:
        *folders, _ = (file if has_train else f"train/{file}").split("/")
        split = folders.pop(0).lower() if folders else ""
        split = "train" if split in TRAIN else split
        if Path(file).suffix.lower() not in SUFFIXES:
            left_out["of an unread suffix"].append(file)
        elif split not in ("train", *TEST):
            left_out["outside train and test"].append(file)
        elif len(folders) > 1:
            left_out["too deep"].append(file)
        else:
            found.append(Picture(file, split, folders[0] if folders else None))
    if len({p.label for p in found if p.split == "train" and p.label}) > 1:
        left_out["without a class folder"] = [p.file for p in found if not p.label]
        found = [p for p in found if p.label]
    else:  # one folder is no class
        found = [p._replace(label=None) for p in found]
    train, *tests = ([p for p in found if p.split == split] for split in ("train", *TEST))
    tests = [test for test in tests if test]
    for third in tests[1:]:
        left_out[f"in {third[0].split}, a third split"] = [p.file for p in third]
    if tests:
        pictures = train + [p._replace(split="test") for p in tests[0]]
    else:
        pictures = split_80_20(train)
    return sorted(pictures, key=lambda p: (p.label or "", p.file))


def list_named(name: str, folder: Path, left_out: LeftOut) -> list[Picture]:
    """The pictures of tiny-imagenet, bccd or oct2017; adds other images to left_out. Kaggle's
    archives hold some sets twice: the files with the shortest root count. Raises Missing."""
    files = [file for file in list_files(folder) if Path(file).suffix.lower() in SUFFIXES]
    matches = [re.fullmatch(PATTERNS[name], file, re.IGNORECASE) for file in files]
    root = min((m["root"] for m in matches if m), key=len, default="")
    matches = [m for m in matches if m and m["root"] == root]
    pictures = []
    for m in matches:
        split = "train" if m["split"].lower() == "train" else "test"
        pictures.append(Picture(m.string, split, m["label"], m.groupdict().get("group")))
    if name == "tiny-imagenet":  # of val/images a file names the classes; train has to have them
        lines = read_lines(folder / root / "val/val_annotations.txt")
        labels = dict(line.split("\t")[:2] for line in lines if "\t" in line)
        known = {p.label for p in pictures if p.split == "train"}
        pictures = [p._replace(label=p.label or labels.get(Path(p.file).name)) for p in pictures]
        pictures = [p for p in pictures if p.label in known]
    if not pictures:
        raise Missing
    used = {p.file for p in pictures}
    splits = {m["split"].lower() for m in matches}
    for file in (file for file in files if file not in used):
        third = [part for part in file.lower().split("/") if part in TEST and part not in splits]
        left_out[f"in {third[0]}, a third split" if third else "not of the set"].append(file)
    order = {wnid: k for k, wnid in enumerate(read_lines(folder / root / "wnids.txt"))}
    return sorted(pictures, key=lambda p: (order.get(p.label, 0), p.label or "", p.file))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; none where it is not there."""
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def read_folder(name: str, folder: Path) -> Found:
    """Both splits of a folder of images, undecoded, and what was left out, as "; left out: 3 too
    deep (a/b/c/1.png)": how many files, with the first as example.

    Groups (source pictures, patients) are numbered over both splits, classes by name (those of
    tiny-imagenet in the order of wnids.txt). Raises Missing where a named set has no image. Exits
    where a user's folder or a split has none, and where test has a class that train lacks.
    """
    left_out = defaultdict(list)
    if name in SETS:
        pictures = list_named(name, folder, left_out)
    elif name and folder.is_dir():  # "" would be the current folder
        pictures = list_own(folder, left_out)
    else:
        fail(f"{name!r} is no folder of images and none of {', '.join(SETS)}")
    parts = [f"{len(files):,} {why} ({files[0]})" for why, files in left_out.items() if files]
    said = f"; left out: {', '.join(parts)}" if parts else ""
    if not pictures:
        fail(f"no images in {name}{said}: the layouts are at the top of data.py")
    classes = list(dict.fromkeys(p.label for p in pictures if p.label and p.split == "train"))
    unknown = sorted({p.label for p in pictures if p.label} - set(classes))
    if unknown:
        names = ", ".join(unknown)
        fail(f"{folder}: test has classes that train ({', '.join(classes)}) lacks: {names}")
    numbers = np.unique([p.group or "" for p in pictures], return_inverse=True)[1]
    splits = []
    for split in ("train", "test"):
        mine = [k for k, p in enumerate(pictures) if p.split == split]
        if not mine:
            fail(f"{folder} has no {split} images of {name}: the layouts are at the top of data.py")
        paths = np.array([folder / pictures[k].file for k in mine])
        labels = np.array([classes.index(pictures[k].label) for k in mine]) if classes else None
        groups = numbers[mine] if pictures[0].group else None
        splits.append(Split(paths, labels, groups, classes))
    return *splits, said


def read_set(name: str, folder: Path) -> Found:
    """Both splits of any set as it lies in its folder now. Raises Missing."""
    if name == "glyphs":
        return draw_glyphs("train"), draw_glyphs("test"), ""
    if name == "mnist":
        folders = [folder, folder.with_name("MNIST")]  # where torchvision puts it
        return read_mnist(folders, "train"), read_mnist(folders, "test"), ""
    if name in ("cifar10", "cifar100"):
        return read_cifar(name, folder, "train"), read_cifar(name, folder, "test"), ""
    return read_folder(name, folder)


def open_set(name: str, data_dir: Path) -> Found:
    """Both splits of any set, undecoded, and what was left out. While reading raises Missing, it
    unpacks, downloads, unpacks again, and reads after each; then it exits."""
    folder = data_dir / name if name in SETS else Path(name)
    for step in (unpack, partial(download, name), unpack, partial(not_there, name)):
        with suppress(Missing):
            return read_set(name, folder)
        step(folder)


# ---------------------------------------------------------------------------- decode


def read_picture(path: Path) -> tuple[Image.Image, int | None, bool]:
    """(image, brightest, several): the picture as a viewer shows it: upright by EXIF, transparency
    on white, 16 bits scaled to 8 by 1/257; of several pages or frames the first.

    `brightest` is the largest value of a 16-bit image, else None. Raises Unreadable.
    """
    try:
        with Image.open(path) as file:
            file.filename = ""  # else Pillow maps raw pixels, and cuts a turned TIFF's rows wrongly
            several = file.format != "MPO" and getattr(file, "n_frames", 1) > 1  # MPO: iPhones'
            file.load()
            turn = None
            with suppress(Exception):  # ImageOps.exif_transpose trips over other, odd tags
                turn = UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation))
            image = file.copy() if turn is None else file.transpose(turn)
    except Image.DecompressionBombError:
        raise Unreadable(f"{path} is too large to decode: shrink it") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything
        if getattr(error, "errno", None) in DISK:  # no permission, a lost disk
            raise Unreadable(f"{path} cannot be read: {error.strerror}") from None
        raise Unreadable(damage(path, error)) from None
    brightest = None
    if image.mode == "F":
        raise Unreadable(f"{path} has floating-point pixels, whose range is unknown: save 8 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        brightest = int(pixels.max())
        if brightest > 65535 or pixels.min() < 0:
            raise Unreadable(f"{path} has pixels beyond 0..65,535: save it in 8 or 16 bits")
        pixels[pixels == image.info.get("transparency", -1)] = 65535
        image = Image.fromarray((pixels / 257).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    elif image.mode == "LAB":  # which Pillow converts to RGB alone
        image = image.convert("RGB")
    return image, brightest, several


def fit(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """An image -> uint8 (C, S, S), aspect not kept. Pillow's bilinear filter averages over all
    pixels when it shrinks, so nothing aliases, and unlike bicubic it cannot overshoot."""
    image = image.convert("L" if channels == 1 else "RGB")
    image = image.resize((size, size), Image.BILINEAR)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def decode(items: list, size: int, channels: int, what: str) -> Iterator[np.ndarray]:
    """Yield each item, a path or uint8 (C, h, w), as uint8 (C, S, S), in order; then say what was
    odd. Raises Unreadable."""
    deep: list[int] = []  # the brightest pixels of the first hundred 16-bit images
    pages = 0

    def one(item: Path | np.ndarray) -> tuple[np.ndarray, int | None, bool]:
        if isinstance(item, Path):
            image, brightest, several = read_picture(item)
            return fit(image, size, channels), brightest, several
        pixels = item[0] if len(item) == 1 else item.transpose(1, 2, 0)
        return fit(Image.fromarray(pixels), size, channels), None, False

    blocks = [items[k : k + 256] for k in range(0, len(items), 256)]  # bounds the memory
    with ThreadPoolExecutor() as pool:
        run = pool.map if isinstance(items[0], Path) else map  # threads pay for real decoding
        results = (result for block in blocks for result in run(one, block))
        shown = progress(results, f"decoding {what}", len(items), "images")
        for pixels, brightest, several in shown:
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


def decode_once(items: list, size: int, channels: int, what: str, cache: Path) -> np.ndarray:
    """Decode and cache as .npy, uint8 (N, C, S, S), memory-mapped. The file name has a hash of the
    images' names, sizes and modification times, so changed files are decoded again. If the cache
    cannot be written, the array stays in memory. Raises Unreadable."""
    shape = (len(items), channels, size, size)
    key = hashlib.sha256(repr((shape, PIL.__version__)).encode())
    for item in items:
        if isinstance(item, Path):
            stat = item.stat()
            key.update(repr((str(item.absolute()), stat.st_size, stat.st_mtime_ns)).encode())
        else:
            key.update(item.tobytes())
    path = cache / f"{what}-{size}-{key.hexdigest()[:16]}.npy"
    with suppress(OSError, ValueError, EOFError):  # it is not there, or cut short
        return np.lib.format.open_memmap(path, mode="r")

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for pixels in decode(items, size, channels, what):
                file.write(pixels.tobytes())

    try:
        replace_file(path, write, private=".*")
        return np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        print(f"no cache in {cache} ({error}): decoding into memory", file=sys.stderr)
        return np.stack(list(decode(items, size, channels, what)))


def sample(split: Split, limit: int, seed: int) -> Split:
    """A seeded sample of `limit` images in their order, 0 being all of them, as equal over the
    classes as they allow."""
    labels, groups = split.labels, split.groups
    n = len(split.images)
    order = np.random.default_rng(mix_seed(seed)).permutation(n)
    if limit and labels is not None:  # first one image of each class, then a second of each, ...
        turn = np.empty(n, np.int64)
        for label in np.unique(labels):
            turn[labels[order] == label] = np.arange((labels == label).sum())
        order = order[np.argsort(turn, kind="stable")]
    index = np.sort(order[: limit or n])
    labels = None if labels is None else labels[index].astype(np.int64)
    groups = None if groups is None else groups[index].astype(np.int64)
    return Split(split.images[index], labels, groups, split.class_names)


def load(
    name: str, size: int, channels: int, data_dir: str | Path, limit: int = 0, seed: int = 0
) -> tuple[Split, Split]:
    """The training and the test images of a set as uint8 (N, C, S, S), resized and converted; says
    what there is and what was left out.

    limit > 0 takes that many of each, a seeded sample as equal over the classes as can be. Exits
    where the set is not there or damaged.
    """
    *splits, left_out = open_set(name, Path(data_dir))
    title = Path(name).resolve().name
    classes = len(splits[0].class_names)
    found = [len(split.images) for split in splits]
    line = f"{title}: {found[0]:,} + {found[1]:,} images (train + test), {classes or 'no'} classes"
    print(line + left_out, flush=True)
    train, test = (sample(split, limit, seed) for split in splits)
    used = [len(train.images), len(test.images)]
    if used != found:
        print(f"a sample of {used[0]:,} + {used[1]:,} of them is used")
    if 0 < limit < classes:
        print(f"--limit {limit} is below the {classes} classes: some have no image")
    if not limit and train.groups is not None and len(set(train.groups)) == 1:
        fail(f"{title}: all training images are of one source or patient, and the probe needs two")
    items = [*train.images, *test.images]
    try:
        images = decode_once(items, size, channels, title, Path(data_dir, "cache"))
    except Unreadable as error:
        fail(str(error))
    train.images, test.images = images[: used[0]], images[used[0] :]
    return train, test


def set_facts(name: str) -> Facts:
    """Channels, row of Table 4, flips. A known name touches no disk. Any folder is read as colour,
    its row is that of the median shorter side of a hundred images. Exits where it has none."""
    if name in SETS:
        return SETS[name]
    paths = read_folder(name, Path(name))[0].images
    sides = []
    for path in paths[:: math.ceil(len(paths) / 100)]:
        with suppress(Exception), Image.open(path) as image:  # `load` names the damaged ones
            sides.append(min(image.size))
    side = np.median(sides) if sides else math.inf
    return Facts(3, 32 if side <= 32 else 64 if side <= 64 else 256, True)


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
    """The order of one epoch, int64 (n,): drawn on the CPU, so that it is the same everywhere, and
    copied from pinned memory, so that nothing waits. (mix_seed(seed, epoch) is also the seed of
    train.py's draws at step `epoch`: a flaw, kept so that recorded runs can be repeated.)"""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    order = torch.randperm(n, generator=generator, pin_memory=device.type == "cuda")
    return order.to(device, non_blocking=True)


def batch_index(n: int, step: int, batch: int, seed: int, device: torch.device) -> Tensor:
    """Which of n images make batch number `step`, int64 (B,): cut from one endless stream of
    permutations, one an epoch, so every batch is full and n may be below B. A pure function: a
    resumed run has nothing to restore."""
    start, end = step * batch, (step + 1) * batch
    pieces = []
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
    x = images.index_select(0, index)  # copies whole rows, which images[index] does not
    if images.device != device:
        x = x.pin_memory().to(device, non_blocking=True)
    x = to_float(x)
    if flips is not None:
        x = torch.where(flips[:, None, None, None], x.flip(-1), x)
    return x


# ---------------------------------------------------------------------------- what all files need


def fail(message: str, kind: type[SystemExit] = SystemExit) -> NoReturn:
    """Print one line and exit with status 2, by an exception of that kind: the way every command
    reports bad input."""
    env = os.environ  # under torchrun one process a machine speaks
    if env.get("LOCAL_RANK", "0") == "0" or env.get("WORLD_SIZE", "1") in ("", "1"):
        line = message.replace("\n", "\\n")  # of a file's name
        print(f"error: {line}", file=sys.stderr)
    raise kind(2)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss; never negative."""
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def status(text: str, again: bool) -> None:
    """Print a progress line; on a terminal `again` writes it over the line above, and what does not
    fit into one line is left out at its start. The cursor is always at a line of its own, so
    whatever ends the program is not glued to it."""
    over = ""
    if sys.stdout.isatty():
        over = "\033[A\033[K" if again else ""
        text = text[-max(20, shutil.get_terminal_size().columns - 1) :]
    print(f"{over}{text}", flush=True)


def progress(
    items: Iterable, what: str, total: float, unit: str, done: Callable[[], float] | None = None
) -> Iterator:
    """Yield the items; after two seconds, show a progress line with count, rate and time left.

    `done` tells how much is done where that is not the number of items.
    """
    start, shown = time.monotonic(), 0.0
    pause = 0.5 if sys.stdout.isatty() else 10
    for k, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - start > 2 and now - shown > pause:
            amount = k if done is None else done()
            rate = max(amount, 1e-9) / (now - start)
            speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
            left = f"{speed} {unit}/s, {clock((total - amount) / rate)} left"
            status(f"{what}: {amount:,.0f} of {total:,.0f} {unit}, {left}", again=shown > 0)
            shown = now


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: str) -> None:
    """Delete what dead processes of this machine have left in a folder of files whose names match
    that pattern."""
    for path in folder.iterdir() if os.name == "posix" else ():
        old = re.fullmatch(rf"\.{names}\.{re.escape(platform.node())}-(\d+)", path.name)
        if old:
            try:
                os.kill(int(old[1]), 0)  # signal 0 only asks: is it alive?
            except (ProcessLookupError, OverflowError):
                remove(path)
            except PermissionError:
                pass  # another user's process, alive


def replace_file(path: Path, write: Callable[[Path], Any], private: str = "") -> None:
    """Call write(temporary path); what it wrote gets its name only if that ends well.

    So a reader sees the old file or the new one, whole. The temporary name is fixed: what kill -9
    leaves is overwritten by the next call. Where two processes may write the same file at once it
    has the process id in it, and leftovers of files whose names match the pattern `private` are
    removed: in data/ all, elsewhere those of this file.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is no plain file: name another", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if private:
        remove_leftovers(path.parent, private)
        temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:  # Ctrl-C comes here too
        remove(temporary)


def check_writable(*paths: Path | None) -> None:
    """Raise OSError now where a file could not be written later, after hours of work."""
    for path in paths:
        if path and path.parent.exists() and not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def write_json(path: Path, value: Any, shared: bool = False) -> None:
    """Write a value as JSON, whole or not at all; `shared` where two processes may at once."""
    text = json.dumps(value, indent=1) + "\n"
    replace_file(path, lambda to: to.write_text(text), re.escape(path.name) if shared else "")
