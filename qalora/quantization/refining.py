"""Better codes and grids than a method found, on the same H = mean(x x^T), as `qalora.quantization.gptq` has it.

By coordinate descent on tr((W - V) H (W - V)^T), V the quantized weight: each column's codes become the best ones given
all the others, again and again. Between two such passes, scale and min of all groups of a row are fitted together to
the codes, by least squares. With S [in] a row's codes less the middle one, and P the sums over each group's columns,
the equations of its scales s and its minima m, which stand for the middle code, are

    [ P (S S^T * H) P^T    P (S * H P^T) ] [s]   [ P (S * H w) ]
    [ its transpose        P H P^T       ] [m] = [ P H w       ]

The last block is the same for all rows: it is factored once, and m is eliminated. Where zero points are whole numbers,
S is the codes less those, and s alone is fitted, by the first block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora.devices import double
from qalora.quantization.grid import Grid, zero_points
from qalora.quantization.minima import pooled_covariance, round_with_feedback
from qalora.quantization.rounding import Zeros, to_float16

__all__ = ["refined"]

STEP = 128
"""Columns whose part of H is multiplied with what is left together."""

TILE_FLOATS = 1 << 22
"""Floats that the rows fitted together may take: this many, or as many as H has, if that is more. A row takes about 4
for each column, and 10 for each pair of groups: the equations in float32 and in float64, their factor, two blocks."""

RIDGE = 1e-6
"""Share of their diagonal that is added to the normal equations."""


def refined(
    w: Tensor, codes: Tensor, grid: Grid, h: Tensor, top: int, zeros: Zeros, passes: int
) -> tuple[Tensor, Grid]:
    """Codes (floats [out, in]) and grid after `passes` passes over all columns, each after a fit of the grid."""
    pulled = w @ h
    minima = _Minima(h, w.shape[1] // grid.scale.shape[1]) if zeros == "real" else None
    for _ in range(passes):
        grid = _fitted(w, pulled, codes, grid, h, minima, top)
        codes = _descended(w, codes, grid, h, top)
    return codes, _fitted(w, pulled, codes, grid, h, minima, top)


def _descended(w: Tensor, codes: Tensor, grid: Grid, h: Tensor, top: int) -> Tensor:
    """Each column's codes in turn the best ones, given all the others."""
    out, columns = w.shape
    size = columns // grid.scale.shape[1]
    left = (w - grid.values(codes.view(out, -1, size)).view(out, columns)).t().contiguous()
    new_codes = codes.t().contiguous()
    step = min(size, STEP)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        pull = h[start:stop] @ left  # (H E^T) of these columns
        for i in range(start, stop):
            group = i // size
            scale, minimum = grid.scale[:, group], grid.min[:, group]
            now = torch.addcmul(minimum, scale, new_codes[i])
            target = now + pull[i - start] / h[i, i]
            better = ((target - minimum) / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(0, top)
            moved = scale * (new_codes[i] - better)
            new_codes[i] = better
            left[i] += moved
            pull[i - start + 1 :].addr_(h[i + 1 : stop, i], moved)
    return new_codes.t().contiguous()


def _fitted(w: Tensor, pulled: Tensor, codes: Tensor, grid: Grid, h: Tensor, minima: _Minima | None, top: int) -> Grid:
    """Scale and min of all groups of a row, or scale alone where there are no `minima`, by least squares in H, codes
    untouched; pulled: W H.

    A row keeps its grid where the fit is no better, or has a scale that is not positive.
    """
    out, columns = w.shape
    groups = grid.scale.shape[1]
    size = columns // groups
    zero = torch.full_like(grid.scale, (top + 1) / 2) if minima is not None else zero_points(grid, top)
    steps = codes - zero.repeat_interleave(size, dim=1)
    scale, minimum = grid.scale.clone(), grid.min.clone()
    tile = max(1, max(TILE_FLOATS, h.numel()) // (4 * columns + 10 * groups * groups))
    for start in range(0, out, tile):
        rows = slice(start, start + tile)
        normal = double(_normal(steps[rows], h, size))
        normal.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE).add_(1e-12)
        right = double(_pooled(pulled[rows] * steps[rows], size))
        if minima is not None:
            cross, sums = minima.of(steps[rows], pulled[rows])
            normal, right = minima.without(normal, right, cross, sums)
        solution = _solved(normal, right)
        good = torch.isfinite(solution).all(dim=1) & ((solution > 0) & (solution < 6e4)).all(1)
        new = torch.where(good[:, None].to(w.device), solution.float().to(w.device), scale[rows])
        scale[rows] = new = to_float16(new)
        minimum[rows] = -new * zero[rows]
        if minima is not None:
            # the best minima for the scales as they were rounded, the rounding of each pushed onto the next
            exact = minima.best(double(new), cross, sums) - double(new) * double(zero[rows])
            minimum[rows] = round_with_feedback(exact, minima.covariance).to(w.device)
    return _better_rows(w, codes, Grid(scale=scale, min=minimum), grid, h)


def _normal(steps: Tensor, h: Tensor, size: int) -> Tensor:
    """The scales' part of the normal equations of rows [rows, in]: float32 [rows, groups, groups], the lower half, of
    which a Cholesky factor is made.
    """
    groups = steps.shape[1] // size
    normal = steps.new_zeros(steps.shape[0], groups, groups)
    for g in range(groups):
        start = g * size
        mixed = steps[:, start : start + size] @ h[start : start + size, start:]
        normal[:, g:, g] = _pooled(mixed.mul_(steps[:, start:]), size)
    return normal


class _Minima:
    """The minima's part of the normal equations: their block is the same for all rows, so that it is solved once.

    covariance  float64 [groups, groups], P H P^T, see `qalora.quantization.minima`
    """

    def __init__(self, h: Tensor, size: int) -> None:
        self._size = size
        self._rows = _pooled(h, size)  # H P^T
        self.covariance = pooled_covariance(h, size)
        ridged = self.covariance.clone()
        ridged.diagonal().mul_(1 + RIDGE).add_(1e-12)
        self._factor = torch.linalg.cholesky(ridged)

    def of(self, steps: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows [rows, in]: the block between scales and minima, float64 [rows, groups, groups]; the right side."""
        groups = self._rows.shape[1]
        parts = steps.view(-1, groups, self._size).transpose(0, 1)  # [groups, rows, size]
        cross = parts @ self._rows.view(groups, self._size, groups)
        return double(cross.transpose(0, 1).contiguous()), double(_pooled(pulled, self._size))

    def without(self, normal: Tensor, right: Tensor, cross: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The equations of the scales alone, with the best minima for each put in."""
        upper = self._factor.t()
        half = torch.linalg.solve_triangular(upper, cross.flatten(0, 1), upper=True, left=False).view(cross.shape)
        rest = torch.linalg.solve_triangular(upper, sums, upper=True, left=False)
        return torch.baddbmm(normal, half, half.mT, alpha=-1), right - (half @ rest[..., None])[..., 0]

    def best(self, scales: Tensor, cross: Tensor, sums: Tensor) -> Tensor:
        """The best minima for these scales, float64 [rows, groups]."""
        rest = sums - (scales[:, None] @ cross)[:, 0]
        return torch.cholesky_solve(rest.t(), self._factor).t()


def _solved(normal: Tensor, right: Tensor) -> Tensor:
    """x of normal @ x = right for each row, float64 [rows, n]; NaN where a matrix is not positive definite.

    Not by torch.linalg.solve: for many matrices of some 190 rows and more, with several threads, it does not come back
    from MKL's LU (torch 2.13).
    """
    factor, failed = torch.linalg.cholesky_ex(normal)
    return torch.cholesky_solve(right[..., None], factor)[..., 0].masked_fill_((failed != 0)[:, None], torch.nan)


def _better_rows(w: Tensor, codes: Tensor, new: Grid, old: Grid, h: Tensor) -> Grid:
    """The new grid in the rows where it is better."""
    errors = []
    for grid in (new, old):
        left = w - grid.values(codes.view(w.shape[0], grid.scale.shape[1], -1)).view(w.shape)
        errors.append(((left @ h) * left).sum(dim=1))
    better = (errors[0] < errors[1])[:, None]
    return Grid(scale=torch.where(better, new.scale, old.scale), min=torch.where(better, new.min, old.min))


def _pooled(values: Tensor, size: int) -> Tensor:
    """Sums over runs of `size` columns; as a product, which is several times as fast as a sum of short runs."""
    return (values.reshape(-1, size) @ values.new_ones(size)).view(values.shape[0], -1)
