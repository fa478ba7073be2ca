"""The data sets in good and damaged form, on small files written here; no network, no real data."""

import gzip
import hashlib
import io
import tarfile
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sets
from data import Batches, load, mix_seed, permutation_stream
from files import Archive, DataError, progress
from sets import describe

RNG = np.random.default_rng(0)


def encode(pixels, kind="png", **options):
    """uint8 (h, w) or (h, w, 3) -> the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, kind, **options)
    return file.getvalue()


def flat(value, side=8, channels=3):
    """The PNG of one colour: grey for channels = 1."""
    return encode(np.full((side, side, 3) if channels == 3 else (side, side), value))


def flat_jpeg(value, side=8):
    return encode(np.full((side, side), value), "jpeg", quality=95)


def write(folder, files):
    """{path: bytes or text} below a folder."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def make_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def make_tar(path, files, prefix=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def cut(path, by=None):
    """Shorten a file: to two thirds, or by some bytes."""
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 2 // 3] if by is None else raw[:-by])


# ------------------------------------------------------------------------------------------- mnist


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def mnist_files(n=20, side=28, zipped=True):
    files, pixels = {}, RNG.integers(0, 256, (n, side, side), np.uint8)
    for prefix in ("train", "t10k"):
        files[f"{prefix}-images-idx3-ubyte"] = idx(pixels)
        files[f"{prefix}-labels-idx1-ubyte"] = idx(np.arange(n) % 10)
    if zipped:
        files = {f"{name}.gz": gzip.compress(raw) for name, raw in files.items()}
    return files, pixels


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("folder", ["mnist", "mnist/MNIST/raw", "MNIST/raw"])
def test_mnist_pixels_and_labels_are_exact_in_every_layout(tmp_path, folder, zipped):
    files, pixels = mnist_files(zipped=zipped)
    write(tmp_path / folder, files)
    split = load("mnist", "train", 28, tmp_path)
    assert np.array_equal(split.images, pixels[:, None]) and split.images.dtype == np.uint8
    assert np.array_equal(split.labels, np.arange(20) % 10) and split.labels.dtype == np.int64
    assert split.groups is None and split.class_names == list("0123456789")
    assert load("mnist", "test", 32, tmp_path).images.shape == (20, 1, 32, 32)


def test_mnist_train_and_test_come_from_their_own_files(tmp_path):
    files, _ = mnist_files()
    files["t10k-labels-idx1-ubyte.gz"] = gzip.compress(idx(np.full(20, 7)))
    write(tmp_path / "mnist", files)
    assert set(load("mnist", "test", 28, tmp_path).labels) == {7}
    assert set(load("mnist", "train", 28, tmp_path).labels) == set(range(10))


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (IMAGES, gzip.compress(idx(np.zeros((20, 28, 28))))[:-12], "Compressed file ended"),
        (IMAGES, b"not a gzip file", "Not a gzipped file"),
        (IMAGES, gzip.compress(b"\0\0\7\3" + bytes(12)), "00000703"),
        (IMAGES, gzip.compress(idx(np.arange(20))), "00000801"),
        (IMAGES, gzip.compress(idx(np.zeros((20, 28, 28)))[:-1]), "dimensions"),
        (IMAGES, gzip.compress(b"\0\0\x08\3\0\0"), "dimensions"),
        (LABELS, gzip.compress(idx(np.zeros(19))), "19 labels"),
        (LABELS, gzip.compress(idx(np.full(20, 10))), "labels to 10"),
    ],
)
def test_damaged_mnist_is_named(tmp_path, file, content, message):
    write(tmp_path / "mnist", mnist_files()[0] | {file: content})
    with pytest.raises(DataError, match=f"{file}.*{message}.*delete it"):
        load("mnist", "train", 28, tmp_path)


def test_a_gz_that_unpacks_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("files.MAX_BYTES", 10_000)
    write(tmp_path / "mnist", {IMAGES: gzip.compress(idx(np.zeros((20, 28, 28)))), LABELS: b""})
    with pytest.raises(DataError, match="more than 10,000 bytes"):
        load("mnist", "train", 28, tmp_path)


# ------------------------------------------------------------------------------------------- cifar


def cifar_files(name, n=3):
    """Each file's images differ; labels are 0, 1, 2, ... (cifar100: coarse 9, then fine)."""
    if name == "cifar10":
        names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
        folder, meta = (
            "cifar-10-batches-bin",
            ("batches.meta.txt", "\n".join("abcdefghij") + "\n\n"),
        )
    else:
        names, folder = ["train.bin", "test.bin"], "cifar-100-binary"
        meta = ("fine_label_names.txt", "\n".join(f"fine{k}" for k in range(100)))
    pixels = RNG.integers(0, 256, (len(names), n, 3, 32, 32), np.uint8)
    files = {f"{folder}/{meta[0]}": meta[1]}
    for k, file in enumerate(names):
        head = np.arange(n, dtype=np.uint8)[:, None]
        head = head if name == "cifar10" else np.hstack([np.full_like(head, 9), head])
        files[f"{folder}/{file}"] = np.hstack([head, pixels[k].reshape(n, -1)]).tobytes()
    return files, pixels


ARCHIVES = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_pixels_labels_and_names_are_exact(tmp_path, name, packed):
    files, pixels = cifar_files(name)
    if packed:
        make_tar(tmp_path / name / ARCHIVES[name], files)
    else:
        write(tmp_path / name, files)
    train, test = (load(name, split, 32, tmp_path) for split in ("train", "test"))
    assert np.array_equal(train.images, pixels[:-1].reshape(-1, 3, 32, 32))
    assert np.array_equal(test.images, pixels[-1])
    assert np.array_equal(test.labels, [0, 1, 2])
    assert train.class_names[:2] == (["a", "b"] if name == "cifar10" else ["fine0", "fine1"])


