"""Files a tile at a time: both sides of a delta are read and hashed so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from qalora.delta.records import DATA, INDEX, TILE
from qalora.formats.files import InputFile, contained

__all__ = ["sha256", "summed", "tiles"]


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


def summed(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of a delta, each with its line of SHA256SUMS: digest, two spaces, name."""
    for name in (DATA, INDEX):
        with InputFile(contained(folder, name)) as file:
            yield file.path, f"{sha256(file)}  {name}"
