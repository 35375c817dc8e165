"""The quantized tensor types of GGUF that hold integer groups: blocks of 32 weights of a row, and the canonical tensor.

| type | bytes of a block | weight | canonical |
|---|---|---|---|
| Q4_0 | f16 d, 16 bytes of nibbles | d * (q - 8) | 4 bits, zero 8 |
| Q4_1 | f16 d, f16 m, 16 bytes of nibbles | d * q + m | 4 bits, min m |
| Q5_0 | f16 d, u32 high bits, 16 bytes of nibbles | d * (q - 16) | 5 bits, zero 16 |
| Q5_1 | f16 d, f16 m, u32 high bits, 16 bytes of nibbles | d * q + m | 5 bits, min m |
| Q8_0 | f16 d, 32 signed bytes | d * q | 8 bits, code q + 128, zero 128 |

Byte j of the nibbles holds weight j in its low half and weight j + 16 in its high half; bit j of the high bits is bit 4
of weight j. Source: ggml-org/ggml, src/ggml-common.h and ggml-quants.c. Codes move as they are; no rounding here.

Other types (K-quants, IQ, ternary, MXFP4) hold no integer groups of this kind: their scales are integers themselves, of
6 bits, or their codes index a table. gguf-py dequantizes them, to the floats that they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qalora.tensor import GroupQuantTensor, QuantSpec, pack_codes, unpack_codes

__all__ = ["BLOCK", "BLOCK_TYPES", "FLOAT_BLOCKS", "BlockType", "decode", "dequantize", "encode"]

FLOAT_BLOCKS = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
"""Types that are read as floats."""

Array = NDArray[Any]

BLOCK = 32
"""Weights of a block."""

TILE = 1 << 19
"""Weights that are shuffled at a time, so that they stay in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """One type: code width, the zero point in the middle or None where the block has a minimum, bytes of a block."""

    bits: int
    zero: int | None
    nbytes: int

    @property
    def fields(self) -> np.dtype[np.void]:
        """What a block holds, in its order: `d`, `m` where there is a minimum, `high` bits, `codes`."""
        fields = [("d", "<f2")]
        if self.zero is None:
            fields.append(("m", "<f2"))
        if self.bits == 5:
            fields.append(("high", "<u4"))
        return np.dtype([*fields, ("codes", "V32" if self.bits == 8 else "V16")])

    @property
    def spec(self) -> QuantSpec:
        """What a tensor of this type guarantees."""
        return QuantSpec(
            bits=self.bits,
            group_size=BLOCK,
            zeros="real" if self.zero is None else "integer",
            scale_dtype=torch.float16,
            min_dtype=torch.float16 if self.zero is None else torch.float32,
            zero=self.zero,
        )


BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(bits=4, zero=8, nbytes=18),
    "Q4_1": BlockType(bits=4, zero=None, nbytes=20),
    "Q5_0": BlockType(bits=5, zero=16, nbytes=22),
    "Q5_1": BlockType(bits=5, zero=None, nbytes=24),
    "Q8_0": BlockType(bits=8, zero=128, nbytes=34),
}


