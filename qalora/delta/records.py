"""The delta's format, schema "qalora.delta/1": what rebuilds each file, read with suspicion.

    DELTA/  delta.json   {"schema": "qalora.delta/1", "files": [file, ...]}, sorted by path, one file a line
            data.bin     zlib streams one behind the other, in the order of the operations
            SHA256SUMS   of the two

    file    {"path": inside the folder, "bytes", "sha256": of the result,
             "base": null, or {"path": inside the base's folder, "bytes", "sha256"}, "ops": [operation, ...]}

The operations rebuild a file from its first byte to its last. `packed` bytes of data.bin belong to one:

    {"op": "copy", "at", "bytes"}         so many bytes of the base file, from its byte `at`
    {"op": "data", "bytes", "packed"}     so many bytes, which the stream unpacks to
    {"op": "patch", "at", "block", "blocks", "columns": [[a, b], ...], "packed"}
                                          `blocks` blocks of `block` bytes each, copied from byte `at` of the base file,
                                          but for the columns a..b-1 of every block: see `coding`

A Q4_1 block is 20 bytes, of which a fold changes the minimum's two: columns [[2, 4]].

A data or patch operation makes at most TILE bytes, which bounds the memory of whoever applies it. A delta is untrusted:
`read_delta` checks every size, offset and path against the others before anything is done with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qalora.errors import FormatError
from qalora.formats.files import contained, read_limited
from qalora.formats.json_text import parse_json

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


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFile:
    """The file of the base's folder that a file is rebuilt from."""

    path: str
    nbytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As delta.json has it."""
        return {"path": self.path, "bytes": self.nbytes, "sha256": self.sha256}


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """`nbytes` of the base file from byte `at`."""

    at: int
    nbytes: int
    packed: int = 0

    @property
    def read(self) -> int:
        """Bytes of the base file that it needs, from `at`."""
        return self.nbytes

    def to_json(self) -> dict[str, Any]:
        """As delta.json has it."""
        return {"op": "copy", "at": self.at, "bytes": self.nbytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """`nbytes` that the delta itself holds."""

    nbytes: int
    packed: int

    def to_json(self) -> dict[str, Any]:
        """As delta.json has it."""
        return {"op": "data", "bytes": self.nbytes, "packed": self.packed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """Blocks of the base file from byte `at`, with the byte columns (a, b) of each replaced by what the delta holds."""

    at: int
    block: int
    blocks: int
    columns: tuple[tuple[int, int], ...]
    packed: int

    @property
    def nbytes(self) -> int:
        """Bytes that it makes, and reads from the base file."""
        return self.block * self.blocks

    @property
    def changed(self) -> int:
        """Bytes that the stream unpacks to."""
        return self.blocks * sum(stop - start for start, stop in self.columns)

    def to_json(self) -> dict[str, Any]:
        """As delta.json has it."""
        columns = [list(column) for column in self.columns]
        numbers = {"at": self.at, "block": self.block, "blocks": self.blocks, "packed": self.packed}
        return {"op": "patch", **numbers, "columns": columns}


Op = Copy | Data | Patch


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaFile:
    """One file of the result. base: the file that its copies and patches read, None where it needs none."""

    path: str
    nbytes: int
    sha256: str
    base: BaseFile | None
    ops: tuple[Op, ...]

    @property
    def packed(self) -> int:
        """Bytes of data.bin that belong to it."""
        return sum(op.packed for op in self.ops)

    def to_json(self) -> dict[str, Any]:
        """As delta.json has it."""
        base = None if self.base is None else self.base.to_json()
        ops = [op.to_json() for op in self.ops]
        return {"path": self.path, "bytes": self.nbytes, "sha256": self.sha256, "base": base, "ops": ops}


def index_bytes(files: Sequence[DeltaFile]) -> bytes:
    """delta.json: sorted by path, a line for each file."""
    lines = [
        json.dumps(file.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
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
    index = parse_json(content, where, strict=True, todo="fetch it again")
    index = _object(index, {"schema", "files"}, where)
    if index["schema"] != SCHEMA:
        raise FormatError(f"{where}: schema", expected=SCHEMA, got=repr(index["schema"])[:80])
    files = tuple(_file(file, f"{where}: files[{n}]") for n, file in enumerate(_list(index["files"], MAX_FILES, where)))
    _check_paths([file.path for file in files], where)
    if sum(len(file.ops) for file in files) > MAX_OPS:
        raise FormatError(where, expected=f"at most {MAX_OPS} operations", got="more")
    return files


def _object(value: object, keys: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != keys:
        got = ", ".join(sorted(value))[:120] if isinstance(value, dict) else type(value).__name__
        raise FormatError(where, expected=f"an object of {', '.join(sorted(keys))}", got=got)
    return value


def _list(value: object, limit: int, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > limit:
        got = f"{len(value)}" if isinstance(value, list) else type(value).__name__
        raise FormatError(where, expected=f"a list of at most {limit}", got=got)
    return value


def _number(value: object, least: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < MAX_NUMBER:
        raise FormatError(where, expected=f"a whole number of at least {least}", got=repr(value)[:40])
    return value


def _digest(value: object, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise FormatError(f"{where}: sha256", expected="64 hexadecimal digits", got=repr(value)[:80])
    return value


def checked_path(value: object, where: str) -> str:
    """A path as a delta may hold it: relative, plain, in its shortest form; FormatError otherwise."""
    plain = (
        isinstance(value, str)
        and 0 < len(value) <= MAX_PATH
        and value.isprintable()
        and "\\" not in value
        and not value.startswith("/")
        and not {".", ".."} & set(value.split("/"))
        and str(PurePosixPath(value)) == value
    )
    if not plain or not isinstance(value, str):
        raise FormatError(f"{where}: path", expected="a plain path inside the release", got=repr(value)[:80])
    return value


def _check_paths(paths: Sequence[str], where: str) -> None:
    """Refuse a path that stands twice, on file systems that ignore case too, or that is another one's folder."""
    seen: set[str] = set()
    folders: set[str] = set()
    for path in map(str.casefold, paths):
        if path in seen:
            raise FormatError(f"{where}: the path {path!r} stands twice")
        seen.add(path)
        folders |= {str(parent) for parent in PurePosixPath(path).parents}
    for path in sorted(seen & folders):
        raise FormatError(f"{where}: the path {path!r} is a file and a folder")


