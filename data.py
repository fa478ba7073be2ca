"""Images for the networks: one uint8 array a split, decoded once; batches on a device; pictures.

`load` gives a split of any set of sets.py as one array (N, C, S, S), from a memory-mapped cache
where the set is large; `Batches` serves it, from the device where it fits; `save_grid` draws.
Every way to fail raises DataError with one line to print.

Shapes: N images, B batch, C channels, H W pixels, S = H = W.
"""

import hashlib
import io
import math
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from files import BROKEN, DataError, damaged, progress, written_whole
from sets import Source, describe, open_set

CPU = torch.device("cpu")
CACHE_FILES, CACHE_BYTES = 2_000, 256 * 2**20  # more takes long, or much memory: decoded only once


@dataclass
class Split:
    """The training or the test images of a set."""

    images: np.ndarray  # uint8 (N, C, S, S), maybe a read-only np.memmap
    labels: np.ndarray | None  # int64 (N,); None: unlabelled
    groups: np.ndarray | None  # int64 (N,), equal for images of one source picture or patient
    class_names: list[str]


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed out of several numbers; their order and their count matter."""
    digest = hashlib.sha256(",".join(str(int(n)) for n in numbers).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
        """Decode one (index, bytes or pixels) into its place."""
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
def permutation(n: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The order of one epoch, int64 (n,): drawn on the CPU, so that it is the same everywhere."""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    return torch.randperm(n, generator=generator).to(device)


def permutation_stream(
    n: int, start: int, count: int, seed: int, device: torch.device = CPU
) -> Tensor:
    """Entries start .. start + count - 1 of one endless stream of permutations of range(n), int64
    (count,). A pure function: a resumed run has nothing to restore. n may be below count."""
    end, pieces = start + count, []
    for epoch in range(start // n, end // n + 1):
        begin = epoch * n
        pieces.append(permutation(n, seed, epoch, device)[max(0, start - begin) : end - begin])
    return torch.cat(pieces)


class Batches:
    """Batches of uint8 images (N, C, S, S) as float32 in [-1, 1] on a device.

    The images move there once if they fit (into half of a GPU's free memory), still as uint8:
    then a step copies nothing from the host. Otherwise each batch is copied through pinned memory,
    while the device is still busy with the step before.
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

    def index(self, step: int, part: slice = slice(None)) -> Tensor:
        """Which images make `part` of batch number `step`: int64 (b,), where the images are."""
        start, home = step * self.batch_size, self.images.device
        return permutation_stream(len(self), start, self.batch_size, self.seed, home)[part]

    def __call__(self, step: int, flips: Tensor | None = None, part: slice = slice(None)) -> Tensor:
        """`part` of batch number `step` -> float32 (b, C, S, S), mirrored left-right where flips,
        bool (B,) on the device, says so (and the set allows it)."""
        index, home = self.index(step, part), self.images.device
        if home == self.device:
            x = self.images[index]
        else:
            shape = (len(index), *self.images.shape[1:])
            x = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            x = torch.index_select(self.images, 0, index, out=x).to(self.device, non_blocking=True)
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
