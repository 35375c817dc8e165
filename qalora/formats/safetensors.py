"""safetensors: a header of names, dtypes, shapes and offsets, then the bytes. Read with suspicion, written streamed.

    8 bytes   N, little-endian                  N <= 100 MB and 8 + N <= file size
    N bytes   JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}
    rest      the tensors; offsets count from here, without gap or overlap, and end with the file

Why not the safetensors package for reading: it maps the file (mapped pages count as resident memory, and a shrinking
file kills the process), and it cannot write a tensor at a time, nor two metadata keys in a stable order. The tests hold
this module against the package in both directions.

A model is one file, or, above a size, several of these and an index, as transformers, mlx-lm and the Hub name them:

    model-00001-of-00003.safetensors ...    each with the same metadata
    model.safetensors.index.json            {"metadata": {"total_size": bytes of all tensors},
                                             "weight_map": {tensor: file}}

Header layout: https://github.com/huggingface/safetensors#format. This module knows no model family.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.errors import FormatError, InputError, json_kind, shown
from qalora.formats.around import instead_of_weights
from qalora.formats.files import InputFile, OutputFile, check_dimensions, contained, read_limited
from qalora.formats.json_text import parse_json
from qalora.formats.output import json_bytes
from qalora.formats.share import Share
from qalora.options.words import SHARD_SIZE

__all__ = [
    "DTYPES",
    "SHARD_SIZE",
    "Entry",
    "Layout",
    "Part",
    "SafetensorsWriter",
    "ShardedLayout",
    "ShardedWriter",
    "load_tensor",
    "plan_layout",
    "plan_shards",
    "read_header",
    "read_tensor",
    "shards",
]

Part = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor to be written."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000

MAX_SHARDS = 200
"""Files of one model: all are reserved at once and open together, and some systems allow a process 256."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a file: dtype, shape, and its first byte and length in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A whole file as its header tells it. `prefix`: its bytes from the start of the file, to be written."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int
    prefix: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedLayout:
    """A model's files: one, or several and an index of them.

    files       the layout of each file of tensors by its name, in order
    where       the name of the file that holds a tensor, by the tensor's
    index_name  `<stem>.safetensors.index.json`
    index       its bytes; empty where there is none
    names       what a tensor is called in its file, where that is not what it is called here
    """

    files: Mapping[str, Layout]
    where: Mapping[str, str]
    index_name: str
    index: bytes = field(repr=False)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files of tensors."""
        return sum(layout.size for layout in self.files.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file that is written, the index too."""
        index = {self.index_name: len(self.index)} if self.index else {}
        return {**{name: layout.size for name, layout in self.files.items()}, **index}

    def entry(self, name: str) -> Entry:
        """Where a tensor stands in its file."""
        return self.files[self.where[name]].entries[self.names.get(name, name)]

    def place(self, names: Iterable[str]) -> tuple[str, int, int]:
        """The file of tensors that stay together, the first one's offset in it, and the bytes of all."""
        names = list(names)
        entries = [self.entry(name) for name in names]
        return self.where[names[0]], entries[0].offset, sum(entry.nbytes for entry in entries)


def read_header(path: Path) -> Layout:
    """Read and check a file's header; FormatError if it is not safetensors, or if it lies about sizes."""
    with InputFile(path) as file:
        if file.size < 8:
            raise FormatError(str(path), expected="a safetensors file", got=f"{file.size} bytes")
        length = int.from_bytes(file.read(0, 8), "little")
        if length > MAX_HEADER or 8 + length > file.size:
            raise FormatError(
                str(path),
                expected=f"a header of at most {min(MAX_HEADER, file.size - 8)} bytes",
                got=f"one of {length}",
                todo="it is truncated or no safetensors file",
            )
        header = _parse_json(file.read(8, length), path)
        return _check_header(header, 8 + length, file.size, path)


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    header = parse_json(data, str(path), expected="a header in JSON", strict=True)
    if not isinstance(header, dict) or not data.startswith(b"{"):
        raise FormatError(str(path), expected="a header that is a JSON object", got=json_kind(header))
    return header


