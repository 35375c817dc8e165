"""Bytes seen as fields of another width: what several layouts pack alike."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["from_nibbles", "nibbles", "rows_as"]


def nibbles(values: Tensor) -> Tensor:
    """uint8 [rows, ceil(columns / 2)]: rows of 4-bit values, two a byte, low half first, an odd row ends with 0."""
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, ::2] | (values[:, 1::2] << 4)


def from_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `nibbles`."""
    return torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1)[:, :columns]


def rows_as(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of each row as another dtype. Goes by way of one dimension: the stride of a single row is anything."""
    return matrix.reshape(-1).view(dtype).view(matrix.shape[0], -1)
