"""Quantized tensors kept in a file: they are made in the order of computation and read in any other.

A file with a name outlives its process, so that a run that was killed need not make its tensors anew:

    a line of JSON, {"key": ...}: what the tensors depend on
    for each tensor a line of JSON, {"name", "bits", "group_size", "parts", "sha256"}, and the bytes of its parts

parts are [dtype, rows, columns] of codes, scale and min; sha256 is that of their bytes. Whatever follows a record that
is cut short or does not fit its digest is dropped when the file is opened again, and all of it where the key differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qalora.tensor import GroupQuantTensor

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

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        # open as long as the object lives
        self._file: IO[bytes] = tempfile.TemporaryFile() if path is None else path.open("a+b")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places: dict[str, tuple[_Place, _Place, _Place, int, int]] = {}
        if path is not None:
            self._recover(key)

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

    def _recover(self, key: str) -> None:
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
            if record is None or not self._take(record):
                self._file.truncate(start)
                return

    def _json(self) -> Mapping[str, Any] | None:
        try:
            found = json.loads(self._file.readline(LONGEST))
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _take(self, record: Mapping[str, Any]) -> bool:
        """Whether a record's bytes follow it and fit its digest; then it is known."""
        if not _is_record(record):
            return False
        places = self._record(record, self._file.tell())
        digest, left = hashlib.sha256(), sum(part.nbytes for part in places[:3])
        while left:
            data = self._file.read(min(CHUNK, left))
            if not data:
                return False
            digest.update(data)
            left -= len(data)
        if digest.hexdigest() != record["sha256"]:
            return False
        self._places[record["name"]] = places
        return True

    def _record(self, record: Mapping[str, Any], at: int) -> tuple[_Place, _Place, _Place, int, int]:
        places = []
        for dtype, rows, columns in record["parts"]:
            places.append(_Place(offset=at, dtype=DTYPES[dtype], shape=(rows, columns)))
            at += places[-1].nbytes
        packed, scale, minimum = places
        return packed, scale, minimum, record["bits"], record["group_size"]


def _is_record(record: Mapping[str, Any]) -> bool:
    kinds = {"name": str, "bits": int, "group_size": int, "parts": list, "sha256": str}
    return (
        all(type(record.get(key)) is kind for key, kind in kinds.items())
        and len(record["parts"]) == 3
        and all(_is_part(part) for part in record["parts"])
    )


def _is_part(part: Any) -> bool:
    if not isinstance(part, list) or len(part) != 3 or not isinstance(part[0], str) or part[0] not in DTYPES:
        return False
    return all(type(size) is int and 0 < size < 1 << 32 for size in part[1:])


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
