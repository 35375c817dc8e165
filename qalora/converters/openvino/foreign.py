"""Open an OpenVINO folder of others: what optimum-intel exports, as it is or compressed by NNCF.

A weight is known by the chain of layers that it goes through:

    Const [out, groups, group size] or [out, in], of u4, u8, i4, i8 or u2
      -> Convert -> Subtract (a zero point) -> Multiply (a scale) -> Reshape -> Convert -> MatMul or Gather

and is called `self.<name>`, as transformers calls it. Norms and biases have lost their names: the layer that uses one
is called `__module.<module>/...`. Signed codes are shifted by half of their range, and have the middle zero point.
Every float of more than one element has to be one of these, or the frequencies of rotary positions, which are held
against config.json: what an algorithm of NNCF adds to the graph, such as a correction by a LoRA, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.decoder import decoder_of
from qalora.converters.families import family_of
from qalora.converters.huggingface import model_of
from qalora.converters.openvino.carriers import float_constant
from qalora.converters.openvino.rotary import is_frequencies
from qalora.errors import FormatError, shown
from qalora.formats.openvino import DTYPES, ELEMENTS, Ir, ReadLayer, Stored, read_stored
from qalora.tensor import GroupQuantTensor, QuantSpec, check_finite

__all__ = ["read"]

CODES = {"u8": 8, "i8": 8, "u4": 4, "i4": 4, "u2": 2}
WEIGHT, MODULE, ROTARY = "self.", "__module.", "rotary_emb"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """Constants of one weight: what is multiplied, and, of codes, its scale and its zero points where it has some."""

    codes: Stored
    scale: Stored | None = None
    zero: Stored | None = None


def read(file: Path, ir: Ir, config: Mapping[str, Any]) -> Checkpoint:
    """The model of a graph. FormatError for one whose constants are not all understood."""
    family, decoder = family_of(config, file.parent), decoder_of(config, file.parent)
    walk, tensors, used = _Walk(file, ir), dict[str, LazyTensor](), set[int]()
    for number, item in ir.constants.items():
        if not item.name.startswith(WEIGHT) or "/" in item.name:
            continue
        name = item.name.removeprefix(WEIGHT)
        parts, own = walk.weight(number)
        used |= own
        lazy = _quantized(file, name, parts) if parts.scale is not None else float_constant(name, item)
        if tensors.setdefault(name, lazy) is not lazy:
            raise FormatError(f"{file}: two constants are called {shown(item.name)}")
    for number, item in ir.constants.items():
        if number in used or item.element not in DTYPES or math.prod(item.shape) <= 1:
            continue
        called = walk.vector(number)
        if called is None:
            if not (ROTARY in walk.user(number).name and is_frequencies(item, decoder)):
                raise FormatError(
                    f"{file}: the constant {shown(item.name)}",
                    expected="a weight, a norm, a bias, or rotary positions as config.json says",
                    got=f"{item.element} {list(item.shape)} in {shown(walk.user(number).name)}",
                    todo="start from the model that it was made of",
                )
            continue
        vector = replace(item, shape=(math.prod(item.shape),))
        tensors[called] = float_constant(called, vector, 1.0 if family.adds_one(called) else 0.0)
    return model_of(file.parent, "openvino", config, tensors, others="refuse")


class _Walk:
    """The ways from a constant to what uses it."""

    def __init__(self, file: Path, ir: Ir) -> None:
        self._file, self._ir = file, ir
        self._users: dict[int, list[tuple[int, int]]] = {}
        for number, layer in ir.layers.items():
            for port, (source, _) in layer.inputs.items():
                self._users.setdefault(source, []).append((number, port))

    def _one(self, number: int) -> tuple[int, int]:
        """The layer that uses another, and its port; FormatError where several do."""
        users = self._users.get(number, [])
        if len(users) != 1:
            name = self._ir.layers[number].name
            raise FormatError(f"{self._file}: {shown(name)}", expected="one layer that uses it", got=str(len(users)))
        return users[0]

    def user(self, number: int) -> ReadLayer:
        """The first layer that computes with a constant: past those that widen it."""
        seen = 0
        while (users := self._users.get(number)) and seen < 8:
            number, seen = users[0][0], seen + 1
            if self._ir.layers[number].kind != "Convert":
                break
        return self._ir.layers[number]

    def vector(self, number: int) -> str | None:
        """The tensor's name of a norm's or a bias' constant, by the layer that uses it."""
        item, layer = self._ir.constants[number], self.user(number)
        module, _, operation = layer.name.removeprefix(MODULE).partition("/")
        if not layer.name.startswith(MODULE) or sum(size > 1 for size in item.shape) > 1:
            return None
        if layer.kind == "Add" and operation.startswith("aten::linear"):
            return f"{module}.bias"
        return f"{module}.weight" if layer.kind == "Multiply" and "norm" in module else None

    def weight(self, number: int) -> tuple[_Weight, set[int]]:
        """The constants of a weight, and their numbers."""
        layers, item = self._ir.layers, self._ir.constants[number]
        found: dict[str, int | None] = {"scale": None, "zero": None}
        used, at = {number}, number
        while True:
            users = self._users.get(at, [])
            ends = [(layers[user].kind, port) for user, port in users]
            if ends and all(end in (("MatMul", 1), ("Gather", 0)) for end in ends):
                break
            at, port = self._one(at)
            kind = layers[at].kind
            if kind in ("Subtract", "Multiply") and port == 0:
                part = "zero" if kind == "Subtract" else "scale"
                source = self._constant_at(at)
                if found[part] is not None or (part == "zero" and found["scale"] is not None):
                    raise self._odd(item)
                found[part] = source
                used.add(source)
            elif kind not in ("Convert", "Reshape"):
                raise self._odd(item)
        for user, _ in users:
            if layers[user].kind == "MatMul" and layers[user].attributes.get("transpose_b") != "true":
                raise self._odd(item)
        if (item.element in CODES) != (found["scale"] is not None):
            raise self._odd(item)
        constants = self._ir.constants
        parts = {part: None if source is None else constants[source] for part, source in found.items()}
        return _Weight(codes=item, **parts), used

    def _constant_at(self, number: int) -> int:
        """The constant at a layer's second port, past a layer that widens it."""
        layers = self._ir.layers
        source = layers[number].inputs[1][0]
        if layers[source].kind == "Convert" and 0 in layers[source].inputs:
            source = layers[source].inputs[0][0]
        if layers[source].kind != "Const":
            raise FormatError(f"{self._file}: {shown(layers[number].name)}", expected="a constant at its second input")
        return source

    def _odd(self, item: Stored) -> FormatError:
        return FormatError(
            f"{self._file}: {shown(item.name)}",
            expected="codes, a zero point, a scale, and a product with the transpose",
            got=f"another chain of layers behind {item.element} {list(item.shape)}",
            todo="start from the model that it was made of",
        )


