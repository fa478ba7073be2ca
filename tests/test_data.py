"""data.py: every set in good and damaged form, on small files drawn here; no network."""

import errno
import gzip
import hashlib
import io
import itertools
import os
import platform
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, full_disk, write_folder
from PIL import Image

import data

RNG = np.random.default_rng(0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test starts in an empty current directory."""
    monkeypatch.chdir(tmp_path)


def write(folder, files):
    """{path: bytes, text, image, or the grey value of 8 x 8 pixels} below a folder."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            content = Image.new("L", (8, 8), content)
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def tree(text):
    """ "a/1 b.txt": a/1.png, whose grey value is its number, and an empty b.txt."""
    words = text.split()
    return {w if "." in w else f"{w}.png": "" if "." in w else int(Path(w).name) for w in words}


def pack(path, files):
    """An archive with these files, of the kind that its name says."""
    kind = {".zip": "zip", ".tar": "tar", ".gz": "gztar"}[Path(path).suffix]
    with tempfile.TemporaryDirectory() as folder:
        write(folder, files)
        made = shutil.make_archive(f"{folder}-made", kind, folder)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made, path)


def put(name, files, archive=None):
    """Lay a set out in its folder, or as an archive there."""
    if archive:
        pack(f"data/{name}/{archive}", files)
    else:
        write(f"data/{name}", files)


def load(name, size=8, channels=3, limit=0, seed=0):
    return data.load(name, size, channels, Path("data"), limit, seed)


def values(split):
    """The first pixel of each image."""
    return split.images[:, 0, 0, 0].tolist()


def entries(folder="data"):
    return sorted(path.name for path in Path(folder).iterdir())


# ---------------------------------------------------------------------------- mnist, cifar, glyphs


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def mnist_files(zipped=True, n=20):
    """{file: bytes}, the pixels of both splits, the labels of both splits."""
    pixels, labels = RNG.integers(0, 256, (2, n, 28, 28), np.uint8), RNG.integers(0, 10, (2, n))
    files = {}
    for k, prefix in enumerate(("train", "t10k")):
        files[f"{prefix}-images-idx3-ubyte"] = idx(pixels[k])
        files[f"{prefix}-labels-idx1-ubyte"] = idx(labels[k])
    if zipped:
        files = {
            f"{name}.gz": gzip.compress(raw[:99]) + gzip.compress(raw[99:])
            for name, raw in files.items()
        }
    return files, pixels, labels


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("folder", ["mnist", "mnist/MNIST/raw", "MNIST/raw"])
def test_mnist_is_exact_in_every_layout(folder, zipped):
    files, pixels, labels = mnist_files(zipped)
    write(f"data/{folder}", files)
    for k, split in enumerate(load("mnist", 28, 1)):
        assert np.array_equal(split.images[:, 0], pixels[k]) and split.images.dtype == np.uint8
        assert np.array_equal(split.labels, labels[k]) and split.labels.dtype == np.int64
        assert split.groups is None and split.class_names == list("0123456789")
    assert load("mnist", 32, 3)[0].images.shape == (20, 3, 32, 32)


def cifar_files(name, n=3):
    """{file: bytes}, the pixels of each; labels 0, 1, 2, ... (cifar100: coarse 9, then fine)."""
    folder, meta, names = "cifar-100-binary", "fine_label_names.txt", ["train.bin", "test.bin"]
    head = np.arange(n, dtype=np.uint8)[:, None]
    if name == "cifar10":
        folder, meta = "cifar-10-batches-bin", "batches.meta.txt"
        names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
    else:
        head = np.hstack([np.full_like(head, 9), head])
    pixels = RNG.integers(0, 256, (len(names), n, 3, 32, 32), np.uint8)
    files = {f"{folder}/{meta}": "".join(f"class{k}\n" for k in range(int(name[5:]))) + "\n"}
    for file, images in zip(names, pixels):
        files[f"{folder}/{file}"] = np.hstack([head, images.reshape(n, -1)]).tobytes()
    return files, pixels


@pytest.mark.parametrize("archive", ["any name.tar.gz", None])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_exact_as_archive_and_folder(name, archive):
    files, pixels = cifar_files(name)
    put(name, files, archive)
    if not archive:  # as many names as classes, else numbers in their place
        next(Path("data").rglob("*.txt")).write_text("a\nb\n")
    train, test = load(name, 32)
    assert np.array_equal(train.images, pixels[:-1].reshape(-1, 3, 32, 32))
    assert np.array_equal(test.images, pixels[-1]) and test.labels.tolist() == [0, 1, 2]
    assert train.class_names[:2] == (["class0", "class1"] if archive else ["0", "1"])
    raw, head = [*files.values()][-1], len([*files.values()][-1]) // 3 - 3072
    assert test.images[0, 1, 5, 7] == raw[head + 1024 + 32 * 5 + 7]  # planes, rows of 32


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
BATCH = "cifar-10-batches-bin/data_batch_4.bin"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            IMAGES,
            gzip.compress(idx(np.zeros((20, 28, 28))))[:-12],
            "ended before the end-of-stream",
        ),
        (IMAGES, b"not a gzip file", "Not a gzipped file"),
        (IMAGES, gzip.compress(b"\0\0\7\3" + bytes(12)), "00000703"),
        (IMAGES, gzip.compress(idx(np.arange(20))), "00000801"),
        (IMAGES, gzip.compress(idx(np.zeros((20, 28, 28)))[:-1]), "dimensions"),
        (IMAGES, gzip.compress(b"\0\0\x08\3\0\0"), "dimensions"),
        (LABELS, gzip.compress(idx(np.zeros(19))), "19 labels"),
        (LABELS, gzip.compress(idx(np.full(20, 10))), "labels to 10"),
        (BATCH, bytes(3073 * 2 - 1), "6,145 bytes are not whole records of 3073"),
        (BATCH, b"", "0 bytes are not whole"),
        (BATCH, b"\x0a" * 3073, "label 10 of 10"),
    ],
)
def test_a_damaged_array_file_is_named(capsys, file, content, message):
    name = "cifar10" if file == BATCH else "mnist"
    files, *_ = cifar_files(name) if file == BATCH else mnist_files()
    write(f"data/{name}", files | {file: content})
    error = fails(capsys, load, name)
    assert f"data/{name}/{file} is damaged (" in error and message in error, error
    assert "delete it" in error


