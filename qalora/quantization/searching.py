"""Rounding to the nearest code of a searched grid: no inputs needed, but their second moments help where known.

clip  the range of each group shrunk, both ends alike, to the share with the least squared error
hqq   the class of HQQ: a grid that minimises the error of the weights, no data. HQQ moves the zero point alone, by
      half-quadratic steps; here scale and minimum both move, by alternating least squares from 16 clipped ranges
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora.errors import InputError
from qalora.quantization.grid import Search, search
from qalora.quantization.rounding import TILE, Zeros, empty_parts
from qalora.tensor import GroupQuantTensor, check_group_size, pack_codes

__all__ = ["ALTERNATING", "CLIPPED", "QUICK", "SEARCHES", "search_tensor"]

CLIPPED = Search(clips=[(1 - n / 20, 1 - n / 20) for n in range(13)], rounds=0, last=0)
ALTERNATING = Search(clips=[(1 - n / 6, 1 - m / 6) for n in range(4) for m in range(4)], rounds=2, last=6)
QUICK = Search(clips=[(1 - n / 6, 1 - m / 6) for n in range(3) for m in range(3)], rounds=1, last=4)
"""What GPTQ searches when it reaches a group: no worse there, at less than half the time."""

SEARCHES = {"clip": CLIPPED, "hqq": ALTERNATING}


def search_tensor(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    zeros: Zeros = "real",
    how: Search = ALTERNATING,
    moments: Tensor | None = None,
) -> GroupQuantTensor:
    """Quantize a float weight [out, in] to searched grids; computed in float32 on its device, rows at a time.

    moments  float32 [in], each input's second moment: squared errors count by it. None: all alike

    Raises InputError for NaN or Inf, for a group size that does not divide `in`, and for weights beyond float16.
    """
    out, columns = weight.shape
    check_group_size(columns, group_size)
    groups, top = columns // group_size, (1 << bits) - 1
    importance = None if moments is None else positive(moments).view(groups, group_size)
    packed, scale, minimum = empty_parts(weight, bits, groups)
    step = max(1, TILE // columns)
    for start in range(0, out, step):
        rows = slice(start, start + step)
        tile = finite(weight[rows]).view(-1, groups, group_size)
        grid = search(tile, top, zeros, how, importance)
        packed[rows] = pack_codes(grid.codes(tile, top).to(torch.uint8).view(-1, columns), bits)
        scale[rows], minimum[rows] = grid.scale, grid.min
    return GroupQuantTensor(packed=packed, scale=scale, min=minimum, bits=bits, group_size=group_size)


def finite(weight: Tensor) -> Tensor:
    """The weight in float32; InputError for NaN or Inf."""
    values = weight.float()
    if not bool(torch.isfinite(values).all()):
        raise InputError("weight", expected="finite values in float32's range", got="NaN or Inf")
    return values


def positive(moments: Tensor) -> Tensor:
    """Second moments with a floor at a thousandth of their mean: an input that was never seen may still come."""
    mean = float(moments.mean())
    return moments.clamp(min=1e-3 * mean) if mean > 0 else torch.ones_like(moments)
