"""What runs an artefact: one module a runtime, and one form for all of them.

A runtime that is not installed is a MissingLibraryError with the command that installs it; it is never passed over.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from qalora.errors import InputError, MissingLibraryError, shown

if TYPE_CHECKING:
    from qalora.checkpoint import Checkpoint
    from qalora.parity.ends import RuntimeEnds

__all__ = ["RUNTIMES", "Runtime", "RuntimeInfo", "RuntimeParts", "Tokenizing", "check_libraries", "open_runtime"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeParts:
    """What a runtime is made of.

    module   of this package, with a function `open_artifact(path, threads)`
    imports  the top-level modules that it imports, which hold its kernels: their packages, and what these require, are
             what a proof depends on
    cuda     whether it needs a device of CUDA
    judged   whether its results are; else they are measured alone
    node     the packages of Node that hold its kernels, found by NODE_PATH (`qalora.parity.runtimes.node`)
    picky    whether its module has a function `takes(path, nbytes)`, for an artefact and the bytes of its weights
    purpose  what it is for, and extra: which of ours brings it; for the sentence where it is not installed
    """

    module: str
    imports: tuple[str, ...]
    cuda: bool = False
    judged: bool = True
    node: tuple[str, ...] = ()
    picky: bool = False
    purpose: str = ""
    extra: str = "runtimes"


_HERE = "qalora.parity.runtimes"
_ONNX, _OPENVINO = "running an ONNX artefact", "running an OpenVINO artefact"
_JS = "running a transformers.js artefact"

RUNTIMES = {
    "torch": RuntimeParts(module=f"{_HERE}.torch", imports=("torch", "transformers")),
    "transformers": RuntimeParts(module=f"{_HERE}.plain", imports=("torch", "transformers")),
    "llama.cpp": RuntimeParts(
        module=f"{_HERE}.llamacpp",
        imports=("xllamacpp", "llama_cpp"),  # one of them
        purpose="running a GGUF artefact",
        extra="llama-cpp",
    ),
    "onnxruntime": RuntimeParts(module=f"{_HERE}.onnxruntime", imports=("onnxruntime", "onnx"), purpose=_ONNX),
    "onnxruntime-cuda": RuntimeParts(
        module=f"{_HERE}.onnxruntime_cuda", imports=("onnxruntime", "onnx"), cuda=True, purpose=f"{_ONNX} on CUDA"
    ),
    "onnx.reference": RuntimeParts(module=f"{_HERE}.onnx_reference", imports=("onnx",), picky=True),
    "onnxruntime-genai": RuntimeParts(
        module=f"{_HERE}.genai",
        imports=("onnxruntime_genai", "onnxruntime"),
        purpose="generating with an ONNX artefact",
        extra="genai",
    ),
    "openvino": RuntimeParts(module=f"{_HERE}.openvino", imports=("openvino",), purpose=_OPENVINO, extra="openvino"),
    "openvino-fast": RuntimeParts(
        module=f"{_HERE}.openvino_fast",
        imports=("openvino",),
        judged=False,
        picky=True,
        purpose=_OPENVINO,
        extra="openvino",
    ),
    "openvino-genai": RuntimeParts(
        module=f"{_HERE}.openvino_genai",
        imports=("openvino_genai", "openvino_tokenizers", "openvino"),
        picky=True,
        purpose="generating with an OpenVINO artefact",
        extra="openvino",
    ),
    "transformers.js": RuntimeParts(
        module=f"{_HERE}.transformersjs",
        imports=(),
        node=("@huggingface/transformers", "onnxruntime-node"),
        purpose=_JS,
    ),
    "onnxruntime-web": RuntimeParts(
        module=f"{_HERE}.onnxruntime_web",
        imports=(),
        node=("@huggingface/transformers", "@huggingface/transformers/node_modules/onnxruntime-web", "onnxruntime-web"),
        picky=True,
        purpose=_JS,
    ),
    "gptqmodel": RuntimeParts(
        module=f"{_HERE}.gptqmodel",
        imports=("gptqmodel", "optimum", "peft", "transformers"),
        purpose="running a GPTQ artefact",
        extra="gptq",
    ),
    "mlx": RuntimeParts(
        module=f"{_HERE}.mlx", imports=("mlx_lm", "mlx"), purpose="running an MLX artefact", extra="mlx"
    ),
    "compressed-tensors": RuntimeParts(
        module=f"{_HERE}.compressed_tensors",
        imports=("compressed_tensors", "peft", "transformers"),
        purpose="running a compressed-tensors artefact",
        extra="compressed-tensors",
    ),
    "torchao": RuntimeParts(
        module=f"{_HERE}.torchao",
        imports=("torchao", "transformers"),
        purpose="running a torchao artefact",
        extra="torchao",
    ),
    "mnn": RuntimeParts(module=f"{_HERE}.mnn", imports=("MNN",), purpose="running an MNN artefact", extra="mnn"),
    "hqq": RuntimeParts(module=f"{_HERE}.hqq", imports=("hqq",), purpose="running an HQQ artefact", extra="hqq"),
}
"""Each runtime by the name that reports give it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeInfo:
    """What ran an artefact: the runtime and its version, the kernels, the type they compute in, the threads."""

    name: str
    version: str
    backend: str
    dtype: str
    threads: int


class Tokenizing(Protocol):
    """A runtime's own tokenizer.

    follows  what it does as transformers does: "text", "chat" and "token" of `tokenizer_texts`, "around", and "spaces":
             a tokenizer's own way with them
    """

    follows: frozenset[str]

    def tokenize(self, text: str, *, special: bool = False, around: bool = False) -> list[int]:
        """The tokens of a text; `special`: added tokens are parsed, `around`: what begins and ends a text is added."""


class Runtime(Protocol):
    """An open artefact.

    words  the runtime's own tokenizer of it; None where it has none
    """

    info: RuntimeInfo
    words: Tokenizing | None

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]: the logits at every position of one sequence, from an empty cache."""

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]: the same, a token at a time through the cache."""

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence, all of them in one batch, padded where the runtime pads."""

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """float32 [tokens, hidden] after each layer, for one sequence; nothing where the runtime does not tell."""

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The tokens that greedy decoding appends; a runtime may stop at an end token."""

    def ends(self) -> RuntimeEnds | None:
        """What generation ends at, as the runtime has loaded it; None where it does not say."""

    def close(self) -> None:
        """Free the model."""


def open_runtime(
    kind: str, path: Path | Checkpoint, *, threads: int | None = None, lora: Path | None = None
) -> Runtime:
    """Open an artefact in a runtime of RUNTIMES; `threads` None: as many as torch has, where it can be told.

    lora  a GGUF LoRA to apply; for llama.cpp alone

    Raises MissingLibraryError if it is not installed, FormatError if it does not take the artefact. What it changes of
    the process while it is opened is undone, see `qalora.parity.runtimes.settings`.
    """
    if kind not in RUNTIMES:
        raise InputError("runtime", expected=f"one of {', '.join(RUNTIMES)}", got=shown(kind))
    from qalora.parity.runtimes.settings import keep_settings

    with keep_settings():
        module: Any = importlib.import_module(RUNTIMES[kind].module)
        runtime: Runtime = module.open_artifact(path, threads, **({} if lora is None else {"lora": lora}))
    return runtime


def check_libraries(kind: str) -> None:
    """MissingLibraryError for the first module that a runtime of RUNTIMES imports and that is not installed."""
    parts = RUNTIMES[kind]
    for name in parts.imports:
        if importlib.util.find_spec(name) is None:
            raise MissingLibraryError(name.replace("_", "-"), parts.purpose, parts.extra)
