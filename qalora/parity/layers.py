"""How much of the adapter each layer of an artefact holds, from the weights alone: no runtime, no text.

    lost = |W - W_adapted| / |W_adapted - W_base|        Frobenius norms, a layer

W_adapted is base + factor * B @ A with the minima that the adapter was trained with, by the reference's arithmetic and
not the fold's. 0 where all of it is there, 1 where none of it is; a layer that the adapter does not change has none.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.parity.reference import rounded_minima
from qalora.tensor import GroupQuantTensor

__all__ = ["adapter_by_layer"]


def adapter_by_layer(
    artifact: Checkpoint, base: Checkpoint, adapter: Adapter, minima: Literal["float16", "float32"]
) -> dict[str, float]:
    """{module: lost}, in the adapter's order; layers that the artefact lacks or has in another shape are left out."""
    shares = {}
    for module, layer in adapter.layers.items():
        name = f"{module}.weight"
        if name not in artifact.tensors or artifact.tensors[name].shape != layer.shape:
            continue
        before, mine = base.tensors[name].load_quantized(), artifact.tensors[name].load()
        folded = rounded_minima(before, layer, minima)
        effect = _distance(folded, before)
        if effect:
            shares[module] = _distance(mine, folded) / effect
    return shares


def _distance(one: Tensor | GroupQuantTensor, two: GroupQuantTensor) -> float:
    """Of two weights; where codes and scales are the same, a group's columns are all as far apart as its minima."""
    if isinstance(one, GroupQuantTensor) and one.g_idx is None and two.g_idx is None:
        fine = math.gcd(one.group_size, two.group_size)
        a, b = one.regrouped(fine), two.regrouped(fine)
        if a.bits == b.bits and torch.equal(a.packed, b.packed) and torch.equal(a.scale, b.scale):
            return _norm(a.min.double() - b.min.double()) * math.sqrt(fine)
    weights = one.dequantize() if isinstance(one, GroupQuantTensor) else one.float()
    return _norm(weights - two.dequantize())


def _norm(difference: Tensor) -> float:
    return float(difference.double().norm())
