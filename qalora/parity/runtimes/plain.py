"""Float folders as their users load them: one from_pretrained call of transformers, with the folder's own files.

Nothing of qalora's readers takes part, neither for the config nor for the tensors nor for the tokenizer. transformers
is asked for its eager attention, the only one that has every family's soft caps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers

from qalora.checkpoint import Checkpoint
from qalora.errors import FormatError, first_line
from qalora.parity.runtimes import RuntimeInfo
from qalora.parity.runtimes.folder_tokenizer import folder_tokenizer
from qalora.parity.runtimes.settings import quiet
from qalora.parity.runtimes.torch import ModuleRuntime, auto_class, runtime_ends

__all__ = ["open_artifact", "open_folder"]


def open_artifact(path: Path | Checkpoint, threads: int | None) -> ModuleRuntime:
    """Open a float folder in float32; FormatError if transformers does not take it."""
    return open_folder("transformers", transformers.__version__, path, threads)


def open_folder(
    name: str,
    version: str,
    path: Path | Checkpoint,
    threads: int | None,
    *,
    prepare: Callable[[Any], None] = lambda module: None,
    **loading: Any,
) -> ModuleRuntime:
    """Open a folder in float32, as a runtime of this name and version, with more that from_pretrained takes; `prepare`
    is called with the module.

    FormatError if transformers does not take it, or for a model in memory.
    """
    if not isinstance(path, Path):
        raise FormatError(name, expected="a folder", got="a model in memory")
    if threads is not None:
        torch.set_num_threads(threads)
    with quiet(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        opens = auto_class(path)
        try:
            module = opens.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                **loading,
            )
        except Exception as error:  # a foreign loader raises what it likes
            reason = first_line(error)
            raise FormatError(f"{path}: transformers does not load it ({reason})") from error
    prepare(module)
    info = RuntimeInfo(
        name=name,
        version=version,
        backend="cpu",
        dtype="float32",
        threads=torch.get_num_threads(),
    )
    ends = runtime_ends(module.generation_config.eos_token_id)
    return ModuleRuntime(module.eval(), info, folder_tokenizer(path), ends=ends)
