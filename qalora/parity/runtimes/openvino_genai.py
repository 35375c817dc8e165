"""OpenVINO folders in openvino-genai, which generates; its logits are OpenVINO's, and it does not give them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.converters.openvino.files import EXACT_OPTIONS
from qalora.errors import FormatError, first_line
from qalora.parity.ends import RuntimeEnds
from qalora.parity.runtimes import RuntimeInfo, check_libraries

__all__ = ["GenaiRuntime", "open_artifact", "takes"]


def takes(path: Path, nbytes: int) -> bool:
    """Whether a folder has the tokenizer's graphs, without which the library opens no model."""
    folder = path if path.is_dir() else path.parent
    return all((folder / f"openvino_{name}.xml").is_file() for name in ("tokenizer", "detokenizer"))


class GenaiRuntime:
    """A folder with the graphs of the model and of its tokenizer.

    backend  the library's ATTENTION_BACKEND, "SDPA" or "PA"; None: what it takes itself
    """

    follows = frozenset({"text", "chat", "token", "around"})

    def __init__(self, folder: Path, threads: int | None, backend: str | None = None) -> None:
        import openvino_genai

        self._library, self._folder = openvino_genai, folder
        chosen = {} if backend is None else {"ATTENTION_BACKEND": backend}
        threads = threads or torch.get_num_threads()
        try:
            options = {**EXACT_OPTIONS, "INFERENCE_NUM_THREADS": threads, **chosen}
            self._pipeline: Any = openvino_genai.LLMPipeline(str(folder), "CPU", **options)
        except Exception as error:  # the library raises what it likes
            raise FormatError(f"{folder}: openvino-genai does not load it ({first_line(error)})") from error
        self.words = self
        self.info = RuntimeInfo(
            name="openvino-genai",
            version=version("openvino-genai"),
            backend="CPU" if backend is None else f"CPU, {backend}",
            dtype="float32",
            threads=threads,
        )

    def tokenize(self, text: str, *, special: bool = False, around: bool = False) -> list[int]:
        """The tokens of a text; special ones are always parsed."""
        encoded = self._pipeline.get_tokenizer().encode(text, add_special_tokens=around)
        return [int(token) for token in encoded.input_ids.data.reshape(-1)]

    def ends(self) -> RuntimeEnds | None:
        """What its loaded config says."""
        config = self._pipeline.get_generation_config()
        own = {config.eos_token_id} if config.eos_token_id >= 0 else set()
        return RuntimeEnds(ids=frozenset(map(int, own | set(config.stop_token_ids))))

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The library gives none."""
        raise NotImplementedError("openvino-genai gives no logits")

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """The library gives none."""
        return self.logits(tokens)

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """The library gives none."""
        return [self.logits(sequence) for sequence in sequences]

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """Nothing: the library does not tell."""
        return []

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens; stops at an end token."""
        import openvino

        config = self._pipeline.get_generation_config()
        config.max_new_tokens, config.do_sample = max_tokens, False
        found = self._pipeline.generate(openvino.Tensor(np.array([list(prompt)], dtype=np.int64)), config)
        return [int(token) for token in found.tokens[0]]

    def close(self) -> None:
        """Free the model."""
        del self._pipeline


def open_artifact(path: Path | Checkpoint, threads: int | None, backend: str | None = None) -> GenaiRuntime:
    """Open a folder; MissingLibraryError if openvino-genai is not installed."""
    check_libraries("openvino-genai")
    if not isinstance(path, Path):
        raise FormatError("openvino-genai", expected="a folder", got="a model in memory")
    return GenaiRuntime(path if path.is_dir() else path.parent, threads, backend)
