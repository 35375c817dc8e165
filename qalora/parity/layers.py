"""How much of the adapter each layer of an artefact holds, from the weights alone: no runtime, no text.

    lost = |W - W_adapted| / |W_adapted - W_base|        Frobenius norms, a layer

W_adapted is base + factor * B @ A with the minima that the adapter was trained with, by the reference's arithmetic and
not the fold's. 0 where all of it is there, 1 where none of it is; a layer that the adapter does not change has none.
"""

from __future__ import annotations

import math

from torch import Tensor

from qalora.tensor import GroupQuantTensor, same_bits

__all__ = ["AdapterShare"]


class AdapterShare:
    """The share of the adapter that is missing from one layer, added up over its rows."""

    def __init__(self) -> None:
        self._error = self._effect = 0.0

    def add(self, mine: Tensor | GroupQuantTensor, base: GroupQuantTensor, adapted: GroupQuantTensor) -> None:
        """Rows of an artefact's layer, of the base's, and of what they should be."""
        self._error += _squared_distance(mine, adapted)
        self._effect += _squared_distance(adapted, base)

    @property
    def lost(self) -> float | None:
        """None where the adapter changes nothing."""
        return math.sqrt(self._error / self._effect) if self._effect else None


def _squared_distance(one: Tensor | GroupQuantTensor, two: GroupQuantTensor) -> float:
    """Of two weights; where codes and scales are the same, a group's columns are all as far apart as its minima."""
    if isinstance(one, GroupQuantTensor) and one.g_idx is None and two.g_idx is None:
        fine = math.gcd(one.group_size, two.group_size)
        a, b = one.regrouped(fine), two.regrouped(fine)
        if a.bits == b.bits and same_bits(a.packed, b.packed) and same_bits(a.scale, b.scale):
            return _square(a.min.double() - b.min.double()) * fine
    weights = one.dequantize() if isinstance(one, GroupQuantTensor) else one.float()
    return _square((weights - two.dequantize()).double())


def _square(difference: Tensor) -> float:
    return float(difference.square().sum())
