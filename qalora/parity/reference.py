"""The reference: what the base, the adapted and the folded model compute, in float32 torch, a layer at a time.

The adapted forward is the one the adapter was trained with, and is computed here from base, A and B by code that is
not the fold's, since it is what the fold is judged by:

    rounded   y = x W^T,  W[o, i] = scale[o, i//g] * codes[o, i] + m(min[o, i//g] + factor * (B @ A)[o, i//p])
              m rounds to the minima's dtype, float16 or float32; the sum is computed in float64
    side      y = x W0^T + factor * (pool(x) A^T) B^T,  W0 the base's weight, pool(x) the sum over p columns

A runtime that rounds inside its kernels is judged against the same forward with the same rounding
(`qalora.parity.roundings`), so that a bound is a measurement of that rounding and not a number that happened to pass.
Float32's own noise is measured too: the same forward with the columns of every linear layer summed in another order.

Only the packed codes are kept; a layer's float weight lives while the layer computes. Where memory is too short even
for the codes, each layer reads them anew at every pass. On a device other than the CPU, embedding, norms and output
layer stay there, the codes of a layer come when it computes, and what float64 decides is decided on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from qalora.adapter import Adapter, AdapterLayer
from qalora.checkpoint import Checkpoint, LazyTensor, cache_bytes
from qalora.devices import CPU
from qalora.options.words import Minima
from qalora.parity.memory import available_memory
from qalora.parity.roundings import EXACT, Rounding, product, q8_input, side_branch
from qalora.parity.runtimes.padding import pad, unpad
from qalora.tensor import GroupQuantTensor

__all__ = ["ExactMinima", "Forward", "Reference", "exact_minima", "rounded_minima", "with_minima"]


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


ExactMinima = tuple[Tensor, Tensor, int]
"""(min + factor * B @ A, |min| + |factor| * |B| @ |A|, group size), float64, in the groups of both."""


def exact_minima(tensor: GroupQuantTensor, layer: AdapterLayer) -> ExactMinima:
    """What the minima of a tensor are with the adapter, before any rounding."""
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
    return with_minima(tensor, whole, fine, minima)


def with_minima(tensor: GroupQuantTensor, whole: Tensor, group_size: int, minima: Minima) -> GroupQuantTensor:
    """A tensor in finer groups with minima that are given in float64, rounded once."""
    minimum = _nearest_float16(whole) if minima == "float16" else whole.float()
    times = tensor.group_size // group_size
    scale = tensor.scale if times == 1 else tensor.scale.repeat_interleave(times, dim=1)
    return replace(tensor, scale=scale, min=minimum, group_size=group_size)


def _nearest_float16(values: Tensor) -> Tensor:
    """The nearest float16 of a float64 in one rounding; `Tensor.half()` goes by way of float32 and rounds twice."""
    return torch.from_numpy(values.numpy().astype(np.float16)).float()


class _Linear(nn.Module):
    """A linear layer that computes whatever the setting says; only a quantized one can have an adapter."""

    def __init__(
        self,
        setting: _Setting,
        weight: Callable[[], GroupQuantTensor | Tensor],
        layer: AdapterLayer | None,
        bias: Tensor | None,
        *,
        keep: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._setting = setting
        self._rounded: dict[Minima, GroupQuantTensor] = {}
        self._keep = keep
        self._weight = weight
        self._layer = layer
        self._bias = None if bias is None else bias.to(device)
        self._device = device

    def forward(self, x: Tensor) -> Tensor:
        setting, tensor, layer = self._setting.forward, self._weight(), self._layer
        minima: Minima | None = setting.weights if setting.weights in ("float16", "float32") else None
        if minima is not None and layer is not None and isinstance(tensor, GroupQuantTensor):
            tensor = self._folded(tensor, layer, minima)
        y = product(x, tensor.to(self._device), setting.rounding, permuted=setting.permuted)
        if layer is not None and setting.weights == "side":
            here = replace(layer, a=layer.a.to(self._device), b=layer.b.to(self._device))
            y = y + side_branch(x, here, setting.rounding)
        return y if self._bias is None else y + self._bias

    def _folded(self, tensor: GroupQuantTensor, layer: AdapterLayer, minima: Minima) -> GroupQuantTensor:
        if minima in self._rounded:
            return self._rounded[minima]
        result = rounded_minima(tensor, layer, minima)
        if self._keep:
            self._rounded[minima] = result
        return result


class Reference:
    """A model whose linear layers compute any `Forward`.

    memory  bytes that there are, what the system says by default; `streamed` says whether that was too little to keep
            the codes, with as much again for everything else
    device  where it computes; what comes out lies on the CPU
    """

    def __init__(
        self,
        model: Checkpoint,
        adapter: Adapter | None = None,
        *,
        memory: int | None = None,
        device: torch.device = CPU,
    ) -> None:
        from qalora.converters import torch_module

        self._setting, self.device = _Setting(), device
        layers = {} if adapter is None else adapter.layers

        self.streamed = 2 * cache_bytes(model) > (available_memory() if memory is None else memory)

        def linear(path: str, weight: LazyTensor, bias: Tensor | None) -> nn.Module:
            def read() -> GroupQuantTensor | Tensor:
                tensor = weight.load()
                return tensor.float() if isinstance(tensor, Tensor) else tensor

            weight_in_memory = None if self.streamed else read()
            weights = read if weight_in_memory is None else lambda: weight_in_memory
            keep = not self.streamed
            return _Linear(self._setting, weights, layers.get(path), bias, keep=keep, device=device)

        self._module = torch_module.build(model, linear).to(device)
        self._quantized_head = model.tensors.get("lm_head.weight", model.tensors["model.embed_tokens.weight"])
        self._module.lm_head.register_forward_pre_hook(self._round_head_input)
        self._module.lm_head.register_forward_hook(self._round_head_weight)

    def _round_head_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """llama.cpp rounds the output layer's input too: to int8 where its weight is quantized, or to float16."""
        if self._setting.forward.rounding.kind != "q8":
            return None
        (x,) = inputs
        if self._quantized_head.spec is not None:
            return (q8_input(x),)
        return (x.half().float(),) if self._quantized_head.dtype == torch.float16 else None

    def _round_head_weight(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """GPTQ's kernels round an output layer in words as any other: scale * (code - zero) to float16."""
        if not self._setting.forward.rounding.head:
            return None
        weight = module.get_parameter("weight")
        return nn.functional.linear(inputs[0], weight.half().to(weight.dtype))

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        rows: int = self._module.lm_head.weight.shape[0]
        return rows

    def logits(self, tokens: Sequence[int], forward: Forward) -> Tensor:
        """float32 [tokens, vocabulary]."""
        return self.batch([tokens], forward)[0]

    @torch.inference_mode()
    def batch(self, sequences: Sequence[Sequence[int]], forward: Forward) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence; a layer's weight is dequantized once for all of them.

        Shorter ones are filled up on the right, which no token before it sees.
        """
        self._setting.forward = forward
        ids, _ = pad(sequences, "right")
        out: Tensor = self._module(input_ids=ids.to(self.device), use_cache=False).logits.to(CPU)
        return [row.float() for row in unpad(out, sequences, "right")]

    def layers(self, tokens: Sequence[int], forward: Forward) -> list[Tensor]:
        """float32 [tokens, hidden] after each layer."""
        from qalora.converters.torch_module import layer_outputs

        self._setting.forward = forward
        return layer_outputs(self._module, tokens)
