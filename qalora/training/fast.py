"""What layers multiply in a training step: the base's weights, made once, and what the fold adds, beside them.

Layers that are given the same input (q, k and v; gate and up) are one product:

    y = [x | pool(x)] @ [W | min' - min]^T            W = scale * codes + min, the base's, float32 or bfloat16
    grad_x = grad_y @ W + unpool(grad_y @ (min' - min))
    grad_M = grad_y^T @ pool(x)                       and grad_A, grad_B of each layer as in `qalora.training.layer`

pool(x) is here over the groups after the fold, and unpool repeats a group's number for its columns. In exact arithmetic
this is x @ W'^T of the folded weight W', since min' - min is the same in all columns of a group. min' are the folded
minima, rounded as they will be shipped; they are made by `refresh`, once for each optimizer step.

float32     y differs from that of the folded weight by rounding alone: W, min' - min, pool(x) and sums have 24 bits
bfloat16    W, min' - min, pool(x), y and grad_M are rounded to 8 bits, by 2^-8 of themselves at most; sums are float32
            in the kernels. The base is rounded, as in any training in bfloat16, and not what the fold adds: that is
            rounded by itself, and not lost beside a larger number. grad_A and grad_B are float32 products
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qalora.fused import dequantize
from qalora.training.layer import FoldedLinear, folded_changes

__all__ = ["SharedInput", "refresh", "share_inputs"]

ALIGNED = {torch.float32: 1, torch.bfloat16: 32}
"""Columns of a weight are a multiple of this: bfloat16 kernels take up to twice as long for others."""


class SharedInput:
    """Layers that are given the same input, as one product.

    weight  [sum of out, columns]: W, then min' - min, then zeros up to a multiple of `ALIGNED`; min' - min is of
            the parameters at the last `refresh`
    added   the columns of min' - min
    """

    def __init__(self, layers: Sequence[FoldedLinear], dtype: torch.dtype) -> None:
        first = layers[0]
        self.layers, self.dtype, self.trained = tuple(layers), dtype, first.trained
        self.inner, self.group_size, self.pool_size = first.in_features, first.group_size, first.pool_size
        end = self.inner + self.inner // self.group_size if self.trained else self.inner
        self.added = slice(self.inner, end)
        aligned = ALIGNED[dtype] if self.trained else 1
        self.columns = -(-end // aligned) * aligned
        self.outs = [layer.out_features for layer in layers]
        self.bias = _joined_bias(layers, dtype)
        self._kept: Tensor | None = None
        self._change: Tensor | None = None
        self._input: Tensor | None = None
        self._outputs: dict[FoldedLinear, Tensor] = {}

    @property
    def size(self) -> tuple[int, int]:
        """The shape of the weight."""
        return sum(self.outs), self.columns

    def keep(self, place: Tensor) -> None:
        """Make W once, in this memory of the weight's size and dtype."""
        self._kept = self._fill(place)

    def take(self, changes: Sequence[Tensor]) -> None:
        """Use these min' - min of the layers, float32 [out, groups], from now on."""
        if self._kept is None:
            self._change = torch.cat(tuple(changes)).to(self.dtype)
            return
        for rows, change in zip(torch.split(self._kept, self.outs), changes, strict=True):
            rows[:, self.added] = change

    def weight(self) -> Tensor:
        """The weight; made of the packed codes where it was not kept, to the same bits.

        Without a `refresh` so far min' - min are made too, of the parameters as they are now.
        """
        if self._kept is not None:
            return self._kept
        device = self.layers[0].packed.device
        filled = self._fill(torch.empty(self.size, dtype=self.dtype, device=device))
        if self.trained:
            filled[:, self.added] = self._changes() if self._change is None else self._change
        return filled

    def _changes(self) -> Tensor:
        return torch.cat([folded_changes([layer])[0] for layer in self.layers])

    def joined(self, rows: Tensor, pooled: Tensor) -> Tensor:
        """[x | pool(x) | zeros]."""
        place = rows.new_empty(len(rows), self.columns)
        place[:, : self.inner] = rows
        place[:, self.added] = pooled
        place[:, self.added.stop :] = 0
        return place

    def grad_x(self, parts: Sequence[Tensor]) -> Tensor:
        """[rows, in] of the gradients of y, [rows, out] for each layer."""
        weights = torch.split(self.weight(), self.outs)
        grad = parts[0] @ weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):  # one long sum takes twice as long in bfloat16
            grad.addmm_(part, weight)
        if not self.trained:
            return grad
        columns = grad[:, : self.inner].view(len(grad), -1, self.group_size)
        return (columns + grad[:, self.added, None]).view(len(grad), self.inner)

    def _fill(self, place: Tensor) -> Tensor:
        for rows, layer in zip(torch.split(place, self.outs), self.layers, strict=True):
            dequantize(layer.packed, layer.scale, layer.minimum, layer.bits, out=rows[:, : self.inner])
        place[:, self.inner :] = 0
        return place

    def output(self, layer: FoldedLinear, x: Tensor) -> Tensor:
        """y of one of the layers; those of the others wait for their call with the same x."""
        if self._input is not x or layer not in self._outputs:
            parameters = [part for one in self.layers for part in (one.a, one.b)]
            outputs = _Together.apply(x, self, *parameters)  # type: ignore[no-untyped-call]
            self._input, self._outputs = x, dict(zip(self.layers, outputs, strict=True))
        y = self._outputs.pop(layer)
        if not self._outputs:
            self._input = None
        return y


