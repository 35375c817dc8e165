"""How the data file holds a quantized weight [out, in] = [N, K], and how the graphs read it.

    codes     UINT8 [N, K/2]               low half first: at 4 bits our own packed bytes
    scale     FLOAT16 or FLOAT [N, groups] as the base has it
    min       FLOAT16 or FLOAT [N, groups] where zero points are real, as the base has it
    zero      UINT8 [N, ceil(K/block / 2)] where they are integers, low half first

Codes of 2 and 3 bits go into the 4-bit container as they are. Codes of 5, 6 and 8 bits go as two halves, code =
16 * high + low: `codes_high` and `zero_high`, and the low half under the plain names. ONNX Runtime's own 8-bit kernel
dequantizes the whole matrix at every call.

Both graphs read the same bytes, each with a type and shape of its own (`as_blocks`, `as_rows`):

    MatMulNBits (com.microsoft; `fast`)     codes UINT8 [N, K/block, block/2], zero as it is
    DequantizeLinear (`portable`)           codes UINT4 [N, K], zero UINT4 [N, K/block], one more where that is odd

What the kernels ask for beyond that is made in the graph, of constants, so that ONNX Runtime makes it once, when it
loads the model (`prepared`). A real zero point is held as the middle one, z, and what it leaves over:

    W = scale * (codes - z) + C,   z = 2^(bits-1),   C = min + scale * z,   y = Q(x; codes, scale, z) + pool(x) @ C^T

pool(x) is the sum of x over each group. C is computed in float32. Where scale and min are float16 both are multiples of
2^-24, so that C is exact up to 1. Elsewhere it is rounded by 2^-24 of itself at most, as float32 rounds a weight.

`block` is the largest power of two from 16 to 256 that divides the group; scale and zero repeat where it is smaller.
An act-order weight is held with its columns in the order of their groups, and that order beside it (see `order`).
Sources: onnxruntime, docs/ContribOperators.md; onnx, docs/Operators.md#DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qalora.converters.column_order import natural, ordered
from qalora.converters.onnx.order import ORDER
from qalora.converters.specs import narrowed
from qalora.errors import ExactnessError, FormatError
from qalora.formats.fields import from_nibbles, nibbles
from qalora.formats.onnx import Initializer
from qalora.tensor import GroupQuantTensor, QuantSpec, integer_zeros, pack_codes, unpack_codes

__all__ = [
    "BLOCKS",
    "FLOATS",
    "Fetch",
    "as_blocks",
    "as_rows",
    "block_size",
    "decode",
    "encode",
    "halves",
    "is_part",
    "middles",
    "parts",
]

KINDS = ("codes", "scale", "min", "zero")
BLOCKS = (256, 128, 64, 32, 16)

FLOATS = {torch.float16: "FLOAT16", torch.float32: "FLOAT"}
"""The type of a scale or a min, by the dtype of the base's."""


def block_size(name: str, spec: QuantSpec) -> int:
    """The block that both graphs use for a tensor; ExactnessError for one that they cannot hold."""
    for block in BLOCKS:
        if spec.group_size % block == 0:
            return block
    raise ExactnessError(
        f"onnx: {name}: group_size",
        expected="a multiple of 16",
        got=str(spec.group_size),
        todo="quantize in other groups",
    )


def halves(bits: int) -> tuple[str, ...]:
    """What the names of a weight's 4-bit products end with."""
    return ("", "_high") if bits > 4 else ("",)


def middles(bits: int) -> dict[str, int]:
    """The zero point of each half where those of the weight are real: z = 2^(bits-1)."""
    return {"": 0, "_high": 1 << (bits - 5)} if bits > 4 else {"": 1 << (bits - 1)}


