"""Quantized tensors kept in a file: they are made in the order of computation and read in any other.

A file with a name outlives its process, so that a run that was killed need not make its tensors anew:

    a line of JSON, {"key": ...}: what the tensors depend on
    for each tensor a line of JSON, {"name", "bits", "group_size", "parts", "sha256"}, and the bytes of its parts

parts are [dtype, rows, columns] of codes, scale and min; sha256 is that of their bytes. When the file is opened again,
a record that is cut short, does not fit its digest or is of no tensor that was asked for is dropped, with whatever
follows it; and all of it where the key differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from torch import Tensor

from qalora.checkpoint import LazyTensor
from qalora.errors import InputError, OutputError
from qalora.tensor import GroupQuantTensor, packed_row_bytes

__all__ = ["TensorFile"]

CHUNK = 1 << 20
LONGEST = 1 << 16
"""Bytes of a line of JSON at most."""

DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a part lies: first byte, dtype, shape."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A file of tensors, nameless unless it is given a path; a nameless one goes when the object does."""

    def __init__(
        self, path: Path | None = None, key: str = "", wanted: Mapping[str, LazyTensor] = MappingProxyType({})
    ) -> None:
        """wanted: the tensors that may be taken from the file, by name; OutputError for a path that is a link."""
        # open as long as the object lives
        self._file: IO[bytes] = tempfile.TemporaryFile() if path is None else _open(path)  # noqa: SIM115
        self._path = path
        weakref.finalize(self, self._file.close)
        self._places: dict[str, tuple[_Place, _Place, _Place, int, int]] = {}
        if path is not None:
            self._recover(key, {name: _shapes(lazy) for name, lazy in wanted.items()})

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which reads what is there; InputError for a nameless file."""
        if self._path is None:
            raise InputError(
                "layers that were quantized on a text, and are in no file yet, cannot be shared by processes",
                todo="save it first, without `jobs` and `engine`, and load it again",
            )
        return {"path": self._path.absolute(), "places": self._places}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._path, self._places = state["path"], state["places"]
        self._file = self._path.open("rb")
        weakref.finalize(self, self._file.close)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def put(self, name: str, tensor: GroupQuantTensor) -> None:
        """Append a tensor whose groups are runs of columns."""
        parts = [part.contiguous() for part in (tensor.packed, tensor.scale, tensor.min)]
        data = [part.view(torch.uint8).numpy().data for part in parts]
        digest = hashlib.sha256()
        for one in data:
            digest.update(one)
        record = {
            "name": name,
            "bits": tensor.bits,
            "group_size": tensor.group_size,
            "parts": [[str(part.dtype).removeprefix("torch."), *part.shape] for part in parts],
            "sha256": digest.hexdigest(),
        }
        self._file.seek(0, 2)
        self._file.write(_line(record))
        at = self._file.tell()
        for one in data:
            self._file.write(one)
        self._file.flush()
        self._places[name] = self._record(record, at)

    def tensor(self, name: str) -> GroupQuantTensor:
        """A whole tensor."""
        return self.rows(name, 0, self._places[name][0].shape[0])

    def rows(self, name: str, start: int, stop: int) -> GroupQuantTensor:
        """Rows start..stop-1 of a tensor."""
        packed, scale, minimum, bits, group_size = self._places[name]
        return GroupQuantTensor(
            packed=self._read(packed, start, stop),
            scale=self._read(scale, start, stop),
            min=self._read(minimum, start, stop),
            bits=bits,
            group_size=group_size,
        )

    def _read(self, place: _Place, start: int, stop: int) -> Tensor:
        row = place.shape[1] * place.dtype.itemsize
        self._file.seek(place.offset + start * row)
        data = bytearray(self._file.read((stop - start) * row))
        return torch.frombuffer(data, dtype=place.dtype).view(stop - start, place.shape[1])

    def _recover(self, key: str, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the whole records of an earlier run, and cut off what follows them."""
        self._file.seek(0)
        if self._json() != {"key": key}:
            self._file.truncate(0)
            self._file.write(_line({"key": key}))
            self._file.flush()
            return
        while True:
            start = self._file.tell()
            record = self._json()
            if record is None or not self._take(record, wanted):
                self._file.truncate(start)
                return

    def _json(self) -> Mapping[str, Any] | None:
        try:
            found = json.loads(self._file.readline(LONGEST))
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _take(self, record: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether a record is of a tensor that is wanted, and its bytes follow it; then it is known."""
        shapes = wanted.get(str(record.get("name")))
        if shapes is None or {**shapes, "sha256": record.get("sha256")} != record:
            return False
        places = self._record(shapes, self._file.tell())
        digest, left = hashlib.sha256(), sum(part.nbytes for part in places[:3])
        while left:
            data = self._file.read(min(CHUNK, left))
            if not data:
                return False
            digest.update(data)
            left -= len(data)
        if digest.hexdigest() != record.get("sha256"):
            return False
        self._places[shapes["name"]] = places
        return True

    def _record(self, record: Mapping[str, Any], at: int) -> tuple[_Place, _Place, _Place, int, int]:
        places = []
        for dtype, rows, columns in record["parts"]:
            places.append(_Place(offset=at, dtype=DTYPES[dtype], shape=(rows, columns)))
            at += places[-1].nbytes
        packed, scale, minimum = places
        return packed, scale, minimum, record["bits"], record["group_size"]


def _open(path: Path) -> IO[bytes]:
    if path.is_symlink():
        raise OutputError(f"{path}", expected="a file of its own", got="a link", todo="remove it")
    follow = getattr(os, "O_NOFOLLOW", 0)  # one that was put there meanwhile
    return open(path, "a+b", opener=lambda name, flags: os.open(name, flags | follow, 0o666))


def _shapes(lazy: LazyTensor) -> Mapping[str, Any]:
    """The record of a tensor without its digest."""
    spec = lazy.spec
    if spec is None:
        raise TypeError(f"{lazy.name} has no spec")
    rows, columns = lazy.shape
    grouped = ["float32", rows, columns // spec.group_size]
    parts = [["uint8", rows, packed_row_bytes(columns, spec.bits)], grouped, grouped]
    return {"name": lazy.name, "bits": spec.bits, "group_size": spec.group_size, "parts": parts}


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
