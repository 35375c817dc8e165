"""Read graphs of the first version of our layout: float32 scales and residuals, and a data file for each graph.

MatMulNBits: everything by rows of the weight, 4 bits wide.

    codes     UINT8 [N, K/block, block/2]   low half first
    scale     FLOAT [N, K/block]
    zero      UINT8 [N, ceil(K/block / 2)]  low half first
    residual  FLOAT [K/group, N]            C = min + scale * zero, transposed, where zero points are real

Codes of 5, 6 and 8 bits are two halves: `codes_high` with `scale_high` = 16 * scale and `zero_high` as well.

DequantizeLinear: the weight transposed.

    codes     UINT4 [K, N] at up to 4 bits, else UINT8 [K, N]
    scale     FLOAT [K/block, N]
    zero      the codes' type [K/block, N]
    residual  FLOAT [K/group, N]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora.converters.column_order import natural
from qalora.converters.onnx.carriers import Fetch, block_size, halves
from qalora.converters.onnx.order import ORDER
from qalora.errors import FormatError
from qalora.formats.fields import from_nibbles
from qalora.formats.onnx import Initializer
from qalora.residual import from_residual
from qalora.tensor import GroupQuantTensor, QuantSpec, pack_codes, unpack_codes

__all__ = ["decode_fast", "decode_portable", "fast_parts", "portable_parts"]

Parts = list[Initializer]


def fast_parts(module: str, shape: tuple[int, int], spec: QuantSpec) -> Parts:
    """The initializers of a weight in the fast graph."""
    (out, columns), block = shape, block_size(module, spec)
    blocks = columns // block
    parts = []
    for half in halves(spec.bits):
        parts.append(Initializer(name=f"{module}.codes{half}", dtype="UINT8", shape=(out, blocks, block // 2)))
        parts.append(Initializer(name=f"{module}.scale{half}", dtype="FLOAT", shape=(out, blocks)))
        parts.append(Initializer(name=f"{module}.zero{half}", dtype="UINT8", shape=(out, (blocks + 1) // 2)))
    return parts + _residual_part(module, shape, spec)


def portable_parts(module: str, shape: tuple[int, int], spec: QuantSpec) -> Parts:
    """The initializers of a weight in the portable graph."""
    (out, columns), block = shape, block_size(module, spec)
    kind = "UINT4" if spec.bits <= 4 else "UINT8"
    parts = [
        Initializer(name=f"{module}.codes", dtype=kind, shape=(columns, out)),
        Initializer(name=f"{module}.scale", dtype="FLOAT", shape=(columns // block, out)),
        Initializer(name=f"{module}.zero", dtype=kind, shape=(columns // block, out)),
    ]
    return parts + _residual_part(module, shape, spec)


def _residual_part(module: str, shape: tuple[int, int], spec: QuantSpec) -> Parts:
    if spec.zeros == "integer":
        return []
    return [Initializer(name=f"{module}.residual", dtype="FLOAT", shape=(shape[1] // spec.group_size, shape[0]))]


def decode_fast(module: str, fetch: Fetch, spec: QuantSpec) -> GroupQuantTensor:
    """The canonical tensor of a fast graph."""
    packed, scale = fetch(f"{module}.codes").flatten(1), fetch(f"{module}.scale")
    zero = from_nibbles(fetch(f"{module}.zero"), scale.shape[1])
    if spec.bits > 4:
        high = unpack_codes(fetch(f"{module}.codes_high").flatten(1), 4)
        codes = unpack_codes(packed, 4) | (high << 4)
        zero = zero | (from_nibbles(fetch(f"{module}.zero_high"), scale.shape[1]) << 4)
        if not torch.equal(fetch(f"{module}.scale_high"), scale * 16):
            raise FormatError(f"{module}.scale_high", expected="16 times the scale", got="different values")
        packed = pack_codes(codes, spec.bits)
    elif spec.bits < 4:
        packed = pack_codes(unpack_codes(packed, 4), spec.bits)
    return _joined(module, packed, scale, zero, fetch, spec)


def _joined(
    module: str, packed: Tensor, scale: Tensor, zero: Tensor, fetch: Fetch, spec: QuantSpec
) -> GroupQuantTensor:
    times = spec.group_size * scale.shape[1] * spec.bits // (packed.shape[1] * 8)
    for part in (scale, zero):
        if times < 1 or not torch.equal(part, part[:, ::times].repeat_interleave(times, dim=1)):
            raise FormatError(f"{module}", expected=f"blocks that repeat in groups of {spec.group_size}")
    scale, zero = scale[:, ::times].contiguous(), zero[:, ::times]
    if spec.zeros == "integer":
        minimum = -scale * zero
    else:
        minimum = from_residual(scale, zero, fetch(f"{module}.residual").T)
    tensor = GroupQuantTensor(packed=packed, scale=scale, min=minimum, bits=spec.bits, group_size=spec.group_size)
    order = f"{module}{ORDER}"
    return natural(order, tensor, fetch(order)) if spec.act_order else tensor


def decode_portable(module: str, fetch: Fetch, spec: QuantSpec) -> GroupQuantTensor:
    """The canonical tensor of a portable graph."""
    codes, zero, scale = fetch(f"{module}.codes"), fetch(f"{module}.zero"), fetch(f"{module}.scale")
    if spec.bits <= 4:
        codes, zero = from_nibbles(codes, scale.shape[1]), from_nibbles(zero, scale.shape[1])
    packed = pack_codes(codes.T.contiguous(), spec.bits)
    return _joined(module, packed, scale.T.contiguous(), zero.T.contiguous(), fetch, spec)
