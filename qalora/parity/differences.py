"""Two tensors of one name compared: codes, scale and minimum in ULP, floats, and the dequantized weights in float64.

Two quantized tensors are compared as codes, scale and min, after both are brought to the same groups. A carrier may
store the same weight with shifted codes (Q8_0 centres them on 0): where a group's codes are all `k` above the
reference's and its min is exactly scale * k below, nothing differs. Where one side holds floats, the other is
dequantized, and what rounding explains is told from what it does not:

    both floats            0 where the artefact's dtype holds the reference's; else half an ULP of the artefact's dtype
    floats of integers     half an ULP of the artefact's dtype, and float32's own in dequantizing:
                           2^-23 (|scale| codes + |min|)
    integers of floats     the latter alone; beyond it the weights were quantized anew, by rounding to the nearest
                           code (at most half a step, and the float16 rounding of scale and min:
                           2^-11 (2^bits - 1 + |min/scale|) of a step) or by a method that moves them further; but
                           where zeros would be nearer (RMS), they are no quantization of these weights at all

A step is the scale of a weight's group. This module runs no model and decides nothing: what may differ is
`qalora.parity.gates`' matter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor

from qalora.parity.findings import TensorDifference, add_up
from qalora.tensor import GroupQuantTensor, same_bits

__all__ = ["at_row", "compare_bytes", "compare_tensors", "transposed", "ulp"]

_FORMATS = {torch.float16: (-14, 10), torch.bfloat16: (-126, 7), torch.float32: (-126, 23)}  # least exponent, mantissa

CHUNK = 1 << 22
"""Weights whose difference is computed at a time."""


def compare_tensors(
    name: str,
    mine: Tensor | GroupQuantTensor,
    theirs: Tensor | GroupQuantTensor,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    *,
    residual: bool = False,
    floats: bool = False,
) -> TensorDifference:
    """Compare two tensors of one shape; `dtypes` are those that the reference's scale and min are counted in ULP of.

    residual  the artefact holds min as C = min + scale * z (`qalora.residual`). Where the reference's min is float32, C
              was rounded (2^-24 |C|, with |C| <= |min| + |scale| 2^bits) and min read back with another rounding
              (2^-24 |min|); `min_beyond` then counts only what is further off than 2^-23 (|min| + |scale| 2^bits).
    floats    the reference is a float model: integers in place of its floats are another quantization, and no fault
    """
    same = _the_same(name, mine, theirs)
    if same is not None:
        return same
    parts: list[TensorDifference] = []
    for row, a, b in _chunks(mine, theirs):
        if isinstance(a, GroupQuantTensor) and isinstance(b, GroupQuantTensor):
            parts.append(at_row(_compare_quantized(name, a, b, dtypes, residual), row))
        else:
            parts.append(_compare_floats(name, a, b, floats=floats))
    difference = add_up(name, parts)
    if difference.same:
        return difference
    if difference.codes_differ or difference.values_differ:
        moved = _rows_moved(mine, theirs)
        if moved:
            return TensorDifference(name=name, rows_moved=moved, codes=difference.codes, values=difference.values)
        if transposed(mine, theirs):
            return TensorDifference(name=name, transposed=1, codes=difference.codes, values=difference.values)
    return _with_errors(difference, mine, theirs)


def compare_bytes(name: str, mine: Tensor, theirs: Tensor) -> TensorDifference:
    """Compare two tensors of one shape that nothing computes with: a value that has other bytes, or another type, is
    beyond what anything explains.
    """
    count = theirs.numel()
    if mine.dtype != theirs.dtype:
        return TensorDifference(name=name, values=count, values_differ=count, values_beyond=count)
    a, b = (part.contiguous().reshape(-1).view(torch.uint8).view(count, -1) for part in (mine, theirs))
    differ = int((a != b).any(dim=1).sum()) if count else 0
    error = (mine.double() - theirs.double()).abs().nan_to_num(0.0, 0.0) if differ else torch.zeros(1)
    return TensorDifference(
        name=name, values=count, values_differ=differ, values_max=float(error.max()), values_beyond=differ
    )


def _the_same(name: str, mine: Tensor | GroupQuantTensor, theirs: Tensor | GroupQuantTensor) -> TensorDifference | None:
    """What is said of two tensors that have the same bits; None of others."""
    if isinstance(mine, GroupQuantTensor) and isinstance(theirs, GroupQuantTensor):
        if _same_fields(mine, theirs):
            return TensorDifference(name=name, codes=math.prod(theirs.shape), groups=theirs.scale.numel())
    elif isinstance(mine, Tensor) and isinstance(theirs, Tensor) and same_bits(mine, theirs):
        return TensorDifference(name=name, values=theirs.numel())
    return None


def at_row(difference: TensorDifference, row: int) -> TensorDifference:
    """Of rows from `row` on, as part of the whole tensor."""
    if difference.code_at is None:
        return difference
    return replace(difference, code_at=(difference.code_at[0] + row, difference.code_at[1]))


def _compare_floats(
    name: str, mine: Tensor | GroupQuantTensor, theirs: Tensor | GroupQuantTensor, *, floats: bool
) -> TensorDifference:
    a, b = _floats(mine), _floats(theirs)
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    count = int(differ.sum())
    if not count:
        return TensorDifference(name=name, values=b.numel())
    error = (a.double() - b.double()).abs().nan_to_num(math.inf, math.inf)
    beyond = error > _slack(mine, theirs, a, b)
    anew = isinstance(mine, GroupQuantTensor) and floats
    return TensorDifference(
        name=name,
        values=b.numel(),
        values_differ=count,
        values_max=float(error.max()),
        values_beyond=0 if anew else int(beyond.sum()),
        requantized=int(beyond.sum()) if anew else 0,
    )


def _slack(mine: Tensor | GroupQuantTensor, theirs: Tensor | GroupQuantTensor, a: Tensor, b: Tensor) -> Tensor:
    """What rounding explains of |a - b|, as the module says."""
    slack = torch.zeros(b.shape, dtype=torch.float64)
    for tensor in (mine, theirs):
        if isinstance(tensor, GroupQuantTensor):
            index = _group_index(tensor)
            product = tensor.scale.double()[:, index].abs() * tensor.codes()
            slack += 2.0**-23 * (product + tensor.min.double()[:, index].abs())
    if isinstance(mine, Tensor) and _narrower(
        mine.dtype, theirs.dtype if isinstance(theirs, Tensor) else torch.float32
    ):
        slack += ulp(b, mine.dtype) / 2
    return slack


def _narrower(mine: torch.dtype, theirs: torch.dtype) -> bool:
    """Whether there are values of `theirs` that `mine` does not hold."""
    return mine in _FORMATS and torch.promote_types(mine, theirs) != mine


def _floats(tensor: Tensor | GroupQuantTensor) -> Tensor:
    if isinstance(tensor, GroupQuantTensor):
        return tensor.dequantize()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _compare_quantized(
    name: str,
    mine: GroupQuantTensor,
    theirs: GroupQuantTensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    residual: bool,
) -> TensorDifference:
    scale_a, min_a, scale_b, min_b, columns = _aligned(mine, theirs)
    same_codes = mine.bits == theirs.bits and same_bits(mine.packed, theirs.packed)
    codes_differ, code_at = 0, None
    if not same_codes:
        shape = (theirs.shape[0], scale_b.shape[1], columns)
        offset = mine.codes().view(shape).to(torch.int16) - theirs.codes().view(shape)
        shift = offset.median(dim=2).values
        moved = min_a.double() + scale_b.double() * shift
        whole = (scale_b != 0) | ((offset == shift[..., None]).all(dim=2) & (columns > 1))  # 0 * k proves no shift
        shift = torch.where((moved == min_b.double()) & (scale_a == scale_b) & whole, shift, 0)
        min_a = torch.where(shift != 0, min_b, min_a)
        wrong = (offset != shift[..., None]).view(theirs.shape)
        codes_differ = int(wrong.sum())
        code_at = _first(wrong) if codes_differ else None
    min_differ = min_a != min_b
    beyond = min_differ
    if residual and dtypes[1] == torch.float32:
        slack = 2.0**-23 * (min_b.double().abs() + scale_b.double().abs() * (1 << theirs.bits))
        beyond = (min_a.double() - min_b.double()).abs() > slack
    above, below = _zeros_off(scale_a, min_a, scale_b, min_b, theirs.bits)
    return TensorDifference(
        name=name,
        codes=theirs.shape[0] * theirs.shape[1],
        codes_differ=codes_differ,
        code_at=code_at,
        groups=scale_b.numel(),
        scale_differ=int((scale_a != scale_b).sum()),
        scale_ulp=_largest_ulp(scale_a, scale_b, dtypes[0]),
        min_differ=int(min_differ.sum()),
        min_ulp=_largest_ulp(min_a, min_b, dtypes[1]),
        min_beyond=int(beyond.sum()),
        zeros_above=above,
        zeros_below=below,
    )


def _same_fields(mine: GroupQuantTensor, theirs: GroupQuantTensor) -> bool:
    return (
        (mine.bits, mine.group_size, mine.g_idx, theirs.g_idx) == (theirs.bits, theirs.group_size, None, None)
        and same_bits(mine.packed, theirs.packed)
        and same_bits(mine.scale, theirs.scale)
        and same_bits(mine.min, theirs.min)
    )


def _first(wrong: Tensor) -> tuple[int, int]:
    row, column = divmod(int(wrong.flatten().to(torch.uint8).argmax()), wrong.shape[1])
    return row, column


def _zeros_off(scale_a: Tensor, min_a: Tensor, scale_b: Tensor, min_b: Tensor, bits: int) -> tuple[int, int]:
    """Groups whose zero point is one above and one below the reference's, modulo 2^bits.

    min = -scale * zero, and one of the two may be rounded to float16: 2^-10 (|min| + |scale|) is allowed for that.
    """
    if torch.equal(min_a, min_b):
        return 0, 0
    scale, moved = scale_b.double(), min_b.double() - min_a.double()
    slack = 2.0**-10 * (torch.maximum(min_a.abs(), min_b.abs()).double() + scale.abs())
    usable = (scale_b != 0) & (scale_a == scale_b)

    def groups(steps: int) -> int:
        return int((usable & ((moved - steps * scale).abs() <= slack)).sum())

    wrap = (1 << bits) - 1
    return groups(1) + groups(-wrap), groups(-1) + groups(wrap)


def _aligned(mine: GroupQuantTensor, theirs: GroupQuantTensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Scale and min of both in common groups, and a group's columns; each column is its own with act-order."""
    ordered = mine.g_idx is not None or theirs.g_idx is not None
    if not ordered:
        fine = math.gcd(mine.group_size, theirs.group_size)
        a, b = mine.regrouped(fine), theirs.regrouped(fine)
        return a.scale, a.min, b.scale, b.min, fine
    index_a, index_b = _group_index(mine), _group_index(theirs)
    return mine.scale[:, index_a], mine.min[:, index_a], theirs.scale[:, index_b], theirs.min[:, index_b], 1


