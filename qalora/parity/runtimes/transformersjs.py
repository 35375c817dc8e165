"""transformers.js in Node, with onnxruntime-node on the CPU: the library that people open the folder with."""

from __future__ import annotations

from pathlib import Path

import torch

from qalora.checkpoint import Checkpoint
from qalora.parity.runtimes.node import NodeRuntime, folder_of

__all__ = ["open_artifact"]


def open_artifact(path: Path | Checkpoint, threads: int | None) -> NodeRuntime:
    """Open a folder; MissingLibraryError where Node or the library is not there."""
    kind = "transformers.js"
    return NodeRuntime(kind, folder_of(kind, path), "cpu", threads or torch.get_num_threads())
