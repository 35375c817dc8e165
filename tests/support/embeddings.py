"""Embeddings of codes."""

from __future__ import annotations

from dataclasses import replace

import torch

from qalora.checkpoint import Checkpoint
from qalora.testing import lazily, random_tensor

__all__ = ["EMBEDDING", "with_coded_embedding"]

EMBEDDING = "model.embed_tokens.weight"


def with_coded_embedding(model: Checkpoint) -> Checkpoint:
    """As a base has it whose embedding is in 8 bits, which a tied output shares."""
    rows, columns = model.tensors[EMBEDDING].shape
    made = random_tensor(rows, columns, bits=8, group_size=32, zeros="integer", seed=99)
    lazy = lazily(EMBEDDING, made, zeros="integer", min_dtype=torch.float32)
    return replace(model, tensors={**model.tensors, EMBEDDING: lazy})
