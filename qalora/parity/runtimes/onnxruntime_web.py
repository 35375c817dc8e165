"""onnxruntime-web's WASM in Node: the kernels that a browser without WebGPU computes with, in one thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.parity.ends import RuntimeEnds
from qalora.parity.runtimes.node import NodeRuntime, folder_of

__all__ = ["WebRuntime", "open_artifact", "takes"]

LARGEST = 200_000_000
"""Bytes of weights: a model of 135 million already takes a quarter of a second for a token, in one thread."""


class WebRuntime(NodeRuntime):
    """A session of the graph, and nothing of the library around it."""

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, step by step with the cache."""
        return self.greedy(prompt, max_tokens)

    def ends(self) -> RuntimeEnds | None:
        """None: a graph has no end."""
        return None


def takes(path: Path, nbytes: int) -> bool:
    """Whether an artefact is small enough for one thread of WASM."""
    return nbytes <= LARGEST


def open_artifact(path: Path | Checkpoint, threads: int | None) -> WebRuntime:
    """Open a folder; MissingLibraryError where Node or the library is not there."""
    kind = "onnxruntime-web"
    return WebRuntime(kind, folder_of(kind, path), "wasm", 1)