def share_inputs(layers: Iterable[tuple[str, FoldedLinear]], dtype: torch.dtype, *, keep: bool) -> list[SharedInput]:
    """Make the layers, by their module path, compute by this module; those that share an input do it together.

    keep  whether weights are made once, in one piece of memory (among others' they would leave gaps), or at each use
    """
    together: dict[object, list[FoldedLinear]] = {}
    for path, layer in layers:
        together.setdefault(_input_of(path, layer), []).append(layer)
    groups = [SharedInput(group, dtype) for group in together.values()]
    if keep:
        sizes = [out * columns for out, columns in (shared.size for shared in groups)]
        whole = torch.empty(sum(sizes), dtype=dtype, device=groups[0].layers[0].packed.device)
        for shared, place in zip(groups, torch.split(whole, sizes), strict=True):
            shared.keep(place.view(shared.size))
    for shared in groups:
        for layer in shared.layers:
            layer.shared = shared
    return groups


@torch.no_grad()
def refresh(inputs: Sequence[SharedInput]) -> None:
    """Take over the folded minima of all parameters as they are now, of several small layers of one form at a time."""
    forms: dict[object, list[FoldedLinear]] = {}
    for layer in (layer for shared in inputs if shared.trained for layer in shared.layers):
        forms.setdefault((layer.a.shape, layer.b.shape, layer.minimum.shape, layer.factor), []).append(layer)
    changes: dict[FoldedLinear, Tensor] = {}
    for layers in forms.values():
        several = max(1, AT_ONCE // (layers[0].out_features * layers[0].a.shape[1]))
        for first in range(0, len(layers), several):
            part = layers[first : first + several]
            changes.update(zip(part, folded_changes(part), strict=True))
    for shared in inputs:
        if shared.trained:
            shared.take([changes[layer] for layer in shared.layers])


AT_ONCE = 1 << 20
"""Numbers of B @ A that are folded together, at most: 8 MB."""

SHARING = {"q_proj": "q", "k_proj": "q", "v_proj": "q", "gate_proj": "gate", "up_proj": "gate"}
"""What transformers' decoders call the layers of one module that are given the same input."""


def _input_of(path: str, layer: FoldedLinear) -> object:
    """Equal for layers that can be one product."""
    module, _, name = path.rpartition(".")
    form = (layer.trained, layer.group_size, layer.pool_size, layer.factor, layer.bias is None)
    return (module, SHARING.get(name, name), *form)


def _joined_bias(layers: Sequence[FoldedLinear], dtype: torch.dtype) -> Tensor | None:
    parts = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return torch.cat(parts).to(dtype) if parts else None


class _Together(torch.autograd.Function):
    """The formulas of the module; parameters are A and B of each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedInput, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.shared = shared
        rows = x.reshape(-1, shared.inner)
        if shared.trained:
            pooled = rows.view(rows.shape[0], -1, shared.group_size).sum(dim=2)
            rows = shared.joined(rows, pooled)
            if shared.pool_size != shared.group_size:
                pooled = pooled.view(pooled.shape[0], -1, shared.pool_size // shared.group_size).sum(dim=2)
            ctx.save_for_backward(pooled, *parameters)
        y = torch.nn.functional.linear(rows, shared.weight(), shared.bias)
        return tuple(part.view(*x.shape[:-1], part.shape[1]) for part in torch.split(y, shared.outs, dim=1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shared: SharedInput = ctx.shared
        parts = [grad.reshape(-1, out) for grad, out in zip(grads, shared.outs, strict=True)]
        grad_x = shared.grad_x(parts).view(*grads[0].shape[:-1], shared.inner) if ctx.needs_input_grad[0] else None
        if not shared.trained:
            return grad_x, None, *(None for _ in shared.layers for _ in "ab")
        pooled, *parameters = ctx.saved_tensors
        adapter_grads: list[Tensor] = []
        for n, (layer, part) in enumerate(zip(shared.layers, parts, strict=True)):
            a, b = parameters[2 * n : 2 * n + 2]
            grad_m = (pooled.t() @ part).float().mul_(layer.factor)  # [in/pool_size, out], the transposed
            if layer.gathered is not None:
                layer.gathered += grad_m.t()
            adapter_grads += [(grad_m @ b).t(), grad_m.t() @ a.t()]
        return grad_x, None, *adapter_grads
