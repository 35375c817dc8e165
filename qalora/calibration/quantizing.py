"""Quantize a model with the inputs that its layers see on a text, a decoder layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from qalora.calibration.streaming import LinearLayer, stream
from qalora.calibration.tensor_file import TensorFile
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.errors import InputError
from qalora.quantization.model import plan_specs
from qalora.quantization.options import QuantizeOptions, quantize_weight
from qalora.tensor import GroupQuantTensor, QuantSpec

__all__ = ["quantize_calibrated"]


def quantize_calibrated(
    model: Checkpoint,
    windows: Tensor,
    options: QuantizeOptions | Mapping[str, QuantizeOptions],
    *,
    requantize: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """The model with its linear weights quantized, each on the inputs that the quantized layers before it give.

    windows  int64 [windows, tokens], see `calibration_windows`
    options  for all linear weights, or for each by name
    tick     called after each decoder layer

    All the work is done when the first linear weight is read; what comes out waits in a temporary file. Raises
    InputError, before anything is read, as `qalora.quantization.quantize` does. Deterministic with the same number of
    threads.
    """
    options_by_name = dict.fromkeys(model.linears, options) if isinstance(options, QuantizeOptions) else dict(options)
    specs = plan_specs(model, options_by_name, requantize=requantize)
    file: list[TensorFile] = []

    def computed() -> TensorFile:
        if not file:
            file.append(_quantized(model, windows, options_by_name, tick))
        return file[0]

    lazily = {name: _lazily(model.tensors[name], spec, computed) for name, spec in specs.items()}
    return replace(model, tensors={**model.tensors, **lazily})


def _quantized(
    model: Checkpoint, windows: Tensor, options: Mapping[str, QuantizeOptions], tick: Callable[[], None]
) -> TensorFile:
    file = TensorFile()

    def visit(layer: LinearLayer) -> Tensor:
        try:
            tensor = quantize_weight(layer.weight, options[layer.name], layer.moments)
        except InputError as error:
            raise InputError(f"{layer.name}: {error}") from error
        file.put(layer.name, tensor)
        return tensor.dequantize()

    stream(model, windows, visit, tick)
    return file


def _lazily(source: LazyTensor, spec: QuantSpec, computed: Callable[[], TensorFile]) -> LazyTensor:
    def read(start: int, stop: int) -> GroupQuantTensor:
        return computed().rows(source.name, start, stop)

    return LazyTensor(name=source.name, shape=source.shape, spec=spec, read=read)
