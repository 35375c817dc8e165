"""The linear layer that is trained: it computes with the weights that will be shipped.

    min' = round(min + factor * B @ A)          qalora.folding.folded_minima, to the bit
    W'   = scale * codes + min'                 y = x @ W'^T

The gradient passes straight through the rounding, and needs no weight but W':

    grad_x = grad_y @ W'                        grad_M = grad_y^T @ pool(x)      [out, in/pool_size]
    grad_B = factor * grad_M @ A^T              grad_A = factor * B^T @ grad_M

pool(x) is the sum of x over each pool. The codes stay packed: W' lives while a layer computes, in the forward and again
in the backward, which keeps only pool(x) [tokens, in/pool_size].

With bfloat16 activations the same folded minima, rounded as they will be shipped, enter the products in another way:
W' is the base W = scale * codes + min plus what the fold added to each group, and one product takes both:

    y = [x | pool(x)] @ [bf16(W) | bf16(min' - min)]^T
    grad_x = grad_y @ bf16(W) + unpool(grad_y @ bf16(min' - min))

pool(x) is here over the groups after the fold, unpool repeats a group's number for its columns. bfloat16 has 8 bits, so
that a number moves by 2^-8 of itself at most when it is rounded; sums are float32 in the kernels, and y is rounded at
the end. So the trained model is the folded model with base weights that are rounded to bfloat16, as in any training in
bfloat16, and not what the fold adds: the change is rounded by itself, and not lost beside a larger number. grad_M,
grad_A and grad_B are float32 products of bfloat16 numbers. [W | min' - min] is made once after `keep_weights`, and its
last columns again when the adapter has changed; else it is made of the packed codes at each use, to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qalora.adapter import AdapterLayer
from qalora.errors import AdapterError
from qalora.folding import check_pool, folded_minima
from qalora.fused import dequantize
from qalora.tensor import GroupQuantTensor

__all__ = ["FoldedLinear", "folded_size", "keep_weights", "uniform_rows"]


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
        self._wide: Tensor | None = None
        self._change: tuple[tuple[int, int], Tensor] | None = None

    def start_from(self, a: Tensor) -> None:
        """New parameters, of A's rank: this A [rank, in/pool_size], and B of zeros."""
        device = self.packed.device
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(self.out_features, a.shape[0], device=device))
        self._change = None

    def gather(self) -> Tensor:
        """Zeros [out, in/pool_size] to which backwards from now on add the gradient of B @ A, as `gathered`."""
        self.gathered = found = torch.zeros(self.out_features, self.a.shape[1], device=self.packed.device)
        return found

    def folded(self) -> Tensor:
        """min' in float32 [out, in/group_size], rounded; the base's without `trained`."""
        if not self.trained:
            return self.minimum
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

    def wide_weight(self) -> Tensor:
        """[bf16(W) | bf16(min' - min)] in bfloat16 [out, in + in/group_size]; without `trained`, bf16(W) alone."""
        kept = self._wide is not None
        wide = self._wide if self._wide is not None else self._new_wide()
        if self.trained:
            version = (self.a._version, self.b._version)
            if self._change is None or self._change[0] != version:
                self._change, kept = (version, self._new_change()), False
            if not kept:
                wide[:, self.in_features :] = self._change[1]
        return wide

    def _wide_size(self) -> tuple[int, int]:
        groups = self.in_features // self.group_size if self.trained else 0
        return self.out_features, self.in_features + groups

    def _new_wide(self) -> Tensor:
        wide = torch.empty(self._wide_size(), dtype=torch.bfloat16, device=self.packed.device)
        return self._fill(wide)

    def _fill(self, wide: Tensor) -> Tensor:
        dequantize(self.packed, self.scale, self.minimum, self.bits, out=wide[:, : self.in_features])
        return wide

    def _new_change(self) -> Tensor:
        minimum = self.minimum
        if self.group_size != self.base_group_size:
            minimum = minimum.repeat_interleave(self.base_group_size // self.group_size, dim=1)
        return self.folded().sub_(minimum).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], float32 or bfloat16."""
        function = _Folded if x.dtype == torch.float32 else _Wide
        y: Tensor = function.apply(x, self.a, self.b, self)  # type: ignore[no-untyped-call]
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


def uniform_rows(rank: int, pools: int, rng: torch.Generator) -> Tensor:
    """A as LoRA starts it: float32 [rank, pools], uniform in +-1/sqrt(pools)."""
    rows = torch.rand(rank, pools, generator=rng) * 2 - 1
    return rows.div_(pools**0.5)


def keep_weights(layers: Sequence[FoldedLinear]) -> None:
    """Make the bfloat16 weights of all layers once, in one piece of memory: among others' they would leave gaps."""
    sizes = [layer._wide_size() for layer in layers]
    device = layers[0].packed.device
    whole = torch.empty(sum(out * columns for out, columns in sizes), dtype=torch.bfloat16, device=device)
    parts = torch.split(whole, [out * columns for out, columns in sizes])
    for layer, part, size in zip(layers, parts, sizes, strict=True):
        layer._wide = layer._fill(part.view(size))


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


class _Wide(torch.autograd.Function):
    """The formulas for bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: FoldedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if layer.trained:
            pooled = rows.reshape(rows.shape[0], -1, layer.group_size).sum(dim=2, dtype=torch.float32)
            rows = torch.cat((rows, pooled.to(x.dtype)), dim=1)
            if layer.pool_size != layer.group_size:
                pooled = pooled.view(pooled.shape[0], a.shape[1], -1).sum(dim=2)
            ctx.save_for_backward(pooled, a, b)
        return nn.functional.linear(rows, layer.wide_weight(), bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        layer: FoldedLinear = ctx.layer
        grad_y = grads[0].reshape(-1, layer.out_features)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ layer.wide_weight()
            if layer.trained:
                columns = grad_x[:, : layer.in_features].view(grad_y.shape[0], -1, layer.group_size)
                grad_x = columns + grad_x[:, layer.in_features :, None]
            grad_x = grad_x.reshape(*grads[0].shape[:-1], layer.in_features)
        if layer.trained:
            pooled, a, b = ctx.saved_tensors
            grad_m = (pooled.t() @ grad_y.float()).mul_(layer.factor)  # [in/pool_size, out], the transposed
            if layer.gathered is not None:
                layer.gathered += grad_m.t()
            grad_a, grad_b = (grad_m @ b).t(), grad_m.t() @ a.t()
        return grad_x, grad_a, grad_b, None
