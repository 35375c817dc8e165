"""ONNX graphs in ONNX Runtime on CUDA, with TF32 off; `qalora.parity.runtimes.onnxruntime` has the rest."""

from __future__ import annotations

from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.errors import FormatError, MissingLibraryError
from qalora.parity.runtimes.onnxruntime import OnnxRuntime

__all__ = ["open_artifact"]

PROVIDER = "CUDAExecutionProvider"


def open_artifact(path: Path | Checkpoint, threads: int | None) -> OnnxRuntime:
    """Open a folder with model.onnx, or the file itself; MissingLibraryError where CUDA does not come up."""
    if not isinstance(path, Path):
        raise FormatError("onnxruntime-cuda", expected="an ONNX file or folder", got="a model in memory")
    runtime = OnnxRuntime(path, threads, PROVIDER)
    if runtime.info.backend != PROVIDER:
        raise MissingLibraryError(
            "onnxruntime-gpu with its CUDA libraries", "running an ONNX artefact on CUDA", "runtimes"
        )
    return runtime
