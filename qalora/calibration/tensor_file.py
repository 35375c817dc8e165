"""Quantized tensors kept in a temporary file: they are made in the order of computation and read in any other."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from qalora.tensor import GroupQuantTensor

__all__ = ["TensorFile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a part lies: first byte, dtype, shape."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, int]


class TensorFile:
    """A nameless temporary file of tensors; it goes when the object does."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the object lives
        weakref.finalize(self, self._file.close)
        self._places: dict[str, tuple[_Place, _Place, _Place, int, int]] = {}

    def put(self, name: str, tensor: GroupQuantTensor) -> None:
        """Append a tensor whose groups are runs of columns."""
        packed, scale, minimum = (self._append(part) for part in (tensor.packed, tensor.scale, tensor.min))
        self._places[name] = packed, scale, minimum, tensor.bits, tensor.group_size

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

    def _append(self, part: Tensor) -> _Place:
        offset = self._file.seek(0, 2)
        self._file.write(part.contiguous().view(torch.uint8).numpy().data)
        return _Place(offset=offset, dtype=part.dtype, shape=(part.shape[0], part.shape[1]))

    def _read(self, place: _Place, start: int, stop: int) -> Tensor:
        row = place.shape[1] * place.dtype.itemsize
        self._file.seek(place.offset + start * row)
        data = bytearray(self._file.read((stop - start) * row))
        return torch.frombuffer(data, dtype=place.dtype).view(stop - start, place.shape[1])
