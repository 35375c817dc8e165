"""GPTQ: codes chosen a column at a time, what rounding leaves pushed onto the columns that are still to come.

With W [out, in], H = mean(x x^T) over a layer's inputs, and U the upper Cholesky factor of H^-1 (H = damped), for each
column i in order of quantisation:

    q = nearest code of W[:, i];   e = (W[:, i] - value(q)) / U[i, i];   W[:, j] -= e * U[i, j]   for j > i

(Frantar et al. 2022, arXiv 2210.17323.) Groups are runs of columns always, so that no g_idx arises and adapters fold.
Without act-order a group's grid is searched when the group is reached, on the weights as they are then. With act-order
the columns of the largest second moments come first, and every grid is searched beforehand ("static groups").

`qalora.quantization.refining` improves what GPTQ found, in further passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qalora.devices import double
from qalora.errors import InputError
from qalora.quantization.grid import Grid, Search, search
from qalora.quantization.refining import refined
from qalora.quantization.rounding import Zeros
from qalora.quantization.searching import QUICK, finite
from qalora.tensor import GroupQuantTensor, check_group_size

__all__ = ["GptqOptions", "damped", "gptq_tensor", "output_error"]

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
