"""MLX's affine quantization: what a quantized weight's three tensors hold.

For a weight [out, in] of b bits in groups of g columns:

    weight   uint32 [out, in*b/32]   a row's codes, packed along `in`, lowest bits first, one continuous bit stream
    scales   float  [out, in/g]      weight = scales * code + biases
    biases   float  [out, in/g]      any real number, so that no zero point is rounded

The bytes of a row of words are those of a packed row of `qalora.tensor`, at every width; packing is a view.

`mlx.core.quantized_matmul` computes in the widest type of its input, scales and biases, `dequantize` (the lookup of a
quantized embedding) in the widest of scales and biases; the two may have different types. Source: ml-explore/mlx,
mlx/ops.cpp (affine_quantize, quantized_matmul, dequantize). Modes mxfp4, mxfp8 and nvfp4 hold floats, and are not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora.errors import FormatError, InputError
from qalora.formats.fields import rows_as

__all__ = ["GROUP_SIZES", "group_size_for", "pack_words", "unpack_words"]

GROUP_SIZES = (32, 64, 128)
"""The groups that MLX's kernels know."""


def group_size_for(group_size: int) -> int | None:
    """The largest of MLX's groups that this one is cut into; None where there is none."""
    return next((size for size in reversed(GROUP_SIZES) if group_size % size == 0), None)


def pack_words(packed: Tensor) -> Tensor:
    """Words uint32 [out, in*b/32] of packed codes uint8 [out, in*b/8]; inverse of `unpack_words`. Shares memory.

    Raises InputError where a row does not fill whole words.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % 4:
        raise InputError(
            "packed codes", expected="uint8 [out, bytes] in whole words", got=f"{packed.dtype} {list(packed.shape)}"
        )
    return rows_as(packed, torch.uint32)


def unpack_words(words: Tensor) -> Tensor:
    """Packed codes uint8 [out, in*b/8] of words uint32 [out, in*b/32]; inverse of `pack_words`. Shares memory."""
    if words.dtype != torch.uint32 or words.ndim != 2:
        raise FormatError("weight", expected="a uint32 matrix", got=f"{words.dtype} {list(words.shape)}")
    return rows_as(words, torch.uint8)