def test_glyphs_are_deterministic_balanced_and_show_their_label():
    test, again, train = (data.draw_glyphs(split) for split in ("test", "test", "train"))
    assert test.images.shape == (2000, 1, 28, 28) and train.images.shape == (10_000, 1, 28, 28)
    assert np.array_equal(test.images, again.images) and np.array_equal(test.labels, again.labels)
    assert np.bincount(test.labels).tolist() == [200] * 10
    assert np.bincount(train.labels).tolist() == [1000] * 10
    seen = {image.tobytes() for image in train.images}
    assert len(seen) == 10_000 and not seen & {image.tobytes() for image in test.images}
    assert test.images.mean() < 60 and test.images.max() > 200  # light on dark
    mean = [test.images[test.labels == k][:, 0, 12:16, 12:16].mean() for k in range(10)]
    assert mean[0] < mean[8] - 20  # a nought is empty where an eight crosses
    ink = np.maximum(train.images[:, 0].astype(float) - 100, 0)
    for axis in (1, 2):  # where its ink lies: around the middle, shifted by up to 3 pixels
        centre = (ink.sum(axis) * np.arange(28)).sum(1) / ink.sum((1, 2))
        assert abs(centre.mean() - 13.5) < 0.7 and 1.5 < centre.std() < 2.2, (centre.mean(), axis)


# ---------------------------------------------------------------------------- named sets of images


@pytest.mark.parametrize("layout", ["folder", "zip", "val in class folders"])
def test_tiny_imagenet_takes_the_order_of_wnids_and_the_annotations(capsys, layout):
    files = {"wnids.txt": "n9\nn2\nn1\n", "words.txt": "n1\tfish\n", "test/images/test_0.JPEG": 0}
    files |= {f"train/n{k // 10}/images/n_{k}.JPEG": k for k in (10, 11, 20, 21)}
    if layout == "val in class folders":
        files |= {"val/n1/val_0.JPEG": 40, "val/n2/images/val_1.JPEG": 50, "val/n7/val_2.JPEG": 60}
    else:
        files |= {f"val/images/val_{k}.JPEG": 40 + 10 * k for k in range(3)}
        files["val/val_annotations.txt"] = "val_0.JPEG\tn1\t0\nval_1.JPEG\tn2\t0\nval_2.JPEG\tn7\t0"
    files = {f"tiny-imagenet-200/{name}": content for name, content in files.items()}
    put("tiny-imagenet", files, "tiny-imagenet-200.zip" if layout == "zip" else None)
    train, test = load("tiny-imagenet")
    assert train.class_names == test.class_names == ["n2", "n1"] and train.groups is None
    assert (values(train), train.labels.tolist()) == ([20, 21, 10, 11], [0, 0, 1, 1])
    assert (values(test), test.labels.tolist()) == ([50, 40], [0, 1])
    out = capsys.readouterr().out
    assert "1 in test, a third split (" in out and "1 not of the set (" in out


CELLS = ["EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL"]


def bccd_files():
    names = ["TRAIN/{}/_0_1", "TRAIN/{}/_0_2", "TRAIN/{}/_12_3", "TEST/{}/_0_9"]
    files = {"dataset2-master/labels.csv": ",Image,Category\r\n,0,NEUTROPHIL\r\n"}
    for k, cell in enumerate(CELLS):
        for name in [*names, "TEST_SIMPLE/{}/_0_5"]:
            files[f"dataset2-master/images/{name.format(cell)}.jpeg"] = 10 * k
    return files


@pytest.mark.parametrize("layout", ["folder", "held twice", "a.zip", "any name.tar", "a.TAR.gz"])
def test_bccd_groups_the_copies_of_one_source_picture(capsys, layout):
    files = bccd_files()
    if layout == "held twice":  # as in Kaggle's archive
        files |= {f"dataset2-master/{name}": content for name, content in files.items()}
    put("bccd", files, layout if "." in layout else None)
    train, test = load("bccd")
    assert len(train.images) == 12 and len(test.images) == 4 and train.class_names == CELLS
    assert values(train) == np.repeat([0, 10, 20, 30], 3).tolist() == (10 * train.labels).tolist()
    a, b, c = train.groups.reshape(4, 3).T  # of each class: _0_1, _0_2, _12_3
    assert np.array_equal(a, b) and len({*a, *c, *test.groups}) == 12  # TEST's _0_ is another
    example = {"folder": "4 not of the set (dataset2-master/images/TEST_SIMPLE"}
    example["held twice"] = "24 not of the set (dataset2-master/dataset2-master/images/TEST/"
    assert example.get(layout, "4 not of the set (") in capsys.readouterr().out


