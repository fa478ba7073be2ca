"""The data sets: six real ones, one drawn on the spot, any folder of images; batches; pictures.

    glyphs         ten digits drawn with Pillow's own font: needs no file
    mnist          {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]                     downloaded
    cifar10        cifar-10-binary.tar.gz, or its folder cifar-10-batches-bin            downloaded
    cifar100       cifar-100-binary.tar.gz, or its folder cifar-100-binary               downloaded
    tiny-imagenet  tiny-imagenet-200.zip, or its folder tiny-imagenet-200                downloaded
    bccd           .../images/{TRAIN,TEST}/CLASS/_K_NNNN.jpeg (K: the source picture), else
                   .../JPEGImages/BloodImage_NNNNN.jpg with labels.csv, split 80/20      by hand
    oct2017        OCT2017/{train,test}/CLASS/CLASS-patient-n.jpeg                       by hand
    path/to/folder train/CLASS/* and test/CLASS/* (or val, valid); or CLASS/*, split 80/20; or
                   images without classes: all of them train, and the same fifth is test

A set lies in data/NAME/, as folders or as one .zip, .tar or .tar.gz, which is read in place. Every
way to fail raises DataError with one line to print. A split becomes one uint8 array (N, C, S, S).
Shapes: N images, B batch, C channels, H W pixels, S = H = W.
"""

