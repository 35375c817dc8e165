"""GPTQ: codes chosen a column at a time, what rounding leaves pushed onto the columns that are still to come.

With W [out, in], H = mean(x x^T) over a layer's inputs, and U the upper Cholesky factor of H^-1 (H = damped), for each
column i in order of quantisation:

    q = nearest code of W[:, i];   e = (W[:, i] - value(q)) / U[i, i];   W[:, j] -= e * U[i, j]   for j > i

(Frantar et al. 2022, arXiv 2210.17323.) Groups are runs of columns always, so that no g_idx arises and adapters fold.
Without act-order a group's grid is searched when the group is reached, on the weights as they are then. With act-order
the columns of the largest second moments come first, and every grid is searched beforehand ("static groups").

`refined` improves what GPTQ found on the same H, by coordinate descent on tr((W - V) H (W - V)^T), V the quantized
weight: each column's codes become the best ones given all the others, again and again; between two such passes scale
and min of all groups of a row are fitted together, by least squares, to the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qalora.devices import double
from qalora.errors import InputError
from qalora.quantization.grid import Grid, Search, search, zero_points
from qalora.quantization.minima import pooled_covariance, round_with_feedback
from qalora.quantization.rounding import Zeros, to_float16
from qalora.quantization.searching import QUICK, finite
from qalora.tensor import GroupQuantTensor, check_group_size

__all__ = ["GptqOptions", "damped", "gptq_tensor", "output_error"]

TILE_FLOATS = 1 << 22
"""Numbers of the rows whose grids are fitted at a time, at least; or as many as H has, which all of them are multiplied
with."""

RIDGE = 1e-6
"""Share of their diagonal that is added to the normal equations of a row's grid."""

BLOCK = 128
"""Columns whose corrections are carried to the rest of the matrix together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqOptions:
    """damping: share of H's mean diagonal that is added to it; act_order: see the module; passes: of `refined`."""

    damping: float = 0.01
    act_order: bool = False
    passes: int = 0
    grids: Search = QUICK


def damped(hessian: Tensor, damping: float) -> Tensor:
    """float64 [in, in]: H with a share of its mean diagonal added, positive definite even where an input is dead."""
    matrix = double(hessian, copy=True)
    mean = float(matrix.diagonal().mean())
    matrix.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return matrix


def output_error(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    """mean over inputs of |(W - V) x|^2, summed over the rows."""
    left = double(weight.float() - other.float())
    return float(((left @ double(hessian)) * left).sum())


def gptq_tensor(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    zeros: Zeros = "real",
    options: GptqOptions | None = None,
) -> GroupQuantTensor:
    """Quantize a float weight [out, in] given H [in, in]; computed on the weight's device in float32, its
    factor in float64.

    Raises InputError as `search_tensor` does.
    """
    settings = options or GptqOptions()
    w = finite(weight)
    columns = w.shape[1]
    check_group_size(columns, group_size)
    h = damped(hessian, settings.damping)
    moments = h.diagonal().float().to(w.device)
    damped_hessian = h.float().to(w.device) if settings.passes else None
    order = (
        torch.argsort(h.diagonal(), descending=True, stable=True)
        if settings.act_order
        else torch.arange(columns, device=h.device)
    )
    if settings.act_order:
        h = h[order]
        h = h[:, order]  # in two statements, so that no third matrix is held
    try:
        factor = _factor(h).to(w.device)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InputError(
            "the moments of the layer's inputs",
            expected="a matrix that is positive definite once damped",
            got=f"a matrix that is not, with damping {settings.damping:g}",
            todo="give a larger `damping`, or more `calibration_tokens`",
        ) from error
    del h
    top = (1 << bits) - 1
    run = _Columns(w, factor, order, group_size, top, zeros, settings.grids)
    if settings.act_order:
        run.grid = search(w.view(w.shape[0], -1, group_size), top, zeros, settings.grids, moments.view(-1, group_size))
    run.all()
    codes, grid = run.codes.t().contiguous(), run.grid
    if damped_hessian is not None:
        codes, grid = refined(w, codes, grid, damped_hessian, top, zeros, settings.passes)
    return GroupQuantTensor.from_codes(codes.to(torch.uint8), grid.scale, grid.min, bits, group_size)


def _factor(h: Tensor) -> Tensor:
    """float32 U of H^-1 = U^T U, upper; H, float64 [in, in], is overwritten: it is the largest thing there is."""
    torch.linalg.cholesky(h, out=h)
    torch.cholesky_inverse(h, out=h)
    torch.linalg.cholesky(h, upper=True, out=h)
    return h.float()


class _Columns:
    """A pass over the columns. Everything is kept transposed, [in, out], so that a column is a run of memory."""

    def __init__(
        self, w: Tensor, factor: Tensor, order: Tensor, group_size: int, top: int, zeros: Zeros, grids: Search
    ) -> None:
        out, columns = w.shape
        self._left = w.t()[order.to(w.device)].contiguous()
        self._order = order.cpu().tolist()  # a column asks for its place, and must not wait for the device
        self._factor, self._size, self._top, self._zeros = factor, group_size, top, zeros
        self._search = grids
        groups = columns // group_size
        self.grid = Grid(scale=w.new_zeros(out, groups), min=w.new_zeros(out, groups))
        self.codes = w.new_empty(columns, out)
        self._static = self._order != list(range(columns))

    def all(self) -> None:
        columns, size = self._left.shape[0], self._size
        block = max(1, BLOCK // size) * size if size < BLOCK else (BLOCK if size % BLOCK == 0 else size)
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            errors = torch.stack([self._column(i, stop) for i in range(start, stop)])
            self._left[stop:].addmm_(self._factor[start:stop, stop:].t(), errors, alpha=-1)

    def _column(self, i: int, stop: int) -> Tensor:
        """Choose the codes of column i, correct columns i+1 .. stop-1; gives the error, over U[i, i]."""
        at = self._order[i]
        group = at // self._size
        if not self._static and i % self._size == 0:
            self._begin(i, group)
        scale, minimum = self.grid.scale[:, group], self.grid.min[:, group]
        column = self._left[i]
        safe = torch.where(scale == 0, torch.inf, scale)
        codes = ((column - minimum) / safe).round_().clamp_(0, self._top)
        self.codes[at] = codes
        error = (column - torch.addcmul(minimum, scale, codes)) / self._factor[i, i]
        self._left[i + 1 : stop].addr_(self._factor[i, i + 1 : stop], error, alpha=-1)
        return error

    def _begin(self, i: int, group: int) -> None:
        """Search the grid of the group that begins at column i, on the weights as they are now."""
        rows = slice(i, i + self._size)
        importance = self._factor.diagonal()[rows].square().reciprocal()[None]
        grid = search(self._left[rows].t().contiguous()[:, None], self._top, self._zeros, self._search, importance)
        self.grid.scale[:, group], self.grid.min[:, group] = grid.scale[:, 0], grid.min[:, 0]


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
    step = min(size, BLOCK)
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
    """The scales' part of the normal equations of rows [rows, in]: float32 [rows, groups, groups], symmetric."""
    groups = steps.shape[1] // size
    normal = steps.new_empty(steps.shape[0], groups, groups)
    for g in range(groups):
        start = g * size
        mixed = steps[:, start : start + size] @ h[start : start + size, start:]
        normal[:, g, g:] = normal[:, g:, g] = _pooled(mixed.mul_(steps[:, start:]), size)
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
    return (values.view(-1, size) @ values.new_ones(size)).view(values.shape[0], -1)
