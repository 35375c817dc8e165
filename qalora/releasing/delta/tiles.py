"""Files a tile at a time: both sides of a delta are read and hashed so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from qalora.formats.files import InputFile
from qalora.releasing.delta.records import TILE

__all__ = ["sha256", "tiles"]


def tiles(at: int, nbytes: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut bytes from `at` into tiles of whole blocks, at most TILE bytes each: (offset, bytes)."""
    step = TILE // block * block
    for start in range(at, at + nbytes, step):
        yield start, min(step, at + nbytes - start)


def sha256(file: InputFile) -> str:
    """The digest of a file, hexadecimal."""
    digest = hashlib.sha256()
    for at, count in tiles(0, file.size, 1):
        digest.update(file.tensor(at, count).numpy().data)
    return digest.hexdigest()
