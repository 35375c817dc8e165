"""Every value of a model, a layer at a time: scales and zero points, NaN, layers of zeros, zero points off by one.

Zero points off by one are seen in the weights themselves. A layer's weights lie about zero, so that the codes of a
group lie about its zero point: the median, over the groups of a layer, of mean(codes) + min/scale is near 0, and near
-1 or +1 where every zero point was read one too high or too low. At up to MOST_BITS bits the weights of a group of 32
spread over a few steps, so that the median of some hundred groups is sure to a tenth of a step; with more bits a step
is small against the spread, and nothing is said. FAR of all layers have to agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.errors import InputError, NotFiniteError
from qalora.inspection.records import Finding, ScaleHistogram
from qalora.tensor import GroupQuantTensor

__all__ = ["read_values"]

MOST_BITS = 5
NEAR = 0.25
FAR = 0.8
FEWEST_GROUPS = 32


@dataclass(slots=True, kw_only=True)
class _Statistics:
    """Counts over the tensors read so far. offsets: of each quantized layer that tells, by name."""

    scales: Counter[int] = field(default_factory=Counter)
    zero: int = 0
    negative: int = 0
    lowest: float = float("inf")
    highest: float = float("-inf")
    offsets: dict[str, float] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    all_zero: list[str] = field(default_factory=list)


def read_values(model: Checkpoint, progress: Callable[[str, int], None]) -> tuple[ScaleHistogram | None, list[Finding]]:
    """Read every tensor; gives the histogram, None where no tensor holds integers, and the warnings."""
    stats = _Statistics()
    for name, lazy in model.tensors.items():
        try:
            _read(lazy, stats, whole=name in model.linears)
        except NotFiniteError as error:
            stats.not_finite.append(str(error))
        except InputError as error:
            stats.unreadable.append(str(error))
        progress(name, int(torch.Size(lazy.shape).numel()))
    quantized = stats.scales or stats.zero
    points = (stats.lowest, stats.highest) if stats.lowest <= stats.highest else None
    histogram = ScaleHistogram(
        counts=tuple(sorted(stats.scales.items())),
        zero=stats.zero,
        negative=stats.negative,
        zero_points=points,
    )
    return (histogram if quantized else None), [*_damage(stats), *_off_by_one(stats)]


def _read(lazy: LazyTensor, stats: _Statistics, *, whole: bool) -> None:
    """One tensor: a linear layer at once, others by rows; the codes of linear layers are counted."""
    alive = False
    offsets: list[Tensor] = []
    tally = stats if whole else _Statistics()
    for _, tile in [(0, lazy.load())] if whole else lazy.tiles():
        if isinstance(tile, Tensor):
            alive = alive or bool(tile.any())
        else:
            alive = _quantized(tile, tally, offsets) or alive
    if not alive and lazy.name.endswith(".weight"):
        stats.all_zero.append(lazy.name)
    if whole and offsets and lazy.spec is not None and lazy.spec.bits <= MOST_BITS:
        groups = torch.cat(offsets)
        if groups.numel() >= FEWEST_GROUPS:
            stats.offsets[lazy.name] = float(groups.median())


def _quantized(tile: GroupQuantTensor, stats: _Statistics, offsets: list[Tensor]) -> bool:
    """Count a tile; gives whether any of its weights is not 0."""
    scale, used = tile.scale, tile.scale != 0
    exponents = torch.frexp(scale[used].abs())[1] - 1
    values, counts = torch.unique(exponents, return_counts=True)
    stats.scales.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    stats.zero += int((~used).sum())
    stats.negative += int((scale < 0).sum())
    codes = tile.codes()
    if tile.g_idx is not None:
        codes = codes[:, torch.argsort(tile.g_idx, stable=True)]
    grouped = codes.view(*scale.shape, -1)
    ratio = tile.min[used].double() / scale[used].double()  # float64 reaches far enough for every float32 quotient
    if ratio.numel():
        stats.lowest, stats.highest = (
            min(stats.lowest, float(-ratio.max())),
            max(stats.highest, float(-ratio.min())),
        )
        offsets.append(grouped.sum(dim=2, dtype=torch.int32)[used] / grouped.shape[2] + ratio)
    ends = (grouped.amin(dim=2) * scale + tile.min, grouped.amax(dim=2) * scale + tile.min)
    return any(bool(end.any()) for end in ends)


def _damage(stats: _Statistics) -> list[Finding]:
    kinds = (
        ("not-finite", stats.not_finite, "holds NaN or Inf, which spreads to every output"),
        ("unreadable", stats.unreadable, "is not what its format says it is"),
        ("all-zero", stats.all_zero, "is zero everywhere: it computes nothing, and was probably never filled"),
    )
    return [
        Finding(
            code=code,
            message=f"a tensor {meaning}" if len(names) == 1 else f"{len(names)} tensors, each of which {meaning}",
            evidence="; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else ""),
            todo="get or convert the file again",
        )
        for code, names, meaning in kinds
        if names
    ]


def _off_by_one(stats: _Statistics) -> list[Finding]:
    if not stats.offsets:
        return []
    for way, word in ((1.0, "above"), (-1.0, "below")):
        near = [value for value in stats.offsets.values() if abs(value - way) < NEAR]
        if len(near) >= FAR * len(stats.offsets):
            return [
                Finding(
                    code="zeros-off-by-one",
                    message="the zero points are off by one: every weight is a whole step off, and what the model "
                    "computes is noise",
                    evidence=f"in {len(near)} of {len(stats.offsets)} layers the codes of a group lie a step {word} "
                    f"their zero point, {abs(sum(near)) / len(near):.2f} in the median; where weights lie about zero, "
                    "as they do, it is 0.00",
                    todo="read it with the other `checkpoint_format`, or convert it again from its source",
                )
            ]
    return []