def encode(tensor: GroupQuantTensor, type_name: str) -> Tensor:
    """The blocks of a canonical tensor with groups of 32: uint8 [out, in/32 * bytes of a block].

    scale, and min where the type has one, are converted to float16: hand over values that it holds. Codes of fewer bits
    go into Q4_1 and Q5_1 as they are. A type with a zero point in the middle takes codes relative to that zero; Q8_0
    takes any integer zero with code - zero in -128..127.
    """
    kind = BLOCK_TYPES[type_name]
    out = torch.empty(tensor.shape[0], tensor.shape[1] // BLOCK * kind.nbytes, dtype=torch.uint8)
    blocks = out.numpy().reshape(-1).view(kind.fields)
    blocks["d"] = tensor.scale.half().numpy().reshape(-1)
    if kind.zero is None:
        blocks["m"] = tensor.min.half().numpy().reshape(-1)
    if kind.bits == 8:
        blocks["codes"] = _signed(tensor).numpy().reshape(-1).view("V32")
        return out
    packed = tensor.packed
    if tensor.bits != 4:
        codes = tensor.codes()
        packed = pack_codes(codes & 15, 4)
        if kind.bits == 5:
            blocks["high"] = np.packbits((codes >> 4).numpy(), bitorder="little").view("<u4")
    _put_nibbles(packed, blocks["codes"])
    return out


def _put_nibbles(packed: Tensor, out: Array) -> None:
    """Put rows of packed codes of 4 bits into the nibbles of blocks, 16 bytes each.

    Byte k of ours holds weights 2k and 2k+1. Bytes 2k and 2k+1 of a block hold 2k, 2k+16 and 2k+1, 2k+17. So between
    the first and the last eight of our bytes, the high nibbles of the former change places with the low ones of the
    latter; then the former are a block's even bytes, the latter its odd ones.
    """
    words = packed.numpy().reshape(-1).view("<i8").reshape(-1, 2)
    step = TILE // BLOCK
    halves, wide = np.empty((3, step), "<i8"), np.empty((2, 8 * step), "<u2")
    for start in range(0, len(words), step):
        part = words[start : start + step]
        (first, last, change), (even, odd) = halves[:, : len(part)], wide[:, : 8 * len(part)]
        first[:], last[:] = part.T
        _exchange(first, last, change)
        even[:], odd[:] = first.view(np.uint8), last.view(np.uint8)
        odd *= 256
        odd |= even
        out[start : start + step] = odd.view("V16")


def _signed(tensor: GroupQuantTensor) -> Tensor:
    """code - zero as int8 [out, in], stored as uint8; the middle zero where the scale is 0, as in `integer_zeros`."""
    codes = tensor.codes()
    safe = torch.where(tensor.scale == 0, 1.0, tensor.scale)
    zero = torch.where(tensor.scale == 0, float(1 << (tensor.bits - 1)), torch.round(-tensor.min / safe))
    if bool(((zero == 128) | (tensor.scale == 0)).all()) and tensor.bits == 8:
        return codes ^ 128
    signed = codes.view(*zero.shape, BLOCK).to(torch.int16) - zero.to(torch.int16)[..., None]
    if int(signed.min()) < -128 or int(signed.max()) > 127:
        raise ValueError("Q8_0: a code is more than 127 steps from its zero point")
    return signed.to(torch.int8).view(torch.uint8).view(codes.shape)


def decode(data: Tensor, type_name: str) -> GroupQuantTensor:
    """The canonical tensor of rows of blocks, uint8 [out, in/32 * bytes of a block]; inverse of `encode`."""
    kind = BLOCK_TYPES[type_name]
    rows, blocks = data.shape[0], data.contiguous().numpy().reshape(-1).view(kind.fields)
    scale = _floats(blocks["d"], rows)
    minimum = _floats(blocks["m"], rows) if kind.zero is None else scale * -kind.zero
    if kind.bits == 8:
        packed = torch.from_numpy(blocks["codes"].copy().view(np.uint8)).view(rows, -1) ^ 128
    else:
        packed = _taken_nibbles(blocks["codes"]).view(rows, -1)
    if kind.bits == 5:
        codes = unpack_codes(packed, 4)
        high = np.unpackbits(blocks["high"].copy().view(np.uint8), bitorder="little")
        codes |= torch.from_numpy(high).view(codes.shape) << 4
        packed = pack_codes(codes, 5)
    return GroupQuantTensor(packed=packed, scale=scale, min=minimum, bits=kind.bits, group_size=BLOCK)


def _floats(values: Array, rows: int) -> Tensor:
    return torch.from_numpy(values.copy()).float().view(rows, -1)


def _taken_nibbles(codes: Array) -> Tensor:
    """The packed codes, uint8 [all bytes], of the nibbles of blocks; inverse of `_put_nibbles`."""
    out = np.empty((len(codes), 2), "<i8")
    step = TILE // BLOCK
    for start in range(0, len(codes), step):
        words = codes[start : start + step].copy().view("<u2")
        first = words.astype(np.uint8).view("<i8")
        words >>= 8
        last = words.astype(np.uint8).view("<i8")
        _exchange(first, last, np.empty_like(first))
        out[start : start + step, 0], out[start : start + step, 1] = first, last
    return torch.from_numpy(out.reshape(-1).view(np.uint8))


def _exchange(first: Array, last: Array, change: Array) -> None:
    """Swap the high nibbles of `first` with the low ones of `last`, byte by byte; `change` is room for it."""
    np.right_shift(first, 4, out=change)
    change ^= last
    change &= 0x0F0F0F0F0F0F0F0F
    last ^= change
    change <<= 4
    first ^= change


def dequantize(data: Tensor, type_name: str) -> Tensor:
    """float32 [out, in] of rows of blocks of one of FLOAT_BLOCKS, uint8 [out, bytes of a row]."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):  # a scale of a damaged file may be anything: the caller looks at the values
        values = quants.dequantize(data.numpy(), GGMLQuantizationType[type_name])
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
