"""The linear layer that is trained: it computes with the weights that will be shipped.

    min' = round(min + factor * B @ A)          qalora.folding.folded_minima, to the bit
    W'   = scale * codes + min'                 y = x @ W'^T

The gradient passes straight through the rounding, and needs no weight but W':

    grad_x = grad_y @ W'                        grad_M = grad_y^T @ pool(x)      [out, in/pool_size]
    grad_B = factor * grad_M @ A^T              grad_A = factor * B^T @ grad_M

pool(x) is the sum of x over each pool. The codes stay packed: W' lives while a layer computes, in the forward and again
in the backward, which keeps only pool(x) [tokens, in/pool_size].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qalora.adapter import AdapterLayer
from qalora.errors import AdapterError
from qalora.folding import folded_group_size, folded_minima
from qalora.tensor import GroupQuantTensor, dequantize

__all__ = ["FoldedLinear", "check_pool"]


class FoldedLinear(nn.Module):
    """A quantized linear layer with an adapter in its minima.

    a  float32 [rank, in/pool_size], uniform in +-1/sqrt(in/pool_size), as LoRA's is
    b  float32 [out, rank], zeros; without `trained` both are zeros of rank 1, frozen: the base's layer, packed

    Raises AdapterError for a pool that neither divides the group nor is a multiple of it.
    """

    packed: Tensor
    scale: Tensor
    minimum: Tensor

    def __init__(
        self,
        tensor: GroupQuantTensor,
        bias: Tensor | None,
        *,
        name: str,
        rank: int,
        factor: float,
        pool_size: int,
        minima: Literal["float16", "float32"],
        rng: torch.Generator,
        trained: bool = True,
    ) -> None:
        super().__init__()
        (out, columns), pools = tensor.shape, tensor.shape[1] // pool_size
        self.group_size = check_pool(name, tensor.shape, tensor.group_size, pool_size)
        self.base_group_size, self.pool_size = tensor.group_size, pool_size
        self.bits, self.factor, self.minima = tensor.bits, factor, minima
        for key, value in (("packed", tensor.packed), ("scale", tensor.scale), ("minimum", tensor.min)):
            self.register_buffer(key, value, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        a = (torch.rand(rank, pools, generator=rng) * 2 - 1) / pools**0.5 if trained else torch.zeros(1, pools)
        self.a = nn.Parameter(a, requires_grad=trained)
        self.b = nn.Parameter(torch.zeros(out, a.shape[0]), requires_grad=trained)
        self.in_features, self.out_features = columns, out

    def folded(self) -> Tensor:
        """min' in float32 [out, in/group_size], rounded."""
        return folded_minima(
            self.minimum,
            self.a.detach(),
            self.b.detach(),
            self.factor,
            group_size=self.base_group_size,
            pool_size=self.pool_size,
            minima=self.minima,
        )

    def weight(self) -> Tensor:
        """W' in float32 [out, in]: the folded layer's weight, bit for bit."""
        scale = self.scale
        if self.group_size != self.base_group_size:
            scale = scale.repeat_interleave(self.base_group_size // self.group_size, dim=1)
        return dequantize(self.packed, scale, self.folded(), self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in] -> [..., out]."""
        y: Tensor = _Folded.apply(x, self.a, self.b, self)  # type: ignore[no-untyped-call]
        return y

    def adapter_layer(self) -> AdapterLayer:
        """What was learned, in the paper's convention, where the scaling is the factor."""
        return AdapterLayer(
            a=self.a.detach().cpu().clone(),
            b=self.b.detach().cpu().clone(),
            pool_size=self.pool_size,
            scaling=self.factor,
            factor=self.factor,
        )


def check_pool(name: str, shape: tuple[int, ...], group_size: int, pool_size: int) -> int:
    """The group size after the fold; AdapterError for a pool that cannot be folded into these groups."""
    if shape[1] % pool_size:
        raise AdapterError(f"{name}: pool_size", expected=f"a divisor of in = {shape[1]}", got=str(pool_size))
    a, b = torch.zeros(1, shape[1] // pool_size), torch.zeros(shape[0], 1)
    probe = AdapterLayer(a=a, b=b, pool_size=pool_size, scaling=1.0, factor=1.0)
    return folded_group_size(group_size, probe, name)


class _Folded(torch.autograd.Function):
    """The formulas of the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: FoldedLinear) -> Tensor:
        pooled = x.reshape(-1, a.shape[1], layer.pool_size).sum(dim=2)
        ctx.save_for_backward(pooled, a, b)
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        (grad_y,) = grads
        pooled, a, b = ctx.saved_tensors
        layer: FoldedLinear = ctx.layer
        grad_m = layer.factor * (grad_y.reshape(-1, b.shape[0]).t() @ pooled)
        grad_x = grad_y @ layer.weight() if ctx.needs_input_grad[0] else None
        return grad_x, b.t() @ grad_m, grad_m @ a.t(), None
