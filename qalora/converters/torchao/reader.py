"""Read a torchao folder: 2, 3, 4, 5, 6 and 8 bits in groups or rows, whole or real zero points; lazily.

Weights describe themselves in the metadata of their file (`qalora.formats.torchao`). A folder of ours says what each
was (`qalora.converters.specs`), which is held against that and against the values.

Not read: torchao's other types of tensors, quantized activations, blocks of several rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.packed import FLOATS, Names, Stored, not_read, parts_of, read_packed
from qalora.converters.real_zeros import joined
from qalora.converters.specs import TENSORS, check_values, stored_specs
from qalora.errors import FormatError, shown
from qalora.formats.json_text import parse_json
from qalora.formats.safetensors import Entry, load_tensor, read_header
from qalora.formats.torchao import PARTS, TYPE, from_qdata, is_lower, type_bits, whole
from qalora.tensor import BITS, GroupQuantTensor, QuantSpec

__all__ = ["read"]


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
        known, weights = stored_specs(stored), {}
        for module, called in names.items():
            path, _ = stored[f"{module}.{PARTS[0]}"]
            where = f"{folder}: {module}"
            bits, size = _described(where, metadata(path), called)
            spec = known.pop(module, None)
            if spec is not None and (type_bits(spec), spec.group_size) != (bits, size):
                expected, got = f"int{bits} in groups of {size}", f"int{type_bits(spec)} in groups of {spec.group_size}"
                raise FormatError(f"{where}: {TENSORS}", expected=expected, got=got)
            weights[module] = _lazy(_layer(where, module, stored, bits, size, spec), spec)
        if known:
            raise FormatError(f"{folder}: {TENSORS}", expected="layers of the file", got=shown(next(iter(known))))
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
    widths = {f"int{bits}": bits for bits in range(2, 9)}
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


def _layer(where: str, module: str, stored: Stored, bits: int, size: int, known: QuantSpec | None) -> _Layer:
    if known is None and bits not in BITS:
        expected = ", ".join(f"int{width}" for width in BITS)
        raise FormatError(f"{where}: target_dtype", expected=f"one of {expected}", got=shown(f"int{bits}"))
    parts = parts_of(where, module, stored, PARTS, needed=PARTS)
    codes = parts[PARTS[0]][1]
    if codes.dtype != torch.int8 or len(codes.shape) != 2 or not all(codes.shape):
        raise FormatError(f"{where}.{PARTS[0]}", expected="an int8 matrix", got=f"{codes.dtype} {list(codes.shape)}")
    rows, columns = codes.shape
    if columns % size or columns % 8:
        raise FormatError(f"{where}: block_size", expected=f"a divisor of {columns} columns", got=str(size))
    zeros: tuple[torch.dtype, ...] = (torch.int8, *FLOATS)
    if known is not None:
        zeros = zeros[:1] if known.zeros == "integer" else (torch.float32,)
    for part, dtypes in ((PARTS[1], FLOATS), (PARTS[2], zeros)):
        entry = parts[part][1]
        if entry.dtype not in dtypes or entry.shape != (rows, columns // size):
            expected = f"{str(dtypes[0]).removeprefix('torch.')} {[rows, columns // size]}"
            got = f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
            raise FormatError(f"{where}.{part}", expected=expected, got=got)
    return _Layer(module=module, parts=parts, bits=bits, group_size=size)


def _lazy(layer: _Layer, known: QuantSpec | None) -> LazyTensor:
    scales, zeros = (layer.parts[part][1].dtype for part in PARTS[1:])
    spec = known or QuantSpec(
        bits=layer.bits,
        group_size=layer.group_size,
        zeros="integer" if zeros == torch.int8 else "real",
        scale_dtype=torch.float16 if scales == torch.float16 else torch.float32,
        min_dtype=torch.float32,
    )
    lower = known is None or is_lower(known)
    middle = 1 << (spec.bits - 1) if lower else 0

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        qdata, scale, zero = (load_tensor(*layer.parts[part], start, stop) for part in PARTS)
        packed = from_qdata(qdata, spec.bits, lower=lower)
        if zero.dtype == torch.int8:
            tensor = joined(packed, scale.float(), whole(PARTS[2], zero, spec.bits, lower=lower).float(), spec)
        else:
            tensor = joined(packed, scale.float(), zero.float(), spec, middle=middle)
        if known is not None:
            check_values(tensor, known)
        return tensor

    size = sum(entry.nbytes for _, entry in layer.parts.values())
    return LazyTensor(
        name=f"{layer.module}.weight", shape=layer.shape, spec=spec, nbytes=size, by_rows=True, read=read_rows
    )
