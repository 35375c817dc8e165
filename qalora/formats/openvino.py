"""OpenVINO IR, version 11: a graph in XML, and the bytes of its constants in a .bin of the same name beside it.

    <net name version="11"> <layers> <layer id name type version> <data .../> <input> <port id precision/> ...
    <edges> <edge from-layer from-port to-layer to-port/>      <rt_info> <key value="..."/> ...

The ports of a layer are numbered, inputs first. A port needs a precision; its dimensions are left out, as OpenVINO
infers them. A constant is a layer of type Const with element_type, shape, offset and size. Types of less than a byte
lie one behind the other over all dimensions, low bits first.

Source: openvino, src/core/src/xml_util/xml_deserialize_util.cpp and xml_serialize_util.cpp. Files are read with
suspicion: a document type, which could define entities, is refused, and so is a constant that is not within its file or
is not as large as it says. This module knows no model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.parsers import expat

import torch
from torch import Tensor

from qalora.errors import FormatError, InputError, shown
from qalora.formats.files import InputFile, check_dimensions, read_limited

__all__ = [
    "DTYPES",
    "ELEMENTS",
    "Constant",
    "Ir",
    "Layer",
    "ReadLayer",
    "Stored",
    "element_of",
    "ir_bytes",
    "lay_out",
    "read_info",
    "read_ir",
    "read_stored",
    "weights_file",
]

ALIGN = 64
LIMIT = 64 << 20
"""Bytes of a graph: one of 70 billion weights has 5 MB."""

MOST = 1 << 18
"""Layers of a graph, a quarter of its edges, and entries of its rt_info: such a one has 16,000 layers."""

ELEMENTS: dict[str, tuple[str, int, torch.dtype]] = {
    "f32": ("FP32", 32, torch.float32),
    "f16": ("FP16", 16, torch.float16),
    "bf16": ("BF16", 16, torch.bfloat16),
    "f64": ("FP64", 64, torch.float64),
    "i64": ("I64", 64, torch.int64),
    "i32": ("I32", 32, torch.int32),
    "boolean": ("BOOL", 8, torch.uint8),
    "u8": ("U8", 8, torch.uint8),
    "i8": ("I8", 8, torch.int8),
    "u4": ("U4", 4, torch.uint8),
    "i4": ("I4", 4, torch.uint8),
    "u2": ("U2", 2, torch.uint8),
}
"""An element's type: what a port calls it, its bits, and torch's dtype of it, or of the bytes that hold several."""

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Types of floats that a model's tensors are stored in."""

_WORDS = {dtype: name for name, dtype in DTYPES.items()}


