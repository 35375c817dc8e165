"""What all artefacts compute on: tokens of a text, cut into windows, and prompts to continue.

Every artefact gets the very same token ids, so that no tokenizer can hide or make a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qalora.checkpoint import Checkpoint
from qalora.converters.first_tokens import first_tokens
from qalora.devices import find_device
from qalora.errors import InputError, about
from qalora.formats.files import InputFile
from qalora.formats.text import check_text, decode_text
from qalora.options.verify import Verify

__all__ = ["EvaluationInputs", "default_text", "make_inputs", "read_text", "verify_arguments"]

WINDOW = 256
"""Tokens of a window at most: its logits are held in memory, one forward's at a time."""

TEXT_BYTES = 16 << 20

PROMPT = "The Python language is"
PROMPT_TOKENS = 12
"""Tokens of the prompt where there is no tokenizer: the text's first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationInputs:
    """windows: token ids, each an independent sequence; source: whose they are; prompts: token ids to continue;
    decode: None without tokenizer.
    """

    windows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    source: str
    decode: Callable[[Sequence[int]], str] | None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; as much of it as any run would use. FormatError with the line of what is not UTF-8."""
    with InputFile(path) as file:
        content = file.read(0, min(file.size, TEXT_BYTES))
        if file.size > TEXT_BYTES:  # the limit may have cut a character
            content = content.rstrip(bytes(range(0x80, 0xC0))).rstrip(bytes(range(0xC0, 0x100)))
    return decode_text(content, str(path))


def verify_arguments(options: Verify) -> dict[str, Any]:
    """Arguments for `qalora.parity.verify`, with texts read; InputError for a file that is no text, or a device that is
    not here.
    """
    find_device(options.device, float64=False)
    text, lines = None, []
    if options.text is not None:
        with about("text"):
            text = read_text(options.text)
    if options.prompts is not None:
        with about("prompts"):
            lines = [line for line in read_text(options.prompts).splitlines() if line.strip()]
    return {
        "level": options.level,
        "text": text,
        "max_tokens": options.max_tokens,
        "prompts": [*options.prompt, *lines],
        "generate": options.generate,
        "threads": options.threads,
        "memory": options.memory_bytes,
        "device": options.device,
        "dynamic_int8": options.dynamic_int8,
    }


def default_text() -> str:
    """English about Python that every Python carries for `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def make_inputs(
    model: Checkpoint,
    tokenizer: Any,
    *,
    text: str | None,
    tokens: Sequence[int] | None,
    prompts: Sequence[str],
    max_tokens: int,
) -> EvaluationInputs:
    """Cut `tokens`, or those of `text`, or of a built-in passage, to `max_tokens`, in windows of about equal length.

    Windows and prompts begin with what the tokenizer puts in front of a text, windows else with the BOS of the model's
    config, where it has one: a word in its place gets activations of a size, and with them float32 noise of a size,
    that no token has in use.
    A model without a tokenizer (transformers' class, or None) and without `tokens` gets random ones, the same at every
    run; a text or prompt for it is refused. Raises InputError for tokens outside the vocabulary, and for text that
    UTF-8 cannot hold.
    """
    from qalora.converters.tokenizer import has_tokenizer

    vocabulary = model.tensors["model.embed_tokens.weight"].shape[0]
    if tokenizer is None and (text is not None or prompts):
        raise InputError(f"{model.path}", expected="a tokenizer for the text", got="a model without one")
    check_text(text, "`text`")
    check_text(prompts, "`prompt`")
    if tokens is not None:
        ids, source = list(tokens), "tokens given"
    elif tokenizer is not None:
        words = text if text is not None else default_text()
        ids = tokenizer(words[: 16 * max_tokens], add_special_tokens=False)["input_ids"]
        source = "built-in passage" if text is None else "text given"
    else:
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (max_tokens,), generator=rng).tolist()
        why = "its rule for cutting text is not known here" if has_tokenizer(model) else "the model has no tokenizer"
        source = f"random tokens, since {why}"
    first = () if tokenizer is None or tokens is not None else first_tokens(tokenizer) or _first_token(model)
    longest = _longest(model)
    ids = [int(token) for token in ids[: max(1, max_tokens - len(first) * -(-max_tokens // longest))]]
    used = [*first, *ids]
    if not ids or min(used) < 0 or max(used) >= vocabulary:
        got = f"{min(used)}..{max(used)}" if ids else "none"
        raise InputError("tokens", expected=f"at least one, each in 0..{vocabulary - 1}", got=got)
    starts = [ids[:PROMPT_TOKENS]]
    if tokenizer is not None and (prompts or tokens is None):
        starts = _started(prompts or (PROMPT,), tokenizer)
    return EvaluationInputs(
        windows=_windows(ids, longest, first),
        prompts=tuple(map(tuple, starts)),
        source=source,
        decode=None if tokenizer is None else tokenizer.decode,
    )


def _started(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokens of prompts, each behind the tokenizer's first ones."""
    starts = [list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    if not all(starts):
        raise InputError("prompt", expected="at least one token", got="an empty one")
    first = list(first_tokens(tokenizer))
    return [start if start[: len(first)] == first else [*first, *start] for start in starts]


def _first_token(model: Checkpoint) -> tuple[int, ...]:
    token = model.config.get("bos_token_id")
    return (
        (token,) if isinstance(token, int) and 0 <= token < model.tensors["model.embed_tokens.weight"].shape[0] else ()
    )


def _longest(model: Checkpoint) -> int:
    context = model.config.get("max_position_embeddings")
    return min(WINDOW, context) if isinstance(context, int) and context > 1 else WINDOW


def _windows(tokens: list[int], longest: int, first: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Windows of about equal length, each with `first` before it and at most `longest` tokens in all."""
    count = -(-len(tokens) // (longest - len(first)))
    step = -(-len(tokens) // count)
    return tuple((*first, *tokens[start : start + step]) for start in range(0, len(tokens), step))
