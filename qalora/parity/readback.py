"""The weights of artefacts read back in one pass: each tensor is read once, whatever is asked of it.

Of a layer that the adapter changes, three things are asked: whether the fold is right, whether each artefact has what
the fold gives, and how much of the adapter it holds. All three need the same tensors, so they are asked one behind the
other, layer by layer; what is in memory is one layer of the base, of the folded model and of an artefact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from torch import Tensor

from qalora.adapter import AdapterLayer
from qalora.checkpoint import Checkpoint, module_of
from qalora.engines import Engine, spread
from qalora.parity.artifacts import Artifact
from qalora.parity.findings import TensorDifference
from qalora.parity.foldcheck import FoldCheck, FoldChecker
from qalora.parity.layers import AdapterShare
from qalora.parity.models import FOLDED, Contents, ReferenceModels
from qalora.parity.reference import exact_minima, with_minima
from qalora.parity.weights import Comparison, WeightMetrics
from qalora.tensor import GroupQuantTensor

__all__ = ["ReadBack"]

Found = tuple[
    list[tuple[dict[str, str], dict[str, TensorDifference]]],
    dict[str, tuple[int, int, int]],
    list[dict[str, AdapterShare]],
]
"""What is found in some tensors: shapes and differences of each artefact, the fold's counts, and the shares."""

TILE = 1 << 22
"""Weights of the rows whose minima are computed in float64 at a time."""


class ReadBack:
    """What is found when all artefacts are read.

    fold     the fold's check; None where no artefact is to hold the folded model
    metrics  of each artefact, against the folded model or the base
    lost     of each artefact, {module: share of the adapter that is missing}, in the adapter's order; layers that it
             lacks or has in another shape are left out
    """

    def __init__(
        self,
        models: ReferenceModels,
        opened: Sequence[tuple[Artifact, Checkpoint]],
        contents: Sequence[Contents],
        engine: Engine | None = None,
    ) -> None:
        """engine: reads and compares in other processes."""
        self._base, self._folded, self._adapter = models.base, models.folded, models.adapter
        self._trained_minima = models.trained_minima
        self._holds_folded = [holds == FOLDED and models.folded is not None for holds in contents]
        self._comparisons = [
            Comparison(checkpoint, self._expected(folded), residual=artifact.layout.residual)
            for (artifact, checkpoint), folded in zip(opened, self._holds_folded, strict=True)
        ]
        self._checker = None
        if models.adapter is not None and models.folded is not None:
            self._checker = FoldChecker(models.adapter, models.minima)
        self._shares: list[dict[str, AdapterShare]] = [{} for _ in opened]
        sizes = self._sizes()
        if engine is None:
            self._read(tuple(sizes))
        else:
            for found in spread(engine, self._found_in, sizes):
                self._take(found)

    @property
    def fold(self) -> FoldCheck | None:
        """The fold's check."""
        return None if self._checker is None else self._checker.result()

    @property
    def metrics(self) -> list[WeightMetrics]:
        """Of each artefact."""
        return [comparison.metrics() for comparison in self._comparisons]

    @property
    def lost(self) -> list[dict[str, float]]:
        """Of each artefact."""
        order = () if self._adapter is None else tuple(self._adapter.layers)
        found = [{path: shares[path].lost for path in order if path in shares} for shares in self._shares]
        return [{path: lost for path, lost in one.items() if lost is not None} for one in found]

    def _expected(self, folded: bool) -> Checkpoint:
        return self._folded if folded and self._folded is not None else self._base

    @property
    def _layers(self) -> dict[str, AdapterLayer]:
        """The layers that the adapter changes, by the names of their weights."""
        return {} if self._adapter is None else {f"{path}.weight": one for path, one in self._adapter.layers.items()}

    def _sizes(self) -> dict[str, int]:
        """The weights of every tensor that is read, in order."""
        pairs = {name: pair[1] for one in self._comparisons for name, pair in one.pairs.items()}
        return {name: math.prod(lazy.shape) for name, lazy in pairs.items()} | {
            name: math.prod(self._base.tensors[name].shape) for name in self._layers if name not in pairs
        }

    def _found_in(self, names: tuple[str, ...]) -> Iterator[Found]:
        """What another process finds in some tensors."""
        for one in self._comparisons:
            one.clear()
        self._shares = [{} for _ in self._comparisons]
        if self._checker is not None:
            self._checker.found = {}
        self._read(names)
        fold = {} if self._checker is None else self._checker.found
        yield [(one.shapes, one.differences) for one in self._comparisons], fold, self._shares

    def _take(self, found: Found) -> None:
        """Add what another process found in tensors of its own."""
        compared, fold, shares = found
        for one, (shapes, differences) in zip(self._comparisons, compared, strict=True):
            one.shapes.update(shapes)
            one.differences.update(differences)
        if self._checker is not None:
            self._checker.found.update(fold)
        for mine, more in zip(self._shares, shares, strict=True):
            mine.update(more)

    def _read(self, names: Sequence[str]) -> None:
        layers = self._layers
        with ThreadPoolExecutor(1) as reader:
            for name in names:
                same = [name in one.pairs and one.compare(name, reader) for one in self._comparisons]
                if name in layers and self._checker is not None:
                    self._look_at_layer(name, layers[name], self._checker, same)

    def _look_at_layer(self, name: str, layer: AdapterLayer, checker: FoldChecker, same: Sequence[bool]) -> None:
        """Check the fold of a layer, and what each artefact has of it; one that has the same is not read again."""
        path, base = module_of(name), self._base.tensors[name].load_quantized()
        folded, minima = self._expected(True).tensors[name].load_quantized(), self._trained_minima
        mine = dict(self._layers_of_artifacts(name, layer, folded, same))
        shares = {n: self._shares[n].setdefault(path, AdapterShare()) for n in mine}
        step = max(1, TILE // base.shape[1])
        for start in range(0, base.shape[0], step):
            stop = min(start + step, base.shape[0])
            rows = base.rows(start, stop)
            exact = exact_minima(rows, replace(layer, b=layer.b[start:stop]))
            checker.add(path, rows, folded.rows(start, stop), exact)
            adapted = with_minima(rows, exact[0], exact[2], minima)
            for n, tensor in mine.items():
                part = tensor[start:stop] if isinstance(tensor, Tensor) else tensor.rows(start, stop)
                shares[n].add(part, rows, adapted)

    def _layers_of_artifacts(
        self, name: str, layer: AdapterLayer, folded: GroupQuantTensor, same: Sequence[bool]
    ) -> Iterator[tuple[int, Tensor | GroupQuantTensor]]:
        """(number, layer) of the artefacts that are to hold the folded model, and have this layer in its shape."""
        for n, comparison in enumerate(self._comparisons):
            if not self._holds_folded[n] or name not in comparison.pairs:
                continue
            lazy, _ = comparison.pairs[name]
            if lazy.shape == layer.shape:
                yield n, folded if same[n] else lazy.load()