def _group_index(tensor: GroupQuantTensor) -> Tensor:
    return torch.arange(tensor.shape[1]) // tensor.group_size if tensor.g_idx is None else tensor.g_idx.long()


def _rows_moved(mine: Tensor | GroupQuantTensor, theirs: Tensor | GroupQuantTensor) -> int:
    """How many rows of `mine` are elsewhere in `theirs`, if both have the very same rows; else 0."""
    if len(theirs.shape) != 2:
        return 0
    rows_a: list[bytes] = []
    rows_b: list[bytes] = []
    for _, one, two in _chunks(mine, theirs):
        if isinstance(one, GroupQuantTensor) and isinstance(two, GroupQuantTensor):
            scale_a, min_a, scale_b, min_b, _ = _aligned(one, two)
            rows_a += _row_digests(one.codes(), scale_a, min_a)
            rows_b += _row_digests(two.codes(), scale_b, min_b)
        else:
            a, b = _floats(one), _floats(two)
            if a.dtype != b.dtype:
                return 0
            rows_a += _row_digests(a)
            rows_b += _row_digests(b)
    return sum(a != b for a, b in zip(rows_a, rows_b, strict=True)) if Counter(rows_a) == Counter(rows_b) else 0


def _row_digests(*parts: Tensor) -> list[bytes]:
    plain = [p if p.dtype == torch.uint8 else (p + 0.0).contiguous().view(torch.uint8) for p in parts]  # -0.0 + 0.0 = 0
    return [blake2b(row, digest_size=16).digest() for row in torch.cat(plain, dim=1).numpy()]


