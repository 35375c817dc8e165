"""How much of what was learned is kept: a factor of B @ A, chosen on held-out text after the last step.

A training at a high rate learns fast, and goes a little too far for text that was not trained on. `--strength auto`
computes the held-out loss at 1, and at the next lower factor as long as that is better. B is multiplied, in float32,
before it is folded and written, so that what is measured is what ships, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from qalora.training.layer import FoldedLinear

__all__ = ["STRENGTHS", "Tried", "at_strength", "best_of", "try_strengths"]

STRENGTHS = (1.0, 0.85, 0.7, 0.55)
"""In the order of trial."""

Tried = tuple[tuple[float, float], ...]
"""(strength, held-out loss) pairs, in the order of trial."""


def try_strengths(full: float, loss_at: Callable[[float], float]) -> Tried:
    """The strengths that were tried, the last one worse than the one before unless it is the last there is.

    full     the held-out loss at 1
    loss_at  gives that of another strength
    """
    tried = [(STRENGTHS[0], full)]
    for strength in STRENGTHS[1:]:
        tried.append((strength, loss_at(strength)))
        if not tried[-1][1] < tried[-2][1]:
            break
    return tuple(tried)


def best_of(tried: Tried) -> tuple[float, float]:
    """The pair of the least loss, the highest strength of several; one whose loss is no number only if all are so."""
    return min(tried, key=lambda pair: (math.isnan(pair[1]), pair[1]))


@contextmanager
def at_strength(layers: Sequence[FoldedLinear], strength: float) -> Iterator[None]:
    """Within, each layer's B is multiplied by the strength."""
    if strength == 1:
        yield
        return
    copies = [layer.b.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.b.mul_(strength)
        try:
            yield
        finally:
            for layer, b in zip(layers, copies, strict=True):
                layer.b.copy_(b)
