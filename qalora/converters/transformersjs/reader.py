"""Read a folder for transformers.js back, as a graph of the ONNX target is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.converters.onnx.reader import read_graph
from qalora.converters.transformersjs.files import GRAPH

__all__ = ["read"]


def read(path: Path) -> Checkpoint:
    """Open a folder. Reads the graph and no weights. Raises what `read_graph` raises."""
    return replace(read_graph(path / GRAPH, path, "transformersjs"), path=path)
