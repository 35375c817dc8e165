"""The GGUF files of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora.formats.files import InputFile
from qalora.formats.gguf import read_header
from qalora.formats.gguf_split import part_number

__all__ = ["file_metadata", "is_gguf", "models"]


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF does."""
    if not path.is_file():
        return False
    with InputFile(path) as file:
        return file.read(0, min(4, file.size)) == b"GGUF"


def file_metadata(path: Path) -> Mapping[str, Any] | None:
    """The values of a model's first file; the others of a split one have none of their own."""
    if path.suffix != ".gguf" or part_number(path) != 1:
        return None
    return {key: str(value.value) for key, value in read_header(path).metadata.entries.items()}


def models(folder: Path) -> Sequence[Path]:
    """The files of a folder, the first alone of those that one model is split into; none beside another model."""
    if (folder / "config.json").is_file():
        return []
    return sorted(file for file in folder.glob("*.gguf") if file.is_file() and part_number(file) == 1)
