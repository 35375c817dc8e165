"""How much of the adapter each layer of an artefact holds, from the weights alone: no runtime, no text.

    lost = |W - W_adapted| / |W_adapted - W_base|        Frobenius norms, a layer

W_adapted is base + factor * B @ A with the minima that the adapter was trained with, by the reference's arithmetic and
not the fold's. 0 where all of it is there, 1 where none of it is; a layer that the adapter does not change has none.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.parity.reference import rounded_minima

__all__ = ["adapter_by_layer"]


def adapter_by_layer(
    artifact: Checkpoint, base: Checkpoint, adapter: Adapter, minima: Literal["float16", "float32"]
) -> dict[str, float]:
    """{module: lost}, in the adapter's order; layers that the artefact lacks or has in another shape are left out."""
    found = {}
    for module, layer in adapter.layers.items():
        name = f"{module}.weight"
        if name not in artifact.tensors or artifact.tensors[name].shape != layer.shape:
            continue
        before = base.tensors[name].load_quantized()
        wanted = rounded_minima(before, layer, minima).dequantize()
        effect = _norm(wanted - before.dequantize())
        if effect:
            found[module] = _norm(artifact.tensors[name].load_float().float() - wanted) / effect
    return found


def _norm(difference: Tensor) -> float:
    return float(difference.double().norm())
