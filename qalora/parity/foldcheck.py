"""The fold judged by arithmetic of its own: the codes are untouched, and each minimum is the nearest there is.

Layer by layer, against base + factor * B @ A in float64. An adapter that was shipped unfolded is compared here too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qalora.adapter import Adapter, AdapterLayer
from qalora.options.words import Minima
from qalora.parity.reference import ExactMinima
from qalora.parity.weights import ulp
from qalora.tensor import GroupQuantTensor, same_bits

__all__ = ["FoldCheck", "FoldChecker", "compare_adapters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldCheck:
    """codes_differ, min_beyond: what is not as the module says; groups: compared; first: the first such layer."""

    layers: int
    groups: int
    codes_differ: int
    min_beyond: int
    first: str


class FoldChecker:
    """Checks each layer that the adapter changes, some rows at a time.

    A minimum may be off by half an ULP of its dtype, and by the float32 rounding of a fold that sums in float32:
    (rank + 2) * 2^-24 * (|min| + |factor| * |B| @ |A|).

    found  (groups, codes that differ, minima that are too far off) of each layer so far
    """

    def __init__(self, adapter: Adapter, minima: Minima) -> None:
        self._adapter = adapter
        self._dtype = torch.float16 if minima == "float16" else torch.float32
        self.found: dict[str, tuple[int, int, int]] = {}

    def add(self, path: str, before: GroupQuantTensor, after: GroupQuantTensor, exact: ExactMinima) -> None:
        """Compare rows of a layer before and after the fold with what `exact_minima` says of them."""
        codes = 0 if same_bits(before.packed, after.packed) else int((before.codes() != after.codes()).sum())
        groups, beyond = _check_minima(after, exact, self._adapter.layers[path].rank, self._dtype)
        so_far = self.found.get(path, (0, 0, 0))
        self.found[path] = (so_far[0] + groups, so_far[1] + codes, so_far[2] + beyond)

    def result(self) -> FoldCheck:
        """Of all layers."""
        layers = [(path, *self.found.get(path, (0, 0, 0))) for path in self._adapter.layers]
        return FoldCheck(
            layers=len(layers),
            groups=sum(groups for _, groups, _, _ in layers),
            codes_differ=sum(codes for _, _, codes, _ in layers),
            min_beyond=sum(beyond for _, _, _, beyond in layers),
            first=next((f"{path}.weight" for path, _, codes, beyond in layers if codes or beyond), ""),
        )


def compare_adapters(adapter: Adapter, expected: Adapter) -> tuple[str, ...]:
    """Names of the layers at which two adapters do not add the same; `adapter` may be a plain LoRA.

    B is the same, and factor * A may be off by 2^-23 of itself: A was multiplied and rounded once, the factor too.
    """
    different = [path for path in expected.layers if path not in adapter.layers]
    different += [path for path in adapter.layers if path not in expected.layers]
    for path in expected.layers.keys() & adapter.layers.keys():
        if not _adds_the_same(adapter.layers[path], expected.layers[path]):
            different.append(path)
    return tuple(sorted(different))


def _adds_the_same(layer: AdapterLayer, expected: AdapterLayer) -> bool:
    if layer.shape != expected.shape or layer.rank != expected.rank or not torch.equal(layer.b, expected.b):
        return False
    mine = layer.factor * layer.a.double().repeat_interleave(layer.pool_size, dim=1)
    theirs = expected.factor * expected.a.double().repeat_interleave(expected.pool_size, dim=1)
    return bool(((mine - theirs).abs() <= 2.0**-23 * theirs.abs()).all())


def _check_minima(after: GroupQuantTensor, exact: ExactMinima, rank: int, dtype: torch.dtype) -> tuple[int, int]:
    """(groups, those whose minimum is further off than allowed)."""
    whole, size, fine = exact
    columns = torch.arange(0, after.shape[1], fine)
    minima = after.min.double()[:, columns // after.group_size]
    slack = ulp(whole, dtype) / 2 + (rank + 2) * 2.0**-24 * size
    wrong = ~((minima - whole).abs() <= slack)
    if dtype == torch.float16:
        wrong |= minima.half().double() != minima
    return wrong.numel(), int(wrong.sum())
