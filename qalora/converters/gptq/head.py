"""An output layer in GPTQ words, where it is one of its own that is quantized, and every loader reads it.

    "lm_head": true                  GPTQModel reads words for it then
    "block_name_to_quantize": ""     transformers (optimum) replaces all linear layers then; without it those of the
                                     blocks alone, and it fills the output layer with random numbers, with a warning

That takes the width and groups of the other layers, and zero points that the label fits. Any other output layer that is
quantized is written in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qalora.checkpoint import Checkpoint
from qalora.converters.wrapping import in_transformers
from qalora.tensor import QuantSpec

__all__ = ["HEAD", "block_settings", "head_fits", "head_settings", "is_read_by_transformers"]

HEAD = "lm_head.weight"

BLOCKS = "block_name_to_quantize"


def head_fits(model: Checkpoint, bits: int, group_size: int | None) -> bool:
    """Whether the output layer can be words of `bits` in groups of `group_size` (-1: whole rows) with its own zeros.

    In a model of text and images it cannot: transformers would look for words around the decoder too.
    """
    spec: QuantSpec | None = None if model.tied or model.wrapper is not None else model.tensors[HEAD].spec
    if spec is None or spec.zeros == "real" or spec.bits != bits or spec.scale_dtype != torch.float16:
        return False
    rows, columns = model.tensors[HEAD].shape
    size = columns if group_size == -1 else group_size
    return spec.group_size == size and not columns % 32 and not rows * bits % 32 and (bits != 3 or not rows % 32)


def head_settings(words: bool) -> dict[str, Any]:
    """quantization_config's entries for the output layer."""
    return {"lm_head": True, BLOCKS: ""} if words else {"lm_head": False}


def block_settings(model: Checkpoint) -> dict[str, Any]:
    """The entry that tells transformers where the words are, in a model that has linear layers elsewhere too."""
    return {} if model.wrapper is None else {BLOCKS: in_transformers(model.wrapper, "model.layers")}


def is_read_by_transformers(settings: Mapping[str, Any]) -> bool:
    """Whether a quantization_config makes transformers read an output layer in words."""
    return settings.get(BLOCKS) == ""
