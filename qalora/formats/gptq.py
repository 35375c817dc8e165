"""GPTQ's words: codes and zero points in int32, here and back.

For a weight [out, in] of b bits in G = in/group_size groups:

    qweight  int32 [in*b/32, out]   column o holds row o's codes, packed along `in`, lowest bits first
    qzeros   int32 [G, out*b/32]    row g holds group g's zero points, packed along `out`, lowest bits first
    scales   float  [G, out]        weight = scales * (codes - zeros)
    g_idx    int32 [in]             group of each column

A column of qweight, and a row of qzeros, is one continuous bit stream: at 3 bits 32 codes fill three words. So the
bytes of a qweight column are those of a packed row of `qalora.tensor`, and packing is a transpose of words.

Two versions of qzeros: "gptq_v2" stores the zero point z, "gptq" (v1) stores z - 1 and so has no place for 0. What
loaders make of a stored 2**b - 1 in v1 differs: GPTQModel (and transformers through it) adds 1 to every field of a word
in one int32 addition at 2, 4 and 8 bits, so that the field becomes 0 and carries into the next one, and takes each
field modulo 2**b at 3 bits; AutoGPTQ's torch kernel takes it modulo 2**b; ExLlama's kernels read 2**b. Here it is read
as GPTQModel reads it, which undoes what GPTQModel's own writer does: 0 - 1 borrows from the next field.

At 5, 6 and 7 bits GPTQModel has a planar layout of its own, which is not here; auto-round has the bit stream at these
widths too, which is read here. Source: GPTQModel 7.6.0,
nn_modules/qlinear and utils/model.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qalora.errors import FormatError, InputError
from qalora.formats.fields import rows_as
from qalora.tensor import BITS as ALL_BITS
from qalora.tensor import pack_codes, unpack_codes

__all__ = ["BITS", "VERSIONS", "Version", "pack_qweight", "pack_qzeros", "unpack_qweight", "unpack_qzeros"]

BITS = (2, 3, 4, 8)
"""The widths that are stored as a continuous bit stream."""

Version = Literal["gptq", "gptq_v2"]
VERSIONS: tuple[Version, ...] = ("gptq", "gptq_v2")

TILE = 1 << 17
"""Words that are transposed at a time, in the cache."""

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""1 in every field of a word."""


def pack_qweight(packed: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """qweight int32 [in*b/32, out] of packed codes uint8 [out, in*b/8], or its rows start..stop-1; inverse of
    `unpack_qweight`.

    Raises InputError where a row does not fill whole words.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % 4:
        raise InputError(
            "packed codes", expected="uint8 [out, bytes] in whole words", got=f"{packed.dtype} {list(packed.shape)}"
        )
    words = rows_as(packed, torch.int32)[:, start:stop]
    out = torch.empty(words.shape[1], words.shape[0], dtype=torch.int32)
    step = max(1, TILE // max(1, words.shape[0]))
    for first in range(0, words.shape[1], step):
        out[first : first + step] = words[:, first : first + step].contiguous().t()
    return out


def unpack_qweight(qweight: Tensor) -> Tensor:
    """Packed codes uint8 [out, in*b/8] of qweight int32 [in*b/32, out]; inverse of `pack_qweight`."""
    _check_words("qweight", qweight)
    return rows_as(qweight.t(), torch.uint8)


def pack_qzeros(zero: Tensor, bits: int, version: Version) -> Tensor:
    """Qzeros int32 [G, out*b/32] of zero points uint8 [out, G]; inverse of `unpack_qzeros`.

    Raises InputError for another dtype, an `out` that does not fill whole words, a zero point that needs more bits, and
    in v1 for a zero point of 0.
    """
    _check_bits(bits)
    if zero.dtype != torch.uint8 or zero.ndim != 2 or zero.shape[0] * bits % 32:
        raise InputError(
            "zero points",
            expected=f"uint8 [out, groups] with out a multiple of {32 // bits if 32 % bits == 0 else 32}",
            got=f"{zero.dtype} {list(zero.shape)}",
        )
    fields = zero.t().contiguous()
    if version == "gptq":
        if bool((fields == 0).any()):
            raise InputError("zero points", expected="1 or more in version gptq", got="0", todo="write gptq_v2")
        fields = fields - 1
    packed = fields if bits == 8 else pack_codes(fields, bits)
    return rows_as(packed, torch.int32)


def unpack_qzeros(qzeros: Tensor, bits: int, version: Version) -> Tensor:
    """Zero points uint8 [out, G], each in 0..2**b-1, of qzeros int32 [G, out*b/32]; inverse of `pack_qzeros`.

    A field of 2**b - 1 in v1 is read as GPTQModel reads it: see the module's docstring.
    """
    _check_bits(bits, BITS if version == "gptq" else ALL_BITS)
    _check_words("qzeros", qzeros)
    if bits < 8 and 4 * qzeros.shape[1] % bits:
        raise FormatError("qzeros", expected=f"rows of whole codes of {bits} bits", got=f"{qzeros.shape[1]} words")
    words = qzeros
    if version == "gptq" and bits in _ONES:
        words = (words.to(torch.int64) + _ONES[bits]).to(torch.int32)
    fields = rows_as(words, torch.uint8)
    if bits < 8:
        fields = unpack_codes(fields, bits)
    if version == "gptq" and bits == 3:
        fields = (fields + 1) & 7
    return fields.t().contiguous()


def _check_bits(bits: int, known: tuple[int, ...] = BITS) -> None:
    if bits not in known:
        raise InputError("bits", expected=f"one of {', '.join(map(str, known))}", got=str(bits))


def _check_words(name: str, words: Tensor) -> None:
    if words.dtype != torch.int32 or words.ndim != 2:
        raise FormatError(name, expected="an int32 matrix", got=f"{words.dtype} {list(words.shape)}")
