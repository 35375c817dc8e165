"""The text that layers' inputs are computed on."""

from __future__ import annotations

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.errors import InputError
from qalora.training.data import make_blocks, read_documents

__all__ = ["calibration_windows"]


def calibration_windows(model: Checkpoint, data: str, *, tokens: int = 8192, length: int = 256) -> Tensor:
    """int64 [windows, length]: token ids, `tokens` of them or as many as there are, spread over the whole text.

    data  a text or JSONL file, or a dataset of the Hub, as `qalora.training.data` reads it

    InputError for data that is too short or not as it should be, and for more tokens than the model's context holds.
    """
    from qalora.converters.tokenizer import load_tokenizer

    context = model.config.get("max_position_embeddings")
    if isinstance(context, int) and length > context:
        raise InputError("--sequence-length", expected=f"at most {context}, the model's context", got=str(length))
    tokenizer = load_tokenizer(model)
    found = make_blocks(read_documents(data, tokenizer), tokenizer, length).tokens
    count = min(len(found), max(1, tokens // length))
    return found[torch.arange(count) * len(found) // count]
