"""GGUF: typed metadata, a table of tensors, then their bytes. Read with suspicion, written streamed.

    4 bytes    "GGUF"
    u32        version, 2 or 3 (little-endian; a big-endian file shows a version beyond 65535 and is refused)
    u64 u64    number of tensors, number of metadata entries
    entries    key string, u32 type, value            string: u64 length, UTF-8 bytes
    tensors    name string, u32 dimensions, u64 each (fastest first: the reverse of torch's shape), u32 type, u64 offset
    padding    to general.alignment (32 by default), then the tensors; offsets count from here and are aligned

Value types: 0 u8, 1 i8, 2 u16, 3 i16, 4 u32, 5 i32, 6 f32, 7 bool, 8 string, 9 array (u32 type, u64 length, values),
10 u64, 11 i64, 12 f64. Nested arrays are refused: no writer makes them, and they have been used against parsers.

Source: ggml-org/ggml, docs/gguf.md. This module knows no model family and no block layout: see `gguf_blocks`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

from qalora.errors import FormatError, shown
from qalora.formats.files import InputFile, OutputFile
from qalora.formats.output import text_bytes
from qalora.formats.share import Share

__all__ = [
    "BLOCKS",
    "GgufFile",
    "GgufLayout",
    "Metadata",
    "TensorInfo",
    "Value",
    "ValueType",
    "metadata_bytes",
    "parse_metadata",
    "plan_layout",
    "read_header",
    "tensor_bytes",
]

MAGIC = b"GGUF"
VERSION = 3
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 20
MAX_STRING = 64 << 20
MAX_ARRAY = 1 << 26
MAX_HEADER = 512 << 20


class ValueType(IntEnum):
    """The type tag of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_STRUCT = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}

BLOCKS: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q8_1": (9, 32, 36),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
}
"""Tensor types: (tag, elements of a block, bytes of a block)."""

