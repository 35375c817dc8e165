"""A width for each layer: how much each layer's output suffers at each width, and what a budget buys.

The error of a layer is mean |(W - V) x|^2 / mean |W x|^2 over its inputs in the float model, V the weight quantized by
the search (`hqq`), whatever the method that does it in the end. A budget is in bits per weight
of the linear layers, all they take counted: codes, scale, and min or zero point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qalora.calibration.streaming import LinearLayer, by_layer, stream
from qalora.checkpoint import Checkpoint
from qalora.devices import CPU, double
from qalora.errors import InputError, shown
from qalora.quantization.allocation import allocate
from qalora.quantization.gptq import output_error
from qalora.quantization.options import QuantizeOptions, quantize_weight
from qalora.tensor import BITS, QuantSpec

__all__ = ["WIDTHS", "Widths", "bits_per_weight", "choose_widths", "size_of"]

WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """options: for each linear weight by name; errors: by name and width; bits_per_weight: of all of them together."""

    options: Mapping[str, QuantizeOptions]
    errors: Mapping[str, Mapping[int, float]]
    bits_per_weight: float


def choose_widths(
    model: Checkpoint,
    windows: Tensor,
    options: QuantizeOptions,
    budget: float,
    *,
    widths: Sequence[int] = WIDTHS,
    device: torch.device = CPU,
    tick: Callable[[], None] = lambda: None,
) -> Widths:
    """The widths with the least sum of errors whose bits per weight are at most `budget`.

    windows  int64 [windows, tokens], see `calibration_windows`
    options  all but `bits`
    device   where the layers are computed and quantized, one at a time

    Raises InputError for a budget that the narrowest widths exceed, and for widths that are none.
    """
    if not widths or any(bits not in BITS for bits in widths):
        raise InputError(field="widths", expected=f"some of {', '.join(map(str, BITS))}", got=shown(list(widths)))
    options_by_width = {bits: replace(options, bits=bits) for bits in widths}
    weights = sum(math.prod(model.tensors[name].shape) for name in model.linears)
    sizes = {
        name: {bits: _size(model.tensors[name].shape, each) for bits, each in options_by_width.items()}
        for name in model.linears
    }
    least = sum(min(by_width.values()) for by_width in sizes.values()) / weights
    if not least <= budget < math.inf:
        raise InputError(field="budget", expected=f"{least:.4g} bits per weight or more, a number", got=f"{budget:g}")
    errors: dict[str, dict[int, float]] = {}
    quick = {bits: replace(each, method="hqq", fit_minima=False) for bits, each in options_by_width.items()}

    def visit(layer: LinearLayer) -> None:
        moments = double(layer.moments)  # once, for all widths
        whole = max(output_error(layer.weight, torch.zeros(()), moments), 1e-30)
        tensors = {bits: quantize_weight(layer.weight, each, layer.moments) for bits, each in quick.items()}
        errors[layer.name] = {
            bits: output_error(layer.weight, tensor.dequantize(), moments) / whole for bits, tensor in tensors.items()
        }

    stream(model, windows, by_layer(visit), tick, device=device)
    allocation = allocate(sizes, errors, math.floor(budget * weights))
    size = sum(sizes[name][bits] for name, bits in allocation.items())
    return Widths(
        options={name: options_by_width[bits] for name, bits in allocation.items()},
        errors=errors,
        bits_per_weight=size / weights,
    )


def bits_per_weight(model: Checkpoint) -> float:
    """What the linear weights of a quantized model take: codes, scale, and min or zero point."""
    total = weights = 0
    for name in model.linears:
        lazy = model.tensors[name]
        if lazy.spec is None:
            raise InputError(f"{name} holds floats")
        total += size_of(lazy.shape, lazy.spec)
        weights += math.prod(lazy.shape)
    return total / weights


def size_of(shape: Sequence[int], spec: QuantSpec) -> int:
    """Bits that a weight takes in our own folder."""
    count = math.prod(shape)
    each = 8 * spec.scale_dtype.itemsize
    if spec.zeros == "real":
        each += 8 * spec.min_dtype.itemsize
    elif spec.zero is None:
        each += 8
    return count * spec.bits + count // spec.group_size * each


def _size(shape: Sequence[int], options: QuantizeOptions) -> int:
    return size_of(shape, options.spec(shape[1]))
