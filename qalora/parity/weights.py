"""Weights read back and compared with the reference's, a tensor at a time; configs too.

What may differ in one tensor is `qalora.parity.differences`' matter; here tensors are paired by name, and what is
missing, extra, or of another shape is told. This module runs no model, and decides nothing: that is
`qalora.parity.gates`' matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.essentials import differences as config_differences
from qalora.converters.families import FAMILIES
from qalora.converters.wrapping import around_differences, around_notes
from qalora.parity.differences import at_row, compare_bytes, compare_tensors, transposed, ulp
from qalora.parity.findings import TensorDifference, add_up
from qalora.tensor import GroupQuantTensor

__all__ = ["Comparison", "TensorDifference", "WeightMetrics", "compare_tensors", "compare_weights", "ulp"]

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
    notes      what differs and changes no logits: the longest context; what is around the decoder in one of the two
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


class Comparison:
    """An artefact's tensors against the reference's, one by one in any order; `residual` as in `compare_tensors`.

    Where the reference is quantized, its floats are to stay floats; a float model may be held in integers, and the
    metrics then tell how far they are from its weights, in steps. What both carry along around the decoder is compared
    byte for byte. An output layer that one side ties to the embedding
    and the other writes out is compared with that embedding.

    shapes, differences  what was found so far, by the tensors' names
    """

    def __init__(self, artifact: Checkpoint, reference: Checkpoint, *, residual: bool = False) -> None:
        self._artifact, self._reference, self._residual = artifact, reference, residual
        self.pairs, self._missing, self._extra = _pairs(artifact, reference)
        self.shapes: dict[str, str] = {}
        self.differences: dict[str, TensorDifference] = {}
        self._carried = () if reference.wrapper is None else reference.wrapper.carried
        self._family = FAMILIES.get(str(reference.config.get("model_type")))

    def clear(self) -> None:
        """Forget what was compared."""
        self.shapes, self.differences = {}, {}

    def compare(self, name: str, reader: Executor) -> bool:
        """Compare the tensors of one of `pairs`; whether both are the same. The reference's are read in `reader`."""
        mine, theirs = self.pairs[name]
        if mine.shape != theirs.shape:
            turned = _turned(mine, theirs)
            self.shapes[name] = f"{name}: {list(mine.shape)} instead of {list(theirs.shape)}{turned}"
            return False
        if name in self._carried:
            tiles = _read_both(mine, theirs, reader, whole=False)
            same = [compare_bytes(name, a, b) for _, a, b in tiles if isinstance(a, Tensor) and isinstance(b, Tensor)]
            self.differences[name] = add_up(name, same)
            return self.differences[name].same
        if self._family is not None and self._family.adds_one(name):
            mine, theirs = _plus_one(mine), _plus_one(theirs)
        self.differences[name] = self._difference(name, mine, theirs, reader)
        return self.differences[name].same

    def _difference(self, name: str, mine: LazyTensor, theirs: LazyTensor, reader: Executor) -> TensorDifference:
        """Rows by rows; a linear weight that differs is compared whole: its rows may be elsewhere, or its columns."""
        linear = name in self._reference.linears
        if not linear or (mine.by_rows and theirs.by_rows):
            parts: list[TensorDifference] = []
            for part in self._parts(name, mine, theirs, reader, whole=False):
                parts.append(part)
                if linear and not part.same:
                    break
            else:
                return parts[0] if len(parts) == 1 else add_up(name, parts)
        (whole,) = self._parts(name, mine, theirs, reader, whole=True)
        return whole

    def _parts(
        self, name: str, mine: LazyTensor, theirs: LazyTensor, reader: Executor, *, whole: bool
    ) -> Iterator[TensorDifference]:
        floats = not self._reference.quantized
        for row, a, b in _read_both(mine, theirs, reader, whole=whole):
            part = compare_tensors(name, a, b, _dtypes(theirs), residual=self._residual, floats=floats)
            yield at_row(part, row)

    def metrics(self) -> WeightMetrics:
        """What was compared so far, in the reference's order."""
        shapes = tuple(self.shapes[name] for name in self.pairs if name in self.shapes)
        differences = [self.differences[name] for name in self.pairs if name in self.differences]
        mine, theirs = self._artifact.config, self._reference.config
        return WeightMetrics(
            tensors=len(differences),
            missing=self._missing,
            extra=self._extra,
            shapes=shapes,
            config=(*config_differences(mine, theirs), *around_differences(self._artifact, self._reference)),
            total=add_up("all", differences),
            different=tuple(difference for difference in differences if not difference.same),
            notes=(*_notes(mine, theirs), *around_notes(self._artifact, self._reference)),
        )


def compare_weights(artifact: Checkpoint, reference: Checkpoint, *, residual: bool = False) -> WeightMetrics:
    """Compare every tensor, streamed, as `Comparison` does."""
    comparison = Comparison(artifact, reference, residual=residual)
    with ThreadPoolExecutor(1) as reader:
        for name in comparison.pairs:
            comparison.compare(name, reader)
    return comparison.metrics()


def _plus_one(lazy: LazyTensor) -> LazyTensor:
    """A norm as it is used, where its family multiplies with 1 + weight."""

    def read(start: int, stop: int) -> Tensor:
        values = lazy.read(start, stop)
        return (values.dequantize() if isinstance(values, GroupQuantTensor) else values.float()) + 1

    return replace(lazy, dtype=torch.float32, read=read)


def _pairs(
    artifact: Checkpoint, reference: Checkpoint
) -> tuple[dict[str, tuple[LazyTensor, LazyTensor]], tuple[str, ...], tuple[str, ...]]:
    """(artefact's, reference's) by name of what both have, in the reference's order; names missing and extra."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    both = artifact.wrapper is not None and reference.wrapper is not None
    mine, theirs = (dict(one.everything if both else one.tensors) for one in (artifact, reference))
    if head in mine and head not in theirs and embedding in theirs:
        theirs[head] = theirs[embedding]
    elif head in theirs and head not in mine and embedding in mine:
        mine[head] = mine[embedding]
    pairs = {name: (mine[name], lazy) for name, lazy in theirs.items() if name in mine}
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


def _dtypes(lazy: LazyTensor) -> tuple[torch.dtype, torch.dtype]:
    if lazy.spec is None:
        return torch.float32, torch.float32
    return lazy.spec.scale_dtype, lazy.spec.min_dtype


def _notes(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, ...]:
    key = "max_position_embeddings"
    a, b = mine.get(key), theirs.get(key)
    return (f"{key}: {a} instead of {b}",) if a != b and a is not None and b is not None else ()