@pytest.mark.parametrize("root", ["OCT2017/", "OCT2017 /", "OCT2017 /OCT2017/", "Data/OCT/", ""])
@pytest.mark.parametrize("archive", ["archive.zip", None])
def test_oct2017_groups_by_patient_in_every_layout(capsys, root, archive):
    names = ["train/CNV/CNV-11-1", "train/CNV/CNV-11-2", "train/DME/DME-11-1", "train/DME/DME-7-1"]
    names += ["test/CNV/CNV-11-3", "test/DME/DME-5-1", "val/CNV/CNV-99-1"]
    files = {f"{root}{name}.jpeg": 10 * k for k, name in enumerate(names)}
    files[f"__MACOSX/{root}train/CNV/CNV-11-1.jpeg"] = files[f"{root}train/CNV/._CNV-1-1.jpeg"] = ""
    files["Data/chest_xray/train/NORMAL/NORMAL-1-1.jpeg"] = 200
    put("oct2017", files, archive)
    train, test = load("oct2017", channels=1)
    assert train.images.shape == (4, 1, 8, 8) and values(train) == [0, 10, 20, 30]
    assert train.class_names == ["CNV", "DME"] and train.labels.tolist() == [0, 0, 1, 1]
    a, b, c, d = train.groups
    assert a == b == c != d and test.groups[0] == a and test.groups[1] not in (a, d)
    out = capsys.readouterr().out
    assert "1 in val, a third split (" in out and "1 not of the set (" in out and "zip" not in out


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("oct2017", {}, "oct2017 is not in data/oct2017: put OCT2017 from https://data.mendel"),
        ("bccd", {"labels.csv": "Image,Category\n"}, "bccd is not in data/bccd: put dataset2-m"),
        ("tiny-imagenet", tree("train/n1/images/1 val/images/2"), "has no test images of tiny-im"),
        ("oct2017", {"train/CNV/CNV-1-1.jpeg": 1, "test/DME/DME-1-1.jpeg": 1}, "lacks: DME"),
        ("oct2017", {f"{split}/{kind}/{kind}-7-{n}.jpeg": n
                     for n, (split, kind) in enumerate(itertools.product(("train", "test"), "AB"))},
         "oct2017: all training images are of one source or patient, and the probe needs two"),
        ("set", tree("a/1 b/2"), "set has no test images of set"),
        ("set", tree("train/Disc/1 train/Box/2 test/disc/3 test/Box/4"),
         "set: test has classes that train (Box, Disc) lacks: disc"),
        ("set", tree("x/y/a/1"), "no images in set; left out: 1 too deep (x/y/a/1.png)"),
        ("set", tree("a.txt"), "no images in set; left out: 1 of an unread suffix (a.txt)"),
        ("", tree("a/1 b/2"), "'' is no folder of images and none of glyphs"),
        ("minst", {}, "'minst' is no folder of images and none of glyphs, mnist, cifar10"),
    ],
)  # fmt: skip
def test_a_set_that_is_not_there_gets_one_line_with_the_way_out(capsys, name, files, message):
    write(f"data/{name}" if name in data.SETS else name, files)
    assert message in fails(capsys, load, name)
    if name not in data.SETS:  # found before anything is built
        assert message in fails(capsys, data.set_facts, name)


# ---------------------------------------------------------------------------- folders of images


@pytest.mark.parametrize(
    ("files", "train", "test", "left_out"),
    [
        ("train/a/1 train/b/2 test/a/3 test/b/4", "1a 2b", "3a 4b", ""),
        ("Train/a/1 Train/b/2 Testing/a/3 Testing/b/4", "1a 2b", "3a 4b", ""),
        ("TRAINING/a/1 TRAINING/b/2 Validation/a/3 Validation/b/4", "1a 2b", "3a 4b", ""),
        ("train/a/1 train/b/2 valid/b/4", "1a 2b", "4b", ""),
        ("train/a/1 train/b/2 train/c/3 val/c/4 val/a/5", "1a 2b 3c", "5a 4c", ""),
        ("train/a/1 train/b/2 test/a/3 val/a/4", "1a 2b", "3a", "1 in val, a third split (val/a/4"),
        ("train/a/1 train/b/2 test/3 val/a/4", "1a 2b", "4a", "1 without a class folder (test/3"),
        ("train/a/1 train/b/2 train/3 val/a/4", "1a 2b", "4a", "1 without a class folder (train/3"),
        ("train/a/1 train/b/2 train/a/w/3 val/a/4", "1a 2b", "4a", "1 too deep (train/a/w/3"),
        ("train/a/1 train/b/2 val/a/4 new/3 7", "1a 2b", "4a", "2 outside train and test (7"),
        ("train/a/1 train/b/2 val/a/4 x.png.txt", "1a 2b", "4a", "1 of an unread suffix (x"),
        ("train/a/1 train/b/2 val/a/4 .x.png __MACOSX/a/x.png", "1a 2b", "4a", ""),
        ("train/a/1 train/2 test/a/3", "2 1", "3", ""),  # one folder is no class
    ],
)  # fmt: skip
def test_what_a_folder_holds_is_used_or_named(capsys, files, train, test, left_out):
    write("set", tree(files))
    splits = load("set")
    for split, expected in zip(splits, (train.split(), test.split())):
        assert split.groups is None and values(split) == [int(word[0]) for word in expected]
        labels = [split.class_names[k] for k in split.labels] if split.labels is not None else []
        assert labels == [word[1] for word in expected if word[1:]]
    counts = " + ".join(str(len(split.images)) for split in splits)
    line = f"set: {counts} images (train + test), {len(splits[0].class_names) or 'no'} classes"
    out = capsys.readouterr().out
    assert out.split(".png")[0].strip() == line + (f"; left out: {left_out}" if left_out else "")


def classes(prefix=""):
    """Two classes of ten: a/0 .. a/9, b/20 .. b/29."""
    return tree(" ".join(f"{prefix}{'ab'[k // 20]}/{k}" for k in [*range(10), *range(20, 30)]))


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_an_80_20_split_is_disjoint_complete_and_within_each_class(prefix):
    write("set", classes(prefix))
    os.rename(f"set/{prefix}a/9.png", os.fsencode(f"set/{prefix}a/caf") + b"\xe9.png")  # no text
    train, test = load("set")
    assert [np.bincount(split.labels).tolist() for split in (train, test)] == [[8, 8], [2, 2]]
    assert sorted(values(train) + values(test)) == [*range(10), *range(20, 30)]
    assert values(test) not in ([8, 9, 28, 29], [0, 1, 20, 21])
    assert set(values(load("set", limit=3, seed=5)[1])) < set(values(test))  # for every seed


@pytest.mark.parametrize("prefix", ["", "images/", "train/", "Train/images/"])
def test_images_without_classes_all_train_and_a_fifth_of_them_is_test(prefix):
    write("set", tree(" ".join(f"{prefix}{k}" for k in range(20))))
    train, test = load("set")
    assert sorted(values(train)) == list(range(20)) and len(test.images) == 4
    assert train.labels is None and test.labels is None and train.class_names == []
    assert len(load("set", limit=7)[0].images) == 7


