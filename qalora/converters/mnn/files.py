"""The files of an MNN folder, and what its config.json asks of MNN."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora.formats.json_text import read_json_object

__all__ = [
    "CONFIG",
    "LIMIT",
    "MODEL",
    "OPTIONS",
    "TABLE",
    "VERSION",
    "VERSION_KEY",
    "WEIGHTS",
    "file_metadata",
    "graphs",
    "is_graph",
    "memory",
    "source_files",
    "weight_files",
]

MODEL, WEIGHTS, CONFIG = "llm.mnn", "llm.mnn.weight", "llm_config.json"

TABLE = "embeddings_bf16.bin"
"""The embedding, where it is bfloat16."""

VERSION_KEY, VERSION = "qalora.mnn", "1"

LIMIT = 64 << 20
"""Bytes of a graph, or of llm_config.json."""

OPTIONS: dict[str, Any] = {
    "llm_model": MODEL,
    "llm_weight": WEIGHTS,
    "llm_config": CONFIG,
    "tokenizer_file": "tokenizer.mtok",
    "backend_type": "cpu",
    "thread_num": 4,
    "precision": "high",
    "memory": "normal",
    "dynamic_option": 2,
    "sampler_type": "greedy",
}
"""What config.json has beside transformers' keys: MNN reads both from there. With `memory` normal MNN decodes the codes
to float32 when it loads them; with low, its own choice, it keeps them, and rounds activations to 8 bits."""


def is_graph(path: Path) -> bool:
    """Whether a path is a graph, or a folder of one that has no safetensors, which would be the model then."""
    return path.suffix == ".mnn" if path.is_file() else bool(graphs(path)) and not any(path.glob("*.safetensors*"))


def graphs(folder: Path) -> Sequence[Path]:
    """The graph of a folder."""
    return [folder / MODEL] if (folder / MODEL).is_file() else []


def weight_files(path: Path) -> Iterable[Path]:
    """A graph, or that of a folder, its weights, and its embedding where that is a file of its own."""
    folder = path if path.is_dir() else path.parent
    return [folder / MODEL, folder / WEIGHTS, *(folder / name for name in (TABLE,) if (folder / name).is_file())]


def source_files(path: Path) -> Iterable[Path]:
    """What is beside a graph."""
    return sorted(path.parent.iterdir())


def file_metadata(path: Path) -> Mapping[str, Any] | None:
    """The keys of llm_config.json."""
    return read_json_object(path, limit=LIMIT) if path.name == CONFIG else None


def memory(path: Path) -> float:
    """Bytes that MNN takes, for a byte of the files: codes of 4 bits become floats of 32, which it packs anew."""
    return 10
