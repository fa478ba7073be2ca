"""The data sets, parsed by hand: six real ones, one drawn on the spot, any folder of images.

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

A set lies in data/NAME/, as folders or as one .zip, .tar or .tar.gz, which is read in place.
`open_set` finds it, downloads what may be downloaded, and gives a Source: what there is, undecoded.
"""

import csv
import hashlib
import io
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from files import Archive, DataError, damaged, download

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
        raise DataError(f"{archive.path} has no {split} images of {name}: see the top of sets.py")
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
            download(name, wanted, *DOWNLOADS[name], folders[0])
    if name not in INFOS:
        raise DataError(f"no images in {name}: the layouts are at the top of sets.py")
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
        raise DataError(f"no images in {name}: the layouts are at the top of sets.py")
    grey = modes <= {"1", "L", "LA", "I", "I;16", "I;16B", "F"}
    side = next((s for s in (32, 64) if np.median(sides) <= s), 256)
    classes = len({row.label for row in rows} - {None}) or None
    return Info(path.resolve().name, 1 if grey else 3, classes, side, True)
