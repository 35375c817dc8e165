"""GPTQ folders as their users load them: one from_pretrained call of transformers, with GPTQModel's torch kernel.

The kernel is named, because the default one computes in bfloat16: float32 activations over weights scale * (q - z) that
are rounded to float16. A residual beside config.json is loaded by the same call, by PEFT.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.errors import FormatError, MissingLibraryError
from qalora.parity.runtimes import RuntimeInfo
from qalora.parity.runtimes.torch import ModuleRuntime

__all__ = ["open_artifact"]

BACKEND = "gptq_torch"
COMPILERS = ("g++", "clang++", "cl")


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
    return _GptqRuntime(_load(path), info)


class _GptqRuntime(ModuleRuntime):
    """The kernel is compiled where there is a C++ compiler, which takes a minute and saves two."""

    _stance: Literal["default", "force_eager"] = "default" if any(map(shutil.which, COMPILERS)) else "force_eager"

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]."""
        with torch.compiler.set_stance(self._stance):
            return super().logits(tokens)

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        with torch.compiler.set_stance(self._stance):
            return super().steps(tokens)

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, step by step with the cache."""
        with torch.compiler.set_stance(self._stance):
            return super().generate(prompt, max_tokens)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, GPTQConfig
    from transformers.utils import logging as transformers_logging

    from qalora.converters.huggingface import read_config

    stored = read_config(folder).get("quantization_config") or {}
    bits = stored.get("bits")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it reports that layers of other shapes compile anew
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it prints banners
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
