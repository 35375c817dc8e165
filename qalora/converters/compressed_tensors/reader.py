"""Read a compressed-tensors folder: 2, 3, 4, 5, 6 and 8 bits, groups or whole rows, act-order, sharded or not; lazily.

Opening reads config, headers, weight_shape and weight_g_idx. A layer is read by rows.

Not read: one scale for a whole matrix or a block of it, floats in few bits, quantized activations, sparse words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.compressed_tensors.scheme import Scheme, parse_settings
from qalora.converters.huggingface import stored_tensors
from qalora.converters.packed import FLOATS, Names, Stored, parts_of, read_packed
from qalora.errors import FormatError
from qalora.formats.compressed_tensors import row_words, unpack_rows, unpack_zeros
from qalora.formats.safetensors import Entry, load_tensor
from qalora.tensor import GroupQuantTensor, QuantSpec

__all__ = ["float16_scales", "read"]

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One quantized layer as the headers tell it. padded: how its words are packed."""

    module: str
    parts: Stored
    scheme: Scheme
    rows: int
    columns: int
    padded: bool
    g_idx: Tensor | None = None

    @property
    def group_size(self) -> int:
        return self.scheme.group_size or self.columns

    @property
    def groups(self) -> int:
        return self.columns // self.group_size


def read(folder: Path) -> Checkpoint:
    """Open a compressed-tensors folder; FormatError for what is no such folder, or is not understood."""

    def layers(said: object, names: Names, stored: Stored) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
        settings = parse_settings(said, f"{folder}: quantization_config")
        settings.check([name for called in names.values() for name in called])
        schemes = {module: settings.scheme_of(module, called) for module, called in names.items()}
        return {module: _lazy(_layer(folder, module, stored, scheme)) for module, scheme in schemes.items()}, ()

    return read_packed(folder, "compressed-tensors", PARTS, layers)


def float16_scales(folder: Path) -> frozenset[str]:
    """The modules with scales in float16, in which the library then computes the weights."""
    stored, end = stored_tensors(folder), ".weight_scale"
    scales = {name: entry for name, (_, entry) in stored.items() if name.endswith(end)}
    return frozenset(name.removesuffix(end) for name, entry in scales.items() if entry.dtype == torch.float16)


