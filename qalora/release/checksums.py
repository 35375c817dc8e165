"""SHA256SUMS, in the form that `sha256sum --check SHA256SUMS` reads: digest, two spaces, path; sorted by path."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qalora.errors import FormatError
from qalora.formats.files import contained, read_limited

__all__ = ["SUMS", "check_sums", "write_sums"]

SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Write `folder/SHA256SUMS` over every other file below it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names if name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Raise FormatError for the first file that is missing, changed, or not listed."""
    listed = {}
    for line in read_limited(folder / SUMS, 64 << 20).decode("utf-8").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    for name, digest in listed.items():
        path = contained(folder, name)
        if not path.is_file():
            raise FormatError(f"{path}: listed in {SUMS}, and not there")
        if _digest(path) != digest:
            raise FormatError(f"{path}: changed since {SUMS} was written")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(present - set(listed) - {SUMS}):
        raise FormatError(f"{folder / name}: not listed in {SUMS}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
