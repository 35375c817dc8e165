"""The reference: what the base, the adapted and the folded model compute, in float32 torch, a layer at a time.

The adapted forward is the one the adapter was trained with, and is computed here from base, A and B by code that is
not the fold's, since it is what the fold is judged by:

    rounded   y = x W^T,  W[o, i] = scale[o, i//g] * codes[o, i] + m(min[o, i//g] + factor * (B @ A)[o, i//p])
              m rounds to the minima's dtype, float16 or float32; the sum is computed in float64
    side      y = x W0^T + factor * (pool(x) A^T) B^T,  W0 the base's weight, pool(x) the sum over p columns

A runtime that rounds inside its kernels is judged against the same forward with the same rounding (`Rounding`), so
that a bound is a measurement of that rounding and not a number that happened to pass. Float32's own noise is measured
too: the same forward with the columns of every linear layer summed in another order.

Only the packed codes are kept; a layer's float weight lives while the layer computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qalora.adapter import Adapter, AdapterLayer
from qalora.checkpoint import Checkpoint
from qalora.residual import to_residual
from qalora.tensor import GroupQuantTensor

__all__ = ["EXACT", "Forward", "Reference", "Rounding", "exact_minima", "rounded_minima"]

Minima = Literal["float16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """What a runtime's kernels round beside float32's own summation.

    kind   "none"
           "weights": scale * (codes - zero) to float16, the residual in float32 (GPTQ kernels)
           "q8": the input to int8 in blocks of 32 columns, d = max|x|/127 in float16, and, where minima are stored,
           their factor d * sum(q) in float16 (llama.cpp's Q8_0 and Q8_1)
           "int8": the input to int8 in blocks of a group, d in float32 (MatMulNBits at accuracy level 4)
           "float16" or "bfloat16": input, weight and output to that dtype
    zeros  which integer zeros the "weights" kind subtracts: see `qalora.residual.to_residual`
    """

    kind: Literal["none", "weights", "q8", "int8", "float16", "bfloat16"] = "none"
    zeros: Literal["nearest", "symmetric"] = "nearest"


EXACT = Rounding()


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Which forward to compute.

    weights   "base", "side", or the dtype of the minima of the rounded one
    rounding  what the kernels round
    permuted  the columns of every linear layer are summed in another order
    """

    weights: Literal["base", "side", "float16", "float32"] = "base"
    rounding: Rounding = EXACT
    permuted: bool = False


class _Setting:
    """The forward that all layers of a model compute at the moment."""

    forward = Forward()


def exact_minima(tensor: GroupQuantTensor, layer: AdapterLayer) -> tuple[Tensor, Tensor, int]:
    """(min + factor * B @ A, |min| + |factor| * |B| @ |A|, group size), float64, in the groups of both."""
    fine = math.gcd(tensor.group_size, layer.pool_size)
    first = torch.arange(0, tensor.shape[1], fine)
    base = tensor.min.double()[:, first // tensor.group_size]
    a, b = layer.a.double(), layer.b.double()
    change = layer.factor * (b @ a)
    size = abs(layer.factor) * (b.abs() @ a.abs())
    pools = first // layer.pool_size
    return base + change[:, pools], base.abs() + size[:, pools], fine


def rounded_minima(tensor: GroupQuantTensor, layer: AdapterLayer, minima: Minima) -> GroupQuantTensor:
    """The weight of the "rounded" forward: the codes as they are, the minima rounded once."""
    whole, _, fine = exact_minima(tensor, layer)
    kept = _nearest_float16(whole) if minima == "float16" else whole.float()
    scale = tensor.scale.repeat_interleave(tensor.group_size // fine, dim=1)
    return replace(tensor, scale=scale, min=kept, group_size=fine)


def _nearest_float16(values: Tensor) -> Tensor:
    """The nearest float16 of a float64 in one rounding; `Tensor.half()` goes by way of float32 and rounds twice."""
    return torch.from_numpy(values.numpy().astype(np.float16)).float()


class _Linear(nn.Module):
    """A quantized linear layer that computes whatever the setting says."""

    def __init__(
        self, setting: _Setting, tensor: GroupQuantTensor, layer: AdapterLayer | None, bias: Tensor | None
    ) -> None:
        super().__init__()
        self._setting = setting
        self._base = tensor
        self._layer = layer
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        setting, tensor, layer = self._setting.forward, self._base, self._layer
        if layer is not None and (setting.weights == "float16" or setting.weights == "float32"):
            tensor = rounded_minima(tensor, layer, setting.weights)
        y = _product(x, tensor, setting)
        if layer is not None and setting.weights == "side":
            pooled = x.unflatten(-1, (-1, layer.pool_size)).sum(dim=-1)
            y = y + layer.factor * functional.linear(functional.linear(pooled, layer.a), layer.b)
        return y if self._bias is None else y + self._bias


def _product(x: Tensor, tensor: GroupQuantTensor, forward: Forward) -> Tensor:
    kind = forward.rounding.kind
    if kind == "none":
        weight = tensor.dequantize()
        if forward.permuted:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
            return functional.linear(x[..., order], weight[:, order])
        return functional.linear(x, weight)
    if kind in ("float16", "bfloat16"):
        dtype = torch.float16 if kind == "float16" else torch.bfloat16
        return functional.linear(_via(x, dtype), _via(tensor.dequantize(), dtype)).to(dtype).float()
    if kind == "q8":
        return _q8_product(x, tensor)
    return _residual_product(x, tensor, forward.rounding)


def _via(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).float()


def _residual_product(x: Tensor, tensor: GroupQuantTensor, rounding: Rounding) -> Tensor:
    """Q(x; codes, scale, z) + pool(x) C^T, with Q's weight or input rounded."""
    held = to_residual(tensor, rounding.zeros)
    centred = replace(tensor, min=-tensor.scale * held.zero)
    weight = centred.dequantize()
    if rounding.kind == "weights":
        quantized = functional.linear(x, _via(weight, torch.float16))
    else:
        quantized = functional.linear(_int8(x, tensor.group_size, torch.float32), weight)
    if not bool(held.c.any()):
        return quantized
    grouped = _pool(x, tensor)
    return quantized + functional.linear(grouped, held.c)


def _pool(x: Tensor, tensor: GroupQuantTensor) -> Tensor:
    if tensor.g_idx is None:
        return x.unflatten(-1, (-1, tensor.group_size)).sum(dim=-1)
    pooled = torch.zeros(*x.shape[:-1], tensor.groups)
    return pooled.index_add(-1, tensor.g_idx.long(), x)


def _q8_product(x: Tensor, tensor: GroupQuantTensor) -> Tensor:
    block = 32
    coarse = _int8(x, block, torch.float16)
    y = functional.linear(coarse, tensor.dequantize())
    sums = coarse.unflatten(-1, (-1, block)).sum(dim=-1)
    lost_sums = _via(sums, torch.float16) - sums
    if tensor.g_idx is not None or tensor.group_size % block:
        return y
    return y + functional.linear(lost_sums, tensor.min.repeat_interleave(tensor.group_size // block, dim=1))


def _int8(x: Tensor, block: int, scale_dtype: torch.dtype) -> Tensor:
    """x rounded to int8 times a scale for each block of columns, max|x|/127."""
    if x.shape[-1] % block:
        return x
    blocks = x.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    codes = torch.round(blocks / torch.where(scale == 0, 1.0, scale))
    return (codes * _via(scale, scale_dtype)).flatten(-2)


class Reference:
    """A model whose linear layers compute any `Forward`."""

    def __init__(self, model: Checkpoint, adapter: Adapter | None = None) -> None:
        from qalora.converters import torch_module

        self._setting = _Setting()
        layers = {} if adapter is None else adapter.layers
        self._module = torch_module.build(model)
        for name in model.linears:
            lazy, path = model.tensors[name], name.removesuffix(".weight")
            if lazy.spec is not None:
                bias = model.tensors.get(f"{path}.bias")
                linear = _Linear(
                    self._setting,
                    lazy.load_quantized(),
                    layers.get(path),
                    None if bias is None else bias.load_float().float(),
                )
                self._module.set_submodule(path, linear)
        self._quantized_head = model.tensors.get("lm_head.weight", model.tensors["model.embed_tokens.weight"])
        self._module.lm_head.register_forward_pre_hook(self._round_head_input)
        self._module.eval()

    def _round_head_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """llama.cpp rounds the output layer's input too: to int8 where its weight is quantized, or to float16."""
        if self._setting.forward.rounding.kind != "q8":
            return None
        (x,) = inputs
        if self._quantized_head.spec is not None:
            return (_int8(x, 32, torch.float16),)
        return (_via(x, torch.float16),) if self._quantized_head.dtype == torch.float16 else None

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], forward: Forward) -> Tensor:
        """float32 [tokens, vocabulary]."""
        self._setting.forward = forward
        out = self._module(input_ids=torch.tensor([list(tokens)]), use_cache=False)
        return out.logits[0].float()  # type: ignore[no-any-return]
