"""From float weights to integer groups. Which layers, and reading and writing them, is the converters' business.

Methods that need the layers' inputs are given their second moments here; `qalora.calibration` gathers those.
"""

from qalora.quantization.model import quantize
from qalora.quantization.options import METHODS, QuantizeOptions, quantize_weight
from qalora.quantization.rounding import ZEROS, Zeros, quantize_tensor

__all__ = ["METHODS", "ZEROS", "QuantizeOptions", "Zeros", "quantize", "quantize_tensor", "quantize_weight"]