def test_a_broken_link_is_named(tmp_path):
    write_folder(tmp_path / "set")
    os.symlink("gone.png", "set/train/class0/link.png")
    with pytest.raises(FileNotFoundError, match="link.png"):  # one line by train.guard
        data.load("set", 8, 3, "data")


def test_links_are_followed_but_not_back_to_a_parent():
    write("elsewhere", tree("3 4"))
    write("set", tree("a/1 a/2"))
    os.symlink("../elsewhere", "set/b")
    os.symlink("..", "set/a/up")
    assert sorted(data.list_files(Path("set"))) == ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]


# ---------------------------------------------------------------------------- what a viewer shows


def test_a_new_line_in_a_name_does_not_break_the_line_of_an_error(capsys):
    write("set", {"a/1.png": 1, "a/2\n.png": "no picture"})
    assert "set/a/2\\n.png is damaged (" in fails(capsys, load, "set")


@pytest.mark.parametrize(("suffix", "channels"), [("png", 3), ("tif", 3), ("tif", 1)])
def test_pictures_stand_upright(suffix, channels):
    """Of TIFF's grey ones Pillow maps the pixels into memory."""
    shown = Image.fromarray(RNG.integers(0, 256, (8, 16, 3), np.uint8))
    shown = shown.convert("L" if channels == 1 else "RGB")
    turn = Image.Transpose  # how a picture is stored that EXIF lets a viewer turn back
    stored = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE]
    stored += [turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270]
    Path("set").mkdir()
    for orientation, how in enumerate(stored, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = shown if how is None else shown.transpose(how)
        image.save(f"set/{orientation}.{suffix}", exif=exif)
    images = load("set", channels=channels)[0].images
    assert len(images) == 8 and (images == data.fit(shown, 8, channels)).all()


def test_an_odd_tag_of_exif_does_not_make_a_turned_picture_damaged():
    """XResolution (0x11a) as text: Pillow reads it, but cannot write it back."""
    tags = struct.pack("<HHIHHHHI4s", 0x112, 3, 1, 6, 0, 0x11A, 2, 3, b"72")
    stored = Image.new("RGB", (16, 8))
    stored.paste("white", (0, 0, 8, 8))  # left, which a viewer shows at the top
    Path("set").mkdir()
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    stored.save("set/1.png", exif=exif)
    image, _, _ = data.read_picture(Path("set/1.png"))
    assert image.size == (8, 16)
    assert (np.asarray(image)[:8] == 255).all() and not np.asarray(image)[8:].any()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_in_lab_is_read(channels):
    write("set", {"1.tif": Image.new("LAB", (8, 8), (255, 128, 128)), "2.png": 1})
    assert (load("set", channels=channels)[0].images[0] >= 254).all()  # white


@pytest.mark.parametrize("top", [4095, 8191, 8192, 65535])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_by_257_and_a_dark_set_is_said_once(capsys, suffix, top):
    deep = np.linspace(0, top, 64).round().astype(np.uint16).reshape(8, 8)
    names = [f"{split}/{c}/1.{suffix}" for split in ("train", "test") for c in "ab"]
    image = Image.fromarray(deep)
    write("set", dict.fromkeys(names, image.convert("I") if suffix == "pgm" else image))
    for split in load("set"):
        assert (split.images == deep // 257).all()
    warned = f"warning: set: 16-bit images reach only {top:,} of 65,535"
    assert capsys.readouterr().out.count(warned) == (top < 65536 / 8)
    load("set")
    assert "warning" not in capsys.readouterr().out  # only when it is decoded


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_is_laid_on_white(mode, channels):
    alpha = np.repeat(np.uint8([0, 128, 255, 255]), 16).reshape(8, 8)  # clear, half, solid
    if mode in ("RGBA", "LA"):
        image, options, half = Image.new(mode, (8, 8), (100,) * len(mode)), {}, 177
        image.putalpha(Image.fromarray(alpha))
    else:  # one grey value, or one of the palette, stands for clear
        image = Image.fromarray(np.where(alpha, 100, 7).astype(np.uint8)).convert(mode)
        options, half = {"transparency": image.getpixel((0, 0))}, 100
    Path("set").mkdir()
    image.save("set/1.png", **options)
    image.save("set/2.png", **options)
    for image in load("set", channels=channels)[0].images:
        assert (image[:, :2] == 255).all() and (image[:, 4:] == 100).all()
        assert abs(image[:, 2:4].astype(int) - half).max() <= 1


def test_transparency_of_sixteen_bits_is_laid_on_white():
    deep = np.repeat(np.uint16([257 * 7, 257 * 100]), 32).reshape(8, 8)
    write("set", {"2.png": 1})
    Image.fromarray(deep).save("set/1.png", transparency=257 * 7)
    image = load("set")[0].images[0]
    assert (image[:, :4] == 255).all() and (image[:, 4:] == 100).all()


NOISE = io.BytesIO()
Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(NOISE, "jpeg")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1.tif", Image.new("F", (8, 8)), "has floating-point pixels"),
        ("1.tif", Image.new("I", (8, 8), 65536), "has pixels beyond 0..65,535"),
        ("1.tif", Image.new("I", (8, 8), -1), "has pixels beyond 0..65,535"),
        ("1.png", b"<html>404</html>", "is damaged (cannot identify image file"),
        ("1.png", b"", "is damaged (cannot identify image file"),
        ("1.jpg", NOISE.getvalue()[:-900], "is damaged (image file is truncated"),
    ],
)
def test_what_cannot_be_read_is_named(capsys, file, content, message):
    write("set", {file: content, f"2{file}": content, "3.png": 1})
    assert data.set_facts("set").channels == 3  # a few damaged files do not hide the others
    assert f"set/{file} {message}" in fails(capsys, load, "set")
    assert entries("data/cache") == []


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_picture_too_large_or_closed_to_us_is_not_called_damaged(capsys, monkeypatch):
    write("set", tree("1 2"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # Pillow refuses twice as many
    assert data.set_facts("set").channels == 3
    assert "set/1.png is too large to decode: shrink it" in fails(capsys, load, "set")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32)
    assert len(load("set")[0].images) == 2

    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Image, "open", closed)
    assert "set/1.png cannot be read: Permission denied" in fails(capsys, load, "set", 16)


