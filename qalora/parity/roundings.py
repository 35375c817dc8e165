"""What runtimes round inside their kernels, repeated in float32 torch: one quantized linear layer's product.

A kernel that computes scale * (codes - zero) in float16, or its inputs in int8, is right and differs from float32 all
the same. Repeating its rounding in the reference turns its error into something that is measured on the very model and
text, instead of a tolerance.

Sources: GPTQModel 7.6.0, nn_modules/qlinear/torch.py; llama.cpp, ggml-quants.c, quantize_row_q8_0_ref and
quantize_row_q8_1_ref; ONNX Runtime 1.31, MLAS's SQNBIT_CompInt8.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from qalora.adapter import AdapterLayer
from qalora.converters.format import EXACT, Rounding
from qalora.residual import to_residual
from qalora.tensor import GroupQuantTensor, integer_zeros

__all__ = ["EXACT", "Q8_BLOCK", "Rounding", "product", "q8_input", "running_sum", "side_branch"]

Q8_BLOCK = 32
"""Columns that share a scale in llama.cpp's Q8_0 and Q8_1."""


def product(
    x: Tensor, tensor: GroupQuantTensor | Tensor, rounding: Rounding = EXACT, *, permuted: bool = False
) -> Tensor:
    """x W^T with the rounding of a kernel: x float32 [..., in], float32 [..., out].

    tensor    quantized, or the float weight itself, which only the "float16" and "bfloat16" kinds round
    permuted  without rounding: the columns are summed in another order, random and the same at every call
    """
    kind = rounding.kind
    if isinstance(tensor, GroupQuantTensor) and kind in ("q8", "weights", "lora", "int8"):
        return _q8_product(x, tensor) if kind == "q8" else _residual_product(x, tensor, rounding)
    weight = tensor.dequantize() if isinstance(tensor, GroupQuantTensor) else tensor
    if kind == "float16" or kind == "bfloat16":
        dtype = torch.float16 if kind == "float16" else torch.bfloat16
        return _via(functional.linear(_via(x, dtype), _via(weight, dtype)), dtype)
    if permuted:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
        order = order.to(weight.device)
        return functional.linear(x[..., order], weight[:, order])
    return functional.linear(x, weight)


def _via(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).float()


def _residual_product(x: Tensor, tensor: GroupQuantTensor, rounding: Rounding) -> Tensor:
    """Q(x; codes, scale, z) + pool(x) C^T, with Q's weight or input rounded; integer zero points are subtracted."""
    residual = to_residual(tensor, "nearest" if integer_zeros(tensor) is not None else rounding.zeros)
    centred = replace(tensor, min=-tensor.scale * residual.zero)
    weight = centred.dequantize()
    if rounding.kind in ("weights", "lora"):
        quantized = functional.linear(x, _via(weight, torch.float16))
    else:
        codes, scale = _int8(x, tensor.group_size)
        quantized = functional.linear((codes * scale).flatten(-2), weight)
    if not bool(residual.c.any()):
        return quantized
    if rounding.kind == "lora":
        half = torch.float16
        return quantized + _via(
            functional.linear(_via(_pool(_via(x, half), tensor), half), _via(residual.c, half)), half
        )
    return quantized + functional.linear(_pool(x, tensor), residual.c)


def side_branch(x: Tensor, layer: AdapterLayer, rounding: Rounding = EXACT) -> Tensor:
    """factor * (pool(x) A^T) B^T; "lora": as PEFT computes the plain LoRA of the same, in float16."""
    if rounding.kind != "lora":
        pooled = _blocks(x, layer.pool_size).sum(dim=-1)
        return layer.factor * functional.linear(functional.linear(pooled, layer.a), layer.b)
    half = torch.float16
    pooled = _blocks(_via(x, half), layer.pool_size).sum(dim=-1)
    inner = _via(functional.linear(pooled, _via(layer.a, half)), half)
    return _via(_via(functional.linear(inner, _via(layer.b, half)), half) * layer.factor, half)


def _pool(x: Tensor, tensor: GroupQuantTensor) -> Tensor:
    """The sum of x over each group: [..., groups]."""
    if tensor.g_idx is None:
        return _blocks(x, tensor.group_size).sum(dim=-1)
    pooled = torch.zeros(*x.shape[:-1], tensor.groups, device=x.device)
    return pooled.index_add(-1, tensor.g_idx.long(), x)


def _q8_product(x: Tensor, tensor: GroupQuantTensor) -> Tensor:
    """codes times d * q, plus min times the block's sum, which is stored as float16 of its own."""
    codes, scale = _int8(x, Q8_BLOCK)
    coarse = codes * _via(scale, torch.float16)
    y = functional.linear(coarse.flatten(-2), tensor.dequantize())
    if tensor.g_idx is not None or tensor.group_size % Q8_BLOCK:
        return y
    stored = _via(codes.sum(dim=-1) * scale[..., 0], torch.float16)
    minimum = tensor.regrouped(Q8_BLOCK).min
    return y + functional.linear(stored - coarse.sum(dim=-1), minimum)


def q8_input(x: Tensor) -> Tensor:
    """x as Q8_0 holds it: int8 times a float16 scale for each 32 columns; x itself where 32 does not divide them."""
    if x.shape[-1] % Q8_BLOCK:
        return x
    codes, scale = _int8(x, Q8_BLOCK)
    return (codes * _via(scale, torch.float16)).flatten(-2)


def _int8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Whole numbers in -127..127 [..., blocks, block] and the scale of each block [..., blocks, 1], max|x|/127."""
    blocks = _blocks(x, block)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(blocks / torch.where(scale == 0, 1.0, scale)), scale


def _blocks(x: Tensor, block: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, block)


def running_sum(columns: int) -> float:
    """How many times float32's usual noise a product has whose terms are added one after the other; 1 at least.

    torch sums in blocks, whose error hardly grows with their number; that of a running sum grows as its root. The two
    are measured on the same random numbers: |running - blocked| over |blocked in another order - blocked|, the norms.
    About 3 at 4096 columns; in how many blocks a kernel sums, and so how this grows, is the processor's.
    """
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, columns, generator=rng), torch.randn(32, columns, generator=rng)
    order = torch.randperm(columns, generator=rng)
    blocked = functional.linear(x, weight)
    running = torch.zeros_like(blocked)
    for a, b in zip(x.T, weight.T, strict=True):
        running = running + a[:, None] * b
    usual = float((functional.linear(x[:, order], weight[:, order]) - blocked).norm())
    return max(1.0, float((running - blocked).norm()) / usual) if usual else 1.0
