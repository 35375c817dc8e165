"""Where it goes wrong: the hidden state after each layer, of a runtime and of the reference, over the same tokens.

    error = |h - reference| / |reference|        Frobenius norms over tokens x hidden, after each layer

The bound of a layer is measured, as those of the logits are: 4 times what summing the reference in another order
makes at that very layer, and 2 times what the runtime's own rounding makes there. The first layer beyond it is at
fault, as later ones inherit its error. A runtime that does not tell its layers is judged by the weights read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from qalora.parity.gates import ROUNDING_FACTOR
from qalora.parity.noise import NOISE_FACTOR, NOISE_FLOOR
from qalora.parity.reference import Forward, Reference
from qalora.parity.roundings import EXACT, Rounding
from qalora.parity.weights import WeightMetrics

__all__ = ["LAYER_TOKENS", "LayerError", "compare_layers", "first_fault"]

LAYER_TOKENS = 32
"""Tokens of the first window that the layers are compared on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """How far the hidden state after one layer is from the reference's, over its norm, and how far it may be."""

    error: float
    bound: float


def compare_layers(
    outputs: Sequence[Tensor], reference: Reference, expected: Forward, rounding: Rounding, tokens: Sequence[int]
) -> tuple[LayerError, ...]:
    """Compare [tokens, hidden] after each layer with the reference's; none where the runtime tells none."""
    if not outputs:
        return ()
    plain = reference.layers(tokens, expected)
    other = reference.layers(tokens, replace(expected, permuted=True))
    rounded = plain if rounding == EXACT else reference.layers(tokens, replace(expected, rounding=rounding))
    exact = rounding.kind in ("none", "weights")  # the reference repeats these kernels, so they are held against that
    expected_outputs = rounded if exact else plain
    errors = []
    for mine, theirs, usual, shifted, modelled in zip(outputs, expected_outputs, plain, other, rounded, strict=True):
        bound = max(NOISE_FLOOR, NOISE_FACTOR * _relative(shifted, usual))
        bound += 0.0 if exact else ROUNDING_FACTOR * _relative(modelled, usual)
        errors.append(LayerError(error=_relative(mine, theirs), bound=bound))
    return tuple(errors)


def _relative(a: Tensor, b: Tensor) -> float:
    norm = float(b.double().norm())
    difference = float((a.double() - b.double()).norm())
    return difference / norm if norm else float(difference > 0)


def first_fault(layers: Sequence[LayerError], weights: WeightMetrics) -> str:
    """One sentence: the first layer at fault, and the weights there that differ."""
    at = next((n for n, layer in enumerate(layers) if not layer.error <= layer.bound), None)
    differing = [difference.name for difference in weights.different] + [
        name.partition(":")[0] for name in weights.shapes
    ]
    if at is not None:
        own = [name.split(".", 3)[-1] for name in differing if name.startswith(f"model.layers.{at}.")]
        because = f"its weights that differ: {', '.join(own)}" if own else "its weights are the reference's"
        size = f"off by {layers[at].error:.2g} of its norm, bound {layers[at].bound:.2g}"
        return f"first at fault is layer {at}: {size}; {because}"
    if layers:
        return "every layer is within its bound: what follows the last one is at fault, the norm or the output layer"
    if differing:
        return f"this runtime does not tell its layers; the first weight that differs is {differing[0]}"
    return "this runtime does not tell its layers, and its weights are the reference's"
