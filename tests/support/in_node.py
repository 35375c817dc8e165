"""Node, and the packages that tests of transformers.js run in it: no part of qalora's environment."""

from __future__ import annotations

import pytest

from qalora.errors import MissingLibraryError
from qalora.parity.runtimes import RUNTIMES
from qalora.parity.runtimes.node import check_packages

__all__ = ["IN_NODE", "missing_in_node", "skip_without_node"]

IN_NODE = tuple(kind for kind, parts in RUNTIMES.items() if parts.node)
"""The runtimes that run in Node."""


def missing_in_node() -> str:
    """What is missing, in a sentence; "" where all is there."""
    try:
        check_packages("transformers.js")
    except MissingLibraryError as error:
        return str(error)
    return ""


def skip_without_node() -> None:
    """Skip a test, by the name of what is missing."""
    if missing_in_node():
        pytest.skip(missing_in_node())
