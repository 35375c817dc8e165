"""The weights of artefacts read back in one pass: each tensor is read once, whatever is asked of it.

Of a layer that the adapter changes, three things are asked: whether the fold is right, whether each artefact has what
the fold gives, and how much of the adapter it holds. All three need the same tensors, so they are asked one behind the
other, layer by layer; what is in memory is one layer of the base, of the folded model and of an artefact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from torch import Tensor

from qalora.adapter import AdapterLayer
from qalora.checkpoint import Checkpoint, module_of
from qalora.parity.artifacts import Artifact
from qalora.parity.foldcheck import FoldCheck, FoldChecker
from qalora.parity.layers import AdapterShare
from qalora.parity.models import FOLDED, Contents, ReferenceModels
from qalora.parity.reference import exact_minima, with_minima
from qalora.parity.weights import Comparison, WeightMetrics
from qalora.tensor import GroupQuantTensor

__all__ = ["ReadBack"]

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
        self, models: ReferenceModels, opened: Sequence[tuple[Artifact, Checkpoint]], contents: Sequence[Contents]
    ) -> None:
        self._models = models
        self._holds_folded = [holds == FOLDED and models.folded is not None for holds in contents]
        self._comparisons = [
            Comparison(checkpoint, self._expected(folded), residual=artifact.layout.residual)
            for (artifact, checkpoint), folded in zip(opened, self._holds_folded, strict=True)
        ]
        self._checker = None
        if models.adapter is not None and models.folded is not None:
            self._checker = FoldChecker(models.adapter, models.minima)
        self._shares: list[dict[str, AdapterShare]] = [{} for _ in opened]
        self._read()

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
        order = () if self._models.adapter is None else tuple(self._models.adapter.layers)
        found = [{path: shares[path].lost for path in order if path in shares} for shares in self._shares]
        return [{path: lost for path, lost in one.items() if lost is not None} for one in found]

    def _expected(self, folded: bool) -> Checkpoint:
        return self._models.folded if folded and self._models.folded is not None else self._models.base

    def _read(self) -> None:
        adapter, compared = self._models.adapter, [comparison.pairs for comparison in self._comparisons]
        layers = {} if adapter is None else {f"{path}.weight": layer for path, layer in adapter.layers.items()}
        with ThreadPoolExecutor(1) as reader:
            for name in dict.fromkeys([*(name for pairs in compared for name in pairs), *layers]):
                same = [name in one.pairs and one.compare(name, reader) for one in self._comparisons]
                if name in layers and self._checker is not None:
                    self._look_at_layer(name, layers[name], self._checker, same)

    def _look_at_layer(self, name: str, layer: AdapterLayer, checker: FoldChecker, same: Sequence[bool]) -> None:
        """Check the fold of a layer, and what each artefact has of it; one that has the same is not read again."""
        path, base = module_of(name), self._models.base.tensors[name].load_quantized()
        folded, minima = self._expected(True).tensors[name].load_quantized(), self._models.trained_minima
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
