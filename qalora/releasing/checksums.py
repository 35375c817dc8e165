"""SHA256SUMS, in the form that `sha256sum --check SHA256SUMS` reads: digest, two spaces, path; sorted by path.

It lists every file of the folder but itself and the signature, which is made after it and over it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from qalora.errors import FormatError, InputError, shown
from qalora.formats.files import contained, read_limited
from qalora.releasing.digests import file_digest

__all__ = ["SIGNATURE", "SUMS", "check_sums", "compare_sums", "release_files", "write_sums"]

SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"
UNLISTED = {SUMS, SIGNATURE}
"""The files that SHA256SUMS leaves out: itself, and the signature over it."""

HUBS = (".gitattributes/", ".git/", ".cache/huggingface/")
"""What a download from the Hub adds to a release: git's own, and the notes of `hf download`; no runtime reads them."""

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write `folder/SHA256SUMS` over every other file below it. known: digests by name, of files read just now."""
    digests_by_name = known or {}
    names = [name for name in release_files(folder) if name not in UNLISTED]
    digests = {name: digests_by_name.get(name) or file_digest(folder / name) for name in names}
    lines = [f"{digest.removeprefix('sha256:')}  {name}\n" for name, digest in digests.items()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Raise FormatError for the first file that is missing, changed, not listed, or a link."""
    for name, problem in compare_sums(folder).items():
        raise FormatError(f"{folder / name}: {problem}")


def compare_sums(folder: Path) -> dict[str, str]:
    """What is wrong with each file, by its name; nothing where all is well. FormatError for lines of another form."""
    listed = _read_sums(folder)
    problems = {name: problem for name, digest in listed.items() if (problem := _problem(folder, name, digest))}
    there = {path.relative_to(folder).as_posix() for path in _present(folder)}
    return problems | dict.fromkeys(sorted(there - set(listed) - UNLISTED), f"not listed in {SUMS}")


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    listed = {}
    try:
        lines = read_limited(path, 64 << 20).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}", expected="lines of a digest and a name in UTF-8", got="bytes that are no UTF-8"
        ) from error
    for n, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise FormatError(f"{path}:{n}", expected="a SHA-256 digest, two spaces and a name", got=shown(line))
        listed[match[2]] = f"sha256:{match[1]}"
    return listed


def _problem(folder: Path, name: str, digest: str) -> str:
    try:
        path = contained(folder, name)
    except InputError as error:
        return str(error)
    if not path.is_file():
        return f"listed in {SUMS}, and not there"
    return "" if file_digest(path) == digest else f"changed since {SUMS} was written"


def release_files(folder: Path) -> list[str]:
    """The names of all files below `folder` but the Hub's own, sorted, with forward slashes.

    Raises FormatError for what is no file of a release: a link out of the folder (see `contained`) or to a folder, a
    device, a name that does not travel.
    """
    names = []
    for path in _present(folder):
        name = path.relative_to(folder).as_posix()
        contained(folder, name)
        if not path.is_file():
            raise FormatError(str(path), expected="a file or a folder", got="a link or device")
        names.append(name)
    return sorted(names)


def _present(folder: Path) -> list[Path]:
    """Whatever lies below `folder` and is no folder, but the Hub's own."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path for path in paths if not f"{path.relative_to(folder).as_posix()}/".startswith(HUBS)]
