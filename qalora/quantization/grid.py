"""Scale and minimum of each group, searched: clipped ranges, and least squares against the codes they give.

A grid is what a group's weights are rounded to: scale * (0..top) + min. From a clipped range of the weights it is
improved in rounds of alternating least squares: codes are the nearest ones, then scale and min are the straight line
that fits the weights to those codes best, rounded to float16 (scale first, so that min makes up for it). The best grid
seen is kept, so that no round makes it worse. The error is the sum of importance * (weight - nearest)^2 of a group.

| zeros | the line |
|---|---|
| real | scale * code + min |
| integer | scale * (code - z), z whole and of the range that the search began with |
| symmetric | scale * (code - 2**(bits-1)) |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qalora.quantization.rounding import Zeros, quotient, to_float16

__all__ = ["Grid", "Search", "search", "zero_points"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """scale, min: float32 [out, groups] of values that float16 holds; min is -scale * z where zeros are not real."""

    scale: Tensor
    min: Tensor

    def codes(self, weight: Tensor, top: int) -> Tensor:
        """The nearest codes of weights [out, groups, size], as floats; 0 where the scale is 0."""
        safe = torch.where(self.scale == 0, torch.inf, self.scale)[..., None]
        return ((weight - self.min[..., None]) / safe).round_().clamp_(0, top)

    def values(self, codes: Tensor) -> Tensor:
        """scale * codes + min of codes [out, groups, size]."""
        return torch.addcmul(self.min[..., None], self.scale[..., None], codes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """clips: (share of the lowest, share of the highest weight) to begin with; rounds of least squares for each of
    them, and `last` more from the best.
    """

    clips: Sequence[tuple[float, float]]
    rounds: int
    last: int


def search(weight: Tensor, top: int, zeros: Zeros, how: Search, importance: Tensor | None = None) -> Grid:
    """The best grid found for float32 weights [out, groups, size]; importance: None or [groups, size], positive."""
    best: tuple[Tensor, Grid] | None = None
    for low, high in how.clips:
        grid = _range(weight, top, zeros, low, high)
        best = _improved(weight, top, zeros, grid, how.rounds, importance, best)
    if best is None:
        raise ValueError("no clips")
    return _improved(weight, top, zeros, best[1], how.last, importance, best)[1] if how.last else best[1]


def zero_points(grid: Grid, top: int) -> Tensor:
    """z of min = -scale * z, whole; the middle one where the scale is 0."""
    safe = torch.where(grid.scale == 0, 1.0, grid.scale)
    return torch.where(grid.scale == 0, float(top // 2 + 1), torch.round(-grid.min / safe))


def _range(weight: Tensor, top: int, zeros: Zeros, low: float, high: float) -> Grid:
    if zeros == "symmetric":
        scale = to_float16(quotient(2 * weight.abs().amax(dim=2) * min(low, high), top))
        return Grid(scale=scale, min=to_float16(-scale * (top // 2 + 1)))
    lo, hi = weight.amin(dim=2) * low, weight.amax(dim=2) * high
    if zeros == "integer":
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = to_float16(quotient((hi - lo).clamp(min=0), top))
    if zeros == "real":
        return Grid(scale=scale, min=to_float16(torch.where(scale == 0, (lo + hi) / 2, lo)))
    zero = torch.round(-lo / torch.where(scale == 0, 1.0, scale)).clamp(0, top)
    return Grid(scale=scale, min=-scale * zero)


def _improved(
    weight: Tensor,
    top: int,
    zeros: Zeros,
    grid: Grid,
    rounds: int,
    importance: Tensor | None,
    best: tuple[Tensor, Grid] | None,
) -> tuple[Tensor, Grid]:
    """(errors, grids), group by group the best of `best`, the grid, and `rounds` rounds from it."""
    for left in range(rounds, -1, -1):
        codes = grid.codes(weight, top)
        error = (grid.values(codes) - weight).square_()
        best = _better((_mean(error, importance), grid), best)
        if left:
            grid = _line(weight, codes, grid, top, zeros, importance)
    if best is None:
        raise ValueError("no rounds")
    return best


def _line(weight: Tensor, codes: Tensor, grid: Grid, top: int, zeros: Zeros, importance: Tensor | None) -> Grid:
    """The grid that fits the weights to their codes best; the old scale where all codes of a group are equal."""
    if zeros != "real":
        zero = zero_points(grid, top)
        steps = codes - zero[..., None]
        scale = _ratio(_mean(steps * weight, importance), _mean(steps * steps, importance), grid.scale)
        scale = to_float16(scale)
        return Grid(scale=scale, min=-scale * zero)
    middle, level = _mean(codes, importance), _mean(weight, importance)
    steps = codes - middle[..., None]
    scale = _ratio(_mean(steps * weight, importance), _mean(steps * steps, importance), grid.scale)
    scale = to_float16(scale)
    return Grid(scale=scale, min=to_float16(level - scale * middle))


def _ratio(over: Tensor, under: Tensor, instead: Tensor) -> Tensor:
    """over / under; `instead` where that is no positive number."""
    quotient = over / under.clamp(min=1e-12)
    return torch.where((under > 1e-12) & (quotient > 0), quotient, instead)


def _mean(values: Tensor, importance: Tensor | None) -> Tensor:
    """The mean over the columns of each group, weighted by importance."""
    if importance is None:
        return values.mean(dim=2)
    return (values * importance).sum(dim=2) / importance.sum(dim=-1)


def _better(one: tuple[Tensor, Grid], other: tuple[Tensor, Grid] | None) -> tuple[Tensor, Grid]:
    if other is None:
        return one
    first_is_better = one[0] < other[0]
    grid = Grid(
        scale=torch.where(first_is_better, one[1].scale, other[1].scale),
        min=torch.where(first_is_better, one[1].min, other[1].min),
    )
    return torch.where(first_is_better, one[0], other[0]), grid