def _check_header(header: dict[str, Any], start: int, size: int, path: Path) -> Layout:
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__", expected="strings only")
    entries = {name: _check_entry(name, entry, start, path) for name, entry in header.items()}
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != at:
            kind = "gap" if entry.offset > at else "overlap"
            raise FormatError(f"{path}: {kind} before tensor {name!r}", expected=f"offset {at}", got=str(entry.offset))
        at += entry.nbytes
    if at != size:
        raise FormatError(
            str(path), expected=f"{at} bytes as the header says", got=str(size), todo="it is truncated or padded"
        )
    return Layout(entries=entries, metadata=metadata, size=size)


def _check_entry(name: str, entry: object, start: int, path: Path) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(where, expected="dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(where, expected=f"a dtype among {', '.join(DTYPES)}", got=shown(dtype))
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise FormatError(where, expected="a shape and two offsets of whole numbers, none negative")
    check_dimensions(where, shape)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise FormatError(
            where, expected=f"{nbytes} bytes for {dtype} {shape}", got=f"offsets {offsets}", todo="the header is wrong"
        )
    return Entry(dtype=DTYPES[dtype], shape=tuple(shape), offset=start + offsets[0], nbytes=nbytes)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63 for item in value
    )


def read_tensor(file: InputFile, entry: Entry, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows start..stop-1 of a tensor (all of it by default), in its own dtype and its own memory."""
    if not entry.shape:
        return file.tensor(entry.offset, entry.nbytes).view(entry.dtype).reshape(())
    rows = entry.shape[0]
    start, stop, _ = slice(start, stop).indices(rows)
    row_bytes = entry.nbytes // rows if rows else 0
    data = file.tensor(entry.offset + start * row_bytes, max(0, stop - start) * row_bytes)
    return data.view(entry.dtype).view(max(0, stop - start), *entry.shape[1:])


def load_tensor(path: Path, entry: Entry, start: int = 0, stop: int | None = None) -> Tensor:
    """`read_tensor` of a file that is opened for it."""
    with InputFile(path) as file:
        return read_tensor(file, entry, start, stop)


def shards(folder: Path, stem: str = "model") -> dict[str, Path]:
    """Which file of `folder` holds which tensor: from `<stem>.safetensors`, or from `<stem>.safetensors.index.json`.

    Raises FormatError if an index names a file outside the folder or a tensor that is not in the file it names, and if
    the folder holds neither.
    """
    single = folder / f"{stem}.safetensors"
    if single.exists():
        path = contained(folder, single.name)
        return dict.fromkeys(read_header(path).entries, path)
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        got, todo = instead_of_weights(folder, stem)
        raise FormatError(f"{folder}", expected=f"{single.name} or {index.name}", got=got, todo=todo)
    content = _parse_json(read_limited(contained(folder, index.name), MAX_HEADER), index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise FormatError(f"{index}", expected="a weight_map of tensor name to file name")
    files = {file: contained(folder, file) for file in sorted(set(names.values()))}
    present = {file: read_header(path).entries for file, path in files.items()}
    for name, file in names.items():
        if name not in present[file]:
            raise FormatError(f"{index}: missing tensor {name!r} in {file}")
    return {name: files[file] for name, file in names.items()}


def plan_layout(tensors: Sequence[Part], metadata: Mapping[str, str] | None = None) -> Layout:
    """Lay tensors out in the order given, widest dtype first so that each is aligned; the header's keys are sorted."""
    order = sorted(tensors, key=lambda item: -item[1].itemsize)
    header: dict[str, object] = {}
    at = 0
    for name, dtype, shape in order:
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    if len(header) != len(tensors):
        raise ValueError("a tensor name appears twice")
    if metadata:
        header["__metadata__"] = dict(metadata)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    entries = {}
    at = len(prefix)
    for name, dtype, shape in order:
        nbytes = math.prod(shape) * dtype.itemsize
        entries[name] = Entry(dtype=dtype, shape=tuple(shape), offset=at, nbytes=nbytes)
        at += nbytes
    return Layout(entries=entries, metadata=dict(metadata or {}), size=at, prefix=prefix)


def plan_shards(
    groups: Sequence[Sequence[Part]],
    metadata: Mapping[str, str] | None = None,
    *,
    max_size: int = SHARD_SIZE,
    stem: str = "model",
    called: Mapping[str, str] | None = None,
    indexed: bool = False,
) -> ShardedLayout:
    """Lay a model out in files of at most `max_size` bytes of tensors, in the order given; one file if all fit.

    The tensors of a group stay together; a group that is larger gets a file of its own. As in transformers, headers do
    not count: some 100 bytes a tensor. Raises InputError for a size that makes more than MAX_SHARDS files.

    called   the names in the files, of parts that have another one there
    indexed  whether one file has an index too, which tells vLLM that other safetensors there are not of the model
    """
    files = _split(groups, max_size)
    if len(files) > MAX_SHARDS:
        raise InputError(
            field="max_shard_size",
            expected=f"a size that makes at most {MAX_SHARDS} files",
            got=f"{max_size} bytes, which makes {len(files)}",
            todo="choose a larger one",
        )
    names = [f"{stem}.safetensors"]
    if len(files) > 1:
        names = [f"{stem}-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    where = {part[0]: name for name, parts in zip(names, files, strict=True) for part in parts}
    if len(where) != sum(map(len, files)):
        raise ValueError("a tensor name appears twice")
    total = sum(_part_bytes(part) for parts in files for part in parts)
    called = called or {}
    weight_map = {called.get(name, name): file for name, file in where.items()}
    if len(weight_map) != len(where):
        raise ValueError("a tensor name appears twice in the files")
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    in_files = [[(called.get(name, name), dtype, shape) for name, dtype, shape in parts] for parts in files]
    return ShardedLayout(
        files={name: plan_layout(parts, metadata) for name, parts in zip(names, in_files, strict=True)},
        where=where,
        index_name=f"{stem}.safetensors.index.json",
        index=json_bytes(content) if indexed or len(files) > 1 else b"",
        names=called,
    )


def _split(groups: Sequence[Sequence[Part]], max_size: int) -> list[list[Part]]:
    if max_size < 1:
        raise InputError(field="max_shard_size", expected="at least a byte", got=str(max_size))
    files: list[list[Part]] = [[]]
    filled = 0
    for group in groups:
        size = sum(_part_bytes(part) for part in group)
        if files[-1] and filled + size > max_size:
            files.append([])
            filled = 0
        files[-1].extend(group)
        filled += size
    return files


def _part_bytes(part: Part) -> int:
    return math.prod(part[2]) * part[1].itemsize


class SafetensorsWriter:
    """Write a planned file a tensor at a time, or a tile of rows at a time, in any order. A context manager."""

    def __init__(self, path: Path, layout: Layout, share: Share | None = None) -> None:
        self.layout = layout
        self._file = OutputFile(path, layout.size, share)
        if share is None or share.frame:
            self._file.write(0, layout.prefix)

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write `tensor` as the rows of `name` from `row` on; ValueError if dtype or shape is not as planned."""
        entry = self.layout.entries[name]
        whole = tuple(tensor.shape) == entry.shape
        fits = tensor.ndim == len(entry.shape) and tuple(tensor.shape[1:]) == entry.shape[1:] and tensor.ndim > 0
        if tensor.dtype != entry.dtype or not (whole or fits) or (fits and row + tensor.shape[0] > entry.shape[0]):
            raise ValueError(
                f"{name}: expected {entry.dtype} {entry.shape}, got {tensor.dtype} {tuple(tensor.shape)} at row {row}"
            )
        row_bytes = entry.nbytes // entry.shape[0] if row else 0
        self._file.write(entry.offset + row * row_bytes, tensor)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


class ShardedWriter:
    """Write a planned model's files into a folder, as `SafetensorsWriter` does one, and their index.

    All files get their full size before the first byte, so that a full disk is found at once.
    """

    def __init__(self, folder: Path, layout: ShardedLayout, share: Share | None = None) -> None:
        self.layout = layout
        with ExitStack() as stack:
            self._writers = {
                name: stack.enter_context(SafetensorsWriter(folder / name, file, share))
                for name, file in layout.files.items()
            }
            if layout.index and (share is None or share.frame):
                (folder / layout.index_name).write_bytes(layout.index)
            self._stack = stack.pop_all()

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write `tensor` as the rows of `name` from `row` on; ValueError if dtype or shape is not as planned."""
        self._writers[self.layout.where[name]].write(self.layout.names.get(name, name), tensor, row)

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