def _layer(folder: Path, module: str, stored: Stored, scheme: Scheme) -> _Layer:
    where = f"{folder}: {module}"
    needed = [*PARTS[:2], "weight_shape", *(["weight_g_idx"] if scheme.ordered else [])]
    needed += [] if scheme.symmetric else ["weight_zero_point"]
    parts = parts_of(where, module, stored, PARTS, needed=needed)
    if "weight_g_idx" in parts and not scheme.ordered:
        raise FormatError(f"{where}.weight_g_idx", expected="none, as actorder says", got="a tensor")
    entries = {part: entry for part, (_, entry) in parts.items()}
    rows, columns = _shape(where, parts)
    bits, size = scheme.bits, scheme.group_size or columns
    if columns % size:
        raise FormatError(f"{where}: group_size", expected=f"a divisor of {columns} columns", got=str(size))
    padded = _padded(where, entries["weight_packed"], columns, bits)
    groups, zeros = columns // size, row_words(rows, bits, padded=padded)
    ints, plain = (torch.int32,), entries.get("weight_zero_point")
    wanted: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "weight_packed": (ints, (rows, row_words(columns, bits, padded=padded))),
        "weight_scale": (FLOATS, (rows, groups)),
        "weight_zero_point": (ints, (zeros, groups)),
        "weight_g_idx": (ints, (columns,)),
    }
    if plain is not None and plain.dtype == torch.int8:  # as they are where nothing packed them
        wanted["weight_zero_point"] = ((torch.int8,), (rows, groups))
    for part, (dtypes, shape) in wanted.items():
        entry = entries.get(part)
        if entry is not None and (entry.dtype not in dtypes or entry.shape != shape):
            raise FormatError(
                f"{where}.{part}",
                expected=f"{str(dtypes[0]).removeprefix('torch.')} {list(shape)} at {bits} bits, as group "
                f"{scheme.name!r} says",
                got=f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}",
            )
    order = load_tensor(*parts["weight_g_idx"]) if scheme.ordered else None
    if order is not None and torch.equal(order, (torch.arange(columns) // size).int()):
        order = None
    return _Layer(module=module, parts=parts, scheme=scheme, rows=rows, columns=columns, padded=padded, g_idx=order)


def _shape(where: str, parts: Stored) -> tuple[int, int]:
    """(out, in) as weight_shape says, in which a row has whole bytes."""
    path, entry = parts["weight_shape"]
    if entry.dtype not in (torch.int32, torch.int64) or entry.shape != (2,):
        raise FormatError(f"{where}.weight_shape", expected="2 whole numbers", got=f"{entry.dtype} {list(entry.shape)}")
    rows, columns = load_tensor(path, entry).tolist()
    if not 0 < rows < 1 << 31 or not 0 < columns < 1 << 31 or columns % 8:
        raise FormatError(
            f"{where}.weight_shape", expected="rows, and columns in a multiple of 8", got=f"{rows}, {columns}"
        )
    return rows, columns


def _padded(where: str, words: Entry, columns: int, bits: int) -> bool:
    """Whether no code is in two words; FormatError for a row of which nothing tells."""
    dense, padded = row_words(columns, bits), row_words(columns, bits, padded=True)
    if 32 % bits and dense == padded:
        raise FormatError(
            f"{where}.weight_packed: rows of {columns} columns at {bits} bits, whose two ways of packing look alike",
            todo="start from the float model",
        )
    return bool(32 % bits) and words.shape[1:] == (padded,)


def _lazy(layer: _Layer) -> LazyTensor:
    middle = 1 << (layer.scheme.bits - 1)
    zeros = layer.parts.get("weight_zero_point")
    scales = layer.parts["weight_scale"][1].dtype
    spec = QuantSpec(
        bits=layer.scheme.bits,
        group_size=layer.group_size,
        zeros="integer",
        scale_dtype=torch.float16 if scales == torch.float16 else torch.float32,
        min_dtype=torch.float32,
        act_order=layer.g_idx is not None,
        zero=middle if zeros is None else None,
    )

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        start, stop, _ = slice(start, stop).indices(layer.rows)
        words = load_tensor(*layer.parts["weight_packed"], start, stop)
        scale = load_tensor(*layer.parts["weight_scale"], start, stop).float()
        zero = torch.tensor(middle) if zeros is None else _zeros(layer, zeros)[start:stop]
        return GroupQuantTensor(
            packed=unpack_rows(words, layer.columns, layer.scheme.bits, padded=layer.padded),
            scale=scale,
            min=-scale * zero,
            bits=layer.scheme.bits,
            group_size=layer.group_size,
            g_idx=layer.g_idx,
        )

    return LazyTensor(
        name=f"{layer.module}.weight",
        shape=(layer.rows, layer.columns),
        spec=spec,
        nbytes=sum(entry.nbytes for _, entry in layer.parts.values()),
        by_rows=True,
        read=read_rows,
    )


def _zeros(layer: _Layer, place: tuple[Path, Entry]) -> Tensor:
    """Zero points [out, groups], each in 0..2**bits-1."""
    stored, bits = load_tensor(*place), layer.scheme.bits
    if stored.dtype == torch.int32:
        return unpack_zeros(stored, layer.rows, bits, padded=layer.padded)
    zero = stored.to(torch.int16) + (1 << (bits - 1))
    if bool((zero < 0).any()) or bool((zero >= 1 << bits).any()):
        raise FormatError("weight_zero_point", expected=f"values of {bits} bits", got="values beyond them")
    return zero
