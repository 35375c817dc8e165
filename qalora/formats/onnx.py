"""ONNX files whose weights lie beside them: stubs, offsets, and reading back with suspicion.

An initializer of `model.onnx` names a file, an offset and a length (external data). Offsets are multiples of ALIGN, so
that runtimes can map them. onnx.save is not used for the data: it needs all weights in memory, and appends to files.

Reading knows three keys of external data (location, offset, length) and ignores others; a location must be a plain name
inside the model's folder, and no link that leads out of it; length must be what dtype and shape say. This module knows
no graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.errors import FormatError, shown
from qalora.formats.files import InputFile, check_content, check_dimensions, contained, read_limited

__all__ = [
    "ALIGN",
    "DTYPES",
    "Initializer",
    "Stored",
    "lay_out",
    "part_name",
    "read_initializers",
    "read_model",
    "read_stored",
    "stub",
]

ALIGN = 4096
MAX_MODEL = 1 << 30

DTYPES: dict[str, tuple[int, int, torch.dtype]] = {
    "FLOAT": (1, 32, torch.float32),
    "UINT8": (2, 8, torch.uint8),
    "INT32": (6, 32, torch.int32),
    "INT64": (7, 64, torch.int64),
    "FLOAT16": (10, 16, torch.float16),
    "UINT4": (21, 4, torch.uint8),
    "INT4": (22, 4, torch.uint8),
}
"""(TensorProto's tag, bits of an element, torch's dtype of the bytes). UINT4, INT4: two in a byte, low half first."""

_NAMES = {tag: name for name, (tag, _, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Initializer:
    """A weight to be written: its type's name in DTYPES, its shape, and its place: in which data file, and where."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    file: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype][1] // 8

    def row_at(self, row: int) -> int:
        """Bytes before a row."""
        return row * (self.nbytes // self.shape[0]) if row else 0


def lay_out(
    initializers: Sequence[Initializer], limit: int | None = None
) -> tuple[dict[str, Initializer], tuple[int, ...]]:
    """Give each its place, in the order given; gives them by name, and the size of each data file.

    limit  bytes that a file may have; None: all are in one. An initializer that has more has a file of its own.
    """
    placed, sizes = {}, [0]
    for item in initializers:
        at = -(-sizes[-1] // ALIGN) * ALIGN
        if limit is not None and sizes[-1] and at + item.nbytes > limit:
            sizes.append(0)
            at = 0
        placed[item.name] = replace(item, offset=at, file=len(sizes) - 1)
        sizes[-1] = at + item.nbytes
    return placed, tuple(sizes)


def part_name(first: str, number: int) -> str:
    """The name of a data file, by that of the first: model.onnx_data, model.onnx_data_1 and so on."""
    return f"{first}_{number}" if number else first


def stub(item: Initializer, location: str) -> Any:
    """The TensorProto of a weight that lies in the data file `location`, or in one behind it."""
    from onnx import TensorProto

    location = part_name(location, item.file)
    proto = TensorProto(
        name=item.name, data_type=DTYPES[item.dtype][0], dims=item.shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", item.offset), ("length", item.nbytes)):
        entry = proto.external_data.add()
        entry.key, entry.value = key, str(value)
    return proto


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A weight of a file that was read: where its bytes are, or the bytes themselves if they are in the model."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    inline: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype][1] // 8


def read_model(path: Path) -> Any:
    """The ModelProto of a file, without the weights that lie beside it; FormatError for what is no ONNX model."""
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(read_limited(path, MAX_MODEL))
    except (DecodeError, RecursionError) as error:
        raise FormatError(str(path), expected="an ONNX model", got="bytes that protobuf cannot read") from error
    _check_text(model, path)
    return model


def _check_text(message: Any, path: Path) -> None:
    """FormatError for a text that is not UTF-8: protobuf gives its bytes. No data of a weight is looked at."""
    for field, held in message.ListFields():
        repeated = not isinstance(held, str | bytes) and hasattr(held, "__len__")
        if field.cpp_type == field.CPPTYPE_MESSAGE:
            for inside in held if repeated else (held,):
                _check_text(inside, path)
        elif field.type == field.TYPE_STRING and any(isinstance(one, bytes) for one in (held if repeated else (held,))):
            raise FormatError(str(path), expected="an ONNX model", got=f"a {field.name} that is not UTF-8")


def read_initializers(path: Path) -> tuple[Any, dict[str, Stored]]:
    """Parse a model and check its initializers; gives the ModelProto, without weights, and the weights by name.

    Raises FormatError for what is no ONNX model, and for external data that leaves the folder or lies about its size.
    """
    model = read_model(path)
    if not model.graph.node:
        raise FormatError(str(path), expected="an ONNX model with a graph", got="no nodes")
    stored: dict[str, Stored] = {}
    for proto in model.graph.initializer:
        if proto.name in stored:
            raise FormatError(f"{path}: the initializer {proto.name!r} appears twice")
        if proto.data_type in _NAMES:
            stored[proto.name] = _check(path, proto)
    return model, stored


def _check(path: Path, proto: Any) -> Stored:
    from onnx import TensorProto

    where, shape = f"{path}: {proto.name}", tuple(proto.dims)
    check_dimensions(where, shape)
    if any(size < 0 or size >= 1 << 48 for size in shape) or math.prod(shape) >= 1 << 56:
        raise FormatError(where, expected="a size that a file can hold", got=str(list(shape)))
    name = _NAMES[proto.data_type]
    if proto.data_location != TensorProto.EXTERNAL:
        item = Stored(dtype=name, shape=shape, path=path, inline=bytes(proto.raw_data))
        if proto.raw_data and len(proto.raw_data) != item.nbytes:
            raise FormatError(where, expected=f"{item.nbytes} bytes", got=str(len(proto.raw_data)))
        return item
    entries = {entry.key: entry.value for entry in proto.external_data}
    item = Stored(
        dtype=name,
        shape=shape,
        path=contained(path.parent, entries.get("location", "")),
        offset=_number(where, entries.get("offset", "0")),
    )
    if _number(where, entries.get("length", str(item.nbytes))) != item.nbytes:
        raise FormatError(where, expected=f"{item.nbytes} bytes for {name} {list(shape)}", got=entries["length"])
    if item.path.is_file():
        check_content(item.path)
    there = item.path.stat().st_size if item.path.is_file() else None
    if there is None or item.offset + item.nbytes > there:
        raise FormatError(
            where,
            expected=f"{item.nbytes} bytes at {item.offset} of {item.path.name}",
            got="no such file" if there is None else f"a file of {there} bytes",
            todo="fetch the whole folder again",
        )
    return item


def _number(where: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise FormatError(f"{where}: external data", expected="a whole number", got=shown(text[:40]))
    return int(text)


def read_stored(item: Stored, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows start..stop-1 of a weight (all by default); UINT4, INT4 as packed bytes [rows, row bytes], in whole bytes.

    FormatError for data in the model that is not raw bytes of the weight's size.
    """
    if item.inline is not None and len(item.inline) != item.nbytes:
        raise FormatError(
            f"{item.path}: an initializer", expected=f"{item.nbytes} raw bytes", got=str(len(item.inline))
        )
    rows = item.shape[0] if item.shape else 1
    start, stop, _ = slice(start, stop).indices(rows)
    row_bytes = item.nbytes // rows if rows else 0
    if item.inline is not None:
        data = torch.frombuffer(bytearray(item.inline or b"\0"), dtype=torch.uint8)[: item.nbytes]
        data = data[start * row_bytes : stop * row_bytes]
    else:
        with InputFile(item.path) as file:
            data = file.tensor(item.offset + start * row_bytes, (stop - start) * row_bytes)
    if item.dtype in ("UINT4", "INT4"):
        return data.view(stop - start, row_bytes)
    shape: Mapping[bool, tuple[int, ...]] = {True: (stop - start, *item.shape[1:]), False: ()}
    return data.view(DTYPES[item.dtype][2]).view(shape[bool(item.shape)])
