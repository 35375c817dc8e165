"""The delta's format: what rebuilds each file, read with suspicion.

    DELTA/  delta.json   the records below, files sorted by path and one a line
            data.bin     zlib streams one behind the other, in the order of the operations, each with its `packed` bytes
            SHA256SUMS   of the two

The operations rebuild a file from its first byte to its last. A Q4_1 block is 20 bytes, of which a fold changes the
minimum's two: a patch of the columns [[2, 4]]. A data or patch operation makes at most TILE bytes, which bounds the
memory of whoever applies it. A delta is untrusted: `read_delta` checks every size, offset and path against the others
before anything is done with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal

from qalora.errors import FormatError
from qalora.formats.files import MAX_NAME, contained, read_limited
from qalora.formats.json_text import parse_json
from qalora.formats.record_json import Key, Only, decode, encode, like

__all__ = [
    "DATA",
    "INDEX",
    "MAX_COLUMNS",
    "SCHEMA",
    "SUMS",
    "TILE",
    "BaseFile",
    "Copy",
    "Data",
    "DeltaFile",
    "Op",
    "Patch",
    "checked_path",
    "index_bytes",
    "parse_index",
    "read_delta",
]


SCHEMA = "qalora.delta/1"
INDEX = "delta.json"
DATA = "data.bin"
SUMS = "SHA256SUMS"

TILE = 8 << 20
"""Bytes that one data or patch operation makes, at most."""

MAX_INDEX = 32 << 20
MAX_FILES = 10_000
MAX_OPS = 1 << 18
MAX_COLUMNS = 64
MAX_PATH = 1024
MAX_NUMBER = 1 << 53


def _is_plain(path: str) -> bool:
    return (
        0 < len(path) <= MAX_PATH
        and path.isprintable()
        and "\\" not in path
        and not path.startswith("/")
        and not {".", ".."} & set(path.split("/"))
        and str(PurePosixPath(path)) == path
        and all(len(os.fsencode(part)) <= MAX_NAME for part in path.split("/"))
    )


def _from(least: int) -> Only:
    return Only(lambda number: least <= number < MAX_NUMBER, f"a whole number of at least {least}, below 2^53")


PlainPath = Annotated[str, Only(_is_plain, "a plain path inside the release")]
Digest = Annotated[str, like("[0-9a-f]{64}", "64 hexadecimal digits")]
Place = Annotated[int, _from(0)]
Size = Annotated[int, _from(0), Key("bytes")]
Count = Annotated[int, _from(1)]
Made = Annotated[int, _from(1), Only(lambda number: number <= TILE, f"at most {TILE} bytes"), Key("bytes")]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFile:
    """The file of the base's folder that a file is rebuilt from."""

    path: PlainPath
    nbytes: Size
    sha256: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """`nbytes` of the base file from byte `at`."""

    op: Literal["copy"] = "copy"
    at: Place
    nbytes: Annotated[Count, Key("bytes")]
    packed: ClassVar[int] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """`nbytes` that the delta itself holds: what the stream unpacks to."""

    op: Literal["data"] = "data"
    nbytes: Made
    packed: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """Blocks of the base file from byte `at`, the byte columns a..b-1 of each as the delta holds them: see `coding`."""

    op: Literal["patch"] = "patch"
    at: Place
    block: Count
    blocks: Count
    columns: tuple[tuple[int, int], ...]
    packed: Count

    def __post_init__(self) -> None:
        if self.nbytes > TILE:
            raise FormatError("blocks", expected=f"at most {TILE} bytes", got=str(self.nbytes))
        if not 1 <= len(self.columns) <= MAX_COLUMNS:
            raise FormatError("columns", expected=f"1 to {MAX_COLUMNS}", got=str(len(self.columns)))
        at = 0
        for start, stop in self.columns:
            if not at <= start < stop <= self.block:
                expected = f"ascending [start, stop] of a block of {self.block}"
                raise FormatError("columns", expected=expected, got=f"{[start, stop]}"[:40])
            at = stop

    @property
    def nbytes(self) -> int:
        """Bytes that it makes, and reads from the base file."""
        return self.block * self.blocks

    @property
    def changed(self) -> int:
        """Bytes that the stream unpacks to."""
        return self.blocks * sum(stop - start for start, stop in self.columns)


Op = Copy | Data | Patch


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaFile:
    """One file of the result. base: the file that its copies and patches read, None where it needs none."""

    path: PlainPath
    nbytes: Size
    sha256: Digest
    base: BaseFile | None
    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        total = sum(op.nbytes for op in self.ops)
        if total != self.nbytes:
            raise FormatError("ops", expected=f"{self.nbytes} bytes together", got=str(total))
        there = 0 if self.base is None else self.base.nbytes
        for n, op in enumerate(self.ops):
            if not isinstance(op, Data) and op.at + op.nbytes > there:
                got = f"{op.nbytes} bytes from {op.at}"
                raise FormatError(f"ops[{n}]", expected=f"bytes of a base file of {there}", got=got)

    @property
    def packed(self) -> int:
        """Bytes of data.bin that belong to it."""
        return sum(op.packed for op in self.ops)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """delta.json. Raises FormatError where a path stands twice, on file systems that ignore case too, or is another
    one's folder.
    """

    schema: Literal["qalora.delta/1"] = "qalora.delta/1"
    files: tuple[DeltaFile, ...]

    def __post_init__(self) -> None:
        if len(self.files) > MAX_FILES:
            raise FormatError("files", expected=f"at most {MAX_FILES}", got=str(len(self.files)))
        if (count := sum(len(file.ops) for file in self.files)) > MAX_OPS:
            raise FormatError("files", expected=f"at most {MAX_OPS} operations", got=str(count))
        paths: set[str] = set()
        folders: set[str] = set()
        for path in (file.path.casefold() for file in self.files):
            if path in paths:
                raise FormatError(f"the path {path!r} appears twice")
            paths.add(path)
            folders |= {str(parent) for parent in PurePosixPath(path).parents}
        for path in sorted(paths & folders):
            raise FormatError(f"the path {path!r} is a file and a folder")


def index_bytes(files: Sequence[DeltaFile]) -> bytes:
    """delta.json: sorted by path, a line for each file."""
    lines = [
        json.dumps(encode(file), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        for file in sorted(files, key=lambda file: file.path)
    ]
    return ('{"files":[\n' + ",\n".join(lines) + f'\n],"schema":"{SCHEMA}"}}\n').encode()


def read_delta(folder: Path) -> tuple[DeltaFile, ...]:
    """Read delta.json and check all of it, and that data.bin has the size that it says; FormatError otherwise."""
    path = contained(folder, INDEX)
    files = parse_index(read_limited(path, MAX_INDEX), str(path))
    data, expected = contained(folder, DATA), sum(file.packed for file in files)
    if not data.is_file() or data.stat().st_size != expected:
        got = f"{data.stat().st_size} bytes" if data.is_file() else "no such file"
        raise FormatError(str(data), expected=f"{expected} bytes, as {INDEX} says", got=got, todo="fetch it again")
    return files


def parse_index(content: bytes, where: str) -> tuple[DeltaFile, ...]:
    """The files of delta.json; `where` names it in errors."""
    return decode(_Index, parse_json(content, where, strict=True, todo="fetch it again"), where).files


def checked_path(path: str, where: str) -> str:
    """A path as a delta may hold it: relative, plain, in its shortest form; FormatError otherwise."""
    return decode(PlainPath, path, where)
