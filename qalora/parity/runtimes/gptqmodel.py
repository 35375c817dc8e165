"""GPTQ folders as their users load them: one from_pretrained call of transformers, with GPTQModel's torch kernel.

The kernel is named, because the default one computes in bfloat16: float32 activations over weights scale * (q - z) that
are rounded to float16. A residual beside config.json is loaded by the same call, by PEFT.
"""

from __future__ import annotations

import importlib.util
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qalora.checkpoint import Checkpoint
from qalora.errors import FormatError, MissingLibraryError
from qalora.parity.runtimes import RuntimeInfo
from qalora.parity.runtimes.torch import ModuleRuntime

__all__ = ["open_artifact"]

BACKEND = "gptq_torch"


def open_artifact(path: Path | Checkpoint, threads: int | None) -> ModuleRuntime:
    """Open a GPTQ folder in float32; MissingLibraryError if gptqmodel, optimum or peft is not installed."""
    for library in ("gptqmodel", "optimum", "peft"):
        if importlib.util.find_spec(library) is None:
            raise MissingLibraryError(library, "running a GPTQ artefact", "gptq")
    if not isinstance(path, Path):
        raise FormatError("gptqmodel", expected="a GPTQ folder", got="a model in memory")
    if threads is not None:
        torch.set_num_threads(threads)
    info = RuntimeInfo(
        name="transformers + gptqmodel",
        version=f"{version('transformers')} + {version('gptqmodel')}",
        backend=BACKEND,
        dtype="float32 (weights rounded to float16)",
        threads=torch.get_num_threads(),
    )
    return ModuleRuntime(_load(path), info)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, GPTQConfig
    from transformers.utils import logging

    from qalora.converters.huggingface import read_config

    stored = read_config(folder).get("quantization_config") or {}
    bits = stored.get("bits")
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                device_map="cpu",
                quantization_config=GPTQConfig(bits=bits, backend=BACKEND),
                local_files_only=True,
            )
        except Exception as error:  # a foreign loader raises what it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise FormatError(f"{folder}: transformers does not load it ({reason})") from error
    return module.eval()
