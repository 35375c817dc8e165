"""Layers whose minima a format keeps as zero points in float (`qalora.formats.real_zeros`): their types, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from qalora.converters.plan import Loss
from qalora.converters.specs import TENSORS
from qalora.errors import FormatError, InputError
from qalora.formats.real_zeros import from_zeros, to_zeros
from qalora.tensor import GroupQuantTensor, QuantSpec, all_finite, integer_zeros

__all__ = ["joined", "minima_loss", "scale_and_zero"]


def minima_loss(spec: QuantSpec) -> Loss | None:
    """What is lost of minima: nothing where zero points are whole or minima float16."""
    if spec.zeros == "integer" or spec.min_dtype is torch.float16:
        return None
    return Loss(name="minima", size="float32 minima kept as zero points, rounded to float32 once more")


def scale_and_zero(target: str, name: str, rows: GroupQuantTensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """float32 [rows, groups] of both; InputError for zero points beyond float32's range."""
    if spec.zeros == "integer":
        zero = integer_zeros(rows)
        if zero is None:
            raise ValueError(f"{name}: its spec promises integer zeros, and it has none")
        return rows.scale, zero.float()
    try:
        return to_zeros(rows.scale, rows.min)
    except InputError as error:
        raise InputError(f"{target}: {name}: {error}") from error


def joined(packed: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, *, middle: int = 0) -> GroupQuantTensor:
    """Rows of packed codes, float32 scales and zero points [rows, groups]; minima are float16 where `spec` says so.

    middle  how much lower than they are zero points are stored, those that are not float16 minima's

    FormatError where the zero points are none of such minima, or not finite.
    """
    if not all_finite(zero):
        raise FormatError("zero points", expected="finite values", got="NaN or Inf")
    stored = (scale, zero)
    scale, minimum = from_zeros(scale, zero, middle)
    if spec.zeros == "real" and spec.min_dtype is torch.float16:
        minimum = minimum.half().float()
        if not all_finite(minimum) or not all(map(torch.equal, to_zeros(scale, minimum), stored)):
            expected = f"those of float16 minima, as {TENSORS} says"
            raise FormatError("zero points", expected=expected, got="different values")
    return GroupQuantTensor(packed=packed, scale=scale, min=minimum, bits=spec.bits, group_size=spec.group_size)
