"""Weights read back and compared with the reference's, a tensor at a time; configs too.

What may differ in one tensor is `qalora.parity.differences`' matter; here tensors are paired by name, and what is
missing, extra, or of another shape is told. This module runs no model, and decides nothing: that is
`qalora.parity.gates`' matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.essentials import differences
from qalora.converters.families import FAMILIES
from qalora.engines import Engine, spread
from qalora.parity.differences import compare_tensors, transposed, ulp
from qalora.parity.findings import TensorDifference, add_up
from qalora.tensor import GroupQuantTensor

__all__ = ["TensorDifference", "WeightMetrics", "compare_tensors", "compare_weights", "ulp"]

TILE_BYTES = 8 << 20
"""Of the rows that are compared at a time, as float32, where a tensor comes by rows: both sides have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMetrics:
    """All tensors of an artefact against the reference's.

    tensors    compared
    missing    the reference has them, the artefact not
    extra      the other way round
    shapes     "name: [shape] instead of [shape]", and whether it is the transpose
    config     "key: value instead of value", for what changes the logits
    notes      what differs and changes no logits: the longest context
    total      the sums of the counts and the largest of the rest
    different  the tensors that differ, in the reference's order
    """

    tensors: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    shapes: tuple[str, ...]
    config: tuple[str, ...]
    notes: tuple[str, ...] = ()
    total: TensorDifference
    different: tuple[TensorDifference, ...]

    @classmethod
    def nothing(cls) -> WeightMetrics:
        """Of no tensors."""
        total = TensorDifference(name="total")
        return cls(tensors=0, missing=(), extra=(), shapes=(), config=(), total=total, different=())


def compare_weights(
    artifact: Checkpoint,
    reference: Checkpoint,
    *,
    residual: bool = False,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
    engine: Engine | None = None,
) -> WeightMetrics:
    """Compare every tensor, streamed; by other processes where there is an engine. `residual` as in `compare_tensors`.

    Where the reference is quantized, its floats are to stay floats; a float model may be held in integers, and the
    metrics then tell how far they are from its weights, in steps. An output layer that one side ties to the embedding
    and the other writes out is compared with that embedding.
    """
    pairs, missing, extra = _pairs(artifact, reference)
    shapes, by_name = [], dict[str, TensorDifference]()
    sizes = {}
    for name, mine, theirs in pairs:
        if mine.shape == theirs.shape:
            sizes[name] = 4 * math.prod(theirs.shape)
        else:
            shapes.append(f"{name}: {list(mine.shape)} instead of {list(theirs.shape)}{_turned(mine, theirs)}")
    compared = partial(_compared, {name: pair for name, *pair in pairs}, reference, residual)
    for name, difference in compared(tuple(sizes)) if engine is None else spread(engine, compared, sizes):
        by_name[name] = difference
        progress(name, sizes[name])
    tensor_differences = [by_name[name] for name in sizes]
    return WeightMetrics(
        tensors=len(tensor_differences),
        missing=missing,
        extra=extra,
        shapes=tuple(shapes),
        config=differences(artifact.config, reference.config),
        total=add_up("all", tensor_differences),
        different=tuple(difference for difference in tensor_differences if not difference.same),
        notes=_notes(artifact.config, reference.config),
    )


def _compared(
    pairs: Mapping[str, Sequence[LazyTensor]], reference: Checkpoint, residual: bool, names: tuple[str, ...]
) -> Iterator[tuple[str, TensorDifference]]:
    """Each of these tensors with its difference. pairs: the artefact's and the reference's."""
    family = FAMILIES.get(str(reference.config.get("model_type")))
    with ThreadPoolExecutor(1) as reader:
        for name in names:
            mine, theirs = pairs[name]
            if family is not None and family.adds_one(name):
                mine, theirs = _plus_one(mine), _plus_one(theirs)
            parts = []
            for row, a, b in _read_both(mine, theirs, reader, whole=name in reference.linears):
                floats = not reference.quantized
                part = compare_tensors(name, a, b, _dtypes(theirs), residual=residual, floats=floats)
                parts.append(_at_row(part, row))
            yield name, parts[0] if len(parts) == 1 else add_up(name, parts)


def _plus_one(lazy: LazyTensor) -> LazyTensor:
    """A norm as it is used, where its family multiplies with 1 + weight."""

    def read(start: int, stop: int) -> Tensor:
        values = lazy.read(start, stop)
        return (values.dequantize() if isinstance(values, GroupQuantTensor) else values.float()) + 1

    return replace(lazy, dtype=torch.float32, read=read)


def _pairs(
    artifact: Checkpoint, reference: Checkpoint
) -> tuple[list[tuple[str, LazyTensor, LazyTensor]], tuple[str, ...], tuple[str, ...]]:
    """(name, artefact's, reference's) of what both have; names missing and extra."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    mine, theirs = dict(artifact.tensors), dict(reference.tensors)
    if head in mine and head not in theirs and embedding in theirs:
        theirs[head] = theirs[embedding]
    elif head in theirs and head not in mine and embedding in mine:
        mine[head] = mine[embedding]
    pairs = [(name, mine[name], lazy) for name, lazy in theirs.items() if name in mine]
    missing = tuple(name for name in theirs if name not in mine)
    return pairs, missing, tuple(name for name in mine if name not in theirs)


def _turned(mine: LazyTensor, theirs: LazyTensor) -> str:
    """Told of a matrix whose shape is the reference's turned round; it is read whole."""
    if len(theirs.shape) != 2 or tuple(reversed(mine.shape)) != theirs.shape:
        return ""
    return ", transposed" if transposed(mine.load(), theirs.load()) else ""


def _read_both(
    mine: LazyTensor, theirs: LazyTensor, reader: Executor, *, whole: bool
) -> Iterator[tuple[int, Tensor | GroupQuantTensor, Tensor | GroupQuantTensor]]:
    """(first row, artefact's rows, reference's), at once or by tiles; both are read at the same time."""
    count = theirs.shape[0] if theirs.shape else 1
    step = max(1, count) if whole else theirs.tile_rows(TILE_BYTES)
    for start in range(0, count, step):
        stop = min(start + step, count)
        other = reader.submit(theirs.rows, start, stop)
        yield start, mine.rows(start, stop), other.result()


def _at_row(difference: TensorDifference, row: int) -> TensorDifference:
    """Of a tile that begins at `row`, told of the whole tensor."""
    if difference.code_at is None:
        return difference
    return replace(difference, code_at=(difference.code_at[0] + row, difference.code_at[1]))


def _dtypes(lazy: LazyTensor) -> tuple[torch.dtype, torch.dtype]:
    if lazy.spec is None:
        return torch.float32, torch.float32
    return lazy.spec.scale_dtype, lazy.spec.min_dtype


def _notes(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, ...]:
    key = "max_position_embeddings"
    a, b = mine.get(key), theirs.get(key)
    return (f"{key}: {a} instead of {b}",) if a != b and a is not None and b is not None else ()
