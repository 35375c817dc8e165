"""Layers in GPTQ's words, whoever wrote them: what their headers tell, and reading them, whole or by rows.

How zero points are stored is the folder's matter: `unpack` gives those of a layer, uint8 [out, groups], of qzeros.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qalora.checkpoint import LazyTensor
from qalora.converters.gptq.beside import StoredResidual, pooling_matrix
from qalora.converters.packed import Stored, parts_of
from qalora.errors import FormatError
from qalora.formats.files import InputFile
from qalora.formats.gptq import Version, unpack_qweight, unpack_qzeros
from qalora.formats.safetensors import Entry, load_tensor
from qalora.residual import from_residual
from qalora.tensor import GroupQuantTensor, QuantSpec, holds_float16

__all__ = ["PARTS", "Words", "lazy_words", "symmetric_version", "words_of"]

SAMPLE = 8
"""Layers whose zero points are looked at before a model is taken for symmetric."""

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """One quantized layer as the headers tell it."""

    module: str
    stored: Stored
    rows: int
    columns: int
    bits: int
    group_size: int
    g_idx: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(entry.nbytes for _, entry in self.stored.values())

    def part(self, part: str) -> Tensor:
        """A whole tensor of the layer."""
        return load_tensor(*self.stored[part])

    def columns_of(self, part: str, start: int, stop: int) -> Tensor:
        """Columns start..stop-1 of a matrix; they are the rows of the weight."""
        if stop - start == self.rows:
            return self.part(part)
        path, entry = self.stored[part]
        size = entry.dtype.itemsize
        with InputFile(path) as file:
            lines = [
                file.tensor(entry.offset + (row * self.rows + start) * size, (stop - start) * size)
                for row in range(entry.shape[0])
            ]
        return torch.stack(lines).view(entry.dtype)


def words_of(folder: Path, module: str, stored: Stored, bits: int, group_size: int, why: str = "") -> Words:
    """A layer of a width and group size, -1 for rows; `why` is a word about them. FormatError where they do not fit."""
    where = f"{folder}: {module}"
    if module.endswith("embed_tokens"):
        raise FormatError(f"{where}: a GPTQ embedding has a layout of its own, which is not read here")
    parts = parts_of(where, module, stored, PARTS, needed=("qweight", "qzeros", "scales"))
    entries = {part: entry for part, (_, entry) in parts.items()}
    _check_dtypes(where, entries)
    words, rows = entries["qweight"].shape
    columns, groups = words * 32 // bits, entries["scales"].shape[0]
    if rows == 0 or groups == 0 or words == 0 or words * 32 % bits or columns % groups:
        raise FormatError(
            where, expected=f"{bits}-bit rows in equal groups", got=f"{words} words in {groups} groups of {rows} rows"
        )
    if groups != _groups(columns, group_size):
        raise FormatError(
            f"{where}.scales",
            expected=f"{_groups(columns, group_size)} groups of {group_size} in {columns} columns{why}",
            got=f"{groups}",
        )
    shapes = {"qzeros": (groups, rows * bits // 32), "scales": (groups, rows), "g_idx": (columns,)}
    for part, shape in shapes.items():
        if part in entries and (entries[part].shape != shape or rows * bits % 32):
            raise FormatError(f"{where}.{part}", expected=f"shape {list(shape)}", got=f"{list(entries[part].shape)}")
    layer = Words(
        module=module,
        stored=parts,
        rows=rows,
        columns=columns,
        bits=bits,
        group_size=columns // groups,
        g_idx=None,
    )
    return _with_order(layer) if "g_idx" in parts else layer


def _check_dtypes(where: str, entries: Mapping[str, Entry]) -> None:
    floats = (torch.float16, torch.bfloat16, torch.float32)
    allowed = {"qweight": (torch.int32,), "qzeros": (torch.int32,), "scales": floats, "g_idx": (torch.int32,)}
    for part, entry in entries.items():
        dimensions = 1 if part == "g_idx" else 2
        if entry.dtype not in allowed[part] or len(entry.shape) != dimensions:
            raise FormatError(
                f"{where}.{part}",
                expected=f"{allowed[part][0]} with {dimensions} dimensions",
                got=f"{entry.dtype} {list(entry.shape)}",
                todo="float zero points in qzeros are no GPTQ format" if part == "qzeros" else "",
            )


def _groups(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-columns // group_size)


def _with_order(layer: Words) -> Words:
    """The layer with its g_idx, where that is not i // group_size."""
    g_idx = layer.part("g_idx")
    if torch.equal(g_idx, (torch.arange(layer.columns) // layer.group_size).int()):
        return layer
    return replace(layer, g_idx=g_idx)


def symmetric_version(layers: Collection[Words]) -> Version | None:
    """How the zero points of the first layers are stored, where all are symmetric; None where one's are not."""
    offsets = set()
    for layer in list(layers)[:SAMPLE]:
        offsets.add(_offset(layer))
        if len(offsets) > 1 or None in offsets:
            return None
    return "gptq" if offsets == {-1} else "gptq_v2"


def _offset(layer: Words) -> int | None:
    """What all stored zero points of a layer are, less 2**(bits-1), if that is -1 or 0; else None."""
    stored = unpack_qzeros(layer.part("qzeros"), layer.bits, "gptq_v2")
    offset = int(stored[0, 0]) - (1 << (layer.bits - 1))
    return offset if offset in (-1, 0) and bool((stored == stored[0, 0]).all()) else None


def lazy_words(
    layer: Words,
    unpack: Callable[[Tensor, int], Tensor],
    *,
    symmetric: bool,
    residual: StoredResidual | None = None,
    minima: torch.dtype = torch.float32,
) -> LazyTensor:
    """The weight of a layer.

    unpack     zero points of qzeros and a width
    symmetric  whether they are the middle everywhere, as the first layers' are; reading raises FormatError for others
    residual   what is beside them, folded into the minima, which are then as narrow as `minima` says
    """
    scales = layer.stored["scales"][1].dtype
    spec = QuantSpec(
        bits=layer.bits,
        group_size=layer.group_size,
        zeros="integer" if residual is None else "real",
        scale_dtype=torch.float16 if scales == torch.float16 else torch.float32,
        min_dtype=torch.float32 if residual is None else minima,
        act_order=layer.g_idx is not None,
        zero=1 << (layer.bits - 1) if symmetric and residual is None else None,
    )

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        start, stop, _ = slice(start, stop).indices(layer.rows)
        scale = layer.columns_of("scales", start, stop).float().t().contiguous()
        zero = unpack(layer.part("qzeros"), layer.bits)[start:stop]
        if symmetric and bool((zero != 1 << (layer.bits - 1)).any()):
            raise FormatError(
                f"{layer.module}.qzeros",
                expected="symmetric zero points, as in the first layers",
                got="asymmetric zero points",
                todo="say how they are stored with `checkpoint_format` gptq or gptq_v2",
            )
        minimum = -scale * zero
        if residual is not None:
            c = residual.c(pooling_matrix(layer.columns, layer.group_size, layer.g_idx), start, stop)
            minimum = from_residual(scale, zero, c)
            if spec.min_dtype == torch.float16 and not holds_float16(minimum):
                raise FormatError(
                    f"{layer.module}", expected="minima that float16 holds, as meta says", got="minima that it rounds"
                )
        return GroupQuantTensor(
            packed=unpack_qweight(layer.columns_of("qweight", start, stop)),
            scale=scale,
            min=minimum,
            bits=layer.bits,
            group_size=layer.group_size,
            g_idx=layer.g_idx,
        )

    size = layer.nbytes + (0 if residual is None else residual.a.nbytes + residual.b.nbytes)
    shape = (layer.rows, layer.columns)
    return LazyTensor(name=f"{layer.module}.weight", shape=shape, spec=spec, nbytes=size, read=read_rows)
