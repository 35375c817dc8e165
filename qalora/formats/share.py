"""A folder's files written by several processes: one makes them, and each writes some of the tensors into them.

Every byte has its place before the first is written, so that it does not matter who writes a tensor, or when. Each
process counts what it wrote; together it has to be every file's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

__all__ = ["Share"]


class Share:
    """What a process writes of a planned folder: `Share()` is all of it.

    frame  whether it makes the files: their headers, the small files, and what is no tensor of the plan
    """

    def __init__(self, tensors: Collection[str] | None = None, *, frame: bool = True) -> None:
        """tensors: the names, in the plan, of those that it writes; None for all."""
        self.frame = frame
        self._tensors = None if tensors is None else frozenset(tensors)
        self._sizes: dict[Path, int] = {}
        self._written: Counter[Path] = Counter()

    @property
    def whole(self) -> bool:
        """Whether nobody else writes into the files."""
        return self._tensors is None

    @property
    def written(self) -> Mapping[Path, int]:
        """Bytes that were written into each file, in all of the closed ones."""
        return self._written

    def writes(self, tensor: str) -> bool:
        """Whether it writes a tensor of the plan."""
        return self._tensors is None or tensor in self._tensors

    def close(self, path: Path, size: int, written: int) -> None:
        """A file is closed; ValueError where nobody else writes into it, and it is not full."""
        if self.whole and written != size:
            raise ValueError(f"{path}: expected {size} bytes written, got {written}")
        self._sizes[path] = size
        self._written[path] += written

    def add(self, written: Mapping[Path, int]) -> None:
        """Count what another process wrote."""
        self._written.update(written)

    def check(self) -> None:
        """ValueError if not every byte of every file was written exactly once."""
        for path, size in self._sizes.items():
            if self._written[path] != size:
                raise ValueError(f"{path}: expected {size} bytes written, got {self._written[path]}")
