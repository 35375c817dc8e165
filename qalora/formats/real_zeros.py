"""A minimum as a zero point that is a real number, -min/scale: what HQQ's layers and torchao's tensors take.

The zero point is rounded once to float32, which gives a float16 minimum back exactly: scale * zero is within
2^-23 |min| of it. A group whose scale is 0 has one value, min; as zero point -2^33 and scale min/2^33 it has that value
in float32 and bfloat16, where 2^33 + code rounds to 2^33 (float16 does not reach that far).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora.errors import InputError
from qalora.tensor import all_finite

__all__ = ["from_zeros", "to_zeros"]

CONSTANT = 2.0**33
"""Minus the zero point of a group whose scale is 0: float32 rounds CONSTANT + code to CONSTANT."""


def to_zeros(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero), float32 [out, groups], of a scale and min; inverse of `from_zeros` for minima of float16.

    InputError for a zero point beyond float32's range.
    """
    constant = (scale == 0) & (minimum != 0)
    safe = torch.where(scale == 0, 1.0, scale).double()
    zero = torch.where(scale == 0, 0.0, -minimum.double() / safe).float()
    if not all_finite(zero):
        raise InputError("zero points", expected="values in float32's range", got="larger values")
    return torch.where(constant, minimum / CONSTANT, scale), torch.where(constant, -CONSTANT, zero)


def from_zeros(scale: Tensor, zero: Tensor, middle: int = 0) -> tuple[Tensor, Tensor]:
    """(scale, min), float32 [out, groups]: min = -scale * (zero + middle), rounded once."""
    constant = zero == -CONSTANT
    minimum = (-scale.double() * (zero.double() + middle)).float()
    return torch.where(constant, 0.0, scale), minimum
