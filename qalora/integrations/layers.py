"""Modules that keep packed codes in memory and dequantize when they compute.

Their buffers have the names of our own folder, so that a state dict is the file: `codes` uint8 [out, in*bits/8],
`scale` [out, groups], `min` [out, groups] or `zero` uint8 [out, groups] (or neither, where one zero point serves all),
`g_idx` int32 [in]. scale and min stay in the dtype they are stored in, whatever dtype the model is loaded in
or cast to.

The weight is scale * codes + min in float32, rounded to the dtype of the input, and lives while the layer computes; the
backward pass makes it again. It is the weight of `GroupQuantTensor.dequantize`, bit for bit.

`QuantizedLinear` is an nn.Linear to others (PEFT puts a LoRA beside it), with a `weight` that is made when it is asked
for. What changes `weight.data`, as PEFT's merge does, would change a copy, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from qalora.errors import InputError
from qalora.fused import dequantize
from qalora.tensor import unpack_codes

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "ReadOnlyWeight", "TiedHead", "float_weight"]

Parts = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of each buffer."""


def float_weight(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    zero: Tensor | int | None,
    bits: int,
    g_idx: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight from the stored parts: min, or -scale * zero where `minimum` is None. float32, rounded to `dtype`."""
    wide = scale.float()
    low = minimum.float() if minimum is not None else -wide * (0 if zero is None else zero)
    if g_idx is None:
        shape = (codes.shape[0], codes.shape[1] * 8 // bits)
        out = None if dtype == torch.float32 else torch.empty(shape, dtype=dtype, device=codes.device)
        return dequantize(codes, wide, low, bits, out=out)
    index = g_idx.long()
    return (wide[:, index] * unpack_codes(codes, bits) + low[:, index]).to(dtype)


class ReadOnlyWeight(Tensor):
    """A dequantized weight in outsiders' hands. Operations give plain tensors; its `data` cannot be assigned."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The values, as a plain tensor."""
        return self.as_subclass(Tensor)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise InputError(
            "a layer of integers cannot take a merged weight: rounding it would lose the adapter",
            todo="fold a QA-LoRA adapter with qalora fold, keep a LoRA beside it, or call model.dequantize() first",
        )


def _add_parts(module: nn.Module, parts: Parts) -> None:
    for name in ("codes", "scale", "min", "zero", "g_idx"):
        dtype, shape = parts.get(name, (None, ()))
        module.register_buffer(name, None if dtype is None else torch.empty(shape, dtype=dtype, device="meta"))


class _Packed(nn.Module):
    """What keeps scale and min in their dtype: `model.to(dtype)` and `model.bfloat16()` would round them, and change
    the weights.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers[name] for name in ("scale", "min")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


class QuantizedLinear(_Packed, nn.Linear):
    """A linear layer of packed codes; `parts` are its buffers, made on the meta device and filled by a loader."""

    codes: Tensor
    scale: Tensor
    min: Tensor | None
    zero: Tensor | None
    g_idx: Tensor | None

    def __init__(self, parts: Parts, bits: int, zero_point: int | None, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        _add_parts(self, parts)
        self.bits, self.zero_point = bits, zero_point
        self.out_features = parts["codes"][1][0]
        self.in_features = parts["codes"][1][1] * 8 // bits
        self.register_parameter("bias", bias)
        self._is_hf_initialized = True  # transformers would fill what it takes for a missing weight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight in float32 [out, in], made anew."""
        return self.plain_weight().as_subclass(ReadOnlyWeight)

    def plain_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in float32 [out, in], rounded to `dtype`, as a plain tensor."""
        zero = self.zero if self.zero is not None else self.zero_point
        return float_weight(self.codes, self.scale, self.min, zero, self.bits, self.g_idx, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the input."""
        y: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """As nn.Linear prints itself, with bits."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """x W^T, W made when it is needed, forwards and backwards; the integers have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear | TiedHead) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.plain_weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.plain_weight(grad.dtype), None


class QuantizedEmbedding(_Packed, nn.Embedding):
    """An embedding of packed codes: the rows that are looked up are dequantized, to `dtype`.

    factor       what the rows are multiplied by, as Gemma's are; None for an ordinary embedding
    float_class  what it was before, and what it is again when the model is dequantized
    """

    codes: Tensor
    scale: Tensor
    min: Tensor | None
    zero: Tensor | None
    float_class: type[nn.Embedding] = nn.Embedding

    def __init__(
        self,
        parts: Parts,
        bits: int,
        zero_point: int | None,
        padding_idx: int | None,
        dtype: torch.dtype,
        factor: float | None = None,
    ) -> None:
        nn.Module.__init__(self)
        _add_parts(self, parts)
        self.bits, self.zero_point, self.dtype, self.factor = bits, zero_point, dtype, factor
        self.num_embeddings = parts["codes"][1][0]
        self.embedding_dim = parts["codes"][1][1] * 8 // bits
        self.padding_idx = padding_idx
        self._is_hf_initialized = True

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The whole table in float32, made anew."""
        return self.plain_weight().as_subclass(ReadOnlyWeight)

    def plain_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole table in float32, rounded to `dtype`, as a plain tensor."""
        zero = self.zero if self.zero is not None else self.zero_point
        return float_weight(self.codes, self.scale, self.min, zero, self.bits, None, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] -> [..., hidden]."""
        ids = input.reshape(-1)
        minimum = None if self.min is None else self.min[ids]
        zero = self.zero[ids] if self.zero is not None else self.zero_point
        rows = float_weight(self.codes[ids], self.scale[ids], minimum, zero, self.bits, None, self.dtype)
        embedded = rows.view(*input.shape, self.embedding_dim)
        return embedded if self.factor is None else embedded * torch.tensor(self.factor).to(self.dtype)

    def extra_repr(self) -> str:
        """As nn.Embedding prints itself, with bits."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


class TiedHead(nn.Linear):
    """An output layer that multiplies with a quantized embedding; it holds nothing of its own."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        nn.Module.__init__(self)
        self._embedding = (embedding,)  # in a tuple, so that it is no submodule, and saved once
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", None)
        self._is_hf_initialized = True

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The embedding's table in float32, made anew."""
        return self._embedding[0].weight

    def plain_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The embedding's table in float32, rounded to `dtype`, as a plain tensor."""
        return self._embedding[0].plain_weight(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary], in the dtype of the input."""
        y: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return y
