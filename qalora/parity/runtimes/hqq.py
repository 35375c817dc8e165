"""HQQ folders in hqq's own layers, on the CPU in float32; the rest of the model is transformers'.

transformers 5.23 does not load HQQ models, so that its model is built here and each linear layer is an HQQLinear that
loads its own tensors from the folder. hqq computes (code - zero) * scale in the type it is told, float32 here, and
multiplies: what is left is float32's own rounding.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import load
from qalora.converters.huggingface import stored_tensors
from qalora.converters.torch_module import build, float_linear
from qalora.errors import FormatError, first_line
from qalora.formats.safetensors import load_tensor
from qalora.parity.runtimes import RuntimeInfo, check_libraries
from qalora.parity.runtimes.torch import ModuleRuntime, ends_in_transformers

__all__ = ["open_artifact"]


def open_artifact(path: Path | Checkpoint, threads: int | None) -> ModuleRuntime:
    """Open an HQQ folder; MissingLibraryError if hqq is not installed."""
    check_libraries("hqq")
    if not isinstance(path, Path):
        raise FormatError("hqq", expected="a folder", got="a model in memory")
    if threads is not None:
        torch.set_num_threads(threads)
    info = RuntimeInfo(
        name="hqq", version=version("hqq"), backend="pytorch", dtype="float32", threads=torch.get_num_threads()
    )
    stored = stored_tensors(path)

    def linear(module: str, weight: LazyTensor, bias: Tensor | None) -> nn.Module:
        names = {name.removeprefix(f"{module}."): name for name in stored if name.startswith(f"{module}.")}
        if "W_q" not in names:
            return float_linear(module, weight, bias)
        return _layer(path, module, {part: load_tensor(*stored[name]) for part, name in names.items()})

    return ModuleRuntime(build(load(path), linear), info, ends=ends_in_transformers(path))


def _layer(folder: Path, module: str, state: dict[str, Tensor]) -> nn.Module:
    from hqq.core.quantize import HQQBackend, HQQLinear

    try:
        HQQLinear.set_backend(HQQBackend.PYTORCH)
        layer: Any = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
        layer.load_state_dict(state)
    except Exception as error:  # the library raises what it likes
        reason = first_line(error)
        raise FormatError(f"{folder}: {module}: hqq does not load it ({reason})") from error
    return layer  # type: ignore[no-any-return]