def test_cifar_planes_are_red_green_blue_and_row_major(tmp_path):
    files, _ = cifar_files("cifar100", 1)
    record = bytearray(2 + 3072)
    record[2 + 5], record[2 + 1024 + 32], record[2 + 2048] = 10, 20, 30
    write(tmp_path / "cifar100", files | {"cifar-100-binary/test.bin": bytes(record)})
    image = load("cifar100", "test", 32, tmp_path).images[0]
    assert (image[0, 0, 5], image[1, 1, 0], image[2, 0, 0]) == (10, 20, 30)
    assert image.astype(int).sum() == 60


def test_cifar_without_its_names_file_numbers_the_classes(tmp_path):
    files, _ = cifar_files("cifar10")
    del files["cifar-10-batches-bin/batches.meta.txt"]
    write(tmp_path / "cifar10", files)
    assert load("cifar10", "test", 32, tmp_path).class_names == list("0123456789")


@pytest.mark.parametrize(
    ("content", "message"),
    [(bytes(3073 * 2 - 1), "whole records of 3073"), (b"", "whole"), (b"\x0a" * 3073, "label 10")],
)
def test_damaged_cifar_is_named(tmp_path, content, message):
    files, _ = cifar_files("cifar10")
    write(tmp_path / "cifar10", files | {"cifar-10-batches-bin/data_batch_4.bin": content})
    with pytest.raises(DataError, match=f"data_batch_4.bin.*{message}"):
        load("cifar10", "train", 32, tmp_path)


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_pickle_is_never_opened_and_the_binary_version_asked_for(tmp_path, kind):
    if kind == "folder":
        write(tmp_path / "cifar10", {"cifar-10-batches-py/data_batch_1": b"pickle"})
    else:
        make_tar(tmp_path / "cifar10/cifar-10-python.tar.gz", {"cifar-10-batches-py/x": b"pickle"})
    with pytest.raises(DataError, match="pickle version.*cifar-10-binary.tar.gz from https"):
        load("cifar10", "train", 32, tmp_path)


@pytest.mark.parametrize("by", [None, 100])
def test_a_truncated_cifar_archive_is_named(tmp_path, by):
    make_tar(tmp_path / "cifar10" / ARCHIVES["cifar10"], cifar_files("cifar10")[0])
    cut(tmp_path / "cifar10" / ARCHIVES["cifar10"], by)
    with pytest.raises(DataError, match="cifar-10-binary.tar.gz is damaged.*delete it"):
        load("cifar10", "train", 32, tmp_path)


# ------------------------------------------------------------------------------------------ glyphs


def test_glyphs_are_deterministic_balanced_and_differ_between_the_splits():
    train, again = load("glyphs", "test", 28), load("glyphs", "test", 28)
    assert train.images.shape == (2000, 1, 28, 28)
    assert np.array_equal(train.images, again.images) and np.array_equal(train.labels, again.labels)
    assert np.array_equal(np.bincount(train.labels), [200] * 10)
    other = load("glyphs", "train", 28)
    assert other.images.shape == (10_000, 1, 28, 28)
    assert np.array_equal(np.bincount(other.labels), [1000] * 10)
    seen = {image.tobytes() for image in other.images}
    assert len(seen) == 10_000 and not seen & {image.tobytes() for image in train.images}


def test_glyphs_are_light_on_dark_and_show_their_label():
    split = load("glyphs", "test", 32)
    assert split.images.mean() < 60 and split.images.max() > 200
    mean = np.stack([split.images[split.labels == k].mean((0, 1)) for k in range(10)])
    centre = mean[:, 14:18, 14:18].mean((1, 2))
    assert centre[0] < centre[8] - 20  # a nought is empty where an eight crosses


# ----------------------------------------------------------------------------------- tiny-imagenet


def tiny_files():
    """Class n2 comes first in wnids.txt; n9 is there without images; val_2 has no known class."""
    files = {"wnids.txt": "n9\nn2\nn1\n", "words.txt": "n1\tfish\n"}
    for wnid, value in (("n1", 10), ("n2", 20)):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = "x\t0\t0\t1\t1\n"
        for k in range(2):
            files[f"train/{wnid}/images/{wnid}_{k}.JPEG"] = flat_jpeg(value + k, 64)
    for k, value in enumerate((40, 50, 60)):
        files[f"val/images/val_{k}.JPEG"] = encode(np.full((64, 64, 3), value), "jpeg")
    notes = [
        "val_0.JPEG\tn1\t0\t0\t1\t1",
        "val_1.JPEG\tn2\t0\t0\t1\t1",
        "val_2.JPEG\tn7\t0\t0\t1\t1",
    ]
    files["val/val_annotations.txt"] = "\n".join(notes)
    files["test/images/test_0.JPEG"] = flat_jpeg(0, 64)
    return {f"tiny-imagenet-200/{name}": content for name, content in files.items()}


