"""The formats that tests write."""

import importlib.util

import pytest

from qalora.options.words import TARGETS

__all__ = ["OF_REAL_ZEROS", "skip_without_mnn"]

OF_REAL_ZEROS = tuple(name for name in TARGETS if name != "compressed-tensors")
"""All formats that hold real zero points."""


def skip_without_mnn() -> None:
    """Skip a test that runs MNN where it is not installed, which it need not be."""
    if importlib.util.find_spec("MNN") is None:
        pytest.skip("pip install 'qalora[mnn]'")
