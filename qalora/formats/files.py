"""Files that are read with suspicion and written whole.

Reading: a name that comes out of a file (a shard index, ONNX external data) must stay inside its folder, or inside the
Hub cache that the folder belongs to, whose snapshots link to its blobs. Nothing is memory-mapped: a file that
shrinks under a map kills the process, and mapped pages count as resident memory.

Writing: a file gets its full size before the first byte, so that a full disk is found at once, and every part is
written at an offset known beforehand.

This module knows no format.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qalora.errors import FormatError, InputError, OutputError, shown
from qalora.formats.remote import ranges_of
from qalora.formats.share import Share

__all__ = [
    "MAX_NAME",
    "InputFile",
    "OutputFile",
    "check_content",
    "check_dimensions",
    "contained",
    "files_below",
    "may_be_of_the_hub",
    "read_limited",
]


MAX_NAME, MAX_PATH = 255, 2048
"""Bytes of a part of a path that file systems take; characters of a name here, which leave room for the folder."""

MAX_DIMENSIONS = 8
"""Of a stored tensor; the product of a million sizes would take minutes, and torch has no more than 64."""


POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
"""What a Git LFS pointer begins with. Source: git-lfs, docs/spec.md."""

POINTER_SIZE = 1024
"""Bytes that a pointer has fewer than."""


def check_content(path: Path) -> None:
    """FormatError for a file that is a Git LFS pointer: a few lines in the place of the file that they stand for.

    `InputFile` asks this of every file that it opens; this is for those that others open, or that are only carried.
    """
    with InputFile(path):
        pass


def contained(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`, refused if it is absolute, climbs out, or is a link that leads outside.

    A link may lead anywhere inside the folder, and from a Hub cache's `snapshots/<revision>` and from folders below it
    into that cache's `blobs`.
    """
    parts = PurePosixPath(name).parts
    try:
        too_long = max((len(os.fsencode(part)) for part in parts), default=0) > MAX_NAME or len(name) > MAX_PATH
    except UnicodeEncodeError:
        raise FormatError(f"{folder.name}: file name {name!r}", expected="a plain name inside the folder") from None
    if not name or "\\" in name or "\0" in name or name.startswith("/") or ".." in parts:
        raise FormatError(f"{folder.name}: file name {name!r}", expected="a plain name inside the folder")
    if too_long:
        raise FormatError(f"{folder.name}: file name {shown(name)}", expected="a name that a file can have")
    path = folder / name
    real, root = path.resolve(), folder.resolve()
    blobs = _blobs_of(root)
    if not (real.is_relative_to(root) or (blobs is not None and real.is_relative_to(blobs))):
        raise FormatError(
            f"{path}", expected="a file inside the model's folder", got=f"a link to {real}", todo="copy the file there"
        )
    return path


def _blobs_of(folder: Path) -> Path | None:
    """The blobs of the Hub cache `models--<owner>--<name>` in whose `snapshots/<revision>` a resolved folder lies."""
    for place in (folder, *folder.parents):
        cache = place.parent.parent
        if place.parent.name == "snapshots" and cache.name.startswith("models--"):
            return cache / "blobs"
    return None


def files_below(folder: Path) -> list[str]:
    """The names of all regular files below a folder, sorted, with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def may_be_of_the_hub(name: str) -> bool:
    """Whether it has the form of a Hub id, name or owner/name, and not that of a path."""
    return not (name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/"))


def check_dimensions(where: str, shape: Sequence[int]) -> None:
    """FormatError for a stored tensor of more than MAX_DIMENSIONS, before anybody multiplies its sizes."""
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(where, expected=f"at most {MAX_DIMENSIONS} dimensions", got=str(len(shape)))


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a small regular file, refused if it holds more than `limit`."""
    with InputFile(path) as file:
        if file.size > limit:
            raise FormatError(str(path), expected=f"at most {limit} bytes", got=str(file.size))
        return file.read(0, file.size)


