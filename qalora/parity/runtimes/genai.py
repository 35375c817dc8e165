"""ONNX folders in onnxruntime-genai, which generates; its logits are ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.errors import FormatError, first_line
from qalora.parity.ends import RuntimeEnds
from qalora.parity.runtimes import RuntimeInfo, check_libraries
from qalora.parity.runtimes.onnxruntime import check_installed

__all__ = ["open_artifact"]


PACKAGES = ("onnxruntime-genai", "onnxruntime-genai-cuda")
"""The second goes with onnxruntime-gpu, and runs on the CPU too."""


def _version() -> str:
    for name in PACKAGES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


class GenaiRuntime:
    """A folder with genai_config.json."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self._library: Any = onnxruntime_genai
        self._folder = folder
        try:
            self._model = onnxruntime_genai.Model(str(folder))
        except Exception as error:  # the library raises what it likes
            reason = first_line(error)
            raise FormatError(f"{folder}: onnxruntime-genai does not load it ({reason})") from error
        self._opened: Any = None
        self.words = self
        self.info = RuntimeInfo(
            name="onnxruntime-genai",
            version=_version(),
            backend="cpu",
            dtype="float32",
            threads=torch.get_num_threads(),
        )

    follows = frozenset({"chat", "token"})
    """Its tokenizer cuts text by expressions of its own, and puts nothing around a text."""

    def tokenize(self, text: str, *, special: bool = False, around: bool = False) -> list[int]:
        """The tokens of a text; special ones are always parsed."""
        return [int(token) for token in self._tokenizer().encode(text)]

    def ends(self) -> RuntimeEnds | None:
        """What its loaded config says; None for a folder without a tokenizer, through which it is asked."""
        try:
            ids = self._tokenizer().eos_token_ids
        except Exception:  # the library raises what it likes
            return None
        return RuntimeEnds(ids=frozenset(map(int, ids)))

    def _tokenizer(self) -> Any:
        """The library's own, opened at the first call."""
        if self._opened is None:
            try:
                self._opened = self._library.Tokenizer(self._model)
            except Exception as error:  # the library raises what it likes
                reason = first_line(error)
                raise FormatError(
                    f"{self._folder}: onnxruntime-genai does not take its tokenizer ({reason})"
                ) from error
        return self._opened

    def _generator(self, tokens: Sequence[int], length: int) -> Any:
        params = self._library.GeneratorParams(self._model)
        params.set_search_options(max_length=length, do_sample=False)
        generator = self._library.Generator(self._model, params)
        generator.append_tokens(list(tokens))
        return generator

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        generator = self._generator(tokens[:1], len(tokens) + 1)
        rows = [torch.from_numpy(generator.get_logits().reshape(-1).copy())]
        for token in tokens[1:]:
            generator.append_tokens([token])
            rows.append(torch.from_numpy(generator.get_logits().reshape(-1).copy()))
        return torch.stack(rows).float()

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        return self.logits(tokens)

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence, one after the other."""
        return [self.logits(sequence) for sequence in sequences]

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """Nothing: the library does not tell."""
        return []

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens; stops at an end token."""
        generator = self._generator(prompt, len(prompt) + max_tokens)
        tokens: list[int] = []
        while not generator.is_done() and len(tokens) < max_tokens:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens

    def close(self) -> None:
        """Free the model."""
        del self._model


def open_artifact(path: Path | Checkpoint, threads: int | None) -> GenaiRuntime:
    """Open a folder; MissingLibraryError if onnxruntime-genai is not installed. It chooses its own threads."""
    check_libraries("onnxruntime-genai")
    check_installed()
    if not isinstance(path, Path):
        raise FormatError("onnxruntime-genai", expected="a folder", got="a model in memory")
    return GenaiRuntime(path if path.is_dir() else path.parent)
