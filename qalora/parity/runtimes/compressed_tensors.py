"""compressed-tensors folders as transformers' users load them: one from_pretrained call, which decodes the weights.

transformers 5.23 opens no folder with zero points otherwise. The weights are computed in the type of their scales; an
adapter beside config.json is loaded by the same call, by PEFT.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.parity.runtimes import check_libraries
from qalora.parity.runtimes.plain import open_folder
from qalora.parity.runtimes.torch import ModuleRuntime

__all__ = ["open_artifact"]


def open_artifact(path: Path | Checkpoint, threads: int | None) -> ModuleRuntime:
    """Open a folder in float32; MissingLibraryError if compressed-tensors or peft is not installed."""
    check_libraries("compressed-tensors")
    from transformers import CompressedTensorsConfig

    return open_folder(
        "compressed-tensors",
        version("compressed-tensors"),
        path,
        threads,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
