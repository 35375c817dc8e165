"""Tokenizers that came from SentencePiece (Llama 2, Mistral, Gemma, Phi-3), from tokenizer.json to GGUF's metadata.

In tokenizer.json they are a BPE over characters that falls back to bytes, with spaces written as U+2581. llama.cpp's
model "llama" joins the two neighbours whose union has the best score, SentencePiece's way; tokenizer.json has the joins
in the order of those scores. So a token's score is minus the rank of the first join that makes it.

Sources: transformers, convert_slow_tokenizer.py (the joins); llama.cpp, convert_hf_to_gguf.py (types, spaces).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qalora.formats.gguf import Value, ValueType

__all__ = ["SPACE", "Spaces", "normalizer_of", "sentencepiece_entries", "spaces_of"]

SPACE = "\u2581"
UNKNOWN, USER_DEFINED, BYTE = 2, 4, 6
NEVER = -1e4
"""The score of what no join makes: characters, bytes, special tokens. It is never compared."""

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


Spaces = Literal["each", "each without", "first", "never"]
"""Where a tokenizer puts a space: before each part of a text between added tokens (in front of another space too, or
not), before the first part alone, or nowhere. llama.cpp has "each" and "never".
"""


def spaces_of(content: Mapping[str, Any]) -> Spaces | None:
    """What tokenizer.json says of it; None for a tokenizer that did not come from SentencePiece."""
    model, normalizer, cutting = content["model"], content.get("normalizer"), content.get("pre_tokenizer")
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    if normalizer == {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]} and cutting is None:
        return "each"
    if normalizer in (_REPLACE, {"type": "Sequence", "normalizers": [_REPLACE]}) and (
        cutting is None or cutting.get("pattern") == {"String": " "}
    ):
        return "never"
    if normalizer is None and cutting is not None and cutting.get("type") == "Metaspace":
        whole = cutting.get("split") is False and cutting.get("replacement") == SPACE
        schemes: dict[object, Spaces] = {"always": "each without", "first": "first", "never": "never"}
        return schemes.get(cutting.get("prepend_scheme")) if whole else None
    return None


def normalizer_of(*, prefix: bool) -> dict[str, Any]:
    """tokenizer.json's normalizer, with no pre_tokenizer beside it, for "each" or "never"."""
    return {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]} if prefix else _REPLACE


def sentencepiece_entries(model: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Value]:
    """Model, tokens, scores, types, by their keys below tokenizer.ggml; `types` know no bytes and no unknown token."""
    scores = _scores(model["merges"])
    unknown = model.get("unk_token")
    words, kinds, values = [], [], []
    for token, kind in zip(tokens, types, strict=True):
        byte, is_unknown = _BYTE.fullmatch(token) is not None, token == unknown
        kinds.append(BYTE if byte else UNKNOWN if is_unknown else kind)
        words.append(token.replace(SPACE, " ") if kind == USER_DEFINED else token)
        values.append(scores.get(token, NEVER))
    return {
        "model": Value.text("llama"),
        "pre": Value.text("default"),
        "tokens": Value(type=ValueType.ARRAY, element=ValueType.STRING, value=tuple(words)),
        "scores": Value(type=ValueType.ARRAY, element=ValueType.FLOAT32, value=tuple(values)),
        "token_type": Value(type=ValueType.ARRAY, element=ValueType.INT32, value=tuple(kinds)),
    }


def _scores(merges: Sequence[str | Sequence[str]]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(len(scores)))
    return scores
