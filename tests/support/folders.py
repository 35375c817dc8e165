"""Folders compared."""

from __future__ import annotations

from pathlib import Path


def same_files(one: Path, two: Path) -> bool:
    """Whether two folders have the same files with the same bytes."""
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (one, two)
    ]
    return bool(files[0]) and files[0] == files[1]