def test_of_several_pages_or_frames_the_first_is_read_and_said_once(capsys):
    page, later = (Image.new("RGB", (8, 8), (value,) * 3) for value in (10, 200))
    write("set", {f"{split}/{c}/1.png": 10 for split in ("train", "test") for c in "ab"})
    for name in ("train/a/2.gif", "train/b/2.tif", "test/b/2.webp"):
        page.save(f"set/{name}", save_all=True, append_images=[later], lossless=True)
    page.save("set/train/a/3.jpg", format="MPO", save_all=True, append_images=[later])
    page.save("set/train/a/4.jpg")  # of a kind that has no pages at all
    train, test = load("set")
    assert values(train) == [10] * 6 and values(test) == [10] * 3
    assert "set: 3 files have several pages or frames" in capsys.readouterr().out


def test_every_suffix_that_pillow_decodes_is_read_in_any_case(capsys):
    image, suffixes = Image.new("RGB", (16, 16), (200, 100, 50)), ["png", "JPG", "jpeg", "jpe"]
    suffixes += ["bmp", "gif", "webp", "tif", "TIFF", "ppm", "tga", "pcx", "ico", "jp2", "sgi"]
    Path("set").mkdir()
    for suffix in suffixes:
        image.save(f"set/x.{suffix}")
    for suffix in ("jfif", "JFIF", "mpo"):
        image.save(f"set/x.{suffix}", format="JPEG")
    image.convert("CMYK").save("set/cmyk.jpg")
    image.convert("1").save("set/bits.png")
    write("set", dict.fromkeys([f"x.{x}" for x in ("eps", "EPS", "wmf", "h5", "mpg")], b"%!PS"))
    images = load("set")[0].images
    assert images.shape == (20, 3, 8, 8)
    close = abs(images[..., 4, 4].astype(int) - [200, 100, 50]).max(1) < 12
    assert close.sum() == 19  # all but the black and white one
    assert "5 of an unread suffix (x.EPS)" in capsys.readouterr().out
    assert not data.SUFFIXES & {".eps", ".ps", ".emf", ".hdf", ".grib", ".bufr", ".mpeg", ".pdf"}


def test_resizing_averages_over_all_pixels_and_ignores_the_aspect():
    board = (np.indices((64, 128)).sum(0) % 2 * 255).astype(np.uint8)  # one-pixel checks
    write("set", {"a.png": Image.fromarray(board), "b.png": Image.new("L", (4, 9), 77)})
    board, grey = load("set", 16)[0].images
    assert board.shape == (3, 16, 16) and abs(board.mean() - 127.5) < 1 and board.std() < 20
    assert (grey == 77).all()


# ---------------------------------------------------------------------------- facts and limit


def test_known_names_touch_no_disk(monkeypatch):
    write("mnist", {"a.png": Image.new("L", (100, 100))})  # a known name wins over a folder
    for name in ("builtins.open", "os.stat", "os.scandir"):
        monkeypatch.setattr(name, None)
    facts = {name: data.set_facts(name) for name in data.SETS}
    assert [facts[name].row for name in ("mnist", "tiny-imagenet", "oct2017")] == [32, 64, 256]
    assert [name for name in facts if not facts[name].flip] == ["glyphs", "mnist"]
    channels = {name: facts[name].channels for name in facts}
    assert channels == dict.fromkeys(facts, 3) | {"glyphs": 1, "mnist": 1, "oct2017": 1}


@pytest.mark.parametrize(("sides", "row"), [((90, 8, 32), 32), ((20, 33, 64), 64), ((65, 65), 256)])
def test_a_folder_has_the_row_of_its_median_shorter_side(sides, row):
    write("set", {f"c/{k}.png": Image.new("L", (s + 50, s)) for k, s in enumerate(sides)})
    assert data.set_facts("set") == data.Facts(3, row, True)


def test_a_limit_may_leave_one_patient():
    """As it may leave one class: to see a network overfit two images needs no probe."""
    write(
        "data/oct2017",
        {
            f"{split}/{kind}/{kind}-7-1.jpeg": 1
            for split, kind in itertools.product(("train", "test"), ("CNV", "DME"))
        },
    )
    assert len(load("oct2017", channels=1, limit=2)[0].images) == 2


