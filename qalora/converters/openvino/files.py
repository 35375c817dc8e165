"""The files of an OpenVINO folder, and what a graph says of how it is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora.formats.openvino import read_info, weights_file

__all__ = [
    "EXACT_OPTIONS",
    "MODEL",
    "OPTIONS",
    "VERSION",
    "VERSION_KEY",
    "file_metadata",
    "graphs",
    "is_graph",
    "memory",
    "options_of",
    "source_files",
    "weight_files",
]

MODEL = "openvino_model.xml"
VERSION_KEY, VERSION = "qalora.openvino", "1"
OPTIONS = "runtime_options"

EXACT_OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
"""What keeps OpenVINO at float32. Without them its CPU plugin computes in bfloat16 where the processor does, holds the
cache in 8 bits, and rounds activations to 8 bits where zero points are integers."""


def is_graph(path: Path) -> bool:
    """Whether a path is a graph, or a folder of one that has no safetensors, which would be the model then."""
    return path.suffix == ".xml" if path.is_file() else bool(graphs(path)) and not any(path.glob("*.safetensors*"))


def graphs(folder: Path) -> Sequence[Path]:
    """The graph of a folder."""
    return [folder / MODEL] if (folder / MODEL).is_file() else []


def weight_files(path: Path) -> Iterable[Path]:
    """A graph, or that of a folder, and its data."""
    graph = path / MODEL if path.is_dir() else path
    return [graph, weights_file(graph)]


def source_files(path: Path) -> Iterable[Path]:
    """What is beside a graph."""
    return sorted(path.parent.iterdir())


def file_metadata(path: Path) -> Mapping[str, Any] | None:
    """The rt_info of a model's graph; that of a tokenizer's has no place for it."""
    return read_info(path) if path.name == MODEL else None


def options_of(path: Path) -> Mapping[str, str]:
    """The options that a graph, or that of a folder, asks OpenVINO for."""
    info = read_info(path / MODEL if path.is_dir() else path)
    return {key.removeprefix(f"{OPTIONS}/"): value for key, value in info.items() if key.startswith(f"{OPTIONS}/")}


def memory(path: Path) -> float:
    """Bytes that OpenVINO takes, for a byte of the files. Seen: 2.3 on a billion weights, from the first call on: the
    pages of the file, and codes packed anew beside float32 scales and zero points.
    """
    return 3
