"""Layers in AWQ's words, whoever wrote them: what their headers tell, and reading them, whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qalora.checkpoint import LazyTensor
from qalora.converters.packed import FLOATS, Stored, parts_of
from qalora.errors import FormatError
from qalora.formats.awq import unpack_words
from qalora.formats.safetensors import Entry, load_tensor
from qalora.tensor import GroupQuantTensor, QuantSpec, pack_codes

__all__ = ["PARTS", "lazy_words"]

PARTS = ("qweight", "qzeros", "scales")


def lazy_words(
    folder: Path, module: str, stored: Stored, bits: int, group_size: int, *, interleaved: bool
) -> LazyTensor:
    """The weight of a layer of a width and group size, -1 for rows; FormatError where its tensors are of others."""
    where = f"{folder}: {module}"
    parts = parts_of(where, module, stored, PARTS, needed=PARTS)
    columns, rows, groups = _sizes(where, {part: entry for part, (_, entry) in parts.items()}, bits)
    wanted = 1 if group_size == -1 else -(-columns // group_size)
    if groups != wanted or columns % groups or columns % 8:
        expected = f"{wanted} groups of {group_size} in {columns} columns"
        raise FormatError(f"{where}.scales", expected=expected, got=f"{groups}")
    scales = parts["scales"][1].dtype
    spec = QuantSpec(
        bits=bits,
        group_size=columns // groups,
        zeros="integer",
        scale_dtype=torch.float16 if scales == torch.float16 else torch.float32,
        min_dtype=torch.float32,
    )

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        words, zeros, scale = (load_tensor(*parts[part]) for part in PARTS)
        codes = unpack_words(words, rows, bits, interleaved=interleaved)[:, start:stop]
        zero = unpack_words(zeros, rows, bits, interleaved=interleaved)[:, start:stop].t()
        scale = scale[:, start:stop].float().t().contiguous()
        return GroupQuantTensor(
            packed=pack_codes(codes.t().contiguous(), bits),
            scale=scale,
            min=-scale * zero,
            bits=bits,
            group_size=columns // groups,
        )

    size = sum(entry.nbytes for _, entry in parts.values())
    return LazyTensor(name=f"{module}.weight", shape=(rows, columns), spec=spec, nbytes=size, read=read_rows)


def _sizes(where: str, entries: Mapping[str, Entry], bits: int) -> tuple[int, int, int]:
    """(in, out, groups) of qweight, qzeros and scales."""
    scales, words = entries["scales"], entries["qweight"]
    groups, rows = scales.shape if len(scales.shape) == 2 else (0, 0)
    columns = words.shape[0] if len(words.shape) == 2 else 0
    if min(groups, rows, columns) < 1 or rows % 8 or rows * bits % 32:
        got = f"qweight {list(words.shape)} and scales {list(scales.shape)}"
        raise FormatError(where, expected=f"words of rows in eights at {bits} bits", got=got)
    packed = rows * bits // 32
    wanted = {"qweight": (columns, packed), "qzeros": (groups, packed), "scales": (groups, rows)}
    for part, shape in wanted.items():
        entry = entries[part]
        if entry.shape != shape or entry.dtype not in (FLOATS if part == "scales" else (torch.int32,)):
            kind = "float16" if part == "scales" else "int32"
            raise FormatError(
                f"{where}.{part}",
                expected=f"{kind} {list(shape)} at {bits} bits",
                got=f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}",
            )
    return columns, rows, groups
