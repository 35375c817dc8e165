"""Are the files of a release the ones that its checksums and its manifest name; which tensor is not, if one is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qalora.errors import InputError
from qalora.formats.files import contained, files_below
from qalora.releasing.checksums import compare_sums
from qalora.releasing.digests import file_digest, range_digest
from qalora.releasing.findings import Finding
from qalora.releasing.records import FileEntry, Manifest, TensorEntry

__all__ = ["check_checksums", "check_files", "differing_tensor"]


def check_checksums(folder: Path) -> list[Finding]:
    """Every file that is missing, changed, not listed, or a link."""
    return [Finding(where=name, problem=problem) for name, problem in compare_sums(folder).items()]


def check_files(folder: Path, manifest: Manifest) -> list[Finding]:
    """The artefacts' files, and the bytes of every tensor, against the manifest."""
    findings = []
    for artifact in manifest.artifacts:
        root = artifact.folder
        fault = _fault_of_place(folder, root, artifact.target)
        if fault is not None:
            findings.append(fault)
            continue
        findings += _check_listed(folder, root, artifact.files)
        for row in artifact.tensors:
            name = f"{root}/{row.file}"
            path = _inside(folder, name)
            if path is None:
                continue  # found above, as a file
            size = path.stat().st_size
            if not (0 <= row.offset <= size and 0 <= row.nbytes <= size):  # its parts may lie apart: no sum
                problem = f"manifest.json places it outside of the file's {size} bytes"
                findings.append(Finding(where=f"{name}: {row.name}", problem=problem))
                break
            if range_digest(path, row.offset, row.nbytes) != row.sha256:
                findings.append(Finding(where=f"{name}: {row.name}", problem=f"{SAID}, at byte {row.offset}"))
                break  # the first one names the file
    return findings


SAID = "not the bytes that manifest.json has the digest of"


def _fault_of_place(folder: Path, root: str, target: str) -> Finding | None:
    """What is wrong with an artefact's folder, which is named after its target and lies in the release."""
    if root != target:
        problem = f"the folder {root!r:.80} is not the one of its target, {target:.40}"
        return Finding(where="manifest.json", problem=problem)
    try:
        contained(folder, root)
    except InputError as error:
        return Finding(where=root, problem=str(error))
    return None


def _check_listed(folder: Path, root: str, files: Mapping[str, FileEntry]) -> list[Finding]:
    findings = []
    for name, entry in files.items():
        path = _inside(folder, name)
        if path is None or not name.startswith(f"{root}/"):
            findings.append(Finding(where=name, problem="manifest.json lists it, and it is not there"))
        elif path.stat().st_size != entry.nbytes or file_digest(path) != entry.sha256:
            findings.append(Finding(where=name, problem=SAID))
    there = {f"{root}/{name}" for name in files_below(folder / root)}
    findings += [Finding(where=name, problem="manifest.json does not list it") for name in sorted(there - set(files))]
    return findings


def _inside(folder: Path, name: str) -> Path | None:
    try:
        path = contained(folder, name)
    except InputError:
        return None
    return path if path.is_file() else None


def differing_tensor(copy: Path, original: Path, rows: Sequence[TensorEntry]) -> str | None:
    """Where two files differ first: the tensor there, or "outside its tensors"; None where they are the same.

    rows  the manifest's tensors of this file
    """
    at = _first_difference(copy, original)
    if at is None:
        return None
    here = [row for row in rows if row.offset <= at < row.offset + row.nbytes]
    return f"{here[0].name}, at byte {at}" if here else f"outside its tensors, at byte {at}"


def _first_difference(one: Path, other: Path, piece: int = 4 << 20) -> int | None:
    at = 0
    with one.open("rb") as first, other.open("rb") as second:
        while True:
            a, b = first.read(piece), second.read(piece)
            if a != b:
                return at + next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            if not a:
                return None
            at += len(a)