def test_a_sample_keeps_labels_and_groups_beside_their_images():
    k = np.arange(40)
    split = data.Split(k[:, None, None, None], k % 2, k // 3, ["a", "b"])
    for limit in (0, 9):
        some = data.sample(split, limit, 0)
        k = some.images.ravel()
        assert len(k) == (limit or 40) and np.all(np.diff(k) > 0)
        assert np.array_equal(some.labels, k % 2) and np.array_equal(some.groups, k // 3)


def test_a_limit_is_a_seeded_sample_equal_over_the_classes(capsys):
    files, pixels, _ = mnist_files(n=200)
    labels = np.repeat([0, 1, 2, 3], [100, 60, 37, 3])
    write("data/mnist", files | {LABELS: gzip.compress(idx(labels))})
    split, other = load("mnist", 28, 1, limit=41)
    assert len(other.images) == 41
    assert sorted(np.bincount(split.labels)) == [3, 12, 13, 13]  # the small class gives all it has
    where = [int((pixels[0] == image).all((1, 2)).argmax()) for image in split.images[:, 0]]
    assert where == sorted(set(where)) and np.array_equal(labels[where], split.labels)
    assert where[:13] != list(range(13))
    again, other = (load("mnist", 28, 1, 41, seed)[0].images for seed in (0, 1))
    assert np.array_equal(again, split.images) and not np.array_equal(other, split.images)
    for limit in (0, 200, 999):
        assert np.array_equal(load("mnist", 28, 1, limit)[0].labels, labels)
    out = capsys.readouterr().out
    assert "below" not in out and out.count("a sample of ") == out.count("41 + 41 of them is used")
    load("mnist", 28, 1, limit=9)
    out = capsys.readouterr().out
    assert "--limit 9 is below the 10 classes" in out and "a sample of 9 + 9 of them is used" in out


# ---------------------------------------------------------------------------- archives


@pytest.mark.parametrize("other_run", [False, True])
def test_an_archive_is_unpacked_once_out_of_sight(monkeypatch, other_run):
    pack("data/bccd/a.zip", bccd_files())
    extract, seen = data.extract, []

    def watched(path, folder):
        extract(path, folder)
        seen.append([folder.name, *entries("data/bccd")])
        if other_run:  # was quicker
            shutil.copytree(folder, "data/bccd/a")

    monkeypatch.setattr(data, "extract", watched)
    for _ in range(2):
        assert len(load("bccd")[0].images) == 12
    hidden = f".a.{platform.node()}-{os.getpid()}"
    assert seen == [[hidden, hidden, "a.zip"]] and entries("data/bccd") == ["a", "a.zip"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_damaged_archive_is_named_wherever_the_damage_is(capsys, name):
    path = Path("data/bccd", name)
    pack(path, {f"{k}.bin": RNG.bytes(1000) for k in range(4)})
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) if name == "a.tar" else len(whole)  # then only zeros
    cuts = [end - 1, end - 700, end * 3 // 4, end // 2, 4096, 700, 0]  # 4096: between members
    at = {"a.tar": 4096 + 148}.get(name, end // 2)  # the checksum of a header
    changed = whole[:at] + bytes(8) + whole[at + 8 :]
    for damaged in [whole[:cut] for cut in cuts] + [changed]:
        path.write_bytes(damaged)
        assert f"{path} is damaged (" in fails(capsys, load, "bccd")
        assert entries("data/bccd") == [name]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("member", ["../out.jpeg", "{here}/out.jpeg", "link/out.jpeg"])
def test_no_member_leaves_its_folder(tmp_path, capsys, kind, member):
    member, path = member.format(here=tmp_path), Path(f"data/bccd/a.{kind}")
    path.parent.mkdir(parents=True)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, b"x")
    else:
        with tarfile.open(path, "w") as archive:
            link, file = tarfile.TarInfo("link"), tarfile.TarInfo(member)
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            for info in [link] * ("link" in member) + [file]:
                archive.addfile(info)
    fails(capsys, load, "bccd")
    for file in tmp_path.rglob("out.jpeg"):
        assert file.is_relative_to(tmp_path / "data/bccd/a")


def test_a_python_that_cannot_unpack_safely_says_so_and_not_that_the_archive_is_damaged(
    capsys, monkeypatch
):
    monkeypatch.delattr(tarfile, "data_filter")
    files = cifar_files("cifar10")[0]
    pack(f"data/cifar10/{ARCHIVE}", files)
    line = fails(capsys, load, "cifar10")
    assert "cannot be unpacked safely by Python" in line and "damaged" not in line
    assert entries("data/cifar10") == [ARCHIVE]
    write("data/cifar10", files)  # by hand, as the line says
    assert len(load("cifar10")[0].images) == 15


def test_leftovers_of_dead_processes_are_removed():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = platform.node()
    gone = [f".a.{host}-{dead.pid}", f".b.{host}-{dead.pid}", f".a.{host}-{10**20}"]
    stay = [f".a.{host}-{os.getppid()}", f".a.elsewhere-{dead.pid}", f".a.{host}-2-{dead.pid}"]
    write("data/cache", dict.fromkeys(gone + stay, ""))
    write("data/bccd", {f"{name}/images/1.png": 1 for name in gone + stay})
    pack("data/bccd/a.zip", bccd_files())
    load("bccd")
    assert entries("data/bccd") == sorted([*stay, "a", "a.zip"])
    assert entries("data/cache")[:-1] == sorted(stay)


def test_a_full_disk_is_not_called_damage():
    pack("data/bccd/a.zip", {"images/TRAIN/MONOCYTE/_1_1.jpeg": RNG.bytes(5000)})
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        load("bccd")
    assert entries("data/bccd") == ["a.zip"]


# ---------------------------------------------------------------------------- cache


@pytest.fixture
def calls(monkeypatch):
    """A folder `set` of 20 images, and a list that grows with each image that is decoded."""
    write("set", classes())
    calls, fit = [], data.fit
    monkeypatch.setattr(data, "fit", lambda *args: calls.append(1) or fit(*args))
    return calls


def test_the_second_load_comes_from_the_cache(calls):
    first, second = load("set"), load("set")
    assert len(calls) == 20 and len(first[0].images) == 16
    for a, b in zip(first, second):
        assert isinstance(b.images, np.memmap) and np.array_equal(a.images, b.images)
        with pytest.raises(ValueError, match="read-only"):
            b.images[0] = 0
    for other in ({"size": 16}, {"channels": 1}, {"limit": 10}):
        load("set", **other)
    assert len(calls) == 20 + 20 + 20 + 14 and len(entries("data/cache")) == 4


def test_arrays_are_cached_by_their_content(calls):
    for _ in range(2):  # the second time other files lie there
        write("data/mnist", mnist_files()[0])
        first, second = load("mnist", 16, 1), load("mnist", 16, 1)
        assert np.array_equal(first[1].images, second[1].images)
    assert len(calls) == 80 and isinstance(second[0].images, np.memmap)


@pytest.mark.parametrize("change", ["cut", "empty", "garbage", "zip", "time", "size", "new file"])
def test_a_damaged_cache_and_changed_files_are_decoded_again(calls, change):
    first = np.array(load("set")[0].images)
    (cache,), file = Path("data/cache").iterdir(), Path("set/a/0.png")
    damaged = {"cut": cache.read_bytes()[:-9], "empty": b"", "garbage": b"bad" * 99}
    damaged["zip"] = b"PK\3\4" * 99
    cache.write_bytes(damaged.get(change, cache.read_bytes()))
    before = file.stat().st_mtime_ns
    if change == "size":
        file.write_bytes(file.read_bytes() + b"x")
    os.utime(file, ns=(before, before + (change == "time")))
    write("set", tree("a/99" if change == "new file" else ""))
    again = load("set")[0].images
    assert len(calls) == 40 + (change == "new file")
    assert change == "new file" or np.array_equal(first, again)


def test_where_no_cache_can_be_written_images_are_decoded_into_memory(calls, capsys):
    with full_disk(1000):
        train, _ = load("set", 16)
    assert entries("data/cache") == []
    shutil.rmtree("data")
    write(".", {"data": "a file in the place of the folder"})
    again, _ = load("set", 16)
    assert np.array_equal(train.images, again.images) and len(train.images) == 16
    assert not isinstance(train.images, np.memmap) and not isinstance(again.images, np.memmap)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("no cache in data/cache (") for line in lines)


# ---------------------------------------------------------------------------- downloads


class Server(ThreadingHTTPServer):
    """http://127.0.0.1 that answers a path with its behaviours, one a request, the last for ever:
    bytes are served, a number is a status, "break" stops in the middle, "stall" sends no more."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.requests, self.closing = {}, [], threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def offer(self, monkeypatch, name, files, mirrors=("/one/",)):
        """Let a set's addresses point here; the last mirror has the files."""
        url = f"http://127.0.0.1:{self.server_port}"
        md5s = {file: hashlib.md5(raw).hexdigest() for file, raw in files.items()}
        monkeypatch.setitem(data.DOWNLOADS, name, md5s)
        monkeypatch.setitem(data.MIRRORS, name, [url + mirror for mirror in mirrors])
        self.plan |= {mirrors[-1] + file: [raw] for file, raw in files.items()}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        steps = self.server.plan.get(self.path, [404])
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        if isinstance(step, int):
            self.send_error(step)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(step) if isinstance(step, bytes) else 200_000))
        self.end_headers()
        self.wfile.write(step if isinstance(step, bytes) else b"x" * 100_000)
        if step == "stall":
            self.server.closing.wait(20)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


