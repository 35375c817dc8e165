"""Write the delta between two folders: a tile at a time, so that a model larger than memory passes through.

Tensors are found by name on both sides, wherever they stand, and compared: equal tiles are copied, changed ones are
patched in the byte columns that changed. What is no tensor (heads, tokenizers, graphs) is searched for copies.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from qalora.delta.chunks import CHUNK, MAX_MATCHED, find_copies
from qalora.delta.coding import Bytes, changed_columns, pack, pack_columns
from qalora.delta.matching import match_files
from qalora.delta.records import (
    DATA,
    INDEX,
    MAX_COLUMNS,
    SUMS,
    TILE,
    BaseFile,
    Copy,
    Data,
    DeltaFile,
    Op,
    Patch,
    checked_path,
    index_bytes,
    read_delta,
)
from qalora.delta.regions import Region, head_bytes, tensor_regions
from qalora.delta.tiles import sha256, summed, tiles
from qalora.errors import InputError
from qalora.formats.files import InputFile, contained, files_below
from qalora.formats.output import Progress, check_output, new_folder

__all__ = ["WrittenDelta", "check_base", "write_delta"]

SMALL = 16 << 10
"""Bytes up to which a file is shipped whole: whoever has the weights alone needs no other file of the base for it."""


MAX_COPIES = 4096
"""Copies among bytes that are no tensor, above which these are shipped whole: the index stays small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenDelta:
    """What was written: its folder, its files' records, the bytes of the delta and of the folder that it makes."""

    folder: Path
    files: tuple[DeltaFile, ...]
    nbytes: int
    made_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes of the delta over those of what it makes."""
        return self.nbytes / max(1, self.made_bytes)


def check_base(base: Path, out: Path, *, force: bool = False) -> None:
    """Refuse what can be refused beforehand: a base that is no folder of files, an output in the way."""
    check_output(out, force=force, names=[INDEX])
    if not base.is_dir():
        raise InputError(f"{base}", expected="the folder of the base release", got="no folder")
    if not files_below(base):
        raise InputError(f"{base}", expected="the folder of the base release", got="an empty folder")


def write_delta(
    base: Path,
    new: Path,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = lambda name, nbytes: None,
) -> WrittenDelta:
    """Write to `out` what makes the folder `new` from `base`; progress is called with each file and its bytes.

    Raises InputError where the base has nothing that `new` could be rebuilt from, OutputError for an output that
    exists without `force`.
    """
    check_base(base, out, force=force)
    matched = match_files(files_below(base), files_below(new))
    files = []
    with new_folder(out, force=force, names=[INDEX]) as folder:
        with (folder / DATA).open("xb") as data:
            for path, old in sorted(matched.items()):
                before = None if old is None else contained(base, old)
                files.append(_Maker(data).file(path, contained(new, path), old, before))
                progress(path, files[-1].nbytes)
        if files and all(file.base is None for file in files):
            got = f"{base}, which shares no file with it"
            raise InputError(f"{new}: a delta", expected="a release of the same base model", got=got)
        (folder / INDEX).write_bytes(index_bytes(files))
        read_delta(folder)  # what nobody could apply is not written
        sums = "".join(f"{line}\n" for _, line in summed(folder))
        (folder / SUMS).write_text(sums, encoding="utf-8")
        nbytes = sum(path.stat().st_size for path in folder.iterdir())
    made_bytes = sum(file.nbytes for file in files)
    return WrittenDelta(folder=out, files=tuple(files), nbytes=nbytes, made_bytes=made_bytes)


class _Maker:
    """Makes the operations of one file; their bytes go to the end of data.bin."""

    def __init__(self, data: BinaryIO) -> None:
        self._data = data
        self._ops: list[Op] = []

    def file(self, path: str, place: Path, base: str | None, before: Path | None) -> DeltaFile:
        """The record of the file `place`, rebuilt from `before`, whose path in the base's folder is `base`."""
        checked_path(path, str(place))
        with ExitStack() as stack:
            new = stack.enter_context(InputFile(place))
            digest, old, base_file = sha256(new), None, None
            if base is not None and before is not None and new.size > SMALL:
                old = stack.enter_context(InputFile(before))
                base_file = BaseFile(path=checked_path(base, str(before)), nbytes=old.size, sha256=sha256(old))
            if base_file is not None and base_file.sha256 == digest:
                self._copy(0, new.size)
            elif old is None:
                self._ship(new, 0, new.size)
            else:
                self._compare(old, new)
        used = any(not isinstance(op, Data) for op in self._ops)
        return DeltaFile(
            path=path, nbytes=new.size, sha256=digest, base=base_file if used else None, ops=tuple(self._ops)
        )

    def _compare(self, old: InputFile, new: InputFile) -> None:
        before, regions = tensor_regions(old.path), tensor_regions(new.path)
        known = {(region.name, region.nbytes, region.block): region for region in before}
        head = head_bytes(before, old.size)
        at = 0
        for region in regions:
            self._between(old, head, new, at, region.offset - at)
            same = known.get((region.name, region.nbytes, region.block))
            if same is None:
                self._ship(new, region.offset, region.nbytes)
            else:
                self._tensor(old, same, new, region)
            at = region.offset + region.nbytes
        self._between(old, head, new, at, new.size - at)

    def _tensor(self, old: InputFile, before: Region, new: InputFile, region: Region) -> None:
        for at, count in tiles(region.offset, region.nbytes, region.block):
            there = before.offset + at - region.offset
            self._tile(old.tensor(there, count).numpy(), new.tensor(at, count).numpy(), there, region.block)

    def _tile(self, old: Bytes, new: Bytes, there: int, block: int) -> None:
        """One tile of a tensor: `old` stands at byte `there` of the base file."""
        before, after = old.reshape(-1, block), new.reshape(-1, block)
        columns = changed_columns(before, after)
        if not columns:
            self._copy(there, len(new))
            return
        if len(columns) > MAX_COLUMNS:
            columns = ((columns[0][0], columns[-1][1]),)
        packed = pack_columns(before, after, columns)
        if 2 * len(packed) > len(new):
            whole = pack(new)
            if len(whole) <= len(packed):
                self._put(Data(nbytes=len(new), packed=len(whole)), whole)
                return
        patch = Patch(at=there, block=block, blocks=len(before), columns=columns, packed=len(packed))
        self._put(patch, packed)

    def _between(self, old: InputFile, head: int, new: InputFile, at: int, count: int) -> None:
        """Bytes that are no tensor: the base file goes on alike, or they are searched for in its head."""
        if not count:
            return
        last = self._ops[-1] if self._ops else None
        follows = 0 if last is None or isinstance(last, Data) else last.at + last.nbytes
        if count <= TILE and follows + count <= old.size and old.read(follows, count) == new.read(at, count):
            self._copy(follows, count)
        elif count < CHUNK:
            self._ship(new, at, count)
        elif max(head, count) <= MAX_MATCHED:
            self._search(old.tensor(0, head).numpy(), new, at, count)
        elif old.size == new.size:  # too large to search: what stands where it stood
            same = Region(name="", offset=at, nbytes=count, block=1)
            self._tensor(old, same, new, same)
        else:
            self._ship(new, at, count)

    def _search(self, head: Bytes, new: InputFile, at: int, count: int) -> None:
        copies = list(islice(find_copies(head, new.tensor(at, count).numpy()), MAX_COPIES + 1))
        if len(copies) > MAX_COPIES:
            copies = []
        done = 0
        for here, there, nbytes in copies:
            self._ship(new, at + done, here - done)
            self._copy(there, nbytes)
            done = here + nbytes
        self._ship(new, at + done, count - done)

    def _ship(self, new: InputFile, at: int, nbytes: int) -> None:
        for start, count in tiles(at, nbytes, 1):
            packed = pack(new.tensor(start, count).numpy())
            self._put(Data(nbytes=count, packed=len(packed)), packed)

    def _copy(self, at: int, nbytes: int) -> None:
        last = self._ops[-1] if self._ops else None
        if isinstance(last, Copy) and last.at + last.nbytes == at:
            self._ops[-1] = replace(last, nbytes=last.nbytes + nbytes)
        elif nbytes:
            self._ops.append(Copy(at=at, nbytes=nbytes))

    def _put(self, op: Op, packed: bytes) -> None:
        self._ops.append(op)
        self._data.write(packed)
