"""The Triton kernel. Importing this module needs Triton, which torch's CUDA builds bring.

A program makes `BLOCK` columns of a row. Code i of a row is the bits i*bits .. (i+1)*bits-1 of its bytes, lowest first:
it begins in byte i*bits // 8, and ends there or in the next one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fill"]

BLOCK = 1024


def fill(out: Tensor, packed: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> None:
    """out[o, i] = scale[o, g] * codes[o, i] + min[o, g] in float32, rounded to out's dtype; on the tensors' device.

    out      float32, bfloat16 or float16 [rows, columns]; columns side by side, rows at any distance
    packed   uint8 [rows, columns*bits/8]
    scale, minimum  float32 [rows, groups]
    """
    rows, columns = out.shape
    if rows == 0:
        return
    groups = scale.shape[1]
    with torch.cuda.device_of(packed):  # type: ignore[no-untyped-call]
        _fill[(rows, triton.cdiv(columns, BLOCK))](
            out,
            packed.contiguous(),
            scale.contiguous(),
            minimum.contiguous(),
            out.stride(0),
            columns,
            packed.shape[1],
            groups,
            columns // groups,
            BITS=bits,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _fill(  # type: ignore[no-untyped-def]
    out,
    packed,
    scale,
    minimum,
    stride,
    columns,
    row_bytes,
    groups,
    group_size,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    first = column * BITS // 8
    word = tl.load(packed + row * row_bytes + first, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:
        more = inside & (first + 1 < row_bytes)
        word |= tl.load(packed + row * row_bytes + first + 1, mask=more, other=0).to(tl.int32) << 8
    code = (word >> (column * BITS % 8)) & ((1 << BITS) - 1)
    group = row * groups + column // group_size
    step = tl.load(scale + group, mask=inside, other=0.0)
    low = tl.load(minimum + group, mask=inside, other=0.0)
    weight = step * code.to(tl.float32) + low
    tl.store(out + row * stride + column, weight.to(out.dtype.element_ty), mask=inside)