def _file(value: object, where: str) -> DeltaFile:
    value = _object(value, {"path", "bytes", "sha256", "base", "ops"}, where)
    where = f"{where} {checked_path(value['path'], where)}"
    base = None if value["base"] is None else _base(value["base"], f"{where}: base")
    ops = tuple(_op(op, f"{where}: ops[{n}]") for n, op in enumerate(_list(value["ops"], MAX_OPS, f"{where}: ops")))
    nbytes = _number(value["bytes"], 0, f"{where}: bytes")
    made = sum(op.nbytes for op in ops)
    if made != nbytes:
        raise FormatError(f"{where}: ops", expected=f"{nbytes} bytes together", got=str(made))
    for n, op in enumerate(ops):
        held = 0 if base is None else base.nbytes
        if not isinstance(op, Data) and op.at + op.nbytes > held:
            got = f"{op.nbytes} bytes from {op.at}"
            raise FormatError(f"{where}: ops[{n}]", expected=f"bytes of a base file of {held}", got=got)
    return DeltaFile(path=value["path"], nbytes=nbytes, sha256=_digest(value["sha256"], where), base=base, ops=ops)


def _base(value: object, where: str) -> BaseFile:
    value = _object(value, {"path", "bytes", "sha256"}, where)
    return BaseFile(
        path=checked_path(value["path"], where),
        nbytes=_number(value["bytes"], 0, f"{where}: bytes"),
        sha256=_digest(value["sha256"], where),
    )


_KEYS: Mapping[str, set[str]] = {
    "copy": {"op", "at", "bytes"},
    "data": {"op", "bytes", "packed"},
    "patch": {"op", "at", "block", "blocks", "columns", "packed"},
}


def _op(value: object, where: str) -> Op:
    kind = value.get("op") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _KEYS:
        raise FormatError(f"{where}: op", expected=", ".join(_KEYS), got=repr(kind)[:40])
    value = _object(value, _KEYS[kind], where)
    numbers = {
        key: _number(given, 0 if key == "at" else 1, f"{where}: {key}")
        for key, given in value.items()
        if key not in ("op", "columns")
    }
    op: Op
    if kind == "copy":
        return Copy(at=numbers["at"], nbytes=numbers["bytes"])
    if kind == "data":
        op = Data(nbytes=numbers["bytes"], packed=numbers["packed"])
    else:
        columns = _columns(value["columns"], numbers["block"], f"{where}: columns")
        op = Patch(columns=columns, **numbers)
    if op.nbytes > TILE:
        raise FormatError(where, expected=f"at most {TILE} bytes", got=str(op.nbytes))
    return op


def _columns(value: object, block: int, where: str) -> tuple[tuple[int, int], ...]:
    columns, at = [], 0
    for pair in _list(value, MAX_COLUMNS, where):
        start, stop = (_number(number, 0, where) for number in _list(pair, 2, where)) if _pair(pair) else (1, 0)
        if not at <= start < stop <= block:
            raise FormatError(where, expected=f"ascending [start, stop] of a block of {block}", got=repr(pair)[:40])
        columns.append((start, stop))
        at = stop
    if not columns:
        raise FormatError(where, expected="at least one", got="none")
    return tuple(columns)


def _pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2
