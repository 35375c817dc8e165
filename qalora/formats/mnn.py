"""The file of weights beside an MNN graph, llm.mnn.weight: codes in blocks with a minimum and a scale each.

A convolution says where its bytes lie: `external` [offset, bytes of header and codes, of alpha, of bias, 0].

    header  1 byte: 2, the number of dimensions; out and in, uint16, or int32 where one is above 65535; the values that
            codes stand for: their number in a byte, 256 as 0, and -2**(b-1) .. 2**(b-1)-1 as int8
    codes   a stream of bits, the highest bit of each code first: 4 bits have the first code in the high nibble
    alpha   float32 [out, groups, 2]: minimum and scale; with a "middle" the first is min + 2**(b-1) * scale
    bias    float32 [out]

MNN computes scale * code + min, in float32. A convolution with aMin = -2**(b-1) has plain minima. One with aMin = 1 has
them with the middle, and so has a table of embeddings, which MNN reads by itself.

Rows have a multiple of 8 columns, so that each begins with a byte.

Source: MNN 3.6.1, source/core/ConvolutionCommon.cpp, transformers/llm/engine/src/diskembedding.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qalora.errors import FormatError
from qalora.tensor import pack_codes, packed_row_bytes, unpack_codes

__all__ = [
    "WIDE",
    "Item",
    "from_alpha",
    "from_stream",
    "header_bytes",
    "lay_out",
    "stream_shape",
    "to_alpha",
    "to_stream",
]

WIDE = 65535
"""The largest number of rows or columns that a header holds in 16 bits."""

_RUN = {2: (1, 4), 3: (3, 8), 4: (1, 2), 5: (5, 8), 6: (3, 4), 8: (1, 1)}
"""bits -> (bytes, codes): the smallest run of whole bytes that holds whole codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A tensor in the file: its type, its shape, and where it begins. shape of packed codes: [out, bytes of a row]."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def row_at(self, row: int) -> int:
        """Bytes before a row."""
        return row * math.prod(self.shape[1:]) * self.dtype.itemsize


def lay_out(items: Iterable[Item], start: int) -> tuple[dict[str, Item], int]:
    """Give each its offset, one right behind the other from `start` on; by name, and the size of the file."""
    placed, at = dict[str, Item](), start
    for item in items:
        if item.name in placed:
            raise ValueError(f"two items are called {item.name}")
        placed[item.name] = replace(item, offset=at)
        at += item.nbytes
    return placed, at


def header_bytes(shape: tuple[int, int], bits: int) -> bytes:
    """What stands before the codes of a weight [out, in]."""
    size, half = 4 if max(shape) > WIDE else 2, 1 << (bits - 1)
    values = [(1 << bits) % 256, *(value % 256 for value in range(-half, half))]
    return bytes([2]) + b"".join(count.to_bytes(size, "little") for count in shape) + bytes(values)


def to_stream(packed: Tensor, bits: int) -> Tensor:
    """uint8 [out, in*bits/8], lowest bits first, as the same codes with the highest bits first.

    Within a run of bytes these are the codes in the opposite order, read from its end.
    """
    size, codes = _RUN[bits]
    if size == 1:
        return _turned(packed, bits)
    rows = packed.shape[0]
    turned = unpack_codes(packed, bits).view(rows, -1, codes).flip(-1).reshape(rows, -1)
    return pack_codes(turned, bits).view(rows, -1, size).flip(-1).reshape(packed.shape)


def from_stream(stream: Tensor, bits: int) -> Tensor:
    """Inverse of `to_stream`."""
    size, codes = _RUN[bits]
    if size == 1:
        return _turned(stream, bits)
    rows = stream.shape[0]
    turned = stream.view(rows, -1, size).flip(-1).reshape(stream.shape)
    return pack_codes(unpack_codes(turned, bits).view(rows, -1, codes).flip(-1).reshape(rows, -1), bits)


def _turned(data: Tensor, bits: int) -> Tensor:
    """uint8, the codes of each byte (8, 4 or 2 bits) in the opposite order: halves change places, then their halves."""
    data = data.contiguous()
    for shift, low in ((4, 0x0F), (2, 0x33)):
        if shift >= bits:
            upper = data.bitwise_right_shift(shift).bitwise_and_(low)
            data = data.bitwise_and(low).bitwise_left_shift_(shift).bitwise_or_(upper)
    return data


def to_alpha(scale: Tensor, minimum: Tensor, *, middle: int = 0) -> Tensor:
    """float32 [out, groups, 2] of scales and minima [out, groups]; middle: 2**(b-1), or 0 for plain minima."""
    moved = (minimum.double() + middle * scale.double()).float() if middle else minimum.float()
    return torch.stack([moved, scale.float()], dim=-1)


def from_alpha(alpha: Tensor, *, middle: int = 0) -> tuple[Tensor, Tensor]:
    """(scale, minimum), float32 [out, groups], as MNN computes them."""
    moved, scale = alpha[..., 0], alpha[..., 1]
    if not bool(torch.isfinite(alpha).all()):
        raise FormatError("alpha", expected="finite numbers", got="infinities, or no numbers")
    return scale.contiguous(), (moved - middle * scale if middle else moved).contiguous()


def stream_shape(shape: tuple[int, int], bits: int) -> tuple[int, int]:
    """The shape of the codes of a weight [out, in] as bytes."""
    return shape[0], packed_row_bytes(shape[1], bits)