def _quantized(file: Path, name: str, parts: _Weight) -> LazyTensor:
    codes, scale, zero = parts.codes, parts.scale, parts.zero
    assert scale is not None
    rows, columns = codes.shape[0], math.prod(codes.shape[1:])
    groups = codes.shape[1] if len(codes.shape) == 3 else 1
    where, bits = f"{file}: {name}", CODES[codes.element]
    if len(codes.shape) not in (2, 3) or 0 in codes.shape or columns % 8:
        raise FormatError(where, expected="[out, groups, group size], or [out, in]", got=str(list(codes.shape)))
    if scale.element not in ("f16", "f32") or math.prod(scale.shape) != rows * groups or scale.shape[0] != rows:
        raise FormatError(f"{where}: scale", expected=f"{rows} x {groups} floats", got=_form(scale))
    if zero is not None and (codes.element[0] == "i" or zero.element != codes.element or not _fits(zero, rows, groups)):
        raise FormatError(f"{where}: zero point", expected=f"{codes.element}, {rows} x {groups}", got=_form(zero))
    middle = 1 << (bits - 1) if codes.element[0] == "i" else 0 if zero is None else None
    spec = QuantSpec(
        bits=bits,
        group_size=columns // groups,
        zeros="integer",
        scale_dtype=ELEMENTS[scale.element][2],
        min_dtype=torch.float32,
        zero=middle,
    )

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        packed = read_stored(codes, start, stop).view(torch.uint8).view(stop - start, -1)
        if codes.element == "i4":
            packed = packed ^ 0x88
        elif codes.element == "i8":
            packed = packed ^ 0x80
        scales = read_stored(scale, start, stop).float().view(-1, groups)
        check_finite(name, scales)
        points = torch.tensor(float(middle or 0)) if zero is None else _points(zero, rows, groups)[start:stop]
        return GroupQuantTensor(
            packed=packed, scale=scales, min=-scales * points, bits=bits, group_size=spec.group_size
        )

    nbytes = sum(item.nbytes for item in (codes, scale, zero) if item is not None)
    return LazyTensor(name=name, shape=(rows, columns), spec=spec, nbytes=nbytes, by_rows=True, read=read_rows)


def _fits(zero: Stored, rows: int, groups: int) -> bool:
    return math.prod(zero.shape) in (1, rows * groups)


def _form(item: Stored) -> str:
    return f"{item.element} {list(item.shape)}"


def _points(zero: Stored, rows: int, groups: int) -> Tensor:
    """float32 [out, groups]: the zero points, of which several may share a byte."""
    data, bits = read_stored(zero), ELEMENTS[zero.element][1]
    if bits < 8:
        each = [(data >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        data = torch.stack(each, dim=1)
    flat = data.flatten()[: math.prod(zero.shape)].float()
    return flat.expand(rows * groups).view(rows, groups) if len(flat) == 1 else flat.view(rows, groups)
