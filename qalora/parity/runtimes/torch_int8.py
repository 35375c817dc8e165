"""PyTorch's dynamic INT8: a row to compare with, not an artefact of ours.

Weights of linear layers in 8 bits, one scale a tensor, made from the float weights; inputs in 8 bits, one scale a call.
What people do to a model when they have no integers of their own; torch announces that it will be removed.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.torch_module import build
from qalora.errors import InputError
from qalora.parity.runtimes import RuntimeInfo
from qalora.parity.runtimes.torch import ModuleRuntime

__all__ = ["open_artifact"]


def open_artifact(path: Path | Checkpoint, threads: int | None) -> ModuleRuntime:
    """Quantize a model's dequantized linear layers. InputError where this torch no longer can."""
    if threads is not None:
        torch.set_num_threads(threads)
    quantize = _quantize_dynamic()
    model = path if isinstance(path, Checkpoint) else load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its removal
        module = quantize(build(model), {nn.Linear}, dtype=torch.qint8)
    info = RuntimeInfo(
        name="torch",
        version=torch.__version__,
        backend=f"dynamic INT8, {torch.backends.quantized.engine}",
        dtype="int8 weights and inputs",
        threads=torch.get_num_threads(),
    )
    return ModuleRuntime(module, info)


def _quantize_dynamic() -> Any:
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError as error:
        raise InputError(
            f"torch {torch.__version__} has no dynamic INT8 any more", todo="leave out `dynamic_int8`"
        ) from error
    return quantize_dynamic
