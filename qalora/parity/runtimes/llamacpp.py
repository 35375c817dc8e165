"""GGUF files in llama.cpp, on the CPU: F32 KV cache, no flash attention, so that only the kernels' rounding is left.

llama.cpp quantizes the activations to 8 bits (Q8_1, Q8_0) before it multiplies them with integer weights.
"""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.errors import FormatError
from qalora.formats.gguf_ends import KNOWN
from qalora.parity.ends import RuntimeEnds
from qalora.parity.runtimes import RuntimeInfo
from qalora.parity.runtimes.llamacpp_abi import EVAL_CALLBACK, LOG_CALLBACK, load_library
from qalora.parity.runtimes.stepping import greedy

__all__ = ["LlamaCpp", "open_artifact"]

F32 = 0
NO_VOCABULARY = 0
DISABLED = 0
ERROR = 4

_messages: list[str] = []


@LOG_CALLBACK  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes | None, _: object) -> None:
    """Keep the errors, drop the rest; kept alive by the module, as the library calls it at any time."""
    if level == ERROR and text:
        _messages.append(text.decode("utf-8", "replace").strip())


class LlamaCpp:
    """A model of one GGUF file, with a GGUF LoRA or without; a context is made for each sequence, just large enough."""

    def __init__(self, path: Path, threads: int | None, *, lora: Path | None = None) -> None:
        self._library, package = load_library()
        self._threads = threads or torch.get_num_threads()
        self._library.llama_log_set(_log, None)
        self._library.llama_backend_init()
        _messages.clear()
        params = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise FormatError(
                f"{path}: llama.cpp does not load it ({_messages[0] if _messages else 'no reason given'})"
            )
        self._lora = None if lora is None else self._open_lora(lora)
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.words = self
        self._width = self._library.llama_vocab_n_tokens(self._vocab)
        self.info = RuntimeInfo(
            name="llama.cpp",
            version=package,
            backend="cpu",
            dtype="float32 (activations of quantized layers in 8 bits)",
            threads=self._threads,
        )

    def _open_lora(self, path: Path) -> Any:
        """The adapter of a file; the model frees it with itself."""
        adapter = self._library.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise FormatError(
                f"{path}: llama.cpp does not load it ({_messages[-1] if _messages else 'no reason given'})"
            )
        return adapter

    follows = frozenset({"text", "chat", "token", "around"})

    def tokenize(self, text: str, *, special: bool = False, around: bool = False) -> list[int]:
        """The tokens of a text; with special ones parsed, and with those that begin and end a text, where asked."""
        data = text.encode()
        out = (c.c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocab, data, len(data), out, len(out), around, special)
        if count < 0:
            raise FormatError("llama.cpp: the text has more tokens than bytes")
        return list(out[:count])

    def ends(self) -> RuntimeEnds | None:
        """The tokens that it ends at, of which those whose text it knows are its own; None without a vocabulary.

        None with llama-cpp-python, too, in a version that does not say.
        """
        is_eog = getattr(self._library, "llama_vocab_is_eog", None)
        if is_eog is None or self._library.llama_vocab_type(self._vocab) == NO_VOCABULARY:
            return None
        ids = frozenset(n for n in range(self._width) if is_eog(self._vocab, n))
        texts = {n: (self._library.llama_vocab_get_text(self._vocab, n) or b"").decode("utf-8", "replace") for n in ids}
        return RuntimeEnds(ids=ids, own=frozenset(n for n, text in texts.items() if text in KNOWN))

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]."""
        context = self._context(len(tokens))
        try:
            return self._decode(context, tokens, 0, every=True)
        finally:
            self._library.llama_free(context)

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        context = self._context(len(tokens))
        try:
            return torch.cat([self._decode(context, [token], n, every=True) for n, token in enumerate(tokens)])
        finally:
            self._library.llama_free(context)

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence, all in one batch, which is not padded."""
        context = self._context(max(map(len, sequences)), sequences=len(sequences))
        try:
            rows = self._decode_all(context, [(sequence, 0) for sequence in sequences], every=True)
        finally:
            self._library.llama_free(context)
        return list(torch.split(rows, [len(sequence) for sequence in sequences]))

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """float32 [tokens, hidden] after each layer, from the tensors that llama.cpp's graphs call l_out-<layer>."""
        outputs: dict[int, Tensor] = {}
        if not hasattr(self._library, "ggml_get_name"):  # llama-cpp-python's own declarations
            return []

        @EVAL_CALLBACK  # type: ignore[untyped-decorator]
        def keep(tensor: int, ask: bool, _: object) -> bool:
            name = (self._library.ggml_get_name(tensor) or b"").decode("utf-8", "replace")
            kind, _, number = name.partition("-")
            if kind != "l_out" or not number.isdigit():
                return not ask
            if not ask:
                values = np.empty(self._library.ggml_nbytes(tensor) // 4, dtype=np.float32)
                self._library.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
                outputs[int(number)] = torch.from_numpy(values).view(len(tokens), -1)
            return True

        context = self._context(len(tokens), callback=c.cast(keep, c.c_void_p))
        try:
            self._decode(context, tokens, 0, every=True)
        finally:
            self._library.llama_free(context)
        return [outputs[n] for n in sorted(outputs)]

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, step by step with the cache."""
        context = self._context(len(prompt) + max_tokens)
        try:
            return greedy(lambda ids, at: self._decode(context, ids, at, every=False), prompt, max_tokens)
        finally:
            self._library.llama_free(context)

    def _context(self, length: int, *, sequences: int = 1, callback: Any = None) -> Any:
        """Room for sequences of at most `length` tokens."""
        params = self._library.llama_context_default_params()
        total = max(32, length) * sequences
        params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = total
        params.n_seq_max = sequences
        params.kv_unified = sequences > 1
        if hasattr(params, "n_outputs_max_per_seq"):
            params.n_outputs_max_per_seq = total
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = F32
        params.flash_attn_type = DISABLED
        if callback is not None:
            params.cb_eval = callback
        context = self._library.llama_init_from_model(self._model, params)
        if not context:
            raise FormatError(
                f"llama.cpp: no context of {length} tokens ({_messages[-1] if _messages else 'no reason'})"
            )
        if self._lora is not None:
            adapters, scales = (c.c_void_p * 1)(self._lora), (c.c_float * 1)(1.0)
            if self._library.llama_set_adapters_lora(context, adapters, 1, scales) != 0:
                raise FormatError("llama.cpp: the LoRA is not applied")
        return context

    def _decode(self, context: Any, tokens: Sequence[int], position: int, *, every: bool) -> Tensor:
        return self._decode_all(context, [(tokens, position)], every=every)

    def _decode_all(self, context: Any, parts: Sequence[tuple[Sequence[int], int]], *, every: bool) -> Tensor:
        """Logits of all sequences' tokens, or of each one's last; a part is (tokens, how many came before)."""
        count = sum(len(tokens) for tokens, _ in parts)
        batch = self._library.llama_batch_init(count, 0, 1)
        rows = []
        try:
            for sequence, (tokens, position) in enumerate(parts):
                for n, token in enumerate(tokens):
                    at = batch.n_tokens
                    batch.token[at], batch.pos[at] = token, position + n
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                    batch.logits[at] = int(every or n == len(tokens) - 1)
                    rows += [at] if batch.logits[at] else []
                    batch.n_tokens += 1
            status = self._library.llama_decode(context, batch)
        finally:
            self._library.llama_batch_free(batch)
        if status != 0:
            raise FormatError(f"llama.cpp: decoding failed with status {status}")
        out = np.empty((len(rows), self._width), dtype=np.float32)
        for n, row in enumerate(rows):
            out[n] = np.ctypeslib.as_array(self._library.llama_get_logits_ith(context, row), shape=(self._width,))
        return torch.from_numpy(out)

    def close(self) -> None:
        """Free the model."""
        if self._model:
            self._library.llama_model_free(self._model)
            self._model = None


def open_artifact(path: Path | Checkpoint, threads: int | None, *, lora: Path | None = None) -> LlamaCpp:
    """Open a GGUF file, with a GGUF LoRA or without; MissingLibraryError if no build of llama.cpp is installed."""
    if not isinstance(path, Path):
        raise FormatError("llama.cpp", expected="a GGUF file", got="a model in memory")
    return LlamaCpp(path, threads, lora=lora)
