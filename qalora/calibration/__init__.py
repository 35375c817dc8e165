"""What needs the inputs of a model's layers: quantizing with them, widths for each layer, minima that make up."""

from qalora.calibration.quantizing import quantize_calibrated
from qalora.calibration.text import Calibration, calibration_windows, quantize_on_text
from qalora.calibration.whole import check_quantize, quantize_model
from qalora.calibration.widths import WIDTHS, Widths, bits_per_weight, choose_widths

__all__ = [
    "WIDTHS",
    "Calibration",
    "Widths",
    "bits_per_weight",
    "calibration_windows",
    "check_quantize",
    "choose_widths",
    "quantize_calibrated",
    "quantize_model",
    "quantize_on_text",
]