@pytest.mark.parametrize("packed", [True, False])
def test_tiny_imagenet_takes_wnids_order_annotations_and_grey_images(tmp_path, packed):
    if packed:
        make_zip(tmp_path / "tiny-imagenet/tiny-imagenet-200.zip", tiny_files())
    else:
        write(tmp_path / "tiny-imagenet", tiny_files())
    train, test = (load("tiny-imagenet", split, 64, tmp_path) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["n2", "n1"]
    assert train.images.shape == (4, 3, 64, 64) and test.images.shape == (2, 3, 64, 64)
    values = dict(zip(train.images[:, 0, 0, 0].tolist(), train.labels.tolist()))
    assert values == {20: 0, 21: 0, 10: 1, 11: 1}
    assert dict(zip(test.images[:, 1, 5, 5].tolist(), test.labels.tolist())) == {40: 1, 50: 0}
    assert (train.images == train.images[:, :1]).all() and train.groups is None


def test_tiny_imagenet_without_its_annotations_says_so(tmp_path):
    files = {n: c for n, c in tiny_files().items() if "annotations" not in n}
    write(tmp_path / "tiny-imagenet", files)
    with pytest.raises(DataError, match="no test images of tiny-imagenet"):
        load("tiny-imagenet", "test", 64, tmp_path)


# -------------------------------------------------------------------------------------------- bccd

CELLS = ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")


def bccd_files():
    files = {"dataset2-master/labels.csv": ",Image,Category\r\n,0,NEUTROPHIL\r\n"}
    for k, cell in enumerate(CELLS):
        for name in ("TRAIN/{}/_0_1", "TRAIN/{}/_0_2", "TRAIN/{}/_12_3", "TEST/{}/_0_9"):
            name = f"dataset2-master/images/{name.format(cell)}.jpeg"
            files[name] = encode(np.full((6, 8, 3), 10 * k), "jpeg")
    files[f"dataset2-master/images/TEST_SIMPLE/{cell}/_0_5.jpeg"] = flat_jpeg(99)
    return files


@pytest.mark.parametrize("layout", ["folder", "nested", "zip", "tar", "tar.gz"])
def test_bccd_groups_the_copies_of_one_source_picture(tmp_path, layout):
    prefix = "dataset2-master/" if layout == "nested" else ""
    files = {prefix + name: content for name, content in bccd_files().items()}
    if layout == "zip":
        make_zip(tmp_path / "bccd/archive.zip", files)
    elif "tar" in layout:
        make_tar(tmp_path / f"bccd/any name.{layout}", files, prefix="./")
    else:
        write(tmp_path / "bccd", files)
    train, test = (load("bccd", split, 16, tmp_path) for split in ("train", "test"))
    assert train.images.shape == (12, 3, 16, 16) and test.images.shape == (4, 3, 16, 16)
    assert train.class_names == list(CELLS)
    assert np.array_equal(train.images[:, 0, 0, 0], train.labels * 10)
    assert Counter(Counter(train.groups.tolist()).values()) == {2: 4, 1: 4}
    assert len(set(train.groups) | set(test.groups)) == 12  # TEST's _0_ is not TRAIN's
    for group in set(train.groups):
        assert len(set(train.labels[train.groups == group])) == 1


def test_a_set_that_an_archive_holds_twice_counts_once(tmp_path):
    files = bccd_files()
    make_zip(tmp_path / "bccd/a.zip", files | {f"dataset2-master/{n}": c for n, c in files.items()})
    assert len(load("bccd", "train", 8, tmp_path).images) == 12


ROWS = [("NEUTROPHIL", 20), ("EOSINOPHIL", 5), ("", 2), ("NEUTROPHIL, EOSINOPHIL", 2)]
ROWS += [("BASOPHIL", 2), ("MONOCYTE", 10)]


def original_files(variant):
    """40 pictures and one missing (MONOCYTE), each of the grey value of its number."""
    lines, number = [], 0
    for category, count in ROWS:
        for _ in range(count):
            cell = f'"{category}"' if "," in category else category
            lines.append(f",{number},{cell}" if variant == "crlf" else f"{number},{cell}")
            number += 1
    head, end = (",Image,Category", "\r\n") if variant == "crlf" else ("Image,Category", "\n")
    files = {"dataset-master/labels.csv": end.join([head, *lines, ""])}
    for k in range(number - 1):
        files[f"dataset-master/JPEGImages/BloodImage_{k:05d}.jpg"] = flat_jpeg(k)
    return files


@pytest.mark.parametrize("variant", ["crlf", "lf"])
@pytest.mark.parametrize("prefix", ["", "dataset-master/"])
def test_bccd_originals_keep_the_rows_with_one_class_and_a_picture(tmp_path, variant, prefix):
    write(tmp_path / "bccd", {prefix + n: c for n, c in original_files(variant).items()})
    train, test = (load("bccd", split, 8, tmp_path) for split in ("train", "test"))
    assert train.class_names == ["EOSINOPHIL", "MONOCYTE", "NEUTROPHIL"]
    assert np.bincount(train.labels).tolist() == [4, 8, 16]
    assert np.bincount(test.labels).tolist() == [1, 1, 4]
    values = {split: s.images[:, 0, 0, 0].tolist() for split, s in (("a", train), ("b", test))}
    assert sorted(values["a"] + values["b"]) == [*range(25), *range(31, 40)]
    assert all((v < 20) == (k == 2) for v, k in zip(values["a"], train.labels))
    assert train.groups is None


def test_bccd_augmented_pictures_win_and_labels_csv_alone_is_no_set(tmp_path):
    write(tmp_path / "bccd", original_files("crlf") | bccd_files())
    assert len(load("bccd", "train", 8, tmp_path).images) == 12
    write(tmp_path / "b/bccd", {"dataset-master/labels.csv": ",Image,Category\r\n"})
    with pytest.raises(DataError, match="bccd is not in .*kaggle"):
        load("bccd", "train", 8, tmp_path / "b")


@pytest.mark.parametrize("text", ["Number,Kind\n1,x\n", "Image,Category\nx1,MONOCYTE\n"])
def test_a_damaged_labels_csv_is_named(tmp_path, text):
    write(tmp_path / "bccd", original_files("lf") | {"dataset-master/labels.csv": text})
    with pytest.raises(DataError, match="labels.csv is damaged"):
        load("bccd", "train", 8, tmp_path)


# ----------------------------------------------------------------------------------------- oct2017


def oct_files():
    names = ["train/CNV/CNV-11-1", "train/CNV/CNV-11-2", "train/DME/DME-11-1", "train/DME/DME-7-1"]
    names += ["test/CNV/CNV-11-3", "test/DME/DME-5-1"]
    return {f"{name}.jpeg": flat_jpeg(10 * k) for k, name in enumerate(names)}


ROOTS = ["OCT2017/", "OCT2017 /", "OCT2017 /OCT2017/", "CellData/OCT/", ""]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("root", ROOTS)
def test_oct2017_groups_by_patient_in_every_layout(tmp_path, root, packed):
    files = {root + name: content for name, content in oct_files().items()}
    files["CellData/chest_xray/train/NORMAL/NORMAL-1-1.jpeg"] = flat_jpeg(200)
    files |= {
        f"__MACOSX/{root}train/CNV/CNV-11-1.jpeg": b"x",
        root + "train/CNV/._CNV-1-1.jpeg": b"",
    }
    if packed:
        make_zip(tmp_path / "oct2017/archive.zip", files)
    else:
        write(tmp_path / "oct2017", files)
    train, test = (load("oct2017", split, 8, tmp_path) for split in ("train", "test"))
    assert train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30]  # one channel
    assert train.class_names == ["CNV", "DME"] and train.labels.tolist() == [0, 0, 1, 1]
    a, b, c, d = train.groups
    assert a == b == c != d and test.groups[0] == a and test.groups[1] not in (a, d)


