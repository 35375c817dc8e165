"""Batches of sequences of different lengths: token ids and a mask, filled up on one side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Side", "pad", "positions", "unpad"]

Side = Literal["left", "right"]


def pad(sequences: Sequence[Sequence[int]], side: Side) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 [batch, longest]: token 0 and mask 0 where a sequence is filled up."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for n, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if side == "left" else slice(0, len(sequence))
        ids[n, place], mask[n, place] = torch.tensor(list(sequence)), 1
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """int64 [batch, length]: the position of each token in its own sequence; 0 where it is filled up."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def unpad(values: Tensor, sequences: Sequence[Sequence[int]], side: Side) -> list[Tensor]:
    """Of [batch, longest, ...], the part of each sequence: [its length, ...]."""
    longest = values.shape[1]
    return [
        row[longest - len(sequence) :] if side == "left" else row[: len(sequence)]
        for row, sequence in zip(values, sequences, strict=True)
    ]