class InputFile:
    """A regular file, read by offset; every read is checked against the size the file had when it was opened. The file
    may lie at a URL, see `qalora.formats.remote`.

    Raises InputError for what cannot be opened, FormatError for a Git LFS pointer in its place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._ranges = ranges_of(path)
        if self._ranges is not None:
            self.size = self._ranges.size
            return
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # before the open, which would wait for a named pipe's writer
                raise InputError(str(path), expected="a regular file", got="a folder or device")
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
        self.size = status.st_size
        if self.size < POINTER_SIZE and self._file.read(max(map(len, POINTERS))).startswith(POINTERS):
            self._file.close()
            raise FormatError(
                f"{path}: a Git LFS pointer instead of the file",
                todo="fetch the file itself: git lfs pull, or download it from the Hub",
            )

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; FormatError if the file does not hold them."""
        return bytes(self.tensor(offset, length).numpy())

    def tensor(self, offset: int, length: int) -> Tensor:
        """`length` bytes from `offset` as a uint8 tensor [length] of its own memory."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                str(self.path),
                expected=f"bytes {offset}..{offset + length}",
                got=f"a file of {self.size} bytes",
                todo="it is truncated or its header is wrong; download it again",
            )
        if self._ranges is not None:
            data = bytearray(self._ranges.read(offset, length))
            return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        out = torch.empty(length, dtype=torch.uint8)
        view = out.numpy().data
        self._file.seek(offset)
        done = 0
        while done < length:
            count = self._file.readinto(view[done:])
            if not count:
                raise FormatError(f"{self.path}: the file shrank while it was read")
            done += count
        return out

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class OutputFile:
    """A new file of a size known beforehand, written by offset; `close` refuses one that is not full.

    Bytes may come in any order, from several threads, and, with a share, from several processes. Never writes over an
    existing file. Raises OutputError when the disk is full.
    """

    def __init__(self, path: Path, size: int, share: Share | None = None) -> None:
        self.path = path
        self.size = size
        self._share = share or Share()
        self._written = 0
        self._lock = threading.Lock()
        try:
            self._file = path.open("xb" if self._share.frame else "r+b", buffering=0)
        except FileExistsError as error:
            raise OutputError(f"{path}: exists already") from error
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}") from error
        try:
            if self._share.frame:
                self._reserve()
            elif os.fstat(self._file.fileno()).st_size != size:
                raise OutputError(f"{path}", expected=f"the file of {size} bytes that another process made")
        except BaseException:
            self._file.close()
            raise

    def _reserve(self) -> None:
        if hasattr(os, "posix_fallocate") and self.size:
            try:
                os.posix_fallocate(self._file.fileno(), 0, self.size)
                return
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                    raise self._no_room(error) from error
        self._file.truncate(self.size)  # an operating system or file system that cannot reserve

    def _no_room(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}",
            expected=f"room for {self.size} bytes",
            got=f"none ({error.strerror})",
            todo="free some space",
        )

    def write(self, offset: int, data: Tensor | bytes | memoryview) -> int:
        """Write a contiguous tensor's bytes, or plain bytes, at `offset`; gives the number of bytes written."""
        view = _bytes_of(data)
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"{self.path}: bytes {offset}..{offset + len(view)} of a file of {self.size}")
        done = 0
        with self._lock:
            try:
                self._file.seek(offset)
                while done < len(view):
                    done += self._file.write(view[done:])
            except OSError as error:
                raise self._no_room(error) from error
            self._written += len(view)
        return len(view)

    def write_all(self, offset: int, parts: Sequence[Tensor | bytes]) -> int:
        """Write parts one behind the other from `offset`; gives the number of bytes written."""
        start = offset
        for part in parts:
            offset += self.write(offset, part)
        return offset - start

    def zeros(self, offset: int, length: int) -> None:
        """Count `length` bytes at `offset` as written: a new file is zero where nothing was put."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{self.path}: bytes {offset}..{offset + length} of a file of {self.size}")
        with self._lock:
            self._written += length

    def close(self) -> None:
        """Close the file; ValueError if not every byte was written exactly once, unless others write into it."""
        self._file.close()
        self._share.close(self.path, self.size, self._written)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _bytes_of(data: Tensor | bytes | memoryview) -> memoryview:
    if isinstance(data, Tensor):
        return data.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return memoryview(data)
