"""What a quantized layer becomes in a GPTQ folder: codes, float16 scales, integer zero points, and what is left over.

| form | zero points | left over | exact |
|---|---|---|---|
| own | the layer's own, which are integers | nothing | yes |
| symmetric | 2**(bits-1) everywhere | C, a LoRA beside | yes |
| nearest | the nearest to -min/scale | C, a LoRA beside | yes |
| round | the nearest to -min/scale | lost | no |
| eight-bit | those of finer steps | nothing | nearly |

eight-bit: a step is cut into m finer ones, q8 = m*q + k, scale8 = scale/m, zero8 = round(m*zero) + k, with k such that
everything lies in 0..255: m <= 17, 36 and 85 at 4, 3 and 2 bits. Each group gets the m whose worst weight is nearest
to what it was; the zero point is then off by at most 1/(2m) of a step. A group with scale 0 has one value, which
becomes scale8 * (1 - 0). Codes are re-encoded, not requantized: equal codes stay equal, in the same order.

Scales beyond float16 are rounded (a stated loss of the plan), min is then kept by C where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qalora.errors import ExactnessError, InputError
from qalora.residual import to_residual
from qalora.tensor import GroupQuantTensor, all_finite, integer_zeros, pack_codes

__all__ = ["Encoded", "Form", "encode"]

Form = Literal["own", "symmetric", "nearest", "round", "eight-bit"]

TILE = 1 << 21
"""Weights whose groups are computed at a time, in float64."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """A layer ready to be laid out in words.

    packed  uint8   [out, in*bits/8]
    scale   float16 [out, groups]
    zero    uint8   [out, groups]
    bits    of the codes; 8 in form eight-bit
    c       float32 [out, groups]; None where nothing is left over or it is lost
    exact   whether no bit of C was rounded
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    c: Tensor | None = None
    exact: bool = True


def encode(tensor: GroupQuantTensor, form: Form) -> Encoded:
    """A layer in one of the forms, made some rows at a time. Raises InputError for scales beyond float16's range."""
    step = max(1, TILE // tensor.shape[1])
    parts = [_encode(tensor.rows(row, row + step), form) for row in range(0, tensor.shape[0], step)]
    same, left = parts[0].bits == tensor.bits, [part.c for part in parts if part.c is not None]
    return Encoded(
        packed=tensor.packed if same else torch.cat([part.packed for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat([part.zero for part in parts]),
        bits=parts[0].bits,
        c=torch.cat(left) if left else None,
        exact=all(part.exact for part in parts),
    )


def _encode(tensor: GroupQuantTensor, form: Form) -> Encoded:
    if form == "eight-bit":
        return _eight_bit(tensor)
    scale = _float16(tensor.scale)
    if form == "own":
        zero = integer_zeros(tensor)
        if zero is None:
            raise ExactnessError("zero points", expected="integers in every group, as its spec says", got="real ones")
        return Encoded(packed=tensor.packed, scale=scale, zero=zero, bits=tensor.bits)
    left = to_residual(replace(tensor, scale=scale.float()), "symmetric" if form == "symmetric" else "nearest")
    return Encoded(
        packed=tensor.packed,
        scale=scale,
        zero=left.zero,
        bits=tensor.bits,
        c=None if form == "round" else left.c,
        exact=left.exact,
    )


def _float16(scale: Tensor) -> Tensor:
    narrow = scale.to(torch.float16)
    if not all_finite(narrow):
        raise InputError("scales", expected="values within float16's 65504", got=f"{float(scale.abs().max()):.6g}")
    return narrow


def _eight_bit(tensor: GroupQuantTensor) -> Encoded:
    top = (1 << tensor.bits) - 1
    scale, minimum = tensor.scale.double(), tensor.min.double()
    constant = scale == 0
    zero = torch.where(constant, 0.0, -minimum / torch.where(constant, 1.0, scale))
    worst = torch.full_like(scale, torch.inf)
    times, shift, middle = torch.zeros_like(scale), torch.ones_like(scale), torch.zeros_like(scale)
    fine = torch.where(constant, minimum, 0.0).half().double()  # times 0, shift 1, zero 0: the constant itself
    for m in range(1, 255 // top + 1):
        z = torch.round(m * zero)
        k = (-z).clamp(min=0)
        step = (scale / m).half().double()
        low, high = step * -z - minimum, step * (m * top - z) - (scale * top + minimum)
        error = torch.maximum(low.abs(), high.abs())  # linear in q, so the worst is at an end
        fits = (k + m * top <= 255) & (z + k <= 255) & ~constant
        better = fits & (error < worst)
        times[better] = m
        for kept, new in ((worst, error), (shift, k), (middle, z + k), (fine, step)):
            kept[better] = new[better]
    if bool((~constant & (times == 0)).any()):
        raise InputError(
            "zero points",
            expected="values that 8-bit codes can hold",
            got="values too far from the codes",
            todo="use `gptq_form` auto",
        )
    codes = _spread(times, tensor) * tensor.codes() + _spread(shift, tensor)
    return Encoded(
        packed=pack_codes(codes.to(torch.uint8), 8), scale=_float16(fine.float()), zero=middle.to(torch.uint8), bits=8
    )


def _spread(values: Tensor, tensor: GroupQuantTensor) -> Tensor:
    """One value of each group [out, groups] on each column [out, in], as int16."""
    small = values.to(torch.int16)
    if tensor.g_idx is not None:
        return small[:, tensor.g_idx.long()]
    return small.repeat_interleave(tensor.group_size, dim=1)
