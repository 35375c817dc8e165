"""What runs an artefact: one module a runtime, and one form for all of them.

A runtime that is not installed is a MissingLibraryError with the command that installs it; it is never passed over.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from qalora.errors import InputError

if TYPE_CHECKING:
    from qalora.checkpoint import Checkpoint

__all__ = ["RUNTIMES", "Runtime", "RuntimeInfo", "open_runtime"]

RUNTIMES = {
    "torch": "qalora.parity.runtimes.torch",
    "transformers": "qalora.parity.runtimes.plain",
    "llama.cpp": "qalora.parity.runtimes.llamacpp",
    "onnxruntime": "qalora.parity.runtimes.onnxruntime",
    "onnxruntime-cuda": "qalora.parity.runtimes.onnxruntime_cuda",
    "onnx.reference": "qalora.parity.runtimes.onnx_reference",
    "onnxruntime-genai": "qalora.parity.runtimes.genai",
    "gptqmodel": "qalora.parity.runtimes.gptqmodel",
    "mlx": "qalora.parity.runtimes.mlx",
    "hqq": "qalora.parity.runtimes.hqq",
}
"""Each runtime and the module that opens artefacts in it, with a function `open_artifact(path, threads)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeInfo:
    """What ran an artefact: the runtime and its version, the kernels, the type they compute in, the threads."""

    name: str
    version: str
    backend: str
    dtype: str
    threads: int


class Runtime(Protocol):
    """An open artefact."""

    info: RuntimeInfo

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]: the logits at every position of one sequence, from an empty cache."""

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]: the same, a token at a time through the cache."""

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence, all of them in one batch, padded where the runtime pads."""

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """float32 [tokens, hidden] after each layer, for one sequence; nothing where the runtime does not tell."""

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The tokens that greedy decoding appends; a runtime may stop at an end token."""

    def close(self) -> None:
        """Free the model."""


def open_runtime(
    kind: str, path: Path | Checkpoint, *, threads: int | None = None, lora: Path | None = None
) -> Runtime:
    """Open an artefact in a runtime of RUNTIMES; `threads` None: as many as torch has, where it can be told.

    lora  a GGUF LoRA to apply; for llama.cpp alone

    Raises MissingLibraryError if it is not installed, FormatError if it does not take the artefact.
    """
    if kind not in RUNTIMES:
        raise InputError("runtime", expected=f"one of {', '.join(RUNTIMES)}", got=repr(kind))
    module: Any = importlib.import_module(RUNTIMES[kind])
    runtime: Runtime = module.open_artifact(path, threads, **({} if lora is None else {"lora": lora}))
    return runtime