def element_of(dtype: torch.dtype) -> str:
    """The type that holds a float of torch's: f32 for what has no type of its own here."""
    return _WORDS.get(dtype, "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A constant to be written: its type in ELEMENTS, its shape, and its place in the .bin."""

    name: str
    element: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the data; the last one may be used in part."""
        return -(-math.prod(self.shape) * ELEMENTS[self.element][1] // 8)

    def row_at(self, row: int) -> int:
        """Bytes before a row, which begins with a byte."""
        bits = row * math.prod(self.shape[1:]) * ELEMENTS[self.element][1]
        if bits % 8:
            raise ValueError(f"{self.name}: row {row} begins within a byte")
        return bits // 8


def lay_out(constants: Iterable[Constant]) -> tuple[dict[str, Constant], int]:
    """Give each its offset, in the order given; gives them by name, and the size of the file."""
    placed, at = dict[str, Constant](), 0
    for item in constants:
        at = -(-at // ALIGN) * ALIGN
        placed[item.name] = replace(item, offset=at)
        at += item.nbytes
    return placed, at


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer to be written.

    inputs      the layers whose outputs it takes: a name, or "name:1" for another output than the first
    outputs     the type of each output
    attributes  of <data>
    names       what the tensor of its first output is called
    decompresses  whether it widens floats that are to stay as they are stored
    """

    name: str
    kind: str
    opset: str
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ("f32",)
    attributes: Mapping[str, str] = field(default_factory=dict)
    names: str = ""
    decompresses: bool = False


def ir_bytes(name: str, layers: Sequence[Layer], constants: Mapping[str, Constant], info: Mapping[str, Any]) -> bytes:
    """The XML. A layer with the name of a constant is that constant. info: texts, or more of such by their keys."""
    numbers = {layer.name: n for n, layer in enumerate(layers)}
    if len(numbers) != len(layers):
        raise ValueError("two layers have one name")
    lines = ['<?xml version="1.0"?>', f'<net name="{_quoted(name)}" version="11">', "\t<layers>"]
    edges = []
    for n, layer in enumerate(layers):
        lines += _layer_lines(n, layer, constants)
        for port, source in enumerate(layer.inputs):
            before, _, output = source.partition(":")
            start = layers[numbers[before]]
            out = len(start.inputs) + int(output or 0)
            edges.append(
                f'\t\t<edge from-layer="{numbers[before]}" from-port="{out}" to-layer="{n}" to-port="{port}"/>'
            )
    lines += ["\t</layers>", "\t<edges>", *edges, "\t</edges>", "\t<rt_info>", *_info_lines(info, 2), "\t</rt_info>"]
    return ("\n".join([*lines, "</net>"]) + "\n").encode()


def _layer_lines(n: int, layer: Layer, constants: Mapping[str, Constant]) -> Iterable[str]:
    attributes, item = dict(layer.attributes), constants.get(layer.name)
    if item is not None:
        shape = ", ".join(map(str, item.shape))
        attributes |= {"element_type": item.element, "shape": shape}
        attributes |= {"offset": str(item.offset), "size": str(item.nbytes)}
    yield f'\t\t<layer id="{n}" name="{_quoted(layer.name)}" type="{layer.kind}" version="{layer.opset}">'
    if attributes:
        yield "\t\t\t<data " + " ".join(f'{key}="{_quoted(value)}"' for key, value in attributes.items()) + "/>"
    if layer.decompresses:
        yield '\t\t\t<rt_info><attribute name="decompression" version="0"/></rt_info>'
    if layer.inputs:
        ports = "".join(f'<port id="{port}" precision="FP32"/>' for port in range(len(layer.inputs)))
        yield f"\t\t\t<input>{ports}</input>"
    if layer.outputs:
        ports = ""
        for at, element in enumerate(layer.outputs):
            names = f' names="{_quoted(layer.names)}"' if layer.names and at == 0 else ""
            ports += f'<port id="{len(layer.inputs) + at}" precision="{ELEMENTS[element][0]}"{names}/>'
        yield f"\t\t\t<output>{ports}</output>"
    yield "\t\t</layer>"


def _info_lines(info: Mapping[str, Any], depth: int) -> Iterable[str]:
    for key, value in info.items():
        if isinstance(value, Mapping):
            yield f"{chr(9) * depth}<{key}>"
            yield from _info_lines(value, depth + 1)
            yield f"{chr(9) * depth}</{key}>"
        else:
            yield f'{chr(9) * depth}<{key} value="{_quoted(value)}"/>'


_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]").search
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"}