_TYPE_NAMES = {tag: name for name, (tag, _, _) in BLOCKS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A metadata value: its type, the type of its elements if it is an array, and the Python value (a tuple then).

    Strings are decoded with surrogateescape, so that any bytes come back as they were.
    """

    type: ValueType
    value: Any
    element: ValueType | None = None

    @classmethod
    def text(cls, value: str) -> Value:
        """A string of ours: UTF-8 as the format wants it, with escapes for the bytes of a path that is none."""
        return cls(type=ValueType.STRING, value=text_bytes(value).decode("utf-8"))

    @classmethod
    def uint32(cls, value: int) -> Value:
        """A whole number from 0 to 2^32 - 1."""
        return cls(type=ValueType.UINT32, value=int(value))

    @classmethod
    def float32(cls, value: float) -> Value:
        """A float32 number."""
        return cls(type=ValueType.FLOAT32, value=float(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """The metadata of a file, in its order."""

    entries: Mapping[str, Value]

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of a key."""
        return self.entries[key].value if key in self.entries else default

    def with_entries(self, changes: Mapping[str, Value]) -> Metadata:
        """The same with some entries changed in place or added at the end."""
        return Metadata(entries={**self.entries, **changes})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor: its shape in torch's order, its type's name in BLOCKS, and where it stands in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; the tensor has shape[0] of them (a vector counts as rows of one element)."""
        return self.nbytes // self.shape[0] if self.shape[0] else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A file as its header tells it. `parts`: the file of each tensor that is in another one, see `gguf_split`."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    parts: Mapping[str, Path] = field(default_factory=dict)

    def place(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.parts.get(name, self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufLayout:
    """A file to be written: the bytes before the data, each tensor's place, and the whole size."""

    prefix: bytes = field(repr=False)
    tensors: Mapping[str, TensorInfo]
    size: int


def tensor_bytes(shape: Sequence[int], type_name: str) -> int:
    """Bytes of a tensor; FormatError if a row does not hold whole blocks."""
    _, elements, nbytes = BLOCKS[type_name]
    if shape and shape[-1] % elements:
        raise FormatError(f"{type_name}", expected=f"rows of whole blocks of {elements}", got=f"rows of {shape[-1]}")
    return math.prod(shape) // elements * nbytes


class _Cursor:
    """Reads typed values one behind the other; every length is checked against the bytes that are left."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._buffer = b""
        self._start = 0
        self.at = 0

    def fail(self, expected: str, got: object) -> FormatError:
        return FormatError(f"{self._file.path}: at byte {self.at}", expected=expected, got=str(got))

    def take(self, count: int) -> bytes:
        if self.at + count > min(self._file.size, MAX_HEADER):
            raise self.fail(f"{count} more bytes of the header", f"a file of {self._file.size} bytes")
        if not self._start <= self.at <= self.at + count <= self._start + len(self._buffer):
            self._start = self.at
            self._buffer = self._file.read(self.at, min(max(count, 1 << 20), self._file.size - self.at))
        begin = self.at - self._start
        self.at += count
        return self._buffer[begin : begin + count]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > MAX_STRING:
            raise self.fail(f"a string of at most {MAX_STRING} bytes", length)
        return self.take(length).decode("utf-8", "surrogateescape")

    def value_type(self) -> ValueType:
        tag = self.number("I")
        if tag not in ValueType.__members__.values():
            raise self.fail("a value type from 0 to 12", tag)
        return ValueType(tag)

    def value(self) -> Value:
        kind = self.value_type()
        if kind is not ValueType.ARRAY:
            return Value(type=kind, value=self._plain(kind))
        element, length = self.value_type(), self.number("Q")
        if element is ValueType.ARRAY:
            raise self.fail("an array of plain values", "a nested array")
        if length > MAX_ARRAY:
            raise self.fail(f"an array of at most {MAX_ARRAY} values", length)
        if element is ValueType.STRING:
            if 8 * length > self._file.size - self.at:
                raise self.fail(f"{length} strings", f"{self._file.size - self.at} bytes")
            return Value(type=kind, element=element, value=tuple(self.string() for _ in range(length)))
        code = f"<{length}{_STRUCT[element]}"
        return Value(type=kind, element=element, value=struct.unpack(code, self.take(struct.calcsize(code))))

    def _plain(self, kind: ValueType) -> Any:
        return self.string() if kind is ValueType.STRING else self.number(_STRUCT[kind])


def read_header(path: Path) -> GgufFile:
    """Read and check metadata and tensor table; FormatError if it is not GGUF, or if it lies about sizes."""
    with InputFile(path) as file:
        return _read(file)


def _read(file: InputFile) -> GgufFile:
    cursor = _Cursor(file)
    if file.size < 24 or cursor.take(4) != MAGIC:
        raise FormatError(str(file.path), expected="a GGUF file", got=f"{file.size} bytes without its magic number")
    version, tensor_count, entry_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise FormatError(f"{file.path}: version", expected="2 or 3, little-endian", got=str(version))
    if tensor_count > MAX_TENSORS or entry_count > MAX_ENTRIES:
        raise FormatError(
            str(file.path),
            expected=f"at most {MAX_TENSORS} tensors and {MAX_ENTRIES} metadata entries",
            got=f"{tensor_count} and {entry_count}",
        )
    entries: dict[str, Value] = {}
    for _ in range(entry_count):
        key = cursor.string()
        if key in entries:
            raise FormatError(f"{file.path}: the key {key!r} appears twice")
        entries[key] = cursor.value()
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = _alignment(file.path, entries)
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(path=file.path, metadata=Metadata(entries=entries), tensors=_place(file, infos, start, alignment))


def _alignment(path: Path, entries: Mapping[str, Value]) -> int:
    value = entries.get("general.alignment")
    alignment = 32 if value is None else value.value
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment", expected="a power of two from 8 to 2**20", got=shown(alignment))
    return alignment


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= 4:
        raise cursor.fail(f"1 to 4 dimensions of tensor {name!r}", dimensions)
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    tag, offset = cursor.number("I"), cursor.number("Q")
    if tag not in _TYPE_NAMES:
        raise cursor.fail(f"a known type of tensor {name!r}", tag)
    if math.prod(shape) >= 1 << 62 or 0 in shape:
        raise cursor.fail(f"a size of tensor {name!r} that a file can hold", list(shape))
    kind = _TYPE_NAMES[tag]
    try:
        nbytes = tensor_bytes(shape, kind)
    except FormatError as error:
        raise FormatError(f"{cursor._file.path}: tensor {name!r}: {error}") from error
    return TensorInfo(name=name, shape=shape, type=kind, offset=offset, nbytes=nbytes)


def _place(file: InputFile, infos: Sequence[TensorInfo], start: int, alignment: int) -> dict[str, TensorInfo]:
    placed: dict[str, TensorInfo] = {}
    for info in infos:
        where = f"{file.path}: tensor {info.name!r}"
        if info.name in placed:
            raise FormatError(f"{where} appears twice")
        if info.offset % alignment or start + info.offset + info.nbytes > file.size:
            raise FormatError(
                where,
                expected=f"{info.nbytes} bytes at an offset that is a multiple of {alignment}",
                got=f"offset {info.offset} of a file of {file.size} bytes",
                todo="it is truncated or its header is wrong; download it again",
            )
        placed[info.name] = TensorInfo(
            name=info.name, shape=info.shape, type=info.type, offset=start + info.offset, nbytes=info.nbytes
        )
    in_order = sorted(placed.values(), key=lambda info: info.offset)
    for before, after in pairwise(in_order):
        if before.offset + before.nbytes > after.offset:
            raise FormatError(f"{file.path}: tensors {before.name!r} and {after.name!r} overlap")
    return placed


def _string_bytes(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value_bytes(value: Value) -> Iterator[bytes]:
    yield struct.pack("<I", value.type)
    if value.type is ValueType.STRING:
        yield _string_bytes(value.value)
    elif value.type is not ValueType.ARRAY:
        yield struct.pack("<" + _STRUCT[value.type], value.value)
    else:
        if value.element is None:
            raise ValueError("an array without the type of its elements")
        yield struct.pack("<IQ", value.element, len(value.value))
        if value.element is ValueType.STRING:
            yield from (_string_bytes(text) for text in value.value)
        else:
            yield struct.pack(f"<{len(value.value)}{_STRUCT[value.element]}", *value.value)


def _prefix(metadata: Metadata, infos: Sequence[tuple[str, tuple[int, ...], str, int]], alignment: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(metadata.entries))]
    for key, value in metadata.entries.items():
        parts.append(_string_bytes(key))
        parts.extend(_value_bytes(value))
    for name, shape, kind, offset in infos:
        parts.append(_string_bytes(name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], BLOCKS[kind][0], offset))
    data = b"".join(parts)
    return data + bytes(-len(data) % alignment)


def metadata_bytes(metadata: Metadata) -> bytes:
    """Metadata as a GGUF file without tensors; inverse of `parse_metadata`."""
    return _prefix(metadata, [], 32)


def parse_metadata(path: Path) -> Metadata:
    """The metadata of a GGUF file, whatever tensors it holds."""
    return read_header(path).metadata


def plan_layout(metadata: Metadata, tensors: Sequence[tuple[str, tuple[int, ...], str]]) -> GgufLayout:
    """Lay tensors (name, shape in torch's order, type) out in the order given, aligned as the metadata says."""
    alignment = _alignment(Path("metadata"), metadata.entries)
    infos, at = [], 0
    for name, shape, kind in tensors:
        infos.append((name, shape, kind, at))
        at += -(-tensor_bytes(shape, kind) // alignment) * alignment
    prefix = _prefix(metadata, infos, alignment)
    placed = {
        name: TensorInfo(
            name=name, shape=shape, type=kind, offset=len(prefix) + offset, nbytes=tensor_bytes(shape, kind)
        )
        for name, shape, kind, offset in infos
    }
    return GgufLayout(prefix=prefix, tensors=placed, size=len(prefix) + at)


def create(path: Path, layout: GgufLayout, share: Share | None = None) -> OutputFile:
    """Begin a planned file: everything but the tensors' bytes is written; write those at their offsets, then close.

    share  what of it is written here: without its frame, the file is there and only tensors are missing
    """
    file = OutputFile(path, layout.size, share)
    if share is not None and not share.frame:
        return file
    file.write(0, layout.prefix)
    in_order = sorted(layout.tensors.values(), key=lambda info: info.offset)
    starts = [info.offset for info in in_order[1:]] + [layout.size]
    for info, following in zip(in_order, starts, strict=True):
        end = info.offset + info.nbytes
        file.zeros(end, following - end)
    return file
