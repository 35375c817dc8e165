"""How the two graphs hold a quantized weight [out, in] = [N, K]; encoders and decoders side by side.

MatMulNBits (com.microsoft; `fast`): everything by rows of the weight, 4 bits wide.

    codes     UINT8 [N, K/block, block/2]   low half first: at 4 bits our own packed bytes
    scale     FLOAT [N, K/block]
    zero      UINT8 [N, ceil(K/block / 2)]  low half first
    residual  FLOAT [K/group, N]            C transposed, where zero points are real

Codes of 2 and 3 bits go into the 4-bit container as they are. Codes of 5, 6 and 8 bits go as two halves,
code = 16 * high + low: `codes_high` with `scale_high` = 16 * scale and `zero_high`, and the low half under the plain
names. ONNX Runtime's own 8-bit kernel dequantizes the whole matrix at every call.

DequantizeLinear (`portable`): the weight transposed, as MatMul wants it.

    codes     UINT4 [K, N] at up to 4 bits, else UINT8 [K, N]
    scale     FLOAT [K/block, N]
    zero      the codes' type [K/block, N]
    residual  FLOAT [K/group, N]

`block` is the largest power of two from 16 to 256 that divides the group; scale and zero repeat where it is smaller.
An act-order weight is held with its columns in the order of their groups, and that order beside it (see `order`).
Sources: onnxruntime, docs/ContribOperators.md; onnx, docs/Operators.md#DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qalora.converters.onnx.order import natural, ordered
from qalora.converters.plan import LOSSES
from qalora.errors import ExactnessError, FormatError
from qalora.formats.onnx import Initializer
from qalora.residual import from_residual, to_residual
from qalora.tensor import GroupQuantTensor, QuantSpec, integer_zeros, pack_codes, unpack_codes

__all__ = [
    "block_size",
    "decode_fast",
    "decode_portable",
    "encode_fast",
    "encode_portable",
    "fast_parts",
    "portable_parts",
]

BLOCKS = (256, 128, 64, 32, 16)

Parts = list[Initializer]


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


def _halves(spec: QuantSpec) -> tuple[str, ...]:
    return ("", "_high") if spec.bits > 4 else ("",)


def fast_parts(module: str, shape: tuple[int, int], spec: QuantSpec) -> Parts:
    """The initializers of a weight in the fast graph."""
    (out, columns), block = shape, block_size(module, spec)
    blocks = columns // block
    parts = []
    for half in _halves(spec):
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
    if kind == "UINT4" and out % 2:
        raise ExactnessError(f"onnx: {module}: out", expected="an even number", got=str(out))
    return parts + _residual_part(module, shape, spec)


def _residual_part(module: str, shape: tuple[int, int], spec: QuantSpec) -> Parts:
    if spec.zeros == "integer":
        return []
    return [Initializer(name=f"{module}.residual", dtype="FLOAT", shape=(shape[1] // spec.group_size, shape[0]))]


def _zeros(module: str, tensor: GroupQuantTensor, spec: QuantSpec, *, rounds: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Integer zeros [out, groups] and, where the real ones leave something over, the residual part."""
    if spec.zeros == "integer":
        zero = integer_zeros(tensor)
        if zero is None:
            raise ValueError(f"{module}: its spec promises integer zeros, and it has none")
        return zero, {}
    residual = to_residual(tensor, "nearest")
    if not residual.exact and not rounds:
        raise ExactnessError(
            f"onnx: {module}",
            expected="a residual that float32 holds",
            got=LOSSES["residual"],
            todo="accept it with `allow_loss` residual",
        )
    return residual.zero, {f"{module}.residual": residual.c.T.contiguous()}


def encode_fast(module: str, tensor: GroupQuantTensor, spec: QuantSpec, *, rounds: bool = False) -> dict[str, Tensor]:
    """The data of `fast_parts`, by name. ExactnessError for a residual that float32 rounds, unless `rounds`."""
    zero, data = _zeros(module, tensor, spec, rounds=rounds)
    times, tensor = spec.group_size // block_size(module, spec), ordered(module, tensor)
    scale, zero = tensor.scale.repeat_interleave(times, dim=1), zero.repeat_interleave(times, dim=1)
    if spec.bits <= 4:
        packed = tensor.packed if spec.bits == 4 else pack_codes(tensor.codes(), 4)
        halves = {"": (packed, scale, zero)}
    else:
        codes = tensor.codes()
        halves = {
            "": (pack_codes(codes & 15, 4), scale, zero & 15),
            "_high": (pack_codes(codes >> 4, 4), scale * 16, zero >> 4),
        }
    for half, (codes_of, scale_of, zero_of) in halves.items():
        data[f"{module}.codes{half}"] = codes_of
        data[f"{module}.scale{half}"] = scale_of
        data[f"{module}.zero{half}"] = _nibbles(zero_of)
    return data


def _nibbles(values: Tensor) -> Tensor:
    """Rows of 4-bit values, two a byte, low half first, a row of odd length filled up with 0."""
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, ::2] | (values[:, 1::2] << 4)


def _from_nibbles(packed: Tensor, columns: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1)[:, :columns]


Fetch = Callable[[str], Tensor]
"""Gives the data of an initializer by its name; UINT4 as packed bytes of each row."""


def decode_fast(module: str, fetch: Fetch, spec: QuantSpec) -> GroupQuantTensor:
    """The canonical tensor that `encode_fast` wrote."""
    packed, scale = fetch(f"{module}.codes").flatten(1), fetch(f"{module}.scale")
    zero = _from_nibbles(fetch(f"{module}.zero"), scale.shape[1])
    if spec.bits > 4:
        high = unpack_codes(fetch(f"{module}.codes_high").flatten(1), 4)
        codes = unpack_codes(packed, 4) | (high << 4)
        zero = zero | (_from_nibbles(fetch(f"{module}.zero_high"), scale.shape[1]) << 4)
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
    return natural(module, tensor, fetch(f"{module}.order")) if spec.act_order else tensor


def encode_portable(
    module: str, tensor: GroupQuantTensor, spec: QuantSpec, *, rounds: bool = False
) -> dict[str, Tensor]:
    """The data of `portable_parts`, by name; UINT4 as packed bytes."""
    zero, data = _zeros(module, tensor, spec, rounds=rounds)
    times = spec.group_size // block_size(module, spec)
    codes, zero = ordered(module, tensor).codes().T, zero.repeat_interleave(times, dim=1).T
    small = spec.bits <= 4
    data[f"{module}.codes"] = _nibbles(codes) if small else codes.contiguous()
    data[f"{module}.scale"] = tensor.scale.repeat_interleave(times, dim=1).T.contiguous()
    data[f"{module}.zero"] = _nibbles(zero) if small else zero.contiguous()
    return data


def decode_portable(module: str, fetch: Fetch, spec: QuantSpec) -> GroupQuantTensor:
    """The canonical tensor that `encode_portable` wrote."""
    codes, zero, scale = fetch(f"{module}.codes"), fetch(f"{module}.zero"), fetch(f"{module}.scale")
    if spec.bits <= 4:
        codes, zero = _from_nibbles(codes, scale.shape[1]), _from_nibbles(zero, scale.shape[1])
    packed = pack_codes(codes.T.contiguous(), spec.bits)
    return _joined(module, packed, scale.T.contiguous(), zero.T.contiguous(), fetch, spec)
