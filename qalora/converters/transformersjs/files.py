"""The files of a folder for transformers.js."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qalora.converters.onnx.files import properties
from qalora.converters.onnx.files import weight_files as files_of_graph

__all__ = ["DTYPE", "GRAPH", "file_metadata", "is_folder", "memory", "weight_files"]

DTYPE = "q4"
GRAPH = "onnx/model_q4.onnx"
"""The graph of dtype q4. Source: transformers.js, src/utils/dtypes.js, DEFAULT_DTYPE_SUFFIX_MAPPING."""


def is_folder(path: Path) -> bool:
    """Whether a folder has the graph, and no safetensors, which would be the model then."""
    return (path / GRAPH).is_file() and not any(path.glob("*.safetensors*"))


def weight_files(path: Path) -> Iterable[Path]:
    """The graph of a folder, and its data."""
    return files_of_graph(path / GRAPH)


def file_metadata(path: Path) -> Mapping[str, Any] | None:
    """The properties of the graph."""
    return properties(path) if path.as_posix().endswith(GRAPH) else None


def memory(path: Path) -> float:
    """Bytes that a runtime takes, for a byte of the files: onnxruntime-web holds them in JavaScript and in WASM."""
    return 3
