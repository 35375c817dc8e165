"""The warnings of an MLX folder."""

from __future__ import annotations

import torch

from qalora.checkpoint import Checkpoint
from qalora.converters.huggingface import stored_tensors
from qalora.inspection.records import Finding

__all__ = ["findings"]


def findings(model: Checkpoint) -> list[Finding]:
    """MLX's biases are the minima; it also computes in the dtype that they have."""
    biases = [entry.dtype for name, (_, entry) in stored_tensors(model.path).items() if name.endswith(".biases")]
    coarse = biases.count(torch.bfloat16)
    if not coarse:
        return []
    return [
        Finding(
            code="runtime",
            message="MLX holds its minima in bfloat16, and computes in it: an adapter that is folded into them "
            "loses about 3 %, where float16 loses 0.3 %",
            evidence=f"{coarse} of {len(biases)} layers have biases in bfloat16, with 8 significant bits",
            todo="export it again from the model that it was made of: qalora export --to mlx",
        )
    ]
