"""AWQ's words ("gemm"): codes and zero points in int32, packed along `out`, to numbers.

For a weight [out, in] of b bits in G = in/group_size groups:

    qweight  int32 [in, out*b/32]   row i holds column i's codes
    qzeros   int32 [G, out*b/32]    row g holds group g's zero points, as they are
    scales   float [G, out]         weight = scales * (codes - zeros)

A row is one continuous bit stream, lowest bits first. At 4 bits eight columns that stand together are in another order:
field k of them holds column ORDER[k]. At other widths GPTQModel leaves the columns in their order, and AutoRound puts
them into that of 4 bits ("interleaved" here). Sources: GPTQModel 7.6.0, quantization/awq/utils/packing_utils.py;
auto-round 0.16.1, utils/bit_packing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora.errors import FormatError
from qalora.formats.fields import rows_as
from qalora.tensor import unpack_codes

__all__ = ["ORDER", "unpack_words"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: Tensor, columns: int, bits: int, *, interleaved: bool) -> Tensor:
    """uint8 [rows, columns] of words int32 [rows, columns*b/32]; `columns` fill whole words, and are in eights.

    Raises FormatError for words of another shape, InputError for another width.
    """
    if words.dtype != torch.int32 or words.ndim != 2 or columns % 8 or 32 * words.shape[1] != columns * bits:
        expected = f"int32 rows of {columns} codes of {bits} bits"
        raise FormatError("words", expected=expected, got=f"{words.dtype} {list(words.shape)}")
    fields = unpack_codes(rows_as(words, torch.uint8), bits)
    if not interleaved:
        return fields
    places = [ORDER.index(column) for column in range(8)]
    return fields.view(words.shape[0], -1, 8)[:, :, places].flatten(1)