def test_what_cannot_be_downloaded_says_what_to_put_where(tmp_path):
    with pytest.raises(DataError, match="oct2017 is not in .*put OCT2017 from https://data.mendel"):
        load("oct2017", "train", 8, tmp_path)


# ------------------------------------------------------------------------------- folders of images


def classes(n=10, prefix=""):
    return {f"{prefix}{c}/{k}.png": flat(20 * i + k) for i, c in enumerate("ab") for k in range(n)}


@pytest.mark.parametrize("held", ["test", "val", "valid", "Test"])
def test_a_folder_with_train_and_test(tmp_path, held):
    write(tmp_path, classes(3, "train/") | classes(2, f"{held}/") | {"train/readme.txt": "no"})
    train, test = (load(str(tmp_path), split, 8, tmp_path) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    assert train.class_names == ["a", "b"] and train.groups is None
    assert train.images[:, 2, 3, 4].tolist() == [0, 1, 2, 20, 21, 22]


def test_test_wins_over_val(tmp_path):
    write(tmp_path, classes(3, "train/") | classes(2, "val/") | classes(1, "test/"))
    assert len(load(str(tmp_path), "test", 8, tmp_path).images) == 2


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_loose_image_beside_class_folders_has_no_class_and_is_left_out(tmp_path, prefix):
    write(tmp_path, classes(5, prefix) | {f"{prefix}cover.png": flat(99)})
    splits = [load(str(tmp_path), split, 8, tmp_path) for split in ("train", "test")]
    assert [split.labels.tolist() for split in splits] == [[0] * 4 + [1] * 4, [0, 1]]
    assert all(99 not in split.images for split in splits) and describe(str(tmp_path)).classes == 2


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_an_80_20_split_is_disjoint_complete_deterministic_and_within_class(tmp_path, prefix):
    write(tmp_path, classes(10, prefix))
    splits = [load(str(tmp_path), s, 8, tmp_path, seed=s == "test") for s in ("train", "test")]
    values = [split.images[:, 0, 0, 0].tolist() for split in splits]
    assert [np.bincount(split.labels).tolist() for split in splits] == [[8, 8], [2, 2]]
    assert sorted(values[0] + values[1]) == [*range(10), *range(20, 30)]
    assert values[1] != [8, 9, 28, 29] and values[1] != [0, 1, 20, 21]
    again = load(str(tmp_path), "test", 8, tmp_path, seed=5)
    assert again.images[:, 0, 0, 0].tolist() == values[1]


def test_images_without_classes_all_train_and_a_fifth_of_them_is_test(tmp_path):
    write(tmp_path, {f"{k}.png": flat(k) for k in range(20)} | {".hidden.png": b"x", "a.txt": b""})
    train, test = (load(str(tmp_path), split, 8, tmp_path) for split in ("train", "test"))
    assert sorted(train.images[:, 0, 0, 0]) == list(range(20)) and len(test.images) == 4
    assert (
        train.labels is None and train.class_names == [] and describe(str(tmp_path)).classes is None
    )
    assert len(load(str(tmp_path), "train", 8, tmp_path, limit=7).images) == 7


def test_every_suffix_and_mode_is_read(tmp_path):
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    for suffix in ("png", "JPG", "jpeg", "bmp", "gif", "webp", "tif", "TIFF"):
        image.save(tmp_path / f"x.{suffix}")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.quantize(4).save(tmp_path / "palette.png", transparency=b"\x00\x80")
    split = load(str(tmp_path), "train", 8, tmp_path)
    assert split.images.shape == (11, 3, 8, 8)
    assert abs(split.images[:, :, 4, 4].astype(int) - [200, 100, 50]).max() < 12


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert describe(str(tmp_path)).channels == 1
    image = load(str(tmp_path), "train", 8, tmp_path).images[0, 0]
    assert abs(image.astype(float) - deep / 257).max() <= 1


def test_a_damaged_image_is_named_by_load_and_by_describe(tmp_path):
    noise = encode(RNG.integers(0, 256, (64, 64, 3)), "jpeg")
    write(tmp_path, {"a/1.jpg": noise, "a/2.jpg": noise[:-900]})
    with pytest.raises(DataError, match="a/2.jpg is damaged.*delete it"):
        [load(str(tmp_path), split, 8, tmp_path) for split in ("train", "test")]
    write(tmp_path, {"a/2.jpg": b"nothing"})
    with pytest.raises(DataError, match="a/2.jpg is damaged"):
        describe(str(tmp_path))


def test_resizing_averages_over_all_pixels_and_ignores_the_aspect(tmp_path):
    board = np.indices((64, 128)).sum(0) % 2 * 255  # one-pixel checks: mean 127.5
    write(tmp_path, {"a.png": encode(board), "b.png": flat(77, 4, 1)})
    images = load(str(tmp_path), "train", 16, tmp_path).images
    assert images.shape == (2, 1, 16, 16) and images.std((1, 2, 3)).max() < 20
    assert sorted(images.mean((1, 2, 3)).round(-1)) == [80, 130] and (images == 77).sum() == 256


# ---------------------------------------------------------------------------------------- describe


def test_describe_touches_no_disk_for_a_known_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mnist", {"a.png": flat(0, 100)})  # a known name wins over a folder
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr(Path, "is_dir", None)
    monkeypatch.setattr("os.stat", None)
    assert [describe(name) for name in sets.INFOS] == list(sets.INFOS.values())
    assert [describe(n).side for n in ("glyphs", "tiny-imagenet", "oct2017")] == [32, 64, 256]
    assert [n for n in sets.INFOS if not describe(n).flip] == ["glyphs", "mnist"]
    assert [n for n in sets.INFOS if describe(n).channels == 1] == ["glyphs", "mnist", "oct2017"]


@pytest.mark.parametrize(("sides", "row"), [((8, 32, 90), 32), ((33, 20, 64), 64), ((65, 65), 256)])
def test_describe_takes_the_median_shorter_side(tmp_path, sides, row):
    folder = tmp_path / "holiday"
    write(folder, {f"c/{k}.png": encode(np.zeros((s, s + 50))) for k, s in enumerate(sides)})
    assert describe(str(folder)) == sets.Info("holiday", 1, 1, row, True)
    write(folder, {"d/0.png": encode(np.zeros((sides[0], 99, 3)))})
    info = describe(str(folder))
    assert (info.channels, info.classes) == (3, 2)


def test_a_name_that_is_nothing_lists_the_sets(tmp_path):
    with pytest.raises(DataError, match="minst.*glyphs, mnist, cifar10"):
        describe("minst")
    with pytest.raises(DataError, match="no images in"):
        describe(str(tmp_path))
    with pytest.raises(DataError, match="'val'.*train or test"):
        load("glyphs", "val", 32)


# ------------------------------------------------------------------------------------------- limit


def test_a_limit_is_a_seeded_sample_equal_over_the_classes(tmp_path):
    files, pixels = mnist_files(200)
    labels = np.repeat([0, 1, 2, 3], [100, 60, 37, 3])
    write(tmp_path / "mnist", files | {LABELS: gzip.compress(idx(labels))})
    split = load("mnist", "train", 28, tmp_path, limit=41)
    assert sorted(np.bincount(split.labels)) == [3, 12, 13, 13]  # the small class gives all it has
    where = [int((pixels == image).all((1, 2)).argmax()) for image in split.images[:, 0]]
    assert where == sorted(set(where)) and np.array_equal(labels[where], split.labels)
    assert where[:13] != list(range(13))
    again, other = (load("mnist", "train", 28, tmp_path, limit=41, seed=s).images for s in (0, 1))
    assert np.array_equal(again, split.images) and not np.array_equal(other, split.images)
    for limit in (0, 200, 999):
        assert np.array_equal(load("mnist", "train", 28, tmp_path, limit=limit).labels, labels)


# ---------------------------------------------------------------------------------------- archives


def test_an_archive_reads_alike_as_folder_zip_and_tar(tmp_path):
    files = {"b/x.bin": b"1" * 3000, "a.txt": b"2", ".hidden": b"3", "__MACOSX/a.txt": b"4"}
    write(tmp_path / "folder", files)
    make_zip(tmp_path / "a.zip", files)
    make_tar(tmp_path / "a.tar", files)
    make_tar(tmp_path / "a.tgz", files, prefix="./")
    for name in ("folder", "a.zip", "a.tar", "a.tgz"):
        archive = Archive(tmp_path / name)
        assert list(archive.members) == ["a.txt", "b/x.bin"], name
        assert archive.read("b/x.bin") == b"1" * 3000 and archive.read("a.txt") == b"2"


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_the_limits_of_an_archive_hold(tmp_path, monkeypatch, make):
    path = tmp_path / ("a.zip" if make is make_zip else "a.tar.gz")
    make(path, {f"{k}.txt": bytes(1000 * k) for k in range(6)})
    assert len(Archive(path).members) == 6
    monkeypatch.setattr("files.MAX_MEMBERS", 5)
    with pytest.raises(DataError, match="more than 5 files"):
        Archive(path).members  # noqa: B018
    monkeypatch.undo()
    monkeypatch.setattr("files.MAX_BYTES", 4999)
    with pytest.raises(DataError, match="5.txt has 5,000 bytes"):
        Archive(path).members  # noqa: B018


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_archive_cut_short_is_refused_wherever_the_cut_is(tmp_path, name):
    path = tmp_path / name
    files = {f"{k}.bin": RNG.bytes(1000) for k in range(4)}
    (make_zip if name == "a.zip" else make_tar)(path, files)
    whole = path.read_bytes()
    used = {"a.zip": len(whole), "a.tar": 4 * 1536}.get(name, len(whole) - 100)  # then only zeros
    for size in (used - 10, used - 700, used * 3 // 4 + 100, used // 2, 1536 * 2 + 100, 700):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="damaged"):
            [Archive(path).read(file) for file in files]


def test_a_member_whose_bytes_changed_is_refused(tmp_path):
    make_zip(tmp_path / "bccd/a.zip", bccd_files())
    path = tmp_path / "bccd/a.zip"
    raw = bytearray(path.read_bytes())
    raw[300:330] = bytes(30)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="a.zip"):
        load("bccd", "train", 8, tmp_path)


# ------------------------------------------------------------------------------------------- cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A folder of 20 images that counts as large, its data folder, and a counter of decodings."""
    monkeypatch.setattr(data, "CACHE_FILES", 4)
    write(tmp_path / "set", classes(10))
    calls, fit = [], data.fit
    monkeypatch.setattr(data, "fit", lambda *args: calls.append(1) or fit(*args))
    return tmp_path / "set", tmp_path / "data", calls


def test_the_second_load_comes_from_the_cache(cached):
    folder, data_dir, calls = cached
    first = load(str(folder), "train", 8, data_dir)
    assert len(calls) == 16 and isinstance(first.images, np.memmap)
    second = load(str(folder), "train", 8, data_dir)
    assert len(calls) == 16 and np.array_equal(first.images, second.images)
    assert sorted(first.images[:, 0, 0, 0]) != sorted(np.zeros(16))
    with pytest.raises(ValueError, match="read-only"):
        second.images[0] = 0
    load(str(folder), "train", 16, data_dir)
    assert len(calls) == 32  # another size is another file
    assert len(list((data_dir / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_a_damaged_cache_is_made_again(cached, damage):
    folder, data_dir, calls = cached
    first = np.array(load(str(folder), "train", 8, data_dir).images)
    (file,) = (data_dir / "cache").iterdir()
    if damage == "cut":
        cut(file)
    else:
        file.write_bytes(b"" if damage == "empty" else b"garbage" * 99)
    assert np.array_equal(load(str(folder), "train", 8, data_dir).images, first)
    assert len(calls) == 32


def test_changed_files_are_decoded_anew(cached):
    folder, data_dir, calls = cached
    write(folder, classes(10, "train/") | classes(2, "test/"))
    first = np.array(load(str(folder), "train", 8, data_dir).images)
    time.sleep(0.02)  # a later time stamp
    write(folder, {"train/a/0.png": flat(222)})
    second = load(str(folder), "train", 8, data_dir).images
    assert len(calls) == 40 and second[0].max() == 222 and np.array_equal(first[1:], second[1:])
    write(folder, {"train/b/new.png": flat(9)})
    assert len(load(str(folder), "train", 8, data_dir).images) == 21


@pytest.mark.parametrize("stop", [KeyboardInterrupt, None])
def test_an_interrupted_decoding_leaves_nothing(cached, monkeypatch, stop):
    folder, data_dir, calls = cached
    if stop:
        fit = data.fit
        stopped = lambda *a: fit(*a) if len(calls) < 9 else (_ for _ in ()).throw(stop)  # noqa: E731
        monkeypatch.setattr(data, "fit", stopped)
    else:
        write(folder, {"a/3.png": b"damaged"} | {"a/4.png": b"damaged"})
    monkeypatch.setattr(data, "describe", lambda name: sets.Info("set", 3, 2, 32, True))
    with pytest.raises(stop or DataError):
        load(str(folder), "train", 8, data_dir)
    assert list((data_dir / "cache").iterdir()) == []


def test_a_data_folder_that_cannot_be_written_does_without_a_cache(cached, capsys):
    folder, data_dir, _ = cached
    data_dir.write_text("a file where a folder should be")
    images = load(str(folder), "train", 8, data_dir).images
    assert len(images) == 16 and not isinstance(images, np.memmap)
    assert "no cache in" in capsys.readouterr().err


def test_an_archive_is_decoded_in_its_own_order_into_the_right_places(tmp_path):
    names = sorted(oct_files(), reverse=True)
    make_tar(tmp_path / "oct2017/x.tar.gz", {f"OCT2017/{n}": oct_files()[n] for n in names})
    assert load("oct2017", "train", 8, tmp_path).images[:, 0, 0, 0].tolist() == [0, 10, 20, 30]


# --------------------------------------------------------------------------------------- downloads


class Server:
    """http://127.0.0.1 that answers a path with its behaviours, one a request, the last for ever:
    bytes are served, a number is a status, "break" stops in the middle, "stall" sends no more."""

    def __init__(self):
        self.plan, self.requests, self.done = {}, [], threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                steps = outer.plan.get(self.path, [404])
                step = steps.pop(0) if len(steps) > 1 else steps[0]
                if isinstance(step, int):
                    self.send_error(step)
                    return
                body = step if isinstance(step, bytes) else b"x" * 200_000
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if isinstance(step, bytes) else body[:100_000])
                if step == "stall":
                    outer.done.wait(20)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.done.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr("files.TIMEOUT", 0.4)
    monkeypatch.setattr("files.time.sleep", lambda seconds: None)
    yield server
    server.close()


def offer(monkeypatch, server, name, files, mirrors=("/one/",)):
    """Let DOWNLOADS point to the server, which serves `files` under its last mirror."""
    md5s = {file: hashlib.md5(raw).hexdigest() for file, raw in files.items()}
    mirrors = [server.url + m for m in mirrors]
    monkeypatch.setattr(sets, "DOWNLOADS", {name: (mirrors, md5s)})
    path = mirrors[-1].removeprefix(server.url)
    server.plan |= {path + file: [raw] for file, raw in files.items()}


def cifar_archive(tmp_path):
    make_tar(tmp_path / "made.tar.gz", cifar_files("cifar10")[0])
    return {ARCHIVES["cifar10"]: (tmp_path / "made.tar.gz").read_bytes()}


def test_a_download_gives_the_set_and_is_not_repeated(tmp_path, monkeypatch, server):
    files, pixels = mnist_files()
    offer(monkeypatch, server, "mnist", files)
    for _ in range(2):
        assert np.array_equal(load("mnist", "train", 28, tmp_path).images, pixels[:, None])
    assert sorted(server.requests) == sorted(f"/one/{file}" for file in files)
    assert sorted(p.name for p in (tmp_path / "mnist").iterdir()) == sorted(files)


def test_only_missing_files_are_downloaded_and_those_by_hand_are_not_checked(
    tmp_path, monkeypatch, server
):
    files, _ = mnist_files()
    offer(monkeypatch, server, "mnist", files)
    by_hand = gzip.compress(idx(np.full(20, 3)))
    write(tmp_path / "mnist", {LABELS: by_hand})
    write(tmp_path / "MNIST/raw", {IMAGES[:-3]: gzip.decompress(files[IMAGES])})
    assert set(load("mnist", "train", 28, tmp_path).labels) == {3} and server.requests == []
    load("mnist", "test", 28, tmp_path)
    assert len(server.requests) == 2 and all("t10k" in path for path in server.requests)


BAD = {"broken off": "break", "md5": b"something else", "404": 404, "timed out": "stall"}


@pytest.mark.parametrize(("reason", "behaviour"), list(BAD.items()))
def test_a_failing_download_is_tried_three_times_and_leaves_nothing(
    tmp_path, monkeypatch, server, reason, behaviour
):
    files = cifar_archive(tmp_path)
    offer(monkeypatch, server, "cifar10", files)
    server.plan[f"/one/{ARCHIVES['cifar10']}"] = [behaviour]
    words = {"broken off": "broke off after|IncompleteRead"}.get(reason, reason)
    with pytest.raises(DataError, match=f"cifar10 is not in .*downloaded.*({words}).*put cifar-10"):
        load("cifar10", "train", 32, tmp_path)
    assert len(server.requests) == 3 and list((tmp_path / "cifar10").iterdir()) == []


@pytest.mark.parametrize("behaviour", list(BAD.values()))
def test_the_next_try_succeeds(tmp_path, monkeypatch, server, behaviour):
    files = cifar_archive(tmp_path)
    offer(monkeypatch, server, "cifar10", files)
    server.plan[f"/one/{ARCHIVES['cifar10']}"].insert(0, behaviour)
    assert len(load("cifar10", "train", 32, tmp_path).images) == 15 and len(server.requests) == 2
    assert [p.name for p in (tmp_path / "cifar10").iterdir()] == list(files)


def test_a_dead_mirror_is_passed_over_for_the_second(tmp_path, monkeypatch, server):
    files, _ = mnist_files()
    offer(monkeypatch, server, "mnist", files, ("/dead/", "/good/"))
    load("mnist", "train", 28, tmp_path)
    assert len(server.requests) == 8 and server.requests[0].startswith("/dead/")


def test_without_a_network_the_error_names_files_and_addresses_after_the_first_file(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("files.time.sleep", lambda seconds: None)
    tries = []

    def fail(url, timeout):
        tries.append(url)
        raise OSError("Name or service not known")

    monkeypatch.setattr("files.urllib.request.urlopen", fail)
    with pytest.raises(DataError) as error:
        load("mnist", "train", 28, tmp_path)
    text = str(error.value)
    assert "\n" not in text and "Name or service not known" in text and "needs no data" in text
    assert all(file in text for file in sets.DOWNLOADS["mnist"][1]) and "https://ossci" in text
    assert [t.split("/")[2] for t in tries] == [
        "ossci-datasets.s3.amazonaws.com",
        "storage.googleapis.com",
        "yann.lecun.com",
    ]


def test_a_silent_name_server_does_not_hold_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr("files.TIMEOUT", 0.1)
    monkeypatch.setattr("files.urllib.request.urlopen", lambda *a, **k: threading.Event().wait(5))
    start = time.monotonic()
    monkeypatch.setattr("files.TRIES", 1)
    with pytest.raises(DataError, match="no answer in 0.1 s"):
        load("cifar100", "train", 32, tmp_path)
    assert time.monotonic() - start < 2


def test_ctrl_c_during_a_download_leaves_nothing(tmp_path, monkeypatch, server):
    files = cifar_archive(tmp_path)
    offer(monkeypatch, server, "cifar10", files)

    def interrupted(items, *rest):
        yield next(iter(items))
        raise KeyboardInterrupt

    monkeypatch.setattr("files.progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10", "train", 32, tmp_path)
    assert list((tmp_path / "cifar10").iterdir()) == []


def test_progress_shows_count_rate_and_time_left_only_when_it_takes_long(monkeypatch, capsys):
    def run(seconds):
        clock = iter(np.arange(0, 1000, seconds))
        monkeypatch.setattr("files.time.monotonic", lambda: float(next(clock)))
        assert list(progress(range(10), "decoding", 10, "images", lambda i: 1)) == [*range(10)]
        return capsys.readouterr().err

    assert run(0.1) == ""
    assert "decoding: 5 of 10 images, 1.0 images/s, 5 s left" in run(1.0)


# ----------------------------------------------------------------------- seeds, batches, pictures


def test_mix_seed_depends_on_every_number_their_order_and_their_count():
    seeds = [mix_seed(*n) for n in ((5,), (5, 0), (0, 5), (5, 1), (), (2**40, 5), (-1,), (51,))]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert mix_seed(5, 1) == mix_seed(np.int64(5), torch.tensor(1)) == seeds[3]
    torch.Generator().manual_seed(max(seeds))


def test_to_uint8_inverts_to_float_for_all_values_and_clips():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    y = data.to_float(x)
    assert y.dtype == torch.float32 and y.min() == -1 and y.max() == 1
    assert torch.equal(y, x.float() / 127.5 - 1) and torch.equal(data.to_uint8(y), x)
    assert data.to_uint8(torch.tensor([-9.0, 9.0, 0.001])).tolist() == [0, 255, 128]


@pytest.mark.parametrize("n", [1, 3, 10])
def test_a_permutation_stream_is_pure_and_holds_every_entry_once_an_epoch(n):
    stream = permutation_stream(n, 0, 70, seed=3)
    assert stream.dtype == torch.int64 and stream.shape == (70,)
    for start in range(0, 70 // n * n, n):
        assert sorted(stream[start : start + n].tolist()) == list(range(n))
    for start, count in ((0, 7), (5, 20), (n, n), (69, 1), (12, 0)):
        assert torch.equal(permutation_stream(n, start, count, 3), stream[start : start + count])
    if n == 10:
        assert not torch.equal(stream[:10], stream[10:20])
        assert not torch.equal(stream, permutation_stream(n, 0, 70, seed=4))
    permutation_stream(n, 0, 5, 3).zero_()  # the caller's copy, not the memory of the function
    assert torch.equal(permutation_stream(n, 0, 70, 3), stream)


CPU = torch.device("cpu")


def numbered(n, side=4):
    """Images whose first pixel is their number and whose columns differ."""
    images = np.tile(np.arange(side, dtype=np.uint8), (n, 1, side, 1))
    images[:, 0, 0, 0] = np.arange(n)
    return images


def test_batches_follow_the_stream_with_exact_values():
    images = RNG.integers(0, 256, (10, 3, 4, 4), np.uint8)
    batches = Batches(images, 4, 7, CPU, flip=False)
    assert len(batches) == 10
    for step in (0, 2, 5):
        x = batches(step)
        index = permutation_stream(10, 4 * step, 4, 7)
        assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
        assert torch.equal(x, torch.from_numpy(images[index.numpy()]).float() / 127.5 - 1)
    assert Batches(images[:3], 8, 7, CPU, flip=False)(1).shape == (8, 3, 4, 4)


def test_batches_flip_exactly_where_asked_and_only_if_the_set_allows_it():
    flips = torch.tensor([True, False, True, False])
    plain = Batches(numbered(8), 4, 0, CPU, flip=False)(1)
    x = Batches(numbered(8), 4, 0, CPU, flip=True)(1, flips)
    assert torch.equal(x[flips], plain[flips].flip(-1)) and torch.equal(x[~flips], plain[~flips])
    assert not torch.equal(x, plain)
    assert torch.equal(Batches(numbered(8), 4, 0, CPU, flip=False)(1, flips), plain)
    assert torch.equal(Batches(numbered(8), 4, 0, CPU, flip=True)(1), plain)


def test_the_parts_of_two_processes_make_the_whole_batch():
    flips = torch.tensor([True, False, False, True, True, False])
    batches = Batches(numbered(20), 6, 1, CPU, flip=True)
    parts = [batches(3, flips, part) for part in (slice(0, 3), slice(3, 6))]
    assert torch.equal(torch.cat(parts), batches(3, flips)) and len(parts[0]) == 3


def test_batches_take_a_read_only_memmap_without_copy_or_warning(tmp_path, recwarn):
    np.save(tmp_path / "x.npy", numbered(8))
    images = np.load(tmp_path / "x.npy", mmap_mode="r")
    batches = Batches(images, 4, 0, CPU, flip=False)
    assert batches.images.data_ptr() == images.ctypes.data and batches.images.dtype == torch.uint8
    assert torch.equal(batches(0), Batches(numbered(8), 4, 0, CPU, flip=False)(0))
    assert not recwarn.list


def test_save_grid_puts_images_where_they_belong(tmp_path):
    rows = torch.zeros(5, 3, 4, 6, dtype=torch.uint8)
    rows[:, 0] = torch.arange(5).view(5, 1, 1) * 10
    rows[4, 1, 3, 5] = 200
    data.save_grid(rows, tmp_path / "new/x.png", columns=3, scale=2)
    page = np.asarray(Image.open(tmp_path / "new/x.png"))
    assert page.shape == (2 * 8 + 2, 3 * 12 + 2 * 2, 3)
    assert page[0, 0].tolist() == [0, 0, 0] and page[0, 14].tolist() == [10, 0, 0]
    assert page[10, 0].tolist() == [30, 0, 0] and page[17, 25].tolist() == [40, 200, 0]
    assert page[0, 12:14].min() == 255 and page[8:10].min() == 255 and page[10:, 26:].min() == 255
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.png"]


def test_save_grid_takes_grey_floats_and_leaves_nothing_when_it_fails(tmp_path):
    data.save_grid(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1), tmp_path / "y.png", columns=2)
    assert np.asarray(Image.open(tmp_path / "y.png"))[0, :, 1].tolist() == [0, 255, 255, 255]
    with pytest.raises(RuntimeError):
        data.save_grid(torch.zeros(2, 4, 1, 1), tmp_path / "z.png", columns=2)
    assert [p.name for p in tmp_path.iterdir()] == ["y.png"]