ARCHIVE = "cifar-10-binary.tar.gz"


@pytest.fixture
def cifar_server(server, monkeypatch):
    """A server with CIFAR-10's archive, of three images a file."""
    pack("made.tar.gz", cifar_files("cifar10")[0])
    server.offer(monkeypatch, "cifar10", {ARCHIVE: Path("made.tar.gz").read_bytes()})
    return server


def test_a_download_gives_the_set_and_is_not_repeated(monkeypatch, server):
    files, pixels, _ = mnist_files()
    server.offer(monkeypatch, "mnist", files, ("/dead/", "/good/"))  # two mirrors
    write("data/mnist", {LABELS: gzip.compress(idx(np.full(20, 3)))})  # by hand: not checked
    for _ in range(2):
        train, test = load("mnist", 28, 1)
        assert np.array_equal(test.images[:, 0], pixels[1]) and set(train.labels) == {3}
    wanted = [f"/{mirror}/{file}" for file in files for mirror in ("dead", "good")]
    assert server.requests == [path for path in wanted if LABELS not in path]
    assert entries("data/mnist") == sorted(files)


BAD = {"broke off after": "break", "its md5 is": b"no", "Error 404": 404, "timed out": "stall"}


@pytest.mark.parametrize("reason", list(BAD))
def test_a_download_is_tried_three_times_and_leaves_nothing(capsys, cifar_server, reason):
    good, start = cifar_server.plan[f"/one/{ARCHIVE}"], time.monotonic()
    cifar_server.plan[f"/one/{ARCHIVE}"] = [BAD[reason]]
    error = fails(capsys, load, "cifar10")
    assert time.monotonic() - start < 3  # a silent server costs TIMEOUT a try
    assert "cifar10 is not in data/cifar10 and could not be downloaded (" in error
    assert reason in error and f"put {ARCHIVE} from http://127.0.0.1" in error
    assert len(cifar_server.requests) == 3 and not Path("data").exists()
    Path("data/cifar10").mkdir(parents=True)  # the user's own folder stays
    fails(capsys, load, "cifar10")
    assert entries("data/cifar10") == []
    cifar_server.plan[f"/one/{ARCHIVE}"] = [BAD[reason], *good]  # now the second try succeeds
    assert len(load("cifar10")[0].images) == 15 and len(cifar_server.requests) == 8
    assert entries("data/cifar10") == ["cifar-10-binary", ARCHIVE]
    next(Path("data/cifar10").rglob("test_batch.bin")).unlink()
    words = f"data/cifar10/cifar-10-binary does not hold all of cifar10: delete it, and {ARCHIVE} "
    assert words in fails(capsys, load, "cifar10")


def test_without_a_network_one_line_names_files_and_addresses(monkeypatch, capsys):
    tries = []

    def refuse(url, timeout):
        tries.append(url.split("/")[2].split(".")[0])
        raise OSError("Name or service not known")

    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    error = fails(capsys, load, "mnist")
    assert "Name or service not known" in error and "needs no data" in error
    assert all(file in error for file in data.DOWNLOADS["mnist"]) and "https://ossci" in error
    assert tries == ["ossci-datasets", "storage", "ossci-datasets"]


def test_what_ends_a_download_here_is_not_tried_again_and_leaves_nothing(monkeypatch, cifar_server):
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        load("cifar10")

    def interrupted(items, *rest):
        yield next(iter(items))
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10")
    assert len(cifar_server.requests) == 2 and not Path("data").exists()


