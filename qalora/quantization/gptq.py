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
"""Numbers of the rows whose grids are fitted at a time."""

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
    for _ in range(passes):
        grid = _fitted(w, codes, grid, h, top, zeros)
        codes = _descended(w, codes, grid, h, top)
    return codes, _fitted(w, codes, grid, h, top, zeros)


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


def _fitted(w: Tensor, codes: Tensor, grid: Grid, h: Tensor, top: int, zeros: Zeros) -> Grid:
    """Scale and min (or scale alone) of all groups of a row, by least squares in H, codes untouched.

    A row keeps its grid where the fit is no better, or has a scale that is not positive.
    """
    out, columns = w.shape
    groups = grid.scale.shape[1]
    size = columns // groups
    zero = torch.full_like(grid.scale, (top + 1) / 2) if zeros == "real" else zero_points(grid, top)
    steps = codes - zero.repeat_interleave(size, dim=1)
    pooled = pooled_covariance(h, size) if zeros == "real" else None
    scale, minimum = grid.scale.clone(), grid.min.clone()
    tile = max(1, TILE_FLOATS // (columns + 4 * groups * groups))
    for start in range(0, out, tile):
        rows = slice(start, start + tile)
        normal, right = _normal(steps[rows], w[rows] @ h, h, size, pooled)
        solution = torch.linalg.solve(normal, right)
        good = torch.isfinite(solution).all(dim=1) & ((solution[:, :groups] > 0) & (solution[:, :groups] < 6e4)).all(1)
        good, scales = good.to(w.device), solution[:, :groups].float().to(w.device)
        new = to_float16(torch.where(good[:, None], scales, scale[rows]))
        scale[rows], minimum[rows] = new, -new * zero[rows]
        if pooled is not None:
            # the best minima for the scales as they were rounded, the rounding of each pushed onto the next
            rest = right[:, groups:] - torch.einsum("ogk,ok->og", normal[:, groups:, :groups], double(new))
            exact = torch.linalg.solve(pooled, rest.t()).t() - double(new) * double(zero[rows])
            minimum[rows] = round_with_feedback(exact, pooled).to(w.device)
    return _better_rows(w, codes, Grid(scale=scale, min=minimum), grid, h)


def _normal(steps: Tensor, target: Tensor, h: Tensor, size: int, pooled: Tensor | None) -> tuple[Tensor, Tensor]:
    """The normal equations of rows [rows, in]: float64 [rows, n, n] and [rows, n]; n: scales, then minima if `pooled`,
    the pooled covariance, is given.
    """
    groups = steps.shape[1] // size
    count = groups * (1 if pooled is None else 2)
    normal = steps.new_empty(steps.shape[0], count, count)
    for g in range(groups):
        within = slice(g * size, (g + 1) * size)
        mixed = steps[:, within] @ h[within]
        normal[:, g, :groups] = _pooled(mixed * steps, size)
        if pooled is not None:
            normal[:, g, groups:] = normal[:, groups:, g] = _pooled(mixed, size)
    right = [_pooled(target * steps, size)]
    wide = double(normal)
    if pooled is not None:
        wide[:, groups:, groups:] = pooled
        right.append(_pooled(target, size))
    wide.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6).add_(1e-12)
    return wide, double(torch.cat(right, dim=1))


def _better_rows(w: Tensor, codes: Tensor, new: Grid, old: Grid, h: Tensor) -> Grid:
    """The new grid in the rows where it is better."""
    errors = []
    for grid in (new, old):
        left = w - grid.values(codes.view(w.shape[0], grid.scale.shape[1], -1)).view(w.shape)
        errors.append(((left @ h) * left).sum(dim=1))
    better = (errors[0] < errors[1])[:, None]
    return Grid(scale=torch.where(better, new.scale, old.scale), min=torch.where(better, new.min, old.min))


def _pooled(values: Tensor, size: int) -> Tensor:
    """Sums over runs of `size` columns."""
    return values.view(values.shape[0], -1, size).sum(dim=2)