import csv
import gzip
import hashlib
import http.client
import io
import math
import os
import queue
import re
import shutil
import sys
import tarfile
import threading
import time
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MAX_BYTES = 256 * 2**20  # of one file in an archive: the largest real one, cifar100's, has 154 MB
MAX_MEMBERS = 1_000_000  # files in an archive: the largest real one, tiny-imagenet, has 120,000
CACHE_FILES, CACHE_BYTES = 2_000, 256 * 2**20  # more takes long, or much memory: decoded only once
TIMEOUT, TRIES = 8.0, 3  # seconds a server may be silent; 3 x (connect + read) stays below a minute
BROKEN = (OSError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile)
BROKEN += (tarfile.TarError, http.client.HTTPException)  # what readers of damaged input raise
BCCD_CLASSES = ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")  # Sec. 5.1; not BASOPHIL
BY_HAND = {
    "bccd": "dataset2-master from https://www.kaggle.com/datasets/paultimothymooney/blood-cells",
    "oct2017": "OCT2017 from https://data.mendeley.com/datasets/rscbjbr9sj/2",
}
DOWNLOADS = {  # set -> (mirrors in the order to try, {file: md5})
    "mnist": (
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
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


class DataError(Exception):
    """One line for the user: what happened, the offending value, the way out."""


@dataclass(frozen=True)
class Info:
    """What is known about a set without reading it."""

    name: str
    channels: int  # 1 or 3
    classes: int | None  # None: unlabelled
    side: int  # its row of Table 4: 32, 64 or 256
    flip: bool  # is a mirrored image still one of its kind? Not for digits


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
    """The training or the test images of a set."""

    images: np.ndarray  # uint8 (N, C, S, S), maybe a read-only np.memmap
    labels: np.ndarray | None  # int64 (N,); None: unlabelled
    groups: np.ndarray | None  # int64 (N,), equal for images of one source picture or patient
    class_names: list[str]


def damaged(where: object, reason: object) -> DataError:
    return DataError(f"{where} is damaged ({reason}): delete it, then run or get it again")


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed out of several numbers; their order and their count matter."""
    digest = hashlib.sha256(",".join(str(int(n)) for n in numbers).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` only if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:  # Ctrl-C comes here too
        temporary.unlink(missing_ok=True)


def progress(items: Iterable, what: str, total: float, unit: str, weigh: Callable) -> Iterator:
    """Pass items on; from the third second a line on stderr: count, rate, time left."""
    start, shown, done = time.monotonic(), 0.0, 0.0
    for item in items:
        yield item
        done, now = done + weigh(item), time.monotonic()
        if now - start > 2 and now - shown > 0.5:
            rate, shown = done / (now - start), now
            line = f"{what}: {done:,.0f} of {total:,.0f} {unit}, {rate:,.1f} {unit}/s, "
            line += f"{max(total - done, 0) / rate:,.0f} s left"
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)


def connect(url: str) -> http.client.HTTPResponse:
    """urlopen in TIMEOUT seconds in all: its own timeout is for each address of each host, and
    does not cover a name server that is silent."""
    box: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put(urllib.request.urlopen(url, timeout=TIMEOUT))
        except Exception as error:
            box.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = box.get(timeout=TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"no answer in {TIMEOUT:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def download(name: str, files: list[str], folder: Path) -> None:
    """Fetch files of a set into folder, each in at most TRIES tries over its mirrors.

    A file gets its name only when it is whole and its md5 is right. Raises DataError at the first
    file that fails for good.
    """
    mirrors, md5s = DOWNLOADS[name]
    for file in files:
        for attempt in range(TRIES):
            url = mirrors[attempt % len(mirrors)] + file
            try:
                with written_whole(folder / file) as temporary, connect(url) as answer:
                    digest, done = hashlib.md5(), 0
                    total = int(answer.headers.get("Content-Length", 0))
                    chunks = iter(lambda: answer.read(2**16), b"")
                    with temporary.open("wb") as out:
                        for chunk in progress(
                            chunks, file, total / 1e6, "MB", lambda c: len(c) / 1e6
                        ):
                            done += len(chunk)
                            digest.update(chunk)
                            out.write(chunk)
                    if done < total:
                        raise OSError(f"broke off after {done:,} of {total:,} bytes")
                    if digest.hexdigest() != md5s[file]:
                        raise OSError(f"its md5 is {digest.hexdigest()}, not {md5s[file]}")
                break
            except BROKEN as error:
                reason = f"{url}: {error}"
                time.sleep(attempt)  # a short pause: 0, 1, 2 seconds
        else:
            raise DataError(
                f"{name} is not in {folder} and could not be downloaded ({reason}): put "
                f"{', '.join(files)} from {mirrors[0]} there; or `python train.py` needs no data"
            )


class Member(NamedTuple):
    """One file in an archive."""

    handle: Any  # what the archive opens it by
    size: int  # bytes
    stamp: int  # changes with its content
    place: int  # archives are read in this order, since a .tar.gz cannot go back cheaply


class Archive:
    """A folder, a .zip or a .tar(.gz): `members` by name, and `read`, which gives the bytes.

    Nothing is ever unpacked, so no name in an archive becomes a path to write to. Hidden files are
    left out. Raises DataError where the archive is damaged or exceeds the limits above.
    """

    def __init__(self, path: Path):
        self.path, self._open = path, partial(open, mode="rb")

    def _list(self) -> Iterator[tuple[str, Member]]:
        if self.path.is_dir():
            for folder, _, files in os.walk(self.path, followlinks=True):
                for path in (os.path.join(folder, file) for file in files):
                    if os.path.isfile(path):
                        status, name = os.stat(path), os.path.relpath(path, self.path)
                        yield (
                            Path(name).as_posix(),
                            Member(path, status.st_size, status.st_mtime_ns, 0),
                        )
        elif self.path.suffix.lower() == ".zip":
            archive = zipfile.ZipFile(self.path)
            self._open = archive.open
            for m in archive.infolist():
                if not m.is_dir():
                    yield m.filename, Member(m, m.file_size, m.CRC, m.header_offset)
        elif self.path.exists():
            archive = tarfile.open(self.path)  # noqa: SIM115, stays open for `read`
            self._open = archive.extractfile
            for m in archive:
                if m.isfile():
                    yield m.name.removeprefix("./"), Member(m, m.size, int(m.mtime), m.offset)
            if archive.fileobj.tell() < archive.offset + tarfile.BLOCKSIZE:
                raise EOFError("it ends too early")  # tarfile takes a cut header for the end

    @cached_property
    def members(self) -> dict[str, Member]:
        """Every file by its path with slashes, sorted."""
        found: dict[str, Member] = {}
        try:
            for name, member in self._list():
                if member.size > MAX_BYTES and self.path.is_file():
                    raise damaged(self.path, f"{name} has {member.size:,} bytes")
                if len(found) == MAX_MEMBERS:
                    raise damaged(self.path, f"it holds more than {MAX_MEMBERS:,} files")
                found[name] = member
        except BROKEN as error:
            raise damaged(self.path, error) from None
        return {n: found[n] for n in sorted(found) if not re.search(r"(^|/)(\.|__MACOSX/)", n)}

    def where(self, name: str) -> str:
        """How to call a member in a message."""
        return f"{self.path / name}" if self.path.is_dir() else f"{self.path} (its {name})"

    def read(self, name: str) -> bytes:
        """The bytes of one member, those of a .gz decompressed."""
        member = self.members[name]
        try:
            with self._open(member.handle) as file:
                file = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
                data = file.read(MAX_BYTES + 1)
        except BROKEN as error:
            raise damaged(self.where(name), error) from None
        if len(data) > MAX_BYTES:
            raise damaged(self.where(name), f"more than {MAX_BYTES:,} bytes")
        return data


@dataclass
class Source:
    """One split before its images are decoded."""

    items: np.ndarray | list[str]  # uint8 pixels (N, C, h, w), or names of image files in `archive`
    labels: np.ndarray | None  # (N,)
    class_names: list[str]
    groups: np.ndarray | None = None  # (N,)
    archive: Archive | None = None


def draw_glyphs(split: str) -> Source:
    """10,000 train or 2,000 test digits in Pillow's font, uint8 (N, 1, 28, 28), white on black.

    Each is scaled, rotated, sheared, shifted, drawn thin or bold, dimmed and covered with noise, so
    that pixels alone do not tell them apart. The recipe was fixed by raw pixels alone.
    """
    n, side, big = {"train": 10_000, "test": 2_000}[split], 28, 28 * 3  # drawn at 3 x, averaged
    rng = np.random.default_rng([0, split == "train"])
    stamps, font = {}, ImageFont.load_default(size=22 * 3)
    for digit, stroke in np.ndindex(10, 4):
        stamps[digit, stroke] = stamp = Image.new("L", (big, big))
        where = {"xy": (big / 2, big / 2), "anchor": "mm"}
        ImageDraw.Draw(stamp).text(
            **where, text=f"{digit}", fill=255, font=font, stroke_width=stroke
        )
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
    return Source(out, labels, [str(digit) for digit in range(10)])


def find(archives: list[Archive], *names: str) -> tuple[str, bytes] | None:
    """(how to call it, bytes) of the first file with one of these names, in any folder."""
    for archive in archives:
        for member in archive.members:
            if member.rsplit("/", 1)[-1] in names:
                return archive.where(member), archive.read(member)
    return None


def read_mnist(archives: list[Archive], split: str) -> Source | None:
    """Two idx files: 0, 0, 8, d, then d big-endian sizes of 4 bytes, then the bytes."""
    prefix, arrays = "train" if split == "train" else "t10k", []
    for file, d in ((f"{prefix}-images-idx3-ubyte", 3), (f"{prefix}-labels-idx1-ubyte", 1)):
        found = find(archives, file, f"{file}.gz")
        if found is None:
            return None
        where, raw = found
        head = 4 + 4 * d
        shape = [int.from_bytes(raw[k : k + 4], "big") for k in range(4, head, 4)]
        if raw[:4] != bytes([0, 0, 8, d]):
            raise damaged(where, f"it starts with {raw[:4].hex()}, not with 000008{d:02d}")
        if len(raw) != head + math.prod(shape) or 0 in shape:
            raise damaged(where, f"{len(raw):,} bytes for the dimensions {shape}")
        arrays.append(np.frombuffer(raw, np.uint8, offset=head).reshape(shape))
    images, labels = arrays
    if len(images) != len(labels) or labels.max() > 9:
        raise damaged(where, f"{len(labels):,} labels to {labels.max()} for {len(images):,} digits")
    return Source(images[:, None], labels, [str(digit) for digit in range(10)])


def read_cifar(name: str, archives: list[Archive], split: str) -> Source | None:
    """Records of one label byte (cifar100: coarse, then fine; the fine one is used) and 3072 bytes,
    the R, G and B planes, row-major."""
    files, head, meta = [f"{split}.bin"], 2, "fine_label_names.txt"
    if name == "cifar10":
        files, head, meta = [f"data_batch_{k}.bin" for k in range(1, 6)], 1, "batches.meta.txt"
        files = files if split == "train" else ["test_batch.bin"]
    records, classes = [], INFOS[name].classes
    for file in files:
        found = find(archives, file)
        if found is None:
            pickles = [a.path for a in archives if "python" in a.path.name]
            pickles += [
                a.path / m for a in archives for m in a.members if re.search("-py(thon)?/", m)
            ]
            if pickles:
                raise DataError(
                    f"{pickles[0]} is the pickle version of {name}, which is never loaded: put "
                    f"{next(iter(DOWNLOADS[name][1]))} from {DOWNLOADS[name][0][0]} beside it"
                )
            return None
        where, raw = found
        if not raw or len(raw) % (head + 3072):
            raise damaged(where, f"{len(raw):,} bytes are not whole records of {head + 3072}")
        records.append(np.frombuffer(raw, np.uint8).reshape(-1, head + 3072))
        if records[-1][:, head - 1].max() >= classes:
            raise damaged(where, f"label {records[-1][:, head - 1].max()} of {classes} classes")
    data, names = np.concatenate(records), find(archives, meta)
    names = names[1].decode().split() if names else [str(k) for k in range(classes)]
    return Source(data[:, head:].reshape(-1, 3, 32, 32), data[:, head - 1], names)


@dataclass
class Row:
    """One image file of a set."""

    file: str
    root: str | None = None  # the folders above the set
    split: str | None = None  # train, test; None: to be split 80/20
    label: str | None = None
    group: str | None = None  # source picture or patient; None: on its own


IMAGE = r"[^/]+\.(?:png|jpe?g|bmp|gif|webp|tiff?)"


def match(archive: Archive, pattern: str) -> list[Row]:
    """The files whose whole path matches, with its named groups, by class and name."""
    found = [re.fullmatch(pattern, file, re.IGNORECASE) for file in archive.members]
    rows = [Row(m.string, **m.groupdict()) for m in found if m]
    root = min((r.root or "" for r in rows), key=len, default="")
    rows = [r for r in rows if (r.root or "") == root]  # Kaggle's archives hold some sets twice
    for row in rows:
        row.split = row.split and ("train" if row.split.lower() == "train" else "test")
    return sorted(rows, key=lambda r: (r.label or "", r.file))


def split_80_20(rows: list[Row]) -> list[Row]:
    """Within each class the fifth whose hashed names come first is for testing: the same on every
    machine and for every seed. Without classes nothing is probed, so all of them also train."""
    by_class: dict[str | None, list[Row]] = {}
    for row in sorted(rows, key=lambda r: hashlib.sha256(r.file.split("/")[-1].encode()).digest()):
        by_class.setdefault(row.label, []).append(row)
    for label, members in by_class.items():
        cut = max(len(members) // 5, len(members) > 1)
        yes, no = members[:cut], members if label is None else members[cut:]
        by_class[label] = [replace(r, split="test") for r in yes]
        by_class[label] += [replace(r, split="train") for r in no]
    rows = [row for members in by_class.values() for row in members]
    return sorted(rows, key=lambda r: (r.label or "", r.file))


def list_tiny_imagenet(archive: Archive) -> list[Row]:
    """val is the test split, its classes in val_annotations.txt; class order by wnids.txt."""
    root, images = r"(?P<root>.*/)?", f"images/{IMAGE}"
    rows = match(archive, rf"{root}(?P<split>train|val)/(?:(?P<label>n\d+)/)?{images}")
    if not rows:
        return []
    texts = [f"{rows[0].root or ''}{n}" for n in ("wnids.txt", "val/val_annotations.txt")]
    wnids, notes = (archive.read(t).decode() if t in archive.members else "" for t in texts)
    labels = dict(line.split("\t")[:2] for line in notes.splitlines() if "\t" in line)
    for row in rows:
        row.label = row.label or labels.get(row.file.split("/")[-1])
    known = {r.label for r in rows if r.split == "train"}
    order = {wnid: k for k, wnid in enumerate(wnids.split())}
    rows = [r for r in rows if r.label in known]
    return sorted(rows, key=lambda r: (order.get(r.label, 0), r.label, r.file))


def list_bccd(archive: Archive) -> list[Row]:
    """The augmented pictures, copies of one source picture grouped; else the originals, of which
    the rows of labels.csv with a picture and exactly one of the four classes count."""
    group = r"(?P<group>(?P<split>TRAIN|TEST)/(?P<label>[A-Z]+)/_\d+)_\d+\.jpe?g"
    rows = match(archive, rf"(?P<root>.*/)?images/{group}")
    if rows:
        return rows
    rows = match(archive, r"(?P<root>.*/)?JPEGImages/BloodImage_(?P<group>\d+)\.jpg")
    table = f"{rows[0].root or ''}labels.csv" if rows else ""
    if table not in archive.members:
        return []
    try:
        lines = csv.DictReader(io.StringIO(archive.read(table).decode(), newline=""))
        labels = {int(n["Image"]): n["Category"].strip() for n in lines if n["Category"]}
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(archive.where(table), f"Image, Category expected: {error}") from None
    rows = [Row(r.file, r.root, None, labels.get(int(r.group))) for r in rows]
    return split_80_20([r for r in rows if r.label in BCCD_CLASSES])


def list_oct2017(archive: Archive) -> list[Row]:
    """The patient is in the name, and may have images of several classes."""
    root = r"(?P<root>(?:.*/)?(?:OCT2017 ?|OCT)/)?"  # with the blank: Kaggle; OCT: ZhangLabData
    file = r"(?P<split>train|test)/(?P<label>[A-Z]+)/[A-Z]+-(?P<group>\d+)-\d+\.jpe?g"
    return match(archive, root + file)


def list_folder(archive: Archive) -> list[Row]:
    """A folder of images, with classes or without."""
    label = rf"(?:(?P<label>[^/]+)/)?{IMAGE}"
    for held in ("test", "val", "valid"):
        rows = match(archive, rf"(?P<split>train|{held})/{label}")
        if {r.split for r in rows} == {"train", "test"}:
            break
    else:
        train = match(archive, rf"train/{label}")
        rows = split_80_20(train if any(r.label for r in train) else match(archive, label))
    if any(r.label for r in rows):
        rows = [r for r in rows if r.label]
    return rows


LISTS = {"tiny-imagenet": list_tiny_imagenet, "bccd": list_bccd, "oct2017": list_oct2017}


def read_images(name: str, archives: list[Archive], split: str) -> Source | None:
    """The image files of the first archive that holds the set."""
    listed = ((archive, LISTS.get(name, list_folder)(archive)) for archive in archives)
    archive, rows = next(((a, rows) for a, rows in listed if rows), (None, []))
    names = list(dict.fromkeys(r.label for r in rows if r.label))
    pictures = np.unique([r.group or "" for r in rows], return_inverse=True)[1]
    mine = [k for k, row in enumerate(rows) if row.split == split]
    if rows and not mine:
        raise DataError(f"{archive.path} has no {split} images of {name}: see the top of data.py")
    if not rows:
        return None
    return Source(
        [rows[k].file for k in mine],
        np.array([names.index(rows[k].label) for k in mine]) if names else None,
        names,
        pictures[mine] if rows[0].group else None,
        archive,
    )


def open_set(name: str, split: str, data_dir: Path) -> Source:
    """The split of any set, downloaded if it has to be. Raises DataError where it is not found."""
    if name == "glyphs":
        return draw_glyphs(split)
    folders = [data_dir / name] if name in INFOS else [Path(name)]
    folders += [data_dir / "MNIST"] if name == "mnist" else []  # where torchvision puts it
    for attempt in range(2):
        files = [f for folder in folders if folder.is_dir() for f in sorted(folder.iterdir())]
        files = [f for f in files if re.search(r"^[^.].*\.(zip|tar|tar\.gz|tgz)$", f.name.lower())]
        archives = [Archive(path) for path in folders + files * (name in INFOS)]
        if name == "mnist":
            source = read_mnist(archives, split)
        elif name in ("cifar10", "cifar100"):
            source = read_cifar(name, archives, split)
        else:
            source = read_images(name, archives, split)
        if source:
            return source
        if name in DOWNLOADS and not attempt:
            have = {
                m.rsplit("/", 1)[-1]
                for archive in archives[: len(folders)]
                for m in archive.members
            }
            wanted = [f for f in DOWNLOADS[name][1] if not {f, f.removesuffix(".gz")} & have]
            download(name, wanted, folders[0])
    if name not in INFOS:
        raise DataError(f"no images in {name}: the layouts are at the top of data.py")
    what = BY_HAND.get(name) or f"{', '.join(DOWNLOADS[name][1])} from {DOWNLOADS[name][0][0]}"
    raise DataError(
        f"{name} is not in {folders[0]}: put {what} there; or `python train.py` needs no data"
    )


def describe(name: str) -> Info:
    """What is known before reading. A known name touches no disk; else it is a folder of images,
    whose file headers are read. Raises DataError where it is neither."""
    if name in INFOS:
        return INFOS[name]
    path = Path(name)
    if not path.is_dir():
        raise DataError(f"{name!r} is no folder of images and none of {', '.join(INFOS)}")
    rows, sides, modes = list_folder(Archive(path)), [], set()
    for file in {row.file for row in rows}:
        try:
            with Image.open(path / file) as image:  # reads no more than the header
                sides.append(min(image.size))
                modes.add(image.mode)
        except Exception as error:
            raise damaged(path / file, error) from None
    if not rows:
        raise DataError(f"no images in {name}: the layouts are at the top of data.py")
    grey = modes <= {"1", "L", "LA", "I", "I;16", "I;16B", "F"}
    side = next((s for s in (32, 64) if np.median(sides) <= s), 256)
    classes = len({row.label for row in rows} - {None}) or None
    return Info(path.resolve().name, 1 if grey else 3, classes, side, True)


def sample(labels: np.ndarray | None, n: int, limit: int, seed: int) -> np.ndarray:
    """Sorted indices of a seeded sample of n images, as equal over the classes as they allow."""
    order = np.random.default_rng(mix_seed(seed)).permutation(n)
    if limit and labels is not None:  # first one image of each class, then a second of each, ...
        turn = np.empty(n, np.int64)
        for label in np.unique(labels):
            turn[labels[order] == label] = np.arange((labels == label).sum())
        order = order[np.argsort(turn, kind="stable")]
    return np.sort(order[: limit or n])


def fit(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Any image -> uint8 (C, S, S), aspect not kept. Pillow's bilinear filter averages over all
    pixels when it shrinks, so nothing aliases, and unlike bicubic it cannot overshoot."""
    if image.mode.startswith("I"):  # 16 bits: convert would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    image = image.convert("RGBA") if image.mode == "P" else image
    image = image.convert("L" if channels == 1 else "RGB")
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def decode(source: Source, chosen: np.ndarray, channels: int, out: np.ndarray) -> None:
    """The chosen images -> out, uint8 (N, C, S, S). Raises DataError with the damaged file."""
    size, items, archive = out.shape[-1], source.items, source.archive

    def one(pair: tuple[int, Any]) -> None:
        k, item = pair
        try:
            if archive:
                image = Image.open(io.BytesIO(item))
            else:
                image = Image.fromarray(item[0] if channels == 1 else item.transpose(1, 2, 0))
            out[k] = fit(image, size, channels)
        except Exception as error:  # Pillow's decoders raise nearly anything
            raise damaged(archive.where(items[chosen[k]]), error) from None

    order = range(len(chosen))
    if archive:
        order = sorted(order, key=lambda k: archive.members[items[chosen[k]]].place)
    blocks = [order[k : k + 64] for k in range(0, len(order), 64)]  # bounds the memory
    with ThreadPoolExecutor() as pool:
        for block in progress(blocks, "decoding", len(order), "images", len):
            raw = [archive.read(items[chosen[k]]) if archive else items[chosen[k]] for k in block]
            any((pool.map if archive else map)(one, zip(block, raw)))


def decode_once(source: Source, chosen: np.ndarray, size: int, channels: int, cache: Path):
    """`decode`, for a large set into a memory-mapped file that is found again as long as the files
    are the same: its name holds a fingerprint of their names, sizes and times."""
    shape = (len(chosen), channels, size, size)
    if math.prod(shape) <= CACHE_BYTES and (not source.archive or len(chosen) <= CACHE_FILES):
        decode(source, chosen, channels, out := np.empty(shape, np.uint8))
        return out
    key = hashlib.sha256(repr((shape, source.archive and str(source.archive.path))).encode())
    key.update(chosen.tobytes() if source.archive is None else b"")
    for k in chosen if source.archive else ():
        member = source.archive.members[source.items[k]]
        key.update(repr((source.items[k], member.size, member.stamp)).encode())
    key.update(b"" if source.archive else source.items)
    path = cache.with_name(f"{cache.name}-{size}-{key.hexdigest()[:16]}.npy")
    try:
        kept = np.load(path, mmap_mode="r")
        if kept.shape == shape and kept.dtype == np.uint8:
            return kept
    except BROKEN:
        pass  # not there, or cut short: decode
    try:
        with written_whole(path) as temporary:
            if shutil.disk_usage(path.parent).free < math.prod(shape):
                raise OSError(f"{math.prod(shape) / 1e6:,.0f} MB are not free there")
            decode(
                source,
                chosen,
                channels,
                np.lib.format.open_memmap(temporary, "w+", np.uint8, shape),
            )
        return np.load(path, mmap_mode="r")
    except OSError as error:
        print(f"no cache in {path.parent} ({error}): decoding into memory", file=sys.stderr)
    decode(source, chosen, channels, out := np.empty(shape, np.uint8))
    return out


def load(
    name: str,
    split: str,
    size: int,
    data_dir: Path = Path("data"),
    limit: int = 0,
    seed: int = 0,
) -> Split:
    """The "train" or "test" images of a set, resized to size x size.

    limit > 0 takes a seeded sample, as equal over the classes as can be. What is missing in
    data_dir is downloaded if it may be. Raises DataError.
    """
    if split not in ("train", "test"):
        raise DataError(f"there is no split {split!r}: take train or test")
    info = describe(name)
    source = open_set(name, split, Path(data_dir))
    chosen = sample(source.labels, len(source.items), limit, seed)
    cache = Path(data_dir) / "cache" / f"{info.name}-{split}"
    images = decode_once(source, chosen, size, info.channels, cache)
    labels, groups = (
        None if x is None else x[chosen].astype(np.int64) for x in (source.labels, source.groups)
    )
    return Split(images, labels, groups, source.class_names)


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Float (B, C, H, W), clipped to [-1, 1] -> uint8, rounded: the inverse of `to_float`."""
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


@lru_cache(maxsize=2)  # every step of an epoch asks for the same one
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix_seed(seed, epoch)))


def permutation_stream(n: int, start: int, count: int, seed: int) -> Tensor:
    """Entries start .. start + count - 1 of one endless stream of permutations of range(n), int64
    (count,). A pure function: a resumed run has nothing to restore. n may be below count."""
    first, last = start // n, (start + count) // n
    stream = torch.cat([permutation(n, seed, epoch) for epoch in range(first, last + 1)])
    return stream[start - first * n :][:count]


class Batches:
    """Batches of uint8 images (N, C, S, S) as float32 in [-1, 1] on a device.

    The images move there once if they fit (into half of a GPU's free memory), still as uint8:
    then a step copies nothing from the host. Otherwise each batch is copied.
    """

    def __init__(
        self, images: np.ndarray, batch_size: int, seed: int, device: torch.device, flip: bool
    ):
        self.batch_size, self.seed, self.device, self.flip = batch_size, seed, device, flip
        with warnings.catch_warnings():  # torch warns of read-only arrays; these are never written
            warnings.simplefilter("ignore", UserWarning)
            self.images = torch.from_numpy(images)
        if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2:
            self.images = self.images.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, step: int, flips: Tensor | None = None, part: slice = slice(None)) -> Tensor:
        """`part` of batch number `step` -> float32 (b, C, S, S), mirrored left-right where flips,
        bool (B,) on the device, says so (and the set allows it)."""
        index = permutation_stream(len(self), step * self.batch_size, self.batch_size, self.seed)
        x = self.images[index[part].to(self.images.device)].to(self.device)
        x = to_float(x)
        if self.flip and flips is not None:
            x = torch.where(flips[part, None, None, None], x.flip(-1), x)
        return x


def save_grid(rows: Tensor, path: Path, columns: int, scale: int = 1) -> None:
    """Images (N, C, H, W), uint8 or float in [-1, 1], as one PNG: `columns` a row, 2 white pixels
    between them, each pixel drawn scale x scale."""
    images = rows if rows.dtype == torch.uint8 else to_uint8(rows)
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, _, h, w = images.shape
    lines = math.ceil(n / columns)
    page = np.full((lines * (h + 2) - 2, columns * (w + 2) - 2, 3), 255, np.uint8)
    for k, image in enumerate(images.expand(n, 3, h, w).permute(0, 2, 3, 1).numpy()):
        y, x = k // columns * (h + 2), k % columns * (w + 2)
        page[y : y + h, x : x + w] = image
    with written_whole(Path(path)) as temporary:
        Image.fromarray(page).save(temporary, format="PNG")