# ---------------------------------------------------------------------------- output, whole files


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_count_rate_and_time_left_when_it_takes_long(monkeypatch, capsys, terminal):
    def run(seconds, **how):
        clock = iter(np.arange(1000, 9000, seconds))
        monkeypatch.setattr(data.time, "monotonic", lambda: float(next(clock)))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        assert list(data.progress(range(30), "decoding", 30, "images", **how)) == [*range(30)]
        return capsys.readouterr().out

    assert run(0.05) == ""
    out = run(1)
    assert out.endswith("\n") and out[0] == "d"  # nothing stands before or after on its lines
    lines = out[:-1].split("\n\033[A\033[K" if terminal else "\n")
    assert len(lines) == (28 if terminal else 3)  # twice a second, or every ten seconds
    assert "decoding: 3 of 30 images, 1.0 images/s, 0:27 left" in lines
    assert "60 of 30 images, 20 images/s, 0:00 left" in run(1, done=lambda: 60)
    if terminal:  # of 60 columns: a longer line would not be overwritten whole
        monkeypatch.setenv("COLUMNS", "60")
        line = run(1, done=lambda: 123_456_789).splitlines()[-1]
        assert len(line) == len("\033[A\033[K") + 59 and line.endswith("images/s, 0:00 left")
    shown = [data.clock(seconds) for seconds in (-5, 0, 61.9, 3600 * 25 + 61)]
    assert shown == ["0:00", "0:00", "1:01", "25:01:01"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_of_a_machine_says_why_all_end(monkeypatch, capsys, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as stop:
        data.fail("no such set")
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("error: no such set\n" if rank == "0" else "")


def test_another_program_s_rank_does_not_silence_an_error(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert fails(capsys, data.fail, "no such set") == "error: no such set\n"


def test_a_shared_file_has_a_temporary_name_of_its_own_and_leaves_other_files_alone(monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".{name}.{platform.node()}-{dead.pid}" for name in ("table.json", "other.json")]
    write("out", dict.fromkeys(names, ""))
    seen, real = [], Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda to, x: seen.append(to.name) or real(to, x))
    data.write_json(Path("out/table.json"), 1, shared=True)
    assert seen == [f".table.json.{platform.node()}-{os.getpid()}"]
    assert entries("out") == [names[1], "table.json"]


def test_a_file_is_replaced_whole_or_not_at_all():
    write(".", {"new/.x.tmp": "left by kill -9"})
    data.replace_file(Path("new/x"), lambda path: path.write_text("old"))

    def broken(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.replace_file(Path("new/x"), broken)
    assert Path("new/x").read_text() == "old" and entries("new") == ["x"]
    os.mkfifo("new/pipe")  # or /dev/null, which root could replace
    with pytest.raises(OSError, match="is no plain file"):
        data.replace_file(Path("new/pipe"), lambda path: path.write_text("new"))
    assert Path("new/pipe").is_fifo()


# ---------------------------------------------------------------------------- seeds and batches


def test_mix_seed_depends_on_every_number_their_order_and_their_count():
    mix = data.mix_seed
    seeds = [mix(*n) for n in ((5,), (5, 0), (0, 5), (5, 1), (), (2**40, 5), (-1,), (51,))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert mix(5, 1) == mix(np.int64(5), torch.tensor(1)) == seeds[3]
    assert mix(0, 1) == 4745876751707733005  # recorded runs can be repeated


def test_to_uint8_inverts_to_float_for_all_values_and_clips():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    y = data.to_float(x)
    assert y.dtype == torch.float32 and y.min() == -1 and y.max() == 1
    assert torch.equal(y, x.float() / 127.5 - 1) and torch.equal(data.to_uint8(y), x)
    assert data.to_uint8(torch.tensor([-9.0, 9.0, 0.001])).tolist() == [0, 255, 128]


@pytest.mark.parametrize("n", [1, 3, 7, 10, 100])
def test_batches_are_cut_from_permutations_that_hold_each_image_once(n):
    def index(step, seed=3):
        return data.batch_index(n, step, 7, seed, CPU)

    stream = torch.cat([index(step) for step in range(30)])
    assert stream.dtype == torch.int64 and stream.shape == (210,)
    for start in range(0, 210 // n * n, n):
        assert sorted(stream[start : start + n].tolist()) == list(range(n))
    for step in (29, 3, 0):  # a pure function
        assert torch.equal(index(step), stream[7 * step : 7 * step + 7])
    index(0).zero_()  # the caller's copy
    assert torch.equal(index(0), stream[:7])
    if n >= 10:
        assert not torch.equal(stream[:10], stream[n : n + 10])
        assert not torch.equal(index(0), index(0, seed=4))


def test_a_batch_is_float_and_mirrored_exactly_where_asked():
    images = torch.from_numpy(RNG.integers(0, 256, (8, 3, 4, 4), np.uint8))
    index, flips = torch.tensor([5, 0, 5, 7]), torch.tensor([True, False, False, True])
    plain = data.get_batch(images, index, CPU)
    assert plain.dtype == torch.float32 and torch.equal(plain, images[index].float() / 127.5 - 1)
    x = data.get_batch(images, index, CPU, flips)
    assert torch.equal(x[flips], plain[flips].flip(-1)) and torch.equal(x[~flips], plain[~flips])
    assert not torch.equal(x[flips], plain[flips])


def test_images_on_the_host_go_through_pinned_memory(monkeypatch):
    images = torch.from_numpy(RNG.integers(0, 256, (8, 1, 4, 4), np.uint8))
    pinned, moved = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.copy_(x))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, **how: moved.append((x, how)) or x)
    x = data.get_batch(images, torch.tensor([3, 1]), torch.device("cuda", 0))
    assert torch.equal(x, data.to_float(images[[3, 1]]))
    assert len(moved) == 1 and moved[0][0] is pinned and moved[0][1] == {"non_blocking": True}


def test_images_move_to_a_gpu_where_they_fit_into_half_of_it_else_none_is_copied(
    monkeypatch, recwarn
):
    np.save("x.npy", RNG.integers(0, 256, (8, 1, 4, 4), np.uint8))
    images, moved = np.load("x.npy", mmap_mode="r"), []  # read-only
    tensor = data.on_device(images, CPU)
    assert tensor.data_ptr() == images.ctypes.data and tensor.dtype == torch.uint8
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: moved.append(device) or x)
    for free in (256, 255):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 999))  # noqa: B023
        data.on_device(images, torch.device("cuda", 0))
    assert len(moved) == 1
    assert not recwarn.list
