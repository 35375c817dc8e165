"""The formats that tests write."""

from qalora.options.words import TARGETS

__all__ = ["OF_REAL_ZEROS"]

OF_REAL_ZEROS = tuple(name for name in TARGETS if name != "compressed-tensors")
"""All formats that hold real zero points."""
