"""An MNN graph, llm.mnn: the flatbuffer of a Net, written and read without MNN.

A table is a dict of its fields, as JSON has it in `mnnconvert -f JSON`: an enumeration is the name of its value, and a
union `main` has the name of its table in `main_type`. Fields that are left out have MNN's defaults. What is known here
is the part of MNN's schema that decoders are made of.

    a table   int32: how far before it its vtable begins; then its fields, those of 4 bytes first
    vtable    uint16 each: its bytes, the table's bytes, and where in the table each field is, 0 where it is left out
    vector    uint32: its length; its elements. A text is a vector of UTF-8 with a zero behind it
    what is no number is an uint32: how far behind itself it begins

Source: MNN 3.6.1, schema/default/*.fbs; flatbuffers, docs/source/internals.md. A graph is read with suspicion:
FormatError for what does not lie within the file, and for more tables than a decoder has.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from qalora.errors import FormatError

__all__ = ["MOST", "graph_bytes", "read_graph"]

MOST = 1 << 17
"""Tables of a graph: one of 80 layers has 10,000."""

_FORMAT = {"NCHW": 0, "NHWC": 1, "NC4HW4": 2, "NHWC4": 3, "UNKNOWN": 4}
_TYPE = {"DT_INVALID": 0, "DT_FLOAT": 1, "DT_INT32": 3, "DT_VARIANT": 21}
_BINARY = {"ADD": 0, "SUB": 1, "MUL": 2}
_UNARY = {"NEG": 1, "SIN": 9, "COS": 10, "SILU": 34}
_OPS = {
    "BinaryOp": 7,
    "Cast": 9,
    "Concat": 10,
    "Const": 11,
    "Convolution": 12,
    "Input": 34,
    "Reshape": 73,
    "StridedSlice": 91,
    "UnaryOp": 101,
    "ConvertTensor": 129,
    "Attention": 299,
    "LayerNorm": 603,
}
_MAINS = {
    "Axis": 4,
    "BinaryOp": 6,
    "Blob": 7,
    "CastParam": 8,
    "Convolution2D": 9,
    "Input": 21,
    "Reshape": 55,
    "StridedSliceParam": 65,
    "TensorConvertInfo": 66,
    "UnaryOp": 70,
    "LayerNorm": 88,
    "AttentionParam": 98,
}

_ENUMS: dict[str, tuple[str, Mapping[str, int]]] = {
    "format": ("b", _FORMAT),
    "type": ("i", _TYPE),
    "binary": ("i", _BINARY),
    "unary": ("i", _UNARY),
    "op": ("i", _OPS),
    "main": ("B", _MAINS),
    "padding": ("b", {"CAFFE": 0}),
    "scales": ("b", {"FP32": 0}),
    "source": ("b", {"ONNX": 3}),
}
"""Each enumeration: how its values are stored, and those that are known."""

_TABLES: dict[str, dict[str, tuple[int, str]]] = {
    "Net": {
        "bizCode": (0, "text"),
        "extraInfo": (2, "ExtraInfo"),
        "oplists": (3, "[Op"),
        "outputName": (4, "[text"),
        "sourceType": (6, "source"),
        "tensorName": (7, "[text"),
        "mnn_uuid": (11, "text"),
    },
    "ExtraInfo": {"name": (1, "text"), "version": (2, "text")},
    "Op": {
        "inputIndexes": (0, "[i"),
        "main_type": (1, "main"),
        "main": (2, "union"),
        "name": (3, "text"),
        "outputIndexes": (4, "[i"),
        "type": (5, "op"),
        "defaultDimentionFormat": (6, "format"),
    },
    "Axis": {"axis": (0, "i")},
    "BinaryOp": {"opType": (0, "binary"), "T": (1, "type"), "activationType": (2, "i")},
    "Blob": {
        "dims": (0, "[i"),
        "dataFormat": (1, "format"),
        "dataType": (2, "type"),
        "int32s": (5, "[i"),
        "float32s": (7, "[f"),
    },
    "CastParam": {"srcT": (0, "type"), "dstT": (1, "type")},
    "Convolution2D": {"common": (0, "Convolution2DCommon"), "quanParameter": (3, "IDSTQuan"), "external": (6, "[q")},
    "Convolution2DCommon": {
        "kernelX": (2, "i"),
        "kernelY": (3, "i"),
        "strideX": (4, "i"),
        "strideY": (5, "i"),
        "dilateX": (6, "i"),
        "dilateY": (7, "i"),
        "padMode": (8, "padding"),
        "group": (9, "i"),
        "outputCount": (10, "i"),
        "inputCount": (11, "i"),
    },
    "IDSTQuan": {
        "type": (2, "i"),
        "useInt32": (3, "?"),
        "quantScale": (4, "f"),
        "scaleIn": (5, "f"),
        "scaleOut": (6, "f"),
        "aMaxOrBits": (7, "i"),
        "aMin": (8, "i"),
        "readType": (9, "i"),
        "has_scaleInt": (10, "?"),
        "shapeInt32": (11, "?"),
        "scaleStorage": (15, "scales"),
    },
    "Input": {"dims": (0, "[i"), "dtype": (1, "type"), "dformat": (2, "format")},
    "Reshape": {"dims": (0, "[i"), "dimType": (1, "format")},
    "StridedSliceParam": {
        "Index": (0, "type"),
        "T": (1, "type"),
        "beginMask": (2, "i"),
        "endMask": (3, "i"),
        "ellipsisMask": (4, "i"),
        "newAxisMask": (5, "i"),
        "shrinkAxisMask": (6, "i"),
        "fromType": (7, "i"),
    },
    "TensorConvertInfo": {"source": (0, "format"), "dest": (1, "format")},
    "UnaryOp": {"opType": (0, "unary"), "T": (1, "type")},
    "LayerNorm": {
        "axis": (0, "[i"),
        "epsilon": (1, "f"),
        "external": (5, "[q"),
        "useRMSNorm": (6, "?"),
    },
    "AttentionParam": {"kv_cache": (0, "?"), "layer_index": (2, "i")},
}
"""Each table's fields: their numbers in the schema, and what they are. "[" begins a vector; "text" is a text, "union"
the table that `main_type` names; else a table, an enumeration, or a number as `struct` writes it."""


def graph_bytes(net: Mapping[str, Any]) -> bytes:
    """The flatbuffer of a Net."""
    writer = _Writer()
    writer.refer(0, writer.table("Net", net))
    return bytes(writer.data)


def read_graph(data: bytes, where: str) -> dict[str, Any]:
    """The Net of a flatbuffer. FormatError for what is none, or has values that are not known here."""
    try:
        return _Reader(data, where).table("Net", _at(data, 0))
    except (struct.error, UnicodeDecodeError) as error:
        raise FormatError(where, expected="an MNN graph", got="a damaged file, or none") from error


class _Writer:
    """Tables one behind the other: whatever is referred to lies behind what refers to it."""

    def __init__(self) -> None:
        self.data = bytearray(4)

    def refer(self, at: int, target: int) -> None:
        """Write the distance to a target."""
        struct.pack_into("<I", self.data, at, target - at)

    def table(self, kind: str, values: Mapping[str, Any]) -> int:
        """Write a table and all that it refers to; gives its place."""
        fields, known = [], _TABLES[kind]
        for name, value in values.items():
            number, what = known[name]
            fields.append((number, name, _inline(what), what, value))
        fields.sort(key=lambda field: (-struct.calcsize(field[2]), field[0]))
        places, size = {}, 4
        for number, _, code, _, _ in fields:
            places[number] = size
            size += struct.calcsize(code)
        slots = [places.get(number, 0) for number in range(max(places, default=-1) + 1)]
        self._pad(4, before=4 + 2 * len(slots))
        vtable = len(self.data)
        self.data += struct.pack(f"<{2 + len(slots)}H", 4 + 2 * len(slots), size, *slots)
        at = len(self.data)
        self.data += struct.pack("<i", at - vtable) + bytes(size - 4)
        for number, name, code, what, value in fields:
            place = at + places[number]
            if code == "I":
                self.refer(place, self._value(values[f"{name}_type"] if what == "union" else what, value))
            else:
                struct.pack_into(f"<{code}", self.data, place, _ENUMS[what][1][value] if what in _ENUMS else value)
        return at

    def _value(self, what: str, value: Any) -> int:
        if what == "text":
            return self._vector("B", value.encode(), end=b"\0")
        if not what.startswith("["):
            return self.table(what, value)
        if _inline(what[1:]) != "I":
            return self._vector(what[1:], value)
        at = self._vector("I", [0] * len(value))
        for n, each in enumerate(value):
            self.refer(at + 4 + 4 * n, self._value(what[1:], each))
        return at

    def _vector(self, code: str, values: Sequence[Any], end: bytes = b"") -> int:
        self._pad(max(4, struct.calcsize(code)), before=4)
        at = len(self.data)
        self.data += struct.pack("<I", len(values)) + struct.pack(f"<{len(values)}{code}", *values) + end
        return at

    def _pad(self, size: int, before: int) -> None:
        """Zeros, so that what comes `before` bytes later begins at a multiple of a size."""
        self.data += bytes(-(len(self.data) + before) % size)


class _Reader:
    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self._left = data, where, MOST

    def table(self, kind: str, at: int) -> dict[str, Any]:
        self._left -= 1
        if kind not in _TABLES:
            raise FormatError(self.where, expected="a graph of qalora's", got="an operator without its table")
        if self._left < 0:
            raise FormatError(self.where, expected=f"at most {MOST} tables", got=f"{MOST + 1} of them at least")
        (back,) = struct.unpack_from("<i", self.data, at)
        (size,) = struct.unpack_from("<H", self.data, _inside(self.data, at - back))
        slots = struct.unpack_from(f"<{max(0, size - 4) // 2}H", self.data, at - back + 4)
        values: dict[str, Any] = {}
        for name, (number, what) in _TABLES[kind].items():
            if number < len(slots) and slots[number]:
                values[name] = self._value(
                    values.get(f"{name}_type", "") if what == "union" else what, at + slots[number]
                )
        return values

    def _value(self, what: str, at: int) -> Any:
        code = _inline(what)
        if what in _ENUMS:
            (number,) = struct.unpack_from(f"<{code}", self.data, at)
            found = next((name for name, value in _ENUMS[what][1].items() if value == number), None)
            if found is None:
                raise FormatError(self.where, expected="a graph of qalora's", got=f"{what} {number} in it")
            return found
        if code != "I":
            return struct.unpack_from(f"<{code}", self.data, at)[0]
        at = _at(self.data, at)
        if not what.startswith("[") and what != "text":
            return self.table(what, at)
        (count,) = struct.unpack_from("<I", self.data, at)
        element = "B" if what == "text" else _inline(what[1:])
        if count * struct.calcsize(element) > len(self.data):
            raise struct.error("a vector beyond the file")
        if what == "text":
            return bytes(struct.unpack_from(f"<{count}B", self.data, at + 4)).decode()
        if element != "I":
            return list(struct.unpack_from(f"<{count}{element}", self.data, at + 4))
        return [self._value(what[1:], at + 4 + 4 * n) for n in range(count)]


def _inline(what: str) -> str:
    """How a field is stored in its table: as a number, or as the distance to it."""
    return _ENUMS[what][0] if what in _ENUMS else what if len(what) == 1 else "I"


def _at(data: bytes, place: int) -> int:
    """Where a reference leads."""
    (distance,) = struct.unpack_from("<I", data, place)
    return _inside(data, place + distance)


def _inside(data: bytes, at: int) -> int:
    if not 0 <= at < len(data):
        raise struct.error("a place beyond the file")
    return at
