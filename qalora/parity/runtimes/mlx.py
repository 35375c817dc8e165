"""MLX folders in mlx-lm, on the CPU and in float32.

mlx-lm has no argument for the type to compute in: MLX computes in the widest type that it finds. Tensors of 16 bits
are therefore widened after loading, which changes none of them; what is left is the order of summation. On the CPU that
is a running sum, one column after the other (mlx 0.32.4: bit for bit), whose error grows with the root of the columns:
1.1e-6 of a product's RMS at 4096 of them, 2.2e-6 at 14336, where torch is at 3e-7. With float16 inputs it is 7e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.converters.families import FAMILIES, Family
from qalora.converters.families.wrappers import WRAPPERS
from qalora.errors import FormatError, first_line
from qalora.parity.ends import RuntimeEnds
from qalora.parity.runtimes import RuntimeInfo, check_libraries
from qalora.parity.runtimes.folder_tokenizer import folder_tokenizer
from qalora.parity.runtimes.padding import pad, unpad
from qalora.parity.runtimes.stepping import greedy

__all__ = ["open_artifact"]


class MlxRuntime:
    """A model of mlx-lm; a cache is made for each sequence."""

    running_sums = True

    def __init__(self, folder: Path) -> None:
        import mlx.core
        from mlx_lm.tokenizer_utils import load as load_tokenizer
        from mlx_lm.utils import load_model

        self._core: Any = mlx.core
        self._folder = folder
        try:
            with mlx.core.stream(mlx.core.cpu):
                self._model, _ = load_model(folder, lazy=True)
                self._model.set_dtype(mlx.core.float32)
                mlx.core.eval(self._model.parameters())
        except Exception as error:  # the library raises what it likes
            reason = first_line(error)
            raise FormatError(f"{folder}: mlx-lm does not load it ({reason})") from error
        self.words = folder_tokenizer(folder, lambda path: load_tokenizer(path)._tokenizer)
        self.info = RuntimeInfo(
            name="mlx-lm",
            version=f"{version('mlx-lm')}, mlx {version('mlx')}",
            backend="cpu",
            dtype="float32 (tensors of 16 bits widened)",
            threads=1,  # MLX computes on one thread of its own
        )

    def _run(self, tokens: Sequence[int], cache: Any = None) -> Tensor:
        with self._core.stream(self._core.cpu):
            out = self._model(self._core.array([list(tokens)]), cache=cache)[0]
            return torch.from_numpy(np.array(out.astype(self._core.float32)))

    def ends(self) -> RuntimeEnds | None:
        """What mlx-lm's tokenizer ends at as its own load makes it, of which the tokenizer's own end token is added
        whatever the configs say; None for a folder without a tokenizer.
        """
        from mlx_lm.utils import load_config, load_tokenizer

        if not any((self._folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            return None
        try:
            tokenizer = load_tokenizer(self._folder, eos_token_ids=load_config(self._folder).get("eos_token_id"))
        except Exception as error:  # the library raises what it likes
            reason = first_line(error)
            raise FormatError(f"{self._folder}: mlx-lm does not load its tokenizer ({reason})") from error
        own = tokenizer.eos_token_id
        return RuntimeEnds(ids=frozenset(tokenizer.eos_token_ids), own=frozenset() if own is None else frozenset({own}))

    @property
    def _decoder(self) -> Any:
        """The decoder, in a model of text and images too."""
        return getattr(self._model, "language_model", self._model)

    @property
    def _family(self) -> Family:
        within = {one.model_type: one.family for kind in WRAPPERS.values() for one in kind.decoders}
        name = self._decoder.model_type
        return FAMILIES[within.get(name, name)]

    def _cache(self) -> Any:
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self._model)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]."""
        return self._run(tokens)

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        cache = self._cache()
        return torch.cat([self._run([token], cache) for token in tokens])

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence, from one batch padded on the left, as mlx-lm's own is; one
        after the other where mlx-lm does not pad: a model that keeps another cache than the plain one, or whose class
        takes no padding (`MlxLm.padded`).
        """
        from mlx_lm.models.cache import BatchKVCache, KVCache

        cache = self._cache()
        padded = self._family.mlx.padded
        if not padded or not all(type(part) is KVCache for part in cache):
            return [self.logits(sequence) for sequence in sequences]
        ids, mask = pad(sequences, "left")
        padding = (mask.shape[1] - mask.sum(dim=1)).tolist()
        with self._core.stream(self._core.cpu):
            out = self._model(self._core.array(ids.numpy()), cache=[BatchKVCache(padding) for _ in cache])
            return unpad(torch.from_numpy(np.array(out.astype(self._core.float32))), sequences, "left")

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """float32 [tokens, hidden] after each layer."""
        outputs: list[Tensor] = []
        decoder = self._decoder.model
        plain = decoder.layers
        decoder.layers = [_Recorder(layer, outputs) for layer in plain]
        try:
            self._run(tokens)
        finally:
            decoder.layers = plain
        return outputs

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, step by step with the cache."""
        cache = self._cache()
        return greedy(lambda ids, at: self._run(ids, cache), prompt, max_tokens)

    def close(self) -> None:
        """Free the model."""
        del self._model


class _Recorder:
    """A layer that keeps what it gives."""

    def __init__(self, layer: Any, outputs: list[Tensor]) -> None:
        self._layer, self._outputs = layer, outputs

    def __call__(self, *args: Any, **options: Any) -> Any:
        out = self._layer(*args, **options)
        self._outputs.append(torch.from_numpy(np.array(out[0])).float())
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def open_artifact(path: Path | Checkpoint, threads: int | None) -> MlxRuntime:
    """Open a folder; MissingLibraryError if mlx-lm or mlx is not installed. The threads are MLX's own matter."""
    check_libraries("mlx")
    if not isinstance(path, Path):
        raise FormatError("mlx-lm", expected="a folder", got="a model in memory")
    return MlxRuntime(path)
