"""Float32 torch through transformers: the runtime that the others are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.torch_module import build, layer_outputs
from qalora.errors import FormatError, first_line
from qalora.parity.ends import RuntimeEnds
from qalora.parity.runtimes import RuntimeInfo, Tokenizing
from qalora.parity.runtimes.padding import pad, positions, unpad
from qalora.parity.runtimes.stepping import greedy

__all__ = ["ModuleRuntime", "auto_class", "ends_in_transformers", "open_artifact", "runtime_ends"]


class ModuleRuntime:
    """A transformers causal language model."""

    def __init__(
        self, module: Any, info: RuntimeInfo, words: Tokenizing | None = None, *, ends: RuntimeEnds | None = None
    ) -> None:
        self.info = info
        self.words = words
        self._module = module
        self._ends = ends

    def ends(self) -> RuntimeEnds | None:
        """What transformers' generate ends at; None for a model in memory."""
        return self._ends

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]."""
        out: Tensor = self._module(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits
        return out[0].float()

    @torch.inference_mode()
    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        rows, cache = [], None
        for token in tokens:
            out = self._module(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0].float())
        return torch.cat(rows)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, step by step with the cache."""
        cache = None

        def step(ids: list[int], before: int) -> Tensor:
            nonlocal cache
            out = self._module(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits: Tensor = out.logits[0]
            return logits

        return greedy(step, prompt, max_tokens)

    @torch.inference_mode()
    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence, from one batch padded on the left, as generation pads."""
        ids, mask = pad(sequences, "left")
        out: Tensor = self._module(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).logits
        return [row.float() for row in unpad(out, sequences, "left")]

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """float32 [tokens, hidden] after each layer."""
        return layer_outputs(self._module, tokens)

    def close(self) -> None:
        """Free the module."""
        self._module = None


def open_artifact(path: Path | Checkpoint, threads: int | None) -> ModuleRuntime:
    """Open anything readable, dequantized to float32."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = path if isinstance(path, Checkpoint) else load(path)
    info = RuntimeInfo(
        name="torch", version=torch.__version__, backend="cpu", dtype="float32", threads=torch.get_num_threads()
    )
    return ModuleRuntime(build(model), info, ends=ends_in_transformers(model.path) if model is not path else None)


def auto_class(folder: Path) -> Any:
    """transformers' class that opens a folder: of causal language models, or of text and images. FormatError for a
    config that it does not take.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a foreign loader raises what it likes
        reason = first_line(error)
        raise FormatError(f"{folder}: transformers does not load it ({reason})") from error
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def ends_in_transformers(folder: Path) -> RuntimeEnds | None:
    """What transformers' generate ends at with a model of this folder, as its from_pretrained finds it; None for what
    is no folder of its own.
    """
    from transformers import GenerationConfig

    if not (folder / "config.json").is_file():
        return None
    try:
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        generation = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
        )
    return runtime_ends(generation.eos_token_id)


def runtime_ends(eos: Any) -> RuntimeEnds:
    """An eos_token_id as transformers has it: a number, a list, or nothing."""
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return RuntimeEnds(ids=frozenset(listed))
