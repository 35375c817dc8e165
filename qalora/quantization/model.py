"""Quantize a whole model lazily: each linear weight is rounded when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.devices import CPU
from qalora.errors import InputError
from qalora.quantization.options import QuantizeOptions, quantize_weight
from qalora.tensor import GroupQuantTensor, QuantSpec

__all__ = ["plan_specs", "quantize"]


def quantize(model: Checkpoint, *, requantize: bool = False, device: torch.device = CPU, **options: Any) -> Checkpoint:
    """The model with its linear weights quantized; embedding, norms and output layer stay as they are.

    device   where it is computed, a tensor or some rows of it at a time; what is made lies on the CPU
    options  those of `QuantizeOptions`

    Raises InputError, before anything is read, for an option out of range, for
    one that needs the layers' inputs (see `qalora.calibration`), for a layer that the group size does not divide, and
    for a model that holds integers already unless `requantize` is set (rounding what was rounded before loses more).
    """
    settings = QuantizeOptions(**options)
    if settings.needs_inputs:
        what = "fitted minima" if settings.fit_minima else settings.method
        raise InputError(f"{what} needs the layers' inputs", todo="give a text: `calibration`")
    specs = plan_specs(model, dict.fromkeys(model.linears, settings), requantize=requantize)
    lazily = {name: _lazily(model.tensors[name], settings, spec, device) for name, spec in specs.items()}
    return replace(model, tensors={**model.tensors, **lazily})


def plan_specs(model: Checkpoint, options: Mapping[str, QuantizeOptions], *, requantize: bool) -> dict[str, QuantSpec]:
    """What each linear weight will be. Raises InputError for a group size that does not divide a layer, and for a model
    that holds integers already unless `requantize` is set.
    """
    if any(model.tensors[name].spec for name in model.linears) and not requantize:
        raise InputError(
            f"{model.path} holds integers already, and rounding them again loses more",
            todo="use it as it is, or give `requantize`",
        )
    specs = {}
    for name in model.linears:
        try:
            specs[name] = options[name].spec(model.tensors[name].shape[1])
        except InputError as error:
            raise InputError(f"{name}: {error}", field=error.field) from error
    return specs


def _lazily(source: LazyTensor, options: QuantizeOptions, spec: QuantSpec, device: torch.device) -> LazyTensor:
    def read(start: int, stop: int) -> GroupQuantTensor:
        rows = source.rows(start, stop)
        weight = rows if isinstance(rows, torch.Tensor) else rows.dequantize()
        return quantize_weight(weight.to(device), options).to(CPU)

    return LazyTensor(name=source.name, shape=source.shape, spec=spec, by_rows=source.by_rows, read=read)
