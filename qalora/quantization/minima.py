"""Minima from a layer's inputs: they are real numbers that cost nothing at run time, so they can be fitted.

With V = scale * codes + min, P x the sums of the inputs over each group's columns, and H = mean(x x^T):

    mean |(W - V) x - D P x|^2  is least for  D = (W - V) H P^T (P H P^T)^-1

and min + D is what the minima should be, codes and scales untouched. P H P^T is the pooled inputs' covariance.

Rounding to float16 then leaves errors that need not add up: group by group, in GPTQ's way, what is left over from one
is pushed onto the next through that covariance. Each minimum stays one of the two float16 neighbours of its own exact
value, less than one ULP away.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qalora.devices import double
from qalora.errors import InputError
from qalora.folding import FLOAT16_MAX
from qalora.tensor import GroupQuantTensor

__all__ = ["fit_minima", "next_float16", "pooled_covariance", "round_with_feedback"]

RIDGE = 1e-4
"""Share of the pooled covariance's mean diagonal that is added to it."""


def pooled_covariance(hessian: Tensor, group_size: int) -> Tensor:
    """P H P^T in float64 [groups, groups], of H [in, in]."""
    groups = hessian.shape[0] // group_size
    return double(hessian).view(groups, group_size, groups, group_size).sum(dim=(1, 3))


def fit_minima(tensor: GroupQuantTensor, weight: Tensor, hessian: Tensor, *, ridge: float = RIDGE) -> GroupQuantTensor:
    """The tensor with the minima that make its outputs closest to those of `weight` [out, in]; codes and scale as is.

    hessian  float [in, in], mean(x x^T) of the layer's inputs

    The result's zero points are real numbers, its minima are float16 values; InputError where those do not reach.
    """
    size, out = tensor.group_size, tensor.shape[0]
    left = double(weight) - double(tensor.dequantize())
    pulled = (left @ double(hessian)).view(out, tensor.groups, size).sum(dim=2)
    covariance = pooled_covariance(hessian, size)
    mean = float(covariance.diagonal().mean())
    covariance.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    change = torch.linalg.solve(covariance, pulled.t()).t()
    optimum = double(tensor.min) + change
    if not bool((optimum.abs() <= FLOAT16_MAX).all()):
        raise InputError(
            "fitted minima",
            expected="values that float16 reaches",
            got=f"{float(optimum.abs().max()):g}",
            todo="leave out `fit_minima`",
        )
    return replace(tensor, min=round_with_feedback(optimum, covariance).to(tensor.min.device))


def round_with_feedback(values: Tensor, covariance: Tensor) -> Tensor:
    """float32 [out, groups] of float16 values: each of the two neighbours of values[o, k], chosen so that the errors
    make up for one another in inputs of this covariance (float64 [groups, groups], positive definite).

    values  float64 [out, groups], within float16's range
    """
    below = _neighbour(values, up=False)
    above = _neighbour(values, up=True)
    targets = values.t().contiguous()
    result = torch.empty_like(targets)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance.double()))
    factor = torch.linalg.cholesky(inverse, upper=True)
    low, high = below.t().contiguous(), above.t().contiguous()
    for k in range(targets.shape[0]):
        result[k] = torch.where((targets[k] - low[k]).abs() <= (high[k] - targets[k]).abs(), low[k], high[k])
        error = (targets[k] - result[k]) / factor[k, k]
        targets[k + 1 :].addr_(factor[k, k + 1 :], error, alpha=-1)
    return result.t().float().contiguous()


def _neighbour(values: Tensor, *, up: bool) -> Tensor:
    """The float16 value at or next below (above) each float64 value, as float64."""
    near = values.to(torch.float16)
    beyond = near.double() > values if not up else near.double() < values
    return torch.where(beyond, next_float16(near, up=up), near).double()


def next_float16(values: Tensor, *, up: bool) -> Tensor:
    """The float16 value next above (below) each finite one, by its bits: torch.nextafter is not on every device."""
    signed = values.view(torch.int16)
    step = torch.where((values < 0) == up, -1, 1).to(torch.int16)  # towards zero, or away from it
    least = 1 if up else -0x7FFF
    return torch.where(values == 0, least, signed + step).to(torch.int16).view(torch.float16)
