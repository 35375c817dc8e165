"""From float weights to integer groups. Which layers, and reading and writing them, is the converters' business."""

from qalora.quantize.model import quantize
from qalora.quantize.rounding import ZEROS, Zeros, quantize_tensor

__all__ = ["ZEROS", "Zeros", "quantize", "quantize_tensor"]
