"""MNN folders in MNN's own LLM engine on the CPU, in `memory` normal: weights decoded to float32 when it loads them.

What a folder's config.json asks for beside is not asked: a proof is of what the artefact holds. A text is given some
tokens at a time: MNN multiplies more of them by Strassen's algorithm, which rounds more. On 4096 columns its error was
4 times torch's at 200 tokens, and 11 times at 800.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.converters.mnn.files import CONFIG, LIMIT, MODEL, TABLE, WEIGHTS
from qalora.converters.mnn.tokenizer import NAME, without_words
from qalora.errors import FormatError
from qalora.formats.json_text import read_json_object
from qalora.parity.ends import RuntimeEnds
from qalora.parity.runtimes import RuntimeInfo, Tokenizing, check_libraries
from qalora.parity.runtimes.stepping import greedy

__all__ = ["MnnRuntime", "open_artifact"]

_SAID = (
    "hidden_size",
    "layer_nums",
    "key_value_shape",
    "attention_mask",
    "attention_type",
    "is_visual",
    "tie_embeddings",
)

ROWS = 16
"""Tokens at a time: two tiles of MNN's smallest kernels have 24 rows, below which there is no Strassen."""


class MnnRuntime:
    """A folder with llm.mnn.

    MNN's products add their terms one after the other. On 256 to 4096 columns their error was 1.5 to 3.7 times torch's,
    and `roundings.running_sum` says 2.2 to 3.
    """

    running_sums = True
    follows = frozenset({"text", "chat", "token", "around"})

    def __init__(self, folder: Path, threads: int | None) -> None:
        self._folder, self._threads = folder, threads or torch.get_num_threads()
        self._model: Any = self._opened()
        self.words: Tokenizing | None = self if self.tokenize("a") else None
        self.info = RuntimeInfo(
            name="mnn", version=version("mnn"), backend="CPU", dtype="float32", threads=self._threads
        )

    def _opened(self) -> Any:
        """The engine, loaded: the exact settings, and places that are told from the root of the file system."""
        whole = read_json_object(self._folder / CONFIG, LIMIT)
        said = {key: whole[key] for key in _SAID if key in whole}  # the engine lets these win over what it is asked for
        with tempfile.TemporaryDirectory() as place, _silent():
            llm = importlib.import_module("MNN.llm")
            words = self._folder / NAME
            if not words.is_file():
                Path(place, NAME).write_bytes(without_words(()))
            Path(place, CONFIG).write_text(json.dumps(said), "utf-8")
            files = {"llm_model": MODEL, "llm_weight": WEIGHTS, "embedding_file": TABLE}
            config: dict[str, Any] = {key: _rooted(self._folder / name) for key, name in files.items()}
            config |= {
                "base_dir": "/",
                "llm_config": _rooted(Path(place, CONFIG)),
                "tokenizer_file": _rooted(words if words.is_file() else Path(place, NAME)),
                "backend_type": "cpu",
                "thread_num": self._threads,
                "precision": "high",
                "memory": "normal",
                "dynamic_option": 2,
                "all_logits": True,
                "use_mmap": False,
                "sampler_type": "greedy",
            }
            Path(place, "config.json").write_text(json.dumps(config), "utf-8")
            model = llm.create(str(Path(place, "config.json")))
            loaded = model._c_obj.load()  # whose answer the method of that name does not pass on
        if not loaded:  # any call would end the process
            raise FormatError(f"{self._folder}: MNN does not load it")
        return model

    def _logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], behind those of the cache."""
        return torch.cat([self._some(tokens[n : n + ROWS]) for n in range(0, len(tokens), ROWS)])

    def _some(self, tokens: Sequence[int]) -> Tensor:
        with _silent():
            found = self._model.forward([int(token) for token in tokens])
            failed = int(self._model.context.status) < 0 or self._model.context.status.name == "INTERNAL_ERROR"
            values = None if failed else np.array(found.read(), dtype=np.float32)
        if values is None or not values.size:
            raise FormatError(f"{self._folder}: MNN does not run it")
        return torch.from_numpy(values.reshape(len(tokens), -1))

    def tokenize(self, text: str, *, special: bool = False, around: bool = False) -> list[int]:
        """The tokens of a text; special ones are always parsed."""
        found, before = (list(self._model.tokenizer_encode(each)) for each in (text, ""))
        return found if around else found[len(before) :]

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]."""
        self._reset()
        return self._logits(tokens)

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        self._reset()
        return torch.cat([self._logits([token]) for token in tokens])

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence, one after the other: the engine has no batches."""
        return [self.logits(tokens) for tokens in sequences]

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """Nothing: the engine gives logits alone."""
        return []

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, step by step with the cache."""
        self._reset()
        return greedy(lambda ids, at: self._logits(ids), prompt, max_tokens)

    def _reset(self) -> None:
        with _silent():
            self._model.reset()

    def ends(self) -> RuntimeEnds | None:
        """None: the engine does not say what it has loaded."""
        return None

    def close(self) -> None:
        """Free the model."""
        self._model = None


def _rooted(path: Path) -> str:
    return str(path.resolve()).lstrip("/")


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the engine prints, which goes past Python, and waits in C's own buffer."""
    flush = (lambda _: None) if sys.platform == "win32" else ctypes.CDLL(None).fflush
    flush(None)
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def open_artifact(path: Path | Checkpoint, threads: int | None) -> MnnRuntime:
    """Open a folder with llm.mnn, or the file itself; MissingLibraryError if MNN is not installed."""
    check_libraries("mnn")
    if not isinstance(path, Path):
        raise FormatError("mnn", expected="an MNN folder", got="a model in memory")
    return MnnRuntime(path if path.is_dir() else path.parent, threads)
