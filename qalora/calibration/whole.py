"""Quantizing a whole model as `qalora quantize` does: with or without a text, at one width or one for each layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qalora.calibration.quantizing import keeping
from qalora.calibration.text import Calibration, quantize_on_text
from qalora.calibration.widths import WIDTHS
from qalora.checkpoint import Checkpoint
from qalora.devices import find_device
from qalora.engines import Engine
from qalora.errors import about
from qalora.options import fields_of
from qalora.options.quantize import Quantize, RoundingOptions
from qalora.quantization.model import quantize
from qalora.quantization.options import QuantizeOptions
from qalora.training.data import check_data

__all__ = ["check_quantize", "quantize_model"]


def check_quantize(options: Quantize) -> None:
    """InputError for a device that torch does not have here, and for a calibration text that is neither here nor of the
    Hub, before any model is opened.
    """
    find_device(options.device, float64=False)
    if options.calibration is not None:
        with about("calibration"):
            check_data(options.calibration)


def quantize_model(
    model: Checkpoint,
    options: Quantize,
    *,
    keep: Path | None = None,
    tick: Callable[[], None] = lambda: None,
    engine: Engine | None = None,
) -> Checkpoint:
    """The model with its linear weights quantized; nothing is read yet, unless widths are to be chosen.

    keep  a file for the layers that are done, from which a later call goes on
    tick  called after each decoder layer, where inputs are computed
    engine  shares what can be shared then, see `quantize_calibrated`
    """
    shared: dict[str, Any] = {one.name: getattr(options, one.name) for one in fields_of(RoundingOptions)}
    shared |= {} if options.bits == "auto" else {"bits": options.bits}
    layer = QuantizeOptions(**shared)
    device = find_device(options.device, float64=False)
    if options.calibration is None:
        settings = {one.name: getattr(layer, one.name) for one in fields_of(QuantizeOptions)}
        quantized = quantize(model, requantize=options.requantize, device=device, **settings)
        return quantized if keep is None else keeping(model, quantized, layer, keep, device=device)
    return quantize_on_text(
        model,
        Calibration(data=options.calibration, tokens=options.calibration_tokens, length=options.calibration_length),
        layer,
        budget=options.budget,
        widths=sorted(options.widths) or WIDTHS,
        requantize=options.requantize,
        keep=keep,
        device=device,
        tick=tick,
        engine=engine,
    )
