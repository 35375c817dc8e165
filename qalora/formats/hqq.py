"""HQQ's layer: packed codes, scales and zero points that are real numbers, with what describes them as small tensors.

For a weight [out, in] of b bits in groups of g columns (axis 1) there are n = out*in/g groups, row by row, and

    W_q         the codes [n, g], packed along the groups, the first ones in the highest bits
                b = 2, 4      uint8 [n*b/8, g]       byte row r holds groups r, r + n*b/8, ...
                b = 3         int32 [ceil(n/10), g]  ten groups a word, the rest of n up to a multiple of 10 is 0
                b = 5, 6, 8   uint8 [n, g]           not packed
    scale, zero float [n, 1]                         weight = (code - zero) * scale, in the type that the loader chose
    nbits, group_size, axis   int32 []               shape   int64 [2]
    packing, unpack_view_dtype, compute_dtype        uint8, the letters of "4bit_u8", "torch.uint8", ...
    and flags, uint8 []

Scales and zero points of a model's minima are in `qalora.formats.real_zeros`.

Source: hqq 0.2.8, core/bitpack.py and core/quantize.py. Groups along the other axis, quantized scales and zeros, and
1-bit codes are not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora.errors import FormatError, InputError
from qalora.tensor import unpack_codes

__all__ = ["BITS", "PACKINGS", "pack_groups", "packed_shape", "unpack_groups"]

PACKINGS = {2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 5: "8bit_u8", 6: "8bit_u8", 8: "8bit_u8"}
"""HQQ's name of the packing at each width."""

BITS = tuple(PACKINGS)

_WORD = 10  # 3-bit codes of a word

TILE = 1 << 19
"""Codes that are shifted at a time, so that they stay in the cache."""


def packed_shape(groups: int, group_size: int, bits: int) -> tuple[int, int]:
    """The shape of W_q; InputError where groups do not fill whole bytes."""
    fields = 8 // bits if bits in (2, 4) else 1
    if groups % fields:
        raise InputError("groups", expected=f"a multiple of {fields} at {bits} bits", got=str(groups))
    return (-(-groups // _WORD) if bits == 3 else groups // fields), group_size


def pack_groups(packed: Tensor, group_size: int, bits: int, start: int = 0, stop: int | None = None) -> Tensor:
    """W_q of packed codes uint8 [out, in*b/8], as in `qalora.tensor`, or its rows start..stop-1; `unpack_groups` gives
    the codes.
    """
    shape = packed_shape(packed.numel() * 8 // bits // group_size, group_size, bits)
    start, stop, _ = slice(start, stop).indices(shape[0])
    if group_size % 8:  # groups that share bytes
        groups, bits_there = unpack_codes(packed, bits).reshape(-1, group_size), 8
    else:
        groups, bits_there = packed.reshape(-1, group_size * bits // 8), bits
    if bits_there == 4:
        return _pack_nibbles(groups[start:stop], groups[shape[0] + start : shape[0] + stop])
    if shape[0] == groups.shape[0]:
        return unpack_codes(groups[start:stop], bits_there).contiguous()
    fields = _WORD if bits == 3 else 8 // bits
    out = torch.zeros(stop - start, group_size, dtype=torch.int32 if bits == 3 else torch.uint8)
    for k in range(fields):
        codes = unpack_codes(groups[k * shape[0] + start : k * shape[0] + stop], bits_there)
        out[: codes.shape[0]] |= codes.to(out.dtype) << (bits * (fields - 1 - k))
    return out


def _pack_nibbles(first: Tensor, last: Tensor) -> Tensor:
    """W_q of packed codes of 4 bits, which need not be unpacked: those of the first half of all groups, and the last.

    Two bytes of W_q hold two codes of the first half, which are one byte of ours, and two of the last.
    """
    out = torch.empty(first.shape[0], 2 * first.shape[1], dtype=torch.uint8)
    words = out.view(-1).view(torch.int16)
    ours, theirs = first.reshape(-1), last.reshape(-1)
    for start in range(0, words.shape[0], TILE):
        one, two = ours[start : start + TILE], theirs[start : start + TILE]
        even, odd = (one << 4) | (two & 0x0F), (one & 0xF0) | (two >> 4)
        torch.add(even.to(torch.int16), odd.to(torch.int16), alpha=256, out=words[start : start + TILE])
    return out


def unpack_groups(packed: Tensor, shape: tuple[int, int], bits: int) -> Tensor:
    """Codes uint8 of a weight of `shape`; inverse of `pack_groups`. FormatError for a W_q of another shape or type."""
    group_size = packed.shape[1] if packed.ndim == 2 else 0
    groups = shape[0] * shape[1] // group_size if group_size else 0
    dtype = torch.int32 if bits == 3 else torch.uint8
    if not group_size or packed.dtype != dtype or tuple(packed.shape) != packed_shape(groups, group_size, bits):
        raise FormatError(
            "W_q", expected=f"{dtype} groups of {list(shape)}", got=f"{packed.dtype} {list(packed.shape)}"
        )
    if packed.shape[0] == groups:
        if bits < 8 and int(packed.max()) >= 1 << bits:
            raise FormatError("W_q", expected=f"codes of {bits} bits", got=str(int(packed.max())))
        return packed.reshape(shape)
    fields, mask = (_WORD if bits == 3 else 8 // bits), (1 << bits) - 1
    parts = [((packed >> (bits * (fields - 1 - k))) & mask).to(torch.uint8) for k in range(fields)]
    return torch.cat(parts)[:groups].reshape(shape)
