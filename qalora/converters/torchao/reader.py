"""Read a torchao folder: 2, 3, 4, 5, 6 and 8 bits in groups or rows, whole or real zero points; lazily.

    weight = scale * (qdata - zero_point)          qdata and zero_point are signed: 2**(bits-1) less than here

Weights describe themselves in the metadata of their file. Source: torchao 0.18.0, prototype/safetensors and
quantization/quantize_/workflows/intx/intx_unpacked_to_int8_tensor.py.

Not read: torchao's other types of tensors, quantized activations, blocks of several rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.packed import FLOATS, Names, Stored, not_read, parts_of, read_packed
from qalora.errors import FormatError, shown
from qalora.formats.json_text import parse_json
from qalora.formats.safetensors import Entry, load_tensor, read_header
from qalora.tensor import BITS, GroupQuantTensor, QuantSpec, all_finite, pack_codes

__all__ = ["read"]

PARTS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
TYPE = "IntxUnpackedToInt8Tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One quantized layer as header and metadata tell it."""

    module: str
    parts: Mapping[str, tuple[Path, Entry]]
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.parts[PARTS[0]][1].shape
        return rows, columns


def read(folder: Path) -> Checkpoint:
    """Open a torchao folder; reads config and headers. FormatError for what is no such folder, or is of other types."""

    def layers(said: object, names: Names, stored: Stored) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
        metadata = cache(lambda path: read_header(path).metadata)
        weights = {}
        for module, called in names.items():
            path, _ = stored[f"{module}.{PARTS[0]}"]
            where = f"{folder}: {module}"
            bits, size = _described(where, metadata(path), called)
            weights[module] = _lazy(_layer(where, module, stored, bits, size))
        return weights, ()

    return read_packed(folder, "torchao", PARTS, layers)


def _described(where: str, metadata: Mapping[str, str], called: Collection[str]) -> tuple[int, int]:
    """Width and group size of a weight, by the metadata of its file."""
    text = next((metadata[f"{name}.weight"] for name in called if f"{name}.weight" in metadata), None)
    if text is None:
        raise FormatError(f"{where}: metadata of the file", expected="an entry for its weight", got="none")
    said = parse_json(text, f"{where}: metadata")
    kind = said.get("_type") if isinstance(said, dict) else None
    if kind != TYPE:
        raise FormatError(f"{where}: type", expected=TYPE, got=shown(kind), todo="start from the float model")
    data = said.get("_data")
    data = data if isinstance(data, dict) else {}
    if data.get("activation_quantization") is not None:
        raise not_read(f"{where}: activation_quantization: quantized activations")
    widths = {f"int{bits}": bits for bits in BITS}
    target = _data_of(data.get("target_dtype"))
    if not isinstance(target, str) or target not in widths:
        raise FormatError(f"{where}: target_dtype", expected=f"one of {', '.join(widths)}", got=shown(target))
    block = data.get("block_size")
    if not isinstance(block, list) or len(block) != 2 or block[0] != 1 or type(block[1]) is not int or block[1] < 1:
        raise FormatError(f"{where}: block_size", expected="1 row, and columns", got=shown(block))
    return widths[target], block[1]


def _data_of(value: Any) -> Any:
    """What torchao's JSON wraps, as in {"_type": "torch.dtype", "_data": "int4"}."""
    return value.get("_data") if isinstance(value, dict) else value


def _layer(where: str, module: str, stored: Stored, bits: int, size: int) -> _Layer:
    parts = parts_of(where, module, stored, PARTS, needed=PARTS)
    codes = parts[PARTS[0]][1]
    if codes.dtype != torch.int8 or len(codes.shape) != 2 or not all(codes.shape):
        raise FormatError(f"{where}.{PARTS[0]}", expected="an int8 matrix", got=f"{codes.dtype} {list(codes.shape)}")
    rows, columns = codes.shape
    if columns % size or columns % 8:
        raise FormatError(f"{where}: block_size", expected=f"a divisor of {columns} columns", got=str(size))
    for part, dtypes in ((PARTS[1], FLOATS), (PARTS[2], (torch.int8, *FLOATS))):
        entry = parts[part][1]
        if entry.dtype not in dtypes or entry.shape != (rows, columns // size):
            expected = f"{str(dtypes[0]).removeprefix('torch.')} {[rows, columns // size]}"
            got = f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
            raise FormatError(f"{where}.{part}", expected=expected, got=got)
    return _Layer(module=module, parts=parts, bits=bits, group_size=size)


def _lazy(layer: _Layer) -> LazyTensor:
    scales, zeros = (layer.parts[part][1].dtype for part in PARTS[1:])
    spec = QuantSpec(
        bits=layer.bits,
        group_size=layer.group_size,
        zeros="integer" if zeros == torch.int8 else "real",
        scale_dtype=torch.float16 if scales == torch.float16 else torch.float32,
        min_dtype=torch.float32,
    )
    middle, top = 1 << (layer.bits - 1), 1 << layer.bits

    def whole(name: str, stored: Tensor) -> Tensor:
        """Signed whole numbers as 0..2**bits-1, uint8."""
        values = stored.to(torch.int16) + middle
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < top:
            raise FormatError(name, expected=f"values of {layer.bits} bits", got="values beyond them")
        return values.to(torch.uint8)

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        codes, scale, zero = (load_tensor(*layer.parts[part], start, stop) for part in PARTS)
        scale = scale.float()
        if zero.dtype == torch.int8:
            minimum = -scale * whole(PARTS[2], zero)
        elif not all_finite(zero.float()):
            raise FormatError(PARTS[2], expected="finite values", got="NaN or Inf")
        else:
            minimum = -(scale.double() * (zero.double() + middle)).float()
        return GroupQuantTensor(
            packed=pack_codes(whole(PARTS[0], codes), layer.bits),
            scale=scale,
            min=minimum,
            bits=layer.bits,
            group_size=layer.group_size,
        )

    size = sum(entry.nbytes for _, entry in layer.parts.values())
    return LazyTensor(
        name=f"{layer.module}.weight", shape=layer.shape, spec=spec, nbytes=size, by_rows=True, read=read_rows
    )
