"""What needs the inputs of a model's layers: quantizing with them, widths for each layer, minima that make up."""

from qalora.calibration.quantizing import quantize_calibrated
from qalora.calibration.text import calibration_windows
from qalora.calibration.widths import Widths, bits_per_weight, choose_widths

__all__ = ["Widths", "bits_per_weight", "calibration_windows", "choose_widths", "quantize_calibrated"]
