"""compressed-tensors' words ("pack-quantized"): codes and zero points in int32, here and back.

For a weight [out, in] of b bits in G = in/group_size groups:

    weight_packed      int32 [out, in*b/32]   row o holds row o's codes, packed along `in`, lowest bits first
    weight_zero_point  int32 [out*b/32, G]    column g holds group g's zero points, packed along `out`; absent where
                                              every one is 2**(b-1)
    weight_scale       float [out, G]         weight = weight_scale * (codes - zeros)
    weight_shape       int64 [2]              out, in
    weight_g_idx       int32 [in]             group of each column, where groups mix columns

Codes and zero points are stored as they are, 0..2**b-1; the library's own are signed, 2**(b-1) less. A row of
weight_packed is one continuous bit stream, filled up to a whole word, so that its bytes are those of a packed row of
`qalora.tensor`. Earlier versions, such as 0.9.4, put 32 // b codes into each word, and no code into two words
("padded" here): at 3, 5 and 6 bits such a row has other bytes, and is longer where it has many columns.

Source: compressed-tensors 0.20.1 and 0.9.4, compressors/pack_quantized (0.9.4: compressors/quantized_compressors).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from qalora.errors import FormatError, InputError
from qalora.formats.fields import rows_as
from qalora.tensor import BITS, pack_codes, unpack_codes

__all__ = ["pack_rows", "pack_zeros", "row_words", "unpack_rows", "unpack_zeros"]


def row_words(count: int, bits: int, *, padded: bool = False) -> int:
    """Words that `count` codes take; padded: as earlier versions pack."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


def pack_rows(packed: Tensor) -> Tensor:
    """weight_packed int32 [out, words] of packed codes uint8 [out, in*b/8]; inverse of `unpack_rows`."""
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise InputError("packed codes", expected="uint8 [out, bytes]", got=f"{packed.dtype} {list(packed.shape)}")
    return rows_as(pad(packed, (0, -packed.shape[1] % 4)), torch.int32)


def unpack_rows(words: Tensor, columns: int, bits: int, *, padded: bool = False) -> Tensor:
    """Packed codes uint8 [out, in*b/8] of weight_packed int32 [out, words]; `columns`, a multiple of 8, is `in`.

    Raises FormatError for words of another shape, InputError for another width.
    """
    _check(words, columns, bits, padded)
    if padded and 32 % bits:
        return pack_codes(_padded_codes(words, columns, bits), bits)
    return rows_as(words, torch.uint8)[:, : columns * bits // 8].contiguous()


def pack_zeros(zero: Tensor, bits: int) -> Tensor:
    """weight_zero_point int32 [words, G] of zero points uint8 [out, G]; inverse of `unpack_zeros`."""
    rows = zero.shape[0]
    fields = pack_codes(pad(zero.t(), (0, -rows % 8)).contiguous(), bits)
    words = row_words(rows, bits)
    return rows_as(pad(fields, (0, max(0, 4 * words - fields.shape[1])))[:, : 4 * words], torch.int32).t().contiguous()


def unpack_zeros(words: Tensor, rows: int, bits: int, *, padded: bool = False) -> Tensor:
    """Zero points uint8 [out, G], each in 0..2**b-1, of weight_zero_point int32 [words, G]; `rows` is `out`."""
    turned = words.t().contiguous()
    _check(turned, rows, bits, padded)
    if padded and 32 % bits:
        return _padded_codes(turned, rows, bits).t().contiguous()
    size = -(-rows // 8) * bits
    fields = rows_as(turned, torch.uint8)
    fields = pad(fields, (0, max(0, size - fields.shape[1])))[:, :size].contiguous()
    return unpack_codes(fields, bits)[:, :rows].t().contiguous()


def _padded_codes(words: Tensor, count: int, bits: int) -> Tensor:
    """uint8 [rows, count] of words with 32 // bits codes each."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(1)[:, :count].contiguous()


def _check(words: Tensor, count: int, bits: int, padded: bool) -> None:
    if bits not in BITS:
        raise InputError("bits", expected=f"one of {', '.join(map(str, BITS))}", got=str(bits))
    expected = row_words(count, bits, padded=padded)
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != expected:
        raise FormatError("words", expected=f"int32 rows of {expected} words", got=f"{words.dtype} {list(words.shape)}")
