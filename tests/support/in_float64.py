"""What torch makes of a model in float64, and how far its float32 is from that."""

from __future__ import annotations

import torch

from qalora.checkpoint import Checkpoint
from qalora.converters.torch_module import build

__all__ = ["float64"]


def float64(model: Checkpoint, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits in float64, and the largest error of torch's float32: what one order of sums makes of them."""
    module = build(model)
    with torch.no_grad():
        single = module(input_ids=tokens).logits
        double = module.double()(input_ids=tokens).logits
    return double, float((single.double() - double).abs().max())
