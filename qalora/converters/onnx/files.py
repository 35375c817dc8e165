"""The files of an ONNX folder, and what a graph says of how it is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora.converters.format import EXACT, Rounding
from qalora.formats.files import contained
from qalora.formats.onnx import read_model

__all__ = [
    "JS_KEY",
    "MODEL",
    "VERSION",
    "VERSION_KEY",
    "accuracy_level",
    "file_metadata",
    "graphs",
    "is_decoder",
    "is_standard",
    "memory",
    "properties",
    "rounding",
    "source_files",
    "weight_files",
]

MODEL = "model.onnx"
"""The graph of a folder."""

JS_KEY = "transformers.js_config"
"""What transformers.js finds in a config.json of the graph beside it."""

VERSION_KEY, VERSION = "qalora.onnx", "2"
"""Metadata of a graph: the version of its layout. Graphs of the first have none (`version1`)."""


def is_decoder(path: Path) -> bool:
    """Whether a path is a graph, or a folder of one that has no safetensors, which would be the model then."""
    return path.suffix == ".onnx" if path.is_file() else bool(graphs(path)) and not any(path.glob("*.safetensors*"))


def graphs(folder: Path) -> Sequence[Path]:
    """The graphs of a folder: that for ONNX Runtime, and the portable one where it is there."""
    first, portable = folder / MODEL, folder / "portable" / MODEL
    return [path for path in (first, portable) if path.is_file()] if first.is_file() else []


def weight_files(path: Path) -> Iterable[Path]:
    """A graph, or the first of a folder, and its data."""
    graph = path / MODEL if path.is_dir() else path
    items = read_model(graph).graph.initializer
    entries = [entry for item in items for entry in item.external_data if entry.key == "location"]
    names = {entry.value for entry in entries if isinstance(entry.value, str)}  # bytes: no UTF-8
    return [graph, *(contained(graph.parent, name) for name in sorted(names))]


def source_files(path: Path) -> Iterable[Path]:
    """What is beside a graph, and its data where they lie below."""
    return sorted({*path.parent.iterdir(), *weight_files(path)})


def file_metadata(path: Path) -> Mapping[str, Any] | None:
    """The properties of a folder's graph."""
    return properties(path) if path.name == MODEL else None


def properties(path: Path) -> dict[str, Any]:
    """The properties of a graph."""
    entries = read_model(path).metadata_props
    return {entry.key: entry.value for entry in entries if isinstance(entry.key, str)}  # bytes: no UTF-8


def rounding(path: Path) -> Rounding:
    """Inputs to int8 where the graph asks for it. Graphs of the first version subtract the nearest zero points."""
    if accuracy_level(path) != 4:
        return EXACT
    first = VERSION_KEY not in {entry.key for entry in read_model(path).metadata_props}
    return Rounding(kind="int8", zeros="nearest" if first else "symmetric")


def accuracy_level(path: Path) -> int:
    """The highest accuracy_level of a graph's MatMulNBits nodes, 0 where there are none; 4 has int8 activations."""
    graph = read_model(path)
    nodes = [*graph.graph.node, *(node for function in graph.functions for node in function.node)]
    levels = [a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"]
    return max(levels, default=0)


def memory(path: Path) -> float:
    """Bytes that ONNX Runtime takes while it opens a graph, for a byte of its files: it keeps codes for its own
    operators, and floats for standard ones. Seen: 1.2 on 8 billion weights, 1.8 on a billion with a tied embedding in
    float32, 3.9 with standard operators.
    """
    return 4 if is_standard(path) else 2


def is_standard(path: Path) -> bool:
    """Whether a graph has standard operators only, and functions of its own that are made of them."""
    graph = read_model(path)
    own = {function.domain for function in graph.functions}
    return all(opset.domain in own | {"", "ai.onnx"} for opset in graph.opset_import)
