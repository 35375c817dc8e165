"""GPTQ folders as their users load them: one from_pretrained call of transformers, with GPTQModel's torch kernel.

The kernel is named, because the default one computes in bfloat16: float32 activations over weights scale * (q - z) that
are rounded to float16. A residual beside config.json is loaded by the same call, by PEFT.

transformers reads an output layer in words only where the config has "block_name_to_quantize": ""; foreign folders that
have one and do not say so get that here.

The kernel dequantizes a layer at every call, by code that it compiles for a minute. It is left uncompiled here, and,
where memory allows, asked by its own switch to keep what it dequantized: every later pass is then a plain product.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from qalora.checkpoint import Checkpoint
from qalora.converters.gptq.kernels import has_head_in_words
from qalora.errors import FormatError, first_line
from qalora.parity.memory import available_memory
from qalora.parity.runtimes import RuntimeInfo, check_libraries
from qalora.parity.runtimes.folder_tokenizer import folder_tokenizer
from qalora.parity.runtimes.settings import quiet
from qalora.parity.runtimes.torch import ModuleRuntime, auto_class, runtime_ends

__all__ = ["open_artifact"]

BACKEND = "gptq_torch"
KEEP = "GPTQ_TORCH_CACHE_WEIGHTS"
"""GPTQModel's switch, read when a layer is made: "1" keeps dequantized weights."""


def open_artifact(path: Path | Checkpoint, threads: int | None) -> ModuleRuntime:
    """Open a GPTQ folder in float32; MissingLibraryError if gptqmodel, optimum or peft is not installed."""
    check_libraries("gptqmodel")
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
    module = _load(path)
    ends = runtime_ends(module.generation_config.eos_token_id)
    return ModuleRuntime(module, info, folder_tokenizer(path), ends=ends)


@contextmanager
def _keep_variable(keep: bool) -> Iterator[None]:
    """GPTQModel's switch, set while a model is loaded."""
    before = os.environ.get(KEEP)
    os.environ[KEEP] = "1" if keep else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[KEEP]
        else:
            os.environ[KEEP] = before


def _load(folder: Path) -> Any:
    from transformers import AutoConfig, GPTQConfig

    from qalora.converters.huggingface import read_config

    stored = read_config(folder).get("quantization_config") or {}
    bits = stored.get("bits")
    head = {"block_name_to_quantize": ""} if has_head_in_words(folder) else {}
    keep = _dequantized_bytes(folder, bits) < available_memory() // 2
    with (
        _keep_variable(keep),
        quiet(),
        warnings.catch_warnings(),
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        warnings.simplefilter("ignore")  # and it prints banners
        opens = auto_class(folder)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            if head:
                config.quantization_config = {**config.quantization_config, **head}
            module = opens.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                device_map="cpu",
                quantization_config=GPTQConfig(bits=bits, backend=BACKEND),
                local_files_only=True,
            )
        except Exception as error:  # a foreign loader raises what it likes
            reason = first_line(error)
            raise FormatError(f"{folder}: transformers does not load it ({reason})") from error
    for layer in module.modules():
        vars(layer).pop("dequantize_weight", None)  # the compiled form of the method of that name
    return module.eval()


def _dequantized_bytes(folder: Path, bits: object) -> int:
    """About what the weights take in float32: their files, as if all of them were codes."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return size * 32 // (bits if isinstance(bits, int) and bits > 0 else 4)
