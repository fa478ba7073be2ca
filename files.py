"""Files: written whole or not at all, downloaded with care, read out of archives in place.

Every way to fail raises DataError with one line to print.
"""

import gzip
import hashlib
import http.client
import os
import queue
import re
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

MAX_BYTES = 256 * 2**20  # of one file in an archive: the largest real one, cifar100's, has 154 MB
MAX_MEMBERS = 1_000_000  # files in an archive: the largest real one, tiny-imagenet, has 120,000
TIMEOUT, TRIES = 8.0, 3  # seconds a server may be silent; 3 x (connect + read) stays below a minute
BROKEN = (OSError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile)
BROKEN += (tarfile.TarError, http.client.HTTPException)  # what readers of damaged input raise


class DataError(Exception):
    """One line for the user: what happened, the offending value, the way out."""


def damaged(where: object, reason: object) -> DataError:
    """The error for a file whose content cannot be right."""
    return DataError(f"{where} is damaged ({reason}): delete it, then run or get it again")


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


def download(
    name: str, files: list[str], mirrors: tuple[str, ...], md5s: dict[str, str], folder: Path
) -> None:
    """Fetch files of a set into folder, each in at most TRIES tries over its mirrors.

    A file gets its name only when it is whole and its md5 is right. Raises DataError at the first
    file that fails for good.
    """
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
