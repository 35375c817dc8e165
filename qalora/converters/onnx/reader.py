"""Read one of our graphs back: canonical tensors from its initializers, as its metadata says; what proves an export.

Graphs without that metadata are others', and `foreign` reads those that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.decoder import decoder_of
from qalora.converters.families import family_of
from qalora.converters.huggingface import model_of, read_config
from qalora.converters.onnx import foreign, version1
from qalora.converters.onnx.carriers import Fetch, as_blocks, as_rows, block_size, decode, parts
from qalora.converters.onnx.decoder import TABLES
from qalora.converters.onnx.embedding import check_tables
from qalora.converters.onnx.files import JS_KEY, VERSION, VERSION_KEY
from qalora.converters.onnx.order import order_part, read_orders
from qalora.converters.onnx.planner import GRAPH
from qalora.converters.onnx.portable import DOMAIN
from qalora.converters.onnx.rotary import check_rotary
from qalora.converters.settings import linear_names
from qalora.converters.specs import TENSORS, check_values, parse_specs
from qalora.errors import FormatError, shown
from qalora.formats.onnx import Initializer, Stored, read_initializers, read_stored
from qalora.tensor import GroupQuantTensor, QuantSpec

__all__ = ["read", "read_graph"]


def read(path: Path) -> Checkpoint:
    """Open a folder with model.onnx, or the file, with config.json beside it. Reads the graph and no weights.

    Raises FormatError for initializers that are not what the graph says, and what `foreign.read` raises for a graph
    that qalora did not write.
    """
    file = path / GRAPH if path.is_dir() else path
    return replace(read_graph(file, file.parent, "onnx"), path=path)


def read_graph(file: Path, folder: Path, layout_name: str) -> Checkpoint:
    """Open a graph, and what stands around it in `folder`. One that is not in that folder itself has to be ours."""
    proto, stored = read_initializers(file)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    if TENSORS not in metadata and folder == file.parent:
        return foreign.read(file, proto, stored)
    if TENSORS not in metadata:
        raise FormatError(f"{file}", expected="a graph that qalora wrote", got="another one", todo="take its source")
    kinds = parse_specs(metadata[TENSORS], str(file))
    layout = _layout(file, metadata.get(VERSION_KEY, "1"), proto)
    config = _config(folder)
    linears = linear_names(config, folder)
    family, tensors = family_of(config, folder), dict[str, LazyTensor]()
    check_tables(file, stored)
    orders = read_orders(proto)
    used = {f"{table}.{side}" for table in TABLES.values() for side in ("cos", "sin")}
    for module, spec in kinds.items():
        tensors[f"{module}.weight"], names = _quantized(file, module, spec, stored, orders.get(module), layout)
        used |= names
    for name, item in stored.items():
        if name not in used and item.dtype == "FLOAT" and item.inline is None:
            tensors[name] = _float(name, item, transposed=name in linears, offset=1.0 if family.adds_one(name) else 0.0)
    model = model_of(folder, layout_name, config, tensors, others="refuse")
    check_rotary(file, stored, decoder_of(model.config, folder))
    return model


def _config(folder: Path) -> dict[str, Any]:
    """config.json without what it says to a runtime of the files beside it."""
    return {key: value for key, value in read_config(folder).items() if key != JS_KEY}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """How a graph holds a weight. whole: the dimensions of its codes are out first; dimensions: how many they are."""

    parts: Callable[[str, tuple[int, int], QuantSpec], Sequence[Initializer]]
    decode: Callable[[str, Fetch, QuantSpec], GroupQuantTensor]
    dimensions: int
    whole: bool = True


def _in_blocks(module: str, shape: tuple[int, int], spec: QuantSpec) -> list[Initializer]:
    return [as_blocks(part, block_size(module, spec)) for part in parts(module, shape, spec)]


def _in_rows(module: str, shape: tuple[int, int], spec: QuantSpec) -> list[Initializer]:
    return [as_rows(part) for part in parts(module, shape, spec)]


_LAYOUTS = {
    (VERSION, False): _Layout(parts=_in_blocks, decode=decode, dimensions=3),
    (VERSION, True): _Layout(parts=_in_rows, decode=decode, dimensions=2),
    ("1", False): _Layout(parts=version1.fast_parts, decode=version1.decode_fast, dimensions=3),
    ("1", True): _Layout(parts=version1.portable_parts, decode=version1.decode_portable, dimensions=2, whole=False),
}
"""By the version of the layout, and whether the graph is the portable one."""


def _layout(file: Path, version: str, proto: Any) -> _Layout:
    portable = any(opset.domain == DOMAIN for opset in proto.opset_import)
    layout = _LAYOUTS.get((version, portable))
    if layout is None:
        known = ", ".join(sorted({number for number, _ in _LAYOUTS}))
        raise FormatError(
            f"{file}: {VERSION_KEY}", expected=f"one of {known}", got=shown(version), todo="update qalora"
        )
    return layout


def _quantized(
    file: Path, module: str, spec: QuantSpec, stored: Mapping[str, Stored], order: str | None, layout: _Layout
) -> tuple[LazyTensor, set[str]]:
    """The lazy tensor, and the initializers that it is made of; order: the name of its columns' order."""
    codes = stored.get(f"{module}.codes")
    if codes is None or len(codes.shape) != layout.dimensions:
        got = "no initializer" if codes is None else f"{len(codes.shape)}"
        raise FormatError(f"{file}: {module}.codes", expected=f"{layout.dimensions} dimensions", got=got)
    shape = _shape(codes.shape) if layout.whole else (codes.shape[1], codes.shape[0])
    if 0 in shape or shape[1] % spec.group_size:
        raise FormatError(f"{file}: {module}", expected=f"groups of {spec.group_size}", got=f"shape {list(shape)}")
    spec = replace(spec, act_order=order is not None)
    planned = {part.name: part for part in layout.parts(module, shape, spec)}
    if order is not None:
        planned[order] = replace(order_part(module, shape[1]), name=order)
    for name, part in planned.items():
        item = stored.get(name)
        if item is None or (item.dtype, item.shape) != (part.dtype, part.shape):
            got = "none" if item is None else f"{item.dtype} {list(item.shape)}"
            raise FormatError(f"{file}: {name}", expected=f"{part.dtype} {list(part.shape)}", got=got)

    def fetch(name: str) -> Tensor:
        return read_stored(stored[order if order is not None and name == f"{module}.order" else name])

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        tensor = layout.decode(module, fetch, spec)
        check_values(tensor, spec)
        return tensor if (start, stop) == (0, shape[0]) else tensor.rows(start, stop)

    nbytes = sum(stored[name].nbytes for name in planned if name.startswith(f"{module}."))  # an order may be another's
    return LazyTensor(name=f"{module}.weight", shape=shape, spec=spec, nbytes=nbytes, read=read_rows), set(planned)


def _shape(codes: tuple[int, ...]) -> tuple[int, int]:
    """[out, in] of codes by rows, or by blocks of bytes."""
    rows, *rest = codes
    return rows, rest[0] if len(rest) == 1 else 2 * rest[0] * rest[1]


def _float(name: str, item: Stored, *, transposed: bool, offset: float) -> LazyTensor:
    if not transposed:

        def read_rows(start: int, stop: int) -> Tensor:
            rows = read_stored(item, start, stop)
            return rows - offset if offset else rows

        return LazyTensor(name=name, shape=item.shape, dtype=torch.float32, nbytes=item.nbytes, read=read_rows)
    return LazyTensor(
        name=name,
        shape=tuple(reversed(item.shape)),
        dtype=torch.float32,
        nbytes=item.nbytes,
        read=lambda start, stop: read_stored(item).T[start:stop].contiguous(),
    )
