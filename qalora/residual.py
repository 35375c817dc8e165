"""An integer zero point and what it leaves over: how carriers with integer zeros hold real ones exactly.

    W = scale * (codes - z) + C,   C = min + scale * z,   y = Q(x; codes, scale, z) + pool(x) @ C^T

pool(x) is the sum of x over each group. ONNX graphs hold C in a branch, GPTQ folders as a LoRA of rank in/group_size
whose A is the 0/1 pooling matrix. C is computed in float64 and rounded once to float32; with scale and min that float16
holds it is nearly always exact, and `Residual.exact` says whether it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qalora.devices import double
from qalora.tensor import GroupQuantTensor

__all__ = ["Residual", "from_residual", "to_residual"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Residual:
    """zero uint8 [out, groups], in 0..2**bits-1; c float32 [out, groups]; exact: whether no bit of C was rounded."""

    zero: Tensor
    c: Tensor
    exact: bool


def to_residual(tensor: GroupQuantTensor, zeros: Literal["nearest", "symmetric"]) -> Residual:
    """Choose integer zeros, the nearest to -min/scale or 2**(bits-1) everywhere, and give what is left over."""
    scale, minimum = double(tensor.scale), double(tensor.min)
    middle = 1 << (tensor.bits - 1)
    if zeros == "symmetric":
        whole = torch.full(scale.shape, middle, dtype=torch.uint8)
        exact_c = minimum.add_(scale, alpha=middle)  # the product is exact: a power of two
    else:
        safe = torch.where(scale == 0, 1.0, scale)
        zero = torch.round(-minimum / safe).clamp(0, (1 << tensor.bits) - 1)
        zero = torch.where(scale == 0, float(middle), zero)
        whole, exact_c = zero.to(torch.uint8), minimum + scale * zero
    c = exact_c.float()
    exact, device = torch.equal(c.double(), exact_c), tensor.min.device
    return Residual(zero=whole.to(device), c=c.to(device), exact=exact)


def from_residual(scale: Tensor, zero: Tensor, c: Tensor) -> Tensor:
    """min = C - scale * z, float32 [out, groups]; the inverse of `to_residual` where that was exact."""
    return (c.double() - scale.double() * zero.double()).float()
