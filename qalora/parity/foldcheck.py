"""The fold judged by arithmetic of its own: the codes are untouched, and each minimum is the nearest there is.

Layer by layer, against base + factor * B @ A in float64. An adapter that was shipped unfolded is compared here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from qalora.adapter import Adapter, AdapterLayer
from qalora.checkpoint import Checkpoint
from qalora.engines import Engine, spread
from qalora.parity.reference import exact_minima
from qalora.parity.weights import ulp
from qalora.tensor import GroupQuantTensor

__all__ = ["FoldCheck", "check_fold", "compare_adapters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldCheck:
    """codes_differ, min_beyond: what is not as the module says; groups: compared; first: the first such layer."""

    layers: int
    groups: int
    codes_differ: int
    min_beyond: int
    first: str


def check_fold(
    base: Checkpoint,
    folded: Checkpoint,
    adapter: Adapter,
    minima: Literal["float16", "float32"],
    engine: Engine | None = None,
) -> FoldCheck:
    """Check each layer that the adapter changes; by other processes where there is an engine.

    A minimum may be off by half an ULP of its dtype, and by the float32 rounding of a fold that sums in float32:
    (rank + 2) * 2^-24 * (|min| + |factor| * |B| @ |A|).
    """
    layers = tuple(adapter.layers)
    checked = partial(_checked, base, folded, adapter, torch.float16 if minima == "float16" else torch.float32)
    sizes = {path: 4 * math.prod(base.tensors[f"{path}.weight"].shape) for path in layers}
    by_layer = dict(checked(layers) if engine is None else spread(engine, checked, sizes))
    counts = [by_layer[path] for path in layers]
    return FoldCheck(
        layers=len(layers),
        groups=sum(groups for groups, _, _ in counts),
        codes_differ=sum(codes for _, codes, _ in counts),
        min_beyond=sum(beyond for _, _, beyond in counts),
        first=next((f"{path}.weight" for path in layers if any(by_layer[path][1:])), ""),
    )


def _checked(
    base: Checkpoint, folded: Checkpoint, adapter: Adapter, minima: torch.dtype, layers: tuple[str, ...]
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Each of these layers with its groups, codes that differ, and minima that are too far off."""
    for path in layers:
        name = f"{path}.weight"
        before, after = base.tensors[name].load_quantized(), folded.tensors[name].load_quantized()
        same = torch.equal(before.packed, after.packed)
        codes = 0 if same else int((before.codes() != after.codes()).sum())
        groups, beyond = _check_minima(before, after, adapter.layers[path], minima)
        yield path, (groups, codes, beyond)


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


def _check_minima(
    before: GroupQuantTensor, after: GroupQuantTensor, layer: AdapterLayer, dtype: torch.dtype
) -> tuple[int, int]:
    """(groups, those whose minimum is further off than allowed)."""
    whole, size, fine = exact_minima(before, layer)
    columns = torch.arange(0, before.shape[1], fine)
    minima = after.min.double()[:, columns // after.group_size]
    slack = ulp(whole, dtype) / 2 + (layer.rank + 2) * 2.0**-24 * size
    wrong = ~((minima - whole).abs() <= slack)
    if dtype == torch.float16:
        wrong |= minima.half().double() != minima
    return wrong.numel(), int(wrong.sum())
