"""From float weights to integer groups. Which layers, and reading and writing them, is the converters' business."""

from qalora.quantization.model import quantize
from qalora.quantization.rounding import ZEROS, Zeros, quantize_tensor

__all__ = ["ZEROS", "Zeros", "quantize", "quantize_tensor"]
