"""torchao folders as transformers' users load them: one from_pretrained call, and torchao's own tensors.

torchao computes (code - zero) * scale in the type that it is told, float32 here, whenever a layer is computed.
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
    """Open a folder in float32; MissingLibraryError if torchao is not installed."""
    check_libraries("torchao")
    return open_folder("torchao", version("torchao"), path, threads)