def _quoted(text: str) -> str:
    """As the value of an attribute; InputError for characters that XML has no way to write."""
    if _ILLEGAL(text):
        raise InputError("openvino: a text in the graph", expected="no control characters", got=shown(text))
    return "".join(_ESCAPES.get(char, char) for char in text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A constant of a graph that was read."""

    name: str
    element: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(slots=True, kw_only=True)
class ReadLayer:
    """A layer of a graph that was read.

    inputs  (number of a layer, its port) by this one's ports
    """

    name: str
    kind: str
    attributes: dict[str, str] = field(default_factory=dict)
    ports: int = 0
    inputs: dict[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ir:
    """A graph that was read: its layers and constants by their numbers, and its rt_info, keys joined by "/"."""

    path: Path
    layers: Mapping[int, ReadLayer]
    constants: Mapping[int, Stored]
    info: Mapping[str, str]


def weights_file(path: Path) -> Path:
    """The .bin of an .xml."""
    return path.with_suffix(".bin")


def read_info(path: Path) -> Mapping[str, str]:
    """The rt_info of a graph, keys joined by "/"; FormatError for what is no IR."""
    return _parsed(path).info


def read_ir(path: Path) -> Ir:
    """Parse a graph and check its constants against the .bin; FormatError for what is none, or is damaged."""
    parsed = _parsed(path)
    data = weights_file(path)
    with InputFile(data) as file:
        size = file.size
    constants = {
        number: _constant(path, data, size, layer) for number, layer in parsed.layers.items() if layer.kind == "Const"
    }
    return Ir(path=path, layers=parsed.layers, constants=constants, info=parsed.info)


def _constant(path: Path, data: Path, size: int, layer: ReadLayer) -> Stored:
    where, values = f"{path}: {layer.name}", layer.attributes
    element = values.get("element_type", "")
    if element not in ELEMENTS:
        raise FormatError(where, expected=f"one of {', '.join(ELEMENTS)}", got=shown(element))
    shape = tuple(_number(where, part) for part in values.get("shape", "").split(",") if part.strip())
    check_dimensions(where, shape)
    item = Constant(name=layer.name, element=element, shape=shape)
    offset, nbytes = (_number(where, values.get(key, "")) for key in ("offset", "size"))
    if nbytes != item.nbytes:
        raise FormatError(where, expected=f"{item.nbytes} bytes, as its type and shape say", got=str(nbytes))
    if offset + nbytes > size:
        raise FormatError(
            str(data),
            expected=f"bytes {offset}..{offset + nbytes} of {layer.name}",
            got=f"a file of {size} bytes",
            todo="it is truncated, or belongs to another graph",
        )
    return Stored(name=layer.name, element=element, shape=shape, path=data, offset=offset, nbytes=nbytes)


def _number(where: str, text: str) -> int:
    if not text.strip().isascii() or not text.strip().isdigit() or len(text) > 20:
        raise FormatError(where, expected="a whole number", got=shown(text))
    return int(text)


def read_stored(item: Stored, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows start..stop-1 of a constant: of its dtype and shape, or, where an element is less than a byte, uint8 [bytes]
    from the one that the first row begins with."""
    placed = Constant(name=item.name, element=item.element, shape=item.shape)
    rows = item.shape[0] if item.shape else 1
    stop = rows if stop is None else stop
    begin, end = placed.row_at(start), item.nbytes if stop == rows else placed.row_at(stop)
    with InputFile(item.path) as file:
        data = file.tensor(item.offset + begin, end - begin)
    bits, dtype = ELEMENTS[item.element][1:]
    return data if bits < 8 else data.view(dtype).view(stop - start if item.shape else 1, *item.shape[1:])


class _Parser:
    """What expat calls for each element."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layers: dict[int, ReadLayer] = {}
        self.info: dict[str, str] = {}
        self._stack: list[str] = []
        self._layer: ReadLayer | None = None
        self._edges = 0

    def fail(self, expected: str, got: str) -> FormatError:
        return FormatError(str(self.path), expected=expected, got=got)

    def doctype(self, *parts: Any) -> None:
        raise self.fail("an OpenVINO graph", "XML with a document type")

    def start(self, tag: str, values: dict[str, str]) -> None:
        stack = self._stack
        if not stack and (tag != "net" or values.get("version") not in ("10", "11")):
            version = f" of version {values['version']}" if "version" in values else ""
            raise self.fail("an OpenVINO graph, <net> of version 10 or 11", f"<{tag}>{version}"[:80])
        if stack == ["net", "layers"] and tag == "layer":
            self._layer = ReadLayer(name=values.get("name", ""), kind=values.get("type", ""))
            self._put(_number(f"{self.path}: layer", values.get("id", "")), self._layer)
        elif self._layer is not None and len(stack) == 3 and tag == "data":
            self._layer.attributes.update(values)
        elif self._layer is not None and tag == "port" and stack[-1] == "input":
            self._layer.ports += 1
        elif stack == ["net", "edges"] and tag == "edge":
            self._edge(values)
        elif len(stack) >= 2 and stack[1] == "rt_info" and "value" in values:
            self.info["/".join([*stack[2:], tag])] = values["value"]
            if len(self.info) > MOST:
                raise self.fail(f"at most {MOST} entries of rt_info", "more")
        stack.append(tag)
        if len(stack) > 64:
            raise self.fail("an OpenVINO graph", "XML of more than 64 levels")

    def end(self, tag: str) -> None:
        self._stack.pop()
        if len(self._stack) == 2:
            self._layer = None

    def _put(self, number: int, layer: ReadLayer) -> None:
        if number in self.layers:
            raise self.fail("layers with numbers of their own", f"two of number {number}")
        if len(self.layers) == MOST:
            raise self.fail(f"at most {MOST} layers", "more")
        self.layers[number] = layer

    def _edge(self, values: Mapping[str, str]) -> None:
        keys = ("from-layer", "from-port", "to-layer", "to-port")
        start, out, end, into = (_number(f"{self.path}: edge: {key}", values.get(key, "")) for key in keys)
        if start not in self.layers or end not in self.layers or into in self.layers[end].inputs:
            raise self.fail("edges between its layers, one to a port", f"one from layer {start} to layer {end}")
        self.layers[end].inputs[into] = (start, out)
        self._edges += 1
        if self._edges > 4 * MOST:
            raise self.fail(f"at most {4 * MOST} edges", "more")


def _parsed(path: Path) -> _Parser:
    handlers, reader = _Parser(path), expat.ParserCreate()
    reader.StartElementHandler, reader.EndElementHandler = handlers.start, handlers.end
    reader.StartDoctypeDeclHandler = handlers.doctype
    try:
        reader.Parse(read_limited(path, LIMIT), True)
    except expat.ExpatError as error:
        raise FormatError(str(path), expected="an OpenVINO graph", got=f"no XML ({error})") from error
    return handlers