def transposed(mine: Tensor | GroupQuantTensor, theirs: Tensor | GroupQuantTensor) -> bool:
    """Whether `mine` is much nearer to the transpose of `theirs`: a quarter of the error, which is half its size."""
    if len(mine.shape) != 2 or tuple(mine.shape) != tuple(reversed(theirs.shape)):
        return False
    a, square = _floats(mine), tuple(mine.shape) == tuple(theirs.shape)
    size = turned = straight = 0.0
    step = max(1, CHUNK // max(1, theirs.shape[1]))
    for start in range(0, theirs.shape[0], step):
        b = _floats(_rows(theirs, start, start + step)).double()
        size += float(b.square().sum())
        turned += float((a[:, start : start + step].T.double() - b).square().sum())
        straight += float((a[start : start + step].double() - b).square().sum()) if square else 0.0
    if not square:
        return turned < size / 16
    return straight > size / 4 and turned < straight / 16


def _with_errors(
    difference: TensorDifference, mine: Tensor | GroupQuantTensor, theirs: Tensor | GroupQuantTensor
) -> TensorDifference:
    """The same with errors in float64, a few rows at a time."""
    measured = stepped = beyond = 0
    largest = squares = steps = step_squares = size = 0.0
    for _, a, b in _chunks(mine, theirs):
        error = (_weights(a) - _weights(b)).abs().nan_to_num(math.inf, math.inf)
        measured, largest = measured + error.numel(), max(largest, float(error.max()))
        squares += float(error.square().sum())
        size += float(_weights(b).square().sum())
        grid = b if isinstance(b, GroupQuantTensor) else a
        if isinstance(grid, GroupQuantTensor):
            inside, slack = _in_steps(error, grid)
            stepped, steps = stepped + inside.numel(), max(steps, float(inside.max()))
            step_squares += float(inside.square().sum())
            beyond += int((inside > 0.5 + slack).sum())
    if difference.requantized and squares >= size:
        difference = replace(difference, values_beyond=difference.requantized, requantized=0)
    return replace(
        difference,
        measured=measured,
        error_max=largest,
        error_rms=math.sqrt(squares / max(1, measured)),
        stepped=stepped,
        step_max=steps,
        step_rms=math.sqrt(step_squares / max(1, stepped)),
        step_beyond=beyond if difference.requantized else 0,
    )


def _in_steps(error: Tensor, grid: GroupQuantTensor) -> tuple[Tensor, Tensor]:
    """The error in steps, and what the float16 rounding of scale and min adds to half a step; both [out, in]."""
    index = _group_index(grid)
    scale, minimum = (part.double().abs()[:, index] for part in (grid.scale, grid.min))
    step = torch.where(scale == 0, 1.0, scale)
    slack = 2.0**-11 * ((1 << grid.bits) - 1 + minimum / step)
    return torch.where(scale == 0, 0.0, error / step), slack


def _chunks(
    mine: Tensor | GroupQuantTensor, theirs: Tensor | GroupQuantTensor
) -> Iterator[tuple[int, Tensor | GroupQuantTensor, Tensor | GroupQuantTensor]]:
    """(first row, rows, rows) of both."""
    if len(theirs.shape) != 2:
        yield 0, mine, theirs
        return
    step = max(1, CHUNK // max(1, theirs.shape[1]))
    for start in range(0, max(1, theirs.shape[0]), step):
        yield start, _rows(mine, start, start + step), _rows(theirs, start, start + step)


def _rows(tensor: Tensor | GroupQuantTensor, start: int, stop: int) -> Tensor | GroupQuantTensor:
    return tensor.rows(start, stop) if isinstance(tensor, GroupQuantTensor) else tensor[start:stop]


def _weights(tensor: Tensor | GroupQuantTensor) -> Tensor:
    """Dequantized in float64."""
    if isinstance(tensor, Tensor):
        return tensor.double()
    index = _group_index(tensor)
    return tensor.scale.double()[:, index] * tensor.codes() + tensor.min.double()[:, index]


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of each value in `dtype`, float64; of a subnormal, and of 0, the least subnormal."""
    least, mantissa = _FORMATS[dtype]
    exponent = torch.frexp(values.double().abs()).exponent - 1
    exponent = torch.where(values == 0, least, exponent).clamp(min=least)
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent - mantissa)


def _largest_ulp(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    if torch.equal(mine, theirs):
        return 0.0
    return float(((mine.double() - theirs.double()).abs() / ulp(theirs, dtype)).max())