def parts(module: str, shape: tuple[int, int], spec: QuantSpec) -> list[Initializer]:
    """The initializers of a weight, as the data file holds them."""
    (rows, columns), block = shape, block_size(module, spec)
    grouped = (rows, columns // spec.group_size)
    made = [
        Initializer(name=f"{module}.codes{half}", dtype="UINT8", shape=(rows, columns // 2))
        for half in halves(spec.bits)
    ]
    made.append(Initializer(name=f"{module}.scale", dtype=FLOATS[spec.scale_dtype], shape=grouped))
    if spec.zeros == "real":
        return [*made, Initializer(name=f"{module}.min", dtype=FLOATS[spec.min_dtype], shape=grouped)]
    packed = (rows, (columns // block + 1) // 2)
    return made + [Initializer(name=f"{module}.zero{half}", dtype="UINT8", shape=packed) for half in halves(spec.bits)]


def is_part(name: str, module: str) -> bool:
    """Whether an initializer is one of a module's `parts`."""
    prefix, _, kind = name.rpartition(".")
    return prefix == module and kind.removesuffix("_high") in KINDS


def as_blocks(part: Initializer, block: int) -> Initializer:
    """A part as MatMulNBits reads it."""
    if not _is("codes", part):
        return part
    rows, width = part.shape
    return replace(part, shape=(rows, 2 * width // block, block // 2))


def as_rows(part: Initializer) -> Initializer:
    """A part as DequantizeLinear reads it, two values in a byte."""
    if not (_is("codes", part) or _is("zero", part)):
        return part
    rows, width = part.shape
    return replace(part, dtype="UINT4", shape=(rows, 2 * width))


def _is(kind: str, part: Initializer) -> bool:
    return part.name.rpartition(".")[2].removesuffix("_high") == kind


def encode(module: str, tensor: GroupQuantTensor, spec: QuantSpec) -> dict[str, Tensor]:
    """The data of `parts`, by name."""
    tensor = ordered(f"onnx: {module}", tensor)
    data = {f"{module}.scale": narrowed(f"{module}: scale", tensor.scale, spec.scale_dtype).contiguous()}
    if spec.zeros == "real":
        data[f"{module}.min"] = narrowed(f"{module}: min", tensor.min, spec.min_dtype).contiguous()
    else:
        zero = integer_zeros(tensor)
        if zero is None:
            raise ValueError(f"{module}: its spec promises integer zeros, and it has none")
        repeated = zero.repeat_interleave(spec.group_size // block_size(module, spec), dim=1)
        data |= {f"{module}.zero{half}": nibbles(part) for half, part in _split(repeated, spec.bits).items()}
    if spec.bits == 4:
        return {**data, f"{module}.codes": tensor.packed}
    codes = _split(tensor.codes(), spec.bits)
    return data | {f"{module}.codes{half}": pack_codes(part, 4) for half, part in codes.items()}


def _split(values: Tensor, bits: int) -> dict[str, Tensor]:
    return {"": values & 15, "_high": values >> 4} if bits > 4 else {"": values}


Fetch = Callable[[str], Tensor]
"""Gives the data of an initializer by its name; UINT4 as packed bytes of each row."""


def decode(module: str, fetch: Fetch, spec: QuantSpec) -> GroupQuantTensor:
    """The canonical tensor that `encode` wrote."""
    packed, scale = _joined_codes(module, fetch, spec.bits), fetch(f"{module}.scale").float()
    if spec.zeros == "real":
        minimum = fetch(f"{module}.min").float()
    else:
        minimum = -scale * _joined_zeros(module, fetch, spec, scale.shape[1])
    tensor = GroupQuantTensor(packed=packed, scale=scale, min=minimum, bits=spec.bits, group_size=spec.group_size)
    order = f"{module}{ORDER}"
    return natural(order, tensor, fetch(order)) if spec.act_order else tensor


def _joined_codes(module: str, fetch: Fetch, bits: int) -> Tensor:
    packed = fetch(f"{module}.codes").flatten(1)
    if bits == 4:
        return packed
    codes = unpack_codes(packed, 4)
    if bits > 4:
        codes = codes | (unpack_codes(fetch(f"{module}.codes_high").flatten(1), 4) << 4)
    return pack_codes(codes, bits)


def _joined_zeros(module: str, fetch: Fetch, spec: QuantSpec, groups: int) -> Tensor:
    times = spec.group_size // block_size(module, spec)
    zero = from_nibbles(fetch(f"{module}.zero"), groups * times)
    if spec.bits > 4:
        zero = zero | (from_nibbles(fetch(f"{module}.zero_high"), groups * times) << 4)
    if not torch.equal(zero, zero[:, ::times].repeat_interleave(times, dim=1)):
        raise FormatError(f"{module}.zero", expected=f"blocks that repeat in groups of {spec.group_size}")
    return zero[:, ::times]
