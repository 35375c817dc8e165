"""Rebuild a folder, or some of its sub-folders, from a delta and the base's folder: byte for byte, or not at all."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qalora.delta.coding import unpack, unpack_columns
from qalora.delta.records import DATA, SUMS, Copy, Data, DeltaFile, Op, read_delta
from qalora.delta.tiles import sha256, summed, tiles
from qalora.errors import FormatError, InputError, OutputError, shown
from qalora.formats.files import InputFile, OutputFile, contained, read_limited
from qalora.formats.output import Progress, check_output, new_folder

__all__ = ["Applied", "apply_delta", "chosen_files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What was rebuilt: the folder, its files, and their bytes."""

    folder: Path
    files: tuple[str, ...]
    nbytes: int


def chosen_files(delta: Path, targets: Sequence[str] = ()) -> list[DeltaFile]:
    """The files of the sub-folders `targets`, all where none is named; InputError for an unknown one."""
    files = read_delta(delta)
    folders = sorted({PurePosixPath(file.path).parts[0] for file in files if "/" in file.path})
    for target in targets:
        if target not in folders:
            raise InputError(
                f"{delta}: `targets`",
                field="targets",
                expected=f"one of {', '.join(folders) or 'none'}",
                got=shown(target),
            )
    return [file for file in files if not targets or file.path.partition("/")[0] in targets]


def apply_delta(
    delta: Path,
    base: Path,
    out: Path,
    *,
    targets: Sequence[str] = (),
    force: bool = False,
    progress: Progress = lambda name, nbytes: None,
) -> Applied:
    """Write to `out` the folder that `delta` makes of `base`; with `targets`, those sub-folders of it alone.

    base is the folder it was made over, or a part of it that holds what is needed: with one target, that sub-folder
    itself, or the one file of weights. Everything is checked before the first byte is written: the delta's checksums
    and every number in it, and the digest of each file of the base; each result's digest is checked before the output
    appears. Raises FormatError for a damaged delta, InputError for a wrong base, OutputError for an output that exists
    without `force`. progress is called with a file's path and the bytes of it that were written.
    """
    files, every = chosen_files(delta, targets), read_delta(delta)
    names = {file.path for file in files}
    check_output(out, force=force, names=names)
    for source in (base, delta):
        if source.resolve().is_relative_to(out.resolve()) and (source is delta or source.resolve() != out.resolve()):
            raise OutputError(
                f"{out}", expected=f"a place that does not hold {source}", todo="choose a different output"
            )
    _check_sums(delta)
    places = _bases(base, files)
    nbytes = sum(file.nbytes for file in files)
    with new_folder(out, force=force, names=names) as folder:
        _check_room(out, folder, nbytes)
        with InputFile(contained(delta, DATA)) as data:
            at = 0
            for file in every:
                if file.path in names:
                    _rebuild(folder, file, places, data, at, progress)
                at += file.packed
    return Applied(folder=out, files=tuple(file.path for file in files), nbytes=nbytes)


def _check_room(out: Path, folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OutputError(f"{out}", expected=f"room for {nbytes} bytes", got=f"{free}", todo="free some space")


def _check_sums(delta: Path) -> None:
    """Refuse a delta that is not what its SHA256SUMS says."""
    lines = read_limited(contained(delta, SUMS), 1 << 20).splitlines()
    for path, line in summed(delta):
        if line.encode() not in lines:
            raise FormatError(f"{path}: changed since {SUMS} was written", todo="fetch it again")


def _bases(base: Path, files: Sequence[DeltaFile]) -> dict[str, Path]:
    """Where each base file that is needed is, by its path in the base's folder; each is hashed, and has its digest."""
    needed = {file.base.path: file.base for file in files if file.base is not None}
    folders = {path.partition("/")[0] for path in needed}
    inside = len(folders) == 1 and all("/" in path for path in needed) and not (base / min(folders)).exists()
    places, digests = {}, dict[Path, str]()
    for path, base_file in sorted(needed.items()):
        place = base if base.is_file() else contained(base, path.partition("/")[2] if inside else path)
        if not place.is_file():
            expected = f"a file of the base with sha256 {base_file.sha256}"
            todo = "name the base release, or with `targets` the sub-folders that are there"
            raise InputError(f"{place}", expected=expected, got="no such file", todo=todo)
        if place not in digests:
            with InputFile(place) as file:
                digests[place] = sha256(file)
        if digests[place] != base_file.sha256:
            raise InputError(
                f"{place}",
                expected=f"{base_file.path} with sha256 {base_file.sha256}",
                got=digests[place],
                todo="this delta was made over another base",
            )
        places[path] = place
    return places


def _rebuild(
    folder: Path, file: DeltaFile, places: Mapping[str, Path], data: InputFile, at: int, progress: Progress
) -> None:
    """Write one file; its bytes of data.bin begin at `at`. FormatError if it does not get its digest."""
    place = contained(folder, file.path)
    place.parent.mkdir(parents=True, exist_ok=True)
    digest, done = hashlib.sha256(), 0
    with ExitStack() as stack:
        old = None if file.base is None else stack.enter_context(InputFile(places[file.base.path]))
        out = stack.enter_context(OutputFile(place, file.nbytes))
        for op in file.ops:
            for part in _bytes_of(op, old, data, at, f"{data.path}: at byte {at}, for {file.path}"):
                digest.update(part)
                done += out.write(done, part)
                progress(file.path, len(part))
            at += op.packed
    if digest.hexdigest() != file.sha256:
        raise FormatError(
            f"{file.path}", expected=f"sha256 {file.sha256}", got=digest.hexdigest(), todo="fetch the delta again"
        )


def _bytes_of(op: Op, old: InputFile | None, data: InputFile, at: int, where: str) -> Iterator[memoryview]:
    """The bytes that one operation makes, a tile at a time."""
    if isinstance(op, Data):
        yield memoryview(unpack(data.read(at, op.packed), op.nbytes, where))
        return
    if old is None:
        raise FormatError(where, expected="a base file", got="none")
    if isinstance(op, Copy):
        for start, count in tiles(op.at, op.nbytes, 1):
            yield old.tensor(start, count).numpy().data
        return
    blocks = old.tensor(op.at, op.nbytes).numpy().reshape(op.blocks, op.block)
    yield unpack_columns(blocks, op.columns, data.read(at, op.packed), where).reshape(-1).data
