"""The linear layer that is trained: it computes with the weights that will be shipped.

    min' = round(min + factor * B @ A)          qalora.folding.folded_minima, to the bit
    W'   = scale * codes + min'                 y = x @ W'^T

The gradient passes straight through the rounding, and needs no weight but W':

    grad_x = grad_y @ W'                        grad_M = grad_y^T @ pool(x)      [out, in/pool_size]
    grad_B = factor * grad_M @ A^T              grad_A = factor * B^T @ grad_M

pool(x) is the sum of x over each pool. The codes stay packed: W' lives while a layer computes, in the forward and again
in the backward, which keeps only pool(x) [tokens, in/pool_size].

This is the exact forward: the weights are those of the folded model, bit for bit. Held-out losses are computed by it,
and a training whose base stays packed. `qalora.training.fast` has the products of every other training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from qalora.adapter import AdapterLayer
from qalora.errors import AdapterError
from qalora.folding import check_pool, folded_minima
from qalora.fused import dequantize
from qalora.tensor import GroupQuantTensor

if TYPE_CHECKING:
    from qalora.training.fast import SharedInput

__all__ = ["FoldedLinear", "folded_changes", "folded_size", "uniform_rows"]


class FoldedLinear(nn.Module):
    """A quantized linear layer with an adapter in its minima.

    a  float32 [rank, in/pool_size], uniform in +-1/sqrt(in/pool_size), as LoRA's is; `start_from` gives others
    b  float32 [out, rank], zeros; without `trained` both are zeros of rank 1, frozen, and the minima are not rounded:
       the base's layer, packed, whatever the pool is

    Raises AdapterError for a pool that neither divides the group nor is a multiple of it, or does not divide `in`.
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
        pool_size = pool_size if trained else tensor.group_size
        (out, columns), pools = tensor.shape, tensor.shape[1] // pool_size
        self.group_size = folded_size(name, columns, tensor.group_size, pool_size)
        self.base_group_size, self.pool_size = tensor.group_size, pool_size
        self.bits, self.factor, self.minima = tensor.bits, factor, minima
        for key, value in (("packed", tensor.packed), ("scale", tensor.scale), ("minimum", tensor.min)):
            self.register_buffer(key, value, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        a = uniform_rows(rank, pools, rng) if trained else torch.zeros(1, pools)
        self.a = nn.Parameter(a, requires_grad=trained)
        self.b = nn.Parameter(torch.zeros(out, a.shape[0]), requires_grad=trained)
        self.in_features, self.out_features = columns, out
        self.trained = trained
        self.gathered: Tensor | None = None
        self.shared: SharedInput | None = None

    def start_from(self, a: Tensor) -> None:
        """New parameters, of A's rank: this A [rank, in/pool_size], and B of zeros."""
        device = self.packed.device
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(self.out_features, a.shape[0], device=device))

    def gather(self) -> Tensor:
        """Zeros [out, in/pool_size] to which backwards from now on add the gradient of B @ A, as `gathered`."""
        self.gathered = total = torch.zeros(self.out_features, self.a.shape[1], device=self.packed.device)
        return total

    def folded(self) -> Tensor:
        """min' in float32 [out, in/group_size], rounded; the base's without `trained`."""
        if not self.trained:
            return self.minimum
        return self.fold(self.minimum, self.a.detach(), self.b.detach())

    def fold(self, minimum: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """min' of other parameters of this form, or of several layers', as `folded_minima` has it."""
        return folded_minima(
            minimum,
            a,
            b,
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
        """[..., in] -> [..., out]. By what `share_inputs` gave it, where a backward follows; else the exact forward."""
        if self.shared is not None and torch.is_grad_enabled():
            return self.shared.output(self, x)
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


def folded_changes(layers: Sequence[FoldedLinear]) -> Tensor:
    """min' - min of layers of one form, float32 [layers, out, in/group_size]."""
    minimum, a, b = (torch.stack(parts) for parts in zip(*((one.minimum, one.a, one.b) for one in layers), strict=True))
    folded = layers[0].fold(minimum, a, b)
    return folded.sub_(minimum.repeat_interleave(folded.shape[2] // minimum.shape[2], dim=2))


def uniform_rows(rank: int, pools: int, rng: torch.Generator) -> Tensor:
    """A as LoRA starts it: float32 [rank, pools], uniform in +-1/sqrt(pools)."""
    rows = torch.rand(rank, pools, generator=rng) * 2 - 1
    return rows.div_(pools**0.5)


def folded_size(name: str, columns: int, group_size: int, pool_size: int) -> int:
    """The group size after the fold; AdapterError for a pool that cannot be folded into these groups."""
    if columns % pool_size:
        raise AdapterError(f"{name}: pool_size", expected=f"a divisor of in = {columns}", got=str(pool_size))
    return check_pool(group_size, pool_size, name)


class _Folded(torch.autograd.Function):
    """The formulas of the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: FoldedLinear) -> Tensor:
        if layer.trained:
            pooled = x.reshape(-1, a.shape[1], layer.pool_size).sum(dim=2)
            ctx.save_for_backward(pooled, a, b)
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad_y,) = grads
        layer: FoldedLinear = ctx.layer
        grad_x = grad_y @ layer.weight() if ctx.needs_input_grad[0] else None
        if not layer.trained:
            return grad_x, None, None, None
        pooled, a, b = ctx.saved_tensors
        grad_m = layer.factor * (grad_y.reshape(-1, b.shape[0]).t() @ pooled)
        if layer.gathered is not None:
            layer.gathered += grad_m
        return grad_x, b.t() @ grad_m, grad_m @ a.t(), None
