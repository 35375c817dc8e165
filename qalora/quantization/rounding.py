"""Quantization by rounding to nearest, group by group, with scale and min chosen among the values that float16 holds.

With lo and hi the smallest and largest weight of a group, and q = 2**bits - 1:

| zeros | scale | min | codes |
|---|---|---|---|
| real | (hi - lo) / q | lo | round((w - min) / scale) |
| integer | (hi - lo) / q, the range widened to hold 0 | -scale * z, z = round(-lo / scale) | round(w / scale) + z |
| symmetric | 2 * max(abs(w)) / q | -scale * 2**(bits-1) | round(w / scale) + 2**(bits-1) |

Scale, and min where it is stored, are rounded to float16 before the codes are chosen, so that the codes make up for
that rounding and every carrier with 16-bit parameters holds the result exactly. Codes are clamped to 0..q.
A group whose scale rounds to 0 (all weights equal, or nearly) gets scale 0: with real zeros its min is the middle of
the range.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from qalora.errors import InputError
from qalora.options.words import Zeros
from qalora.tensor import GroupQuantTensor, QuantSpec, check_group_size, pack_codes, packed_row_bytes

__all__ = ["ZEROS", "Zeros", "empty_parts", "quantize_tensor", "quotient", "spec_of", "to_float16"]

ZEROS: tuple[Zeros, ...] = get_args(Zeros)

TILE = 1 << 20
"""Weights that are quantized at a time."""


def spec_of(bits: int, group_size: int, zeros: Zeros) -> QuantSpec:
    """What `quantize_tensor` guarantees of its result."""
    return QuantSpec(
        bits=bits,
        group_size=group_size,
        zeros="real" if zeros == "real" else "integer",
        scale_dtype=torch.float16,
        min_dtype=torch.float32 if zeros == "integer" else torch.float16,
        zero=1 << (bits - 1) if zeros == "symmetric" else None,
    )


def quantize_tensor(weight: Tensor, *, bits: int, group_size: int, zeros: Zeros = "real") -> GroupQuantTensor:
    """Quantize a float weight [out, in] as the module's docstring says; computed in float32, on the weight's device.

    No step sums, so that every device that rounds as IEEE 754 says gives the same bits.

    Raises InputError for NaN or Inf, for a group size that does not divide `in`, and for weights beyond float16.
    """
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise InputError("weight", expected="a float matrix", got=f"{weight.dtype} {list(weight.shape)}")
    out, columns = weight.shape
    check_group_size(columns, group_size)
    groups = columns // group_size
    packed, scale, minimum = empty_parts(weight, bits, groups)
    step = max(1, TILE // columns)
    for start in range(0, out, step):
        rows = slice(start, start + step)
        tile = weight[rows].float()
        if not bool(torch.isfinite(tile).all()):
            raise InputError("weight", expected="finite values in float32's range", got="NaN or Inf")
        grouped = tile.view(tile.shape[0], groups, group_size)
        codes, scale[rows], minimum[rows] = _ROUND[zeros](grouped, (1 << bits) - 1)
        packed[rows] = pack_codes(codes.view(tile.shape), bits)
    return GroupQuantTensor(packed=packed, scale=scale, min=minimum, bits=bits, group_size=group_size)


def _real(w: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    lo, hi = w.amin(dim=2), w.amax(dim=2)
    scale = to_float16(quotient(hi - lo, top))
    minimum = to_float16(torch.where(scale == 0, lo + (hi - lo) / 2, lo))
    steps = (w - minimum[..., None]) / _divisor(scale)[..., None]
    return _codes(torch.where(scale[..., None] == 0, 0.0, steps), top), scale, minimum


def _integer(w: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    lo, hi = w.amin(dim=2).clamp(max=0), w.amax(dim=2).clamp(min=0)
    scale = to_float16(quotient(hi - lo, top))
    zero = torch.round(-lo / _divisor(scale)).clamp(0, top)
    zero = torch.where(scale == 0, float(top // 2 + 1), zero)
    return _around(w, scale, zero, top)


def _symmetric(w: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    scale = to_float16(quotient(2 * w.abs().amax(dim=2), top))
    to_float16(scale * (top // 2 + 1))  # the min must be in range too
    return _around(w, scale, torch.full_like(scale, top // 2 + 1), top)


def _around(w: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    steps = torch.where(scale[..., None] == 0, 0.0, w / _divisor(scale)[..., None])
    return _codes(torch.round(steps) + zero[..., None], top), scale, -scale * zero


_ROUND = {"real": _real, "integer": _integer, "symmetric": _symmetric}


def _codes(steps: Tensor, top: int) -> Tensor:
    return torch.round(steps).clamp(0, top).to(torch.uint8)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def empty_parts(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """What packed codes, scale and min of a weight go into, on its device."""
    out, columns = weight.shape
    packed = torch.empty(out, packed_row_bytes(columns, bits), dtype=torch.uint8, device=weight.device)
    scale, minimum = (torch.empty(out, groups, device=weight.device) for _ in range(2))
    return packed, scale, minimum


def quotient(values: Tensor, by: float) -> Tensor:
    """values / by, rounded once: CUDA multiplies with the reciprocal of a number that is no tensor of its own."""
    return values / torch.full((), by, dtype=values.dtype, device=values.device)


def to_float16(values: Tensor) -> Tensor:
    """The nearest float16 values, as float32; InputError beyond 65504."""
    rounded = values.to(torch.float16).float()
    if not bool(torch.isfinite(rounded).all()):
        raise InputError(
            "weight", expected="scales and minima within float16's 65504", got=f"{float(values.abs().max()):.6g}"
        )
    return rounded
