"""A file of tensors one behind the other, each at an offset that something else tells: ONNX's data, OpenVINO's .bin.

This module knows no format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

from torch import Tensor

from qalora.formats.files import OutputFile
from qalora.formats.share import Share

__all__ = ["DataFile", "DataFiles", "Placed"]


class Placed(Protocol):
    """A tensor's place in the file."""

    @property
    def offset(self) -> int:
        """Where it begins."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    def row_at(self, row: int) -> int:
        """Bytes before a row of it, which begins with a byte."""


class DataFile:
    """A new file that is filled by the names of its tensors, in any order; what lies between them is zeros.

    items  the tensors by name, by rising offsets
    size   bytes of the file
    share  who else writes into it
    """

    def __init__(self, path: Path, items: Mapping[str, Placed], size: int, share: Share) -> None:
        self._items = items
        self._frame = share.frame
        self._file = OutputFile(path, size, share)

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of that name."""
        return name in self._items

    def write(self, name: str, data: Tensor, row: int = 0) -> None:
        """Write a tensor, or its rows from `row` on."""
        item = self._items[name]
        self._file.write(item.offset + item.row_at(row), data)

    def __enter__(self) -> DataFile:
        self._file.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self._frame:
            for offset, length in _gaps(self._items.values()):
                self._file.zeros(offset, length)
        self._file.__exit__(kind, error, at)


class DataFiles:
    """Several such files.

    files  of each its tensors, as `DataFile` wants them, and its bytes
    """

    def __init__(self, files: Mapping[Path, tuple[Mapping[str, Placed], int]], share: Share) -> None:
        self._stack = ExitStack()
        self._of: dict[str, DataFile] = {}
        with self._stack:  # which closes those before one that cannot be made
            for path, (items, size) in files.items():
                file = self._stack.enter_context(DataFile(path, items, size, share))
                self._of |= dict.fromkeys(items, file)
            self._stack = self._stack.pop_all()

    def has(self, name: str) -> bool:
        """Whether a file has a tensor of that name."""
        return name in self._of

    def write(self, name: str, data: Tensor, row: int = 0) -> None:
        """Write a tensor, or its rows from `row` on."""
        self._of[name].write(name, data, row)

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)


def _gaps(items: Iterable[Placed]) -> list[tuple[int, int]]:
    """(offset, length) of what alignment leaves between the tensors."""
    found, at = [], 0
    for item in items:
        if item.offset > at:
            found.append((at, item.offset - at))
        at = item.offset + item.nbytes
    return found
