"""Rewrite an adapter from one convention, or one pool size, into another: the same dW, no bit of A or B rounded.

The constant between two conventions goes into alpha, layer by layer (PEFT's `alpha_pattern`), never into A or B. A
finer pool repeats the columns of A. The factor of a layer, a float64 number, is carried over as it is; the alpha that
is written is the float64 nearest to the exact quotient, chosen among its neighbours so that a reader that computes the
factor from it gets the very same number wherever there is such an alpha (else a neighbour, 1e-16 away; our own record
beside it keeps the number itself).
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from qalora.adapter.records import Adapter, AdapterLayer, Convention, convention_factor
from qalora.errors import AdapterError

__all__ = ["alpha_for", "convert", "repool", "to_plain_lora"]


def convert(adapter: Adapter, convention: Convention) -> Adapter:
    """The same adapter in another convention: each layer's A, B and factor stay, its scaling changes.

    PEFT has one `qalora_group_size` for all layers, so that layers with different pool sizes get their common divisor.
    Raises AdapterError where that is 1: PEFT applies such an adapter in two ways, according to the base's layers.
    """
    layers = dict(adapter.layers)
    if convention == "peft" and layers:
        common = math.gcd(*(layer.pool_size for layer in layers.values()))
        if common == 1:
            raise AdapterError(
                "the pool sizes of the adapter's layers",
                expected="a common divisor above 1, since PEFT has one qalora_group_size for all",
                got=", ".join(map(str, sorted({layer.pool_size for layer in layers.values()}))),
                todo="write it as a plain LoRA, which PEFT reads too: --to plain",
            )
        layers = {module: repool(layer, common) for module, layer in layers.items()}
    rescaled = {
        module: replace(layer, scaling=alpha_for(layer, convention) / layer.rank) for module, layer in layers.items()
    }
    return replace(adapter, layers=rescaled, convention=convention)


def repool(layer: AdapterLayer, pool_size: int) -> AdapterLayer:
    """The same dW with a finer pool, which divides the layer's: the columns of A repeat. Scaling is left as it is."""
    if pool_size < 1 or layer.pool_size % pool_size:
        raise AdapterError("pool_size", expected=f"a divisor of {layer.pool_size}", got=str(pool_size))
    if pool_size == layer.pool_size:
        return layer
    return replace(layer, a=layer.a.repeat_interleave(layer.pool_size // pool_size, dim=1), pool_size=pool_size)


def to_plain_lora(adapter: Adapter) -> Adapter:
    """The adapter as an ordinary LoRA, which every LoRA runtime reads: pool size 1, scaling equal to the factor."""
    layers = {module: repool(layer, 1) for module, layer in adapter.layers.items()}
    return convert(replace(adapter, layers=layers), "paper")


def alpha_for(layer: AdapterLayer, convention: Convention) -> float:
    """The alpha that gives the layer's factor in a convention, without rsLoRA; see the module's docstring."""
    columns = layer.shape[1]
    exact = Fraction(layer.factor) * layer.rank
    if convention != "paper":
        exact *= layer.pool_size
    if convention == "peft":
        exact /= columns // layer.pool_size
    near = float(exact)
    up, down = math.nextafter(near, math.inf), math.nextafter(near, -math.inf)
    for alpha in (float(round(near)), near, up, down):
        if convention_factor(convention, alpha / layer.rank, columns, layer.pool_size) == layer.factor:
            return alpha
    return near
