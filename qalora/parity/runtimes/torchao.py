"""torchao folders as transformers' users load them: one from_pretrained call, and torchao's own tensors.

torchao computes (code - zero) * scale in the tensor's own type whenever a layer is computed. transformers leaves that
type as it was saved, so tensors of 16 bits become float32 here.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from qalora.checkpoint import Checkpoint
from qalora.parity.runtimes import check_libraries
from qalora.parity.runtimes.plain import open_folder
from qalora.parity.runtimes.torch import ModuleRuntime

__all__ = ["open_artifact"]


def open_artifact(path: Path | Checkpoint, threads: int | None) -> ModuleRuntime:
    """Open a folder in float32; MissingLibraryError if torchao is not installed."""
    check_libraries("torchao")
    return open_folder("torchao", version("torchao"), path, threads, prepare=_widen)


def _widen(model: nn.Module) -> None:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16):
            module.weight = nn.Parameter(weight.to(torch.float32), requires_grad=False)
