"""Groups at the edges of what a format holds."""

from __future__ import annotations

from dataclasses import replace

from qalora.tensor import GroupQuantTensor

__all__ = ["edges"]


def edges(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """Groups of one value, groups of zeros, minima near 0, and scales below 0."""
    scale, minimum = tensor.scale.clone(), tensor.min.clone()
    scale[0], scale[1], minimum[1] = 0, 0, 0
    minimum[2] = 2.0**-24
    scale[3] = -scale[3]
    return replace(tensor, scale=scale, min=minimum)
