"""Added tokens, which are looked for in a text before it is cut: tokenizer.json's flags, and llama.cpp's rules.

llama.cpp looks for every token of type CONTROL, USER_DEFINED or UNKNOWN, the longest first, and for those whose text it
knows whatever their type. Its files have no flags. White space behind tokens is dropped in models whose general.name
says Phi-3, behind all of them but STAYING; nowhere else is anything dropped, and no token has to stand alone.

Source: llama.cpp, src/llama-vocab.cpp, llama_vocab::impl::load and tokenizer_st_partition; tokenizers, AddedToken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qalora.errors import InputError
from qalora.formats.gguf import Metadata

__all__ = ["check_added", "listed_added", "name_in_gguf", "strips"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
LOOKED_FOR = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
"""Types of tokens that are looked for in a text, and whether they are special."""

STAYING = ("<unk>", "<s>", "<|endoftext|>")
NEEDED = (*STAYING, "</s>")
"""Tokens that a Phi-3 has: without one of them llama.cpp does not load a model of that name."""

_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)


def strips(name: object) -> bool:
    """Whether llama.cpp drops white space behind tokens in a model of this general.name."""
    return isinstance(name, str) and _PHI3.search(name) is not None


def name_in_gguf(name: str, *, stripping: bool) -> str:
    """The general.name by which llama.cpp does what the tokenizer does."""
    if strips(name) == stripping:
        return name
    return f"{name}-phi-3" if stripping else _PHI3.sub("phi 3", name)


def check_added(where: str, added: Iterable[Mapping[str, Any]], *, prefixed: bool) -> bool:
    """Whether white space behind the tokens is dropped as llama.cpp does it in a Phi-3.

    added     tokenizer.json's added_tokens, those that the model has a row for
    prefixed  a normalizer puts a space before each part of a text

    InputError names a token with a flag that llama.cpp has no place for.
    """
    tokens = list(added)
    for token in tokens:
        flags = [flag for flag in ("lstrip", "single_word") if token.get(flag)]
        flags += ["normalized"] if prefixed and token.get("normalized") else []
        if flags:
            raise _refused(where, token, flags[0])
    dropping = [token for token in tokens if token.get("rstrip")]
    if not dropping:
        return False
    texts = {str(token.get("content")) for token in tokens}
    other = [token for token in tokens if bool(token.get("rstrip")) == (token.get("content") in STAYING)]
    if other or not texts >= set(NEEDED):
        raise _refused(where, next((token for token in other if token.get("rstrip")), dropping[0]), "rstrip")
    return True


def _refused(where: str, token: Mapping[str, Any], flag: str) -> InputError:
    expected = "none" if flag != "rstrip" else f"none, or what Phi-3 has: on all but {', '.join(STAYING)}"
    return InputError(
        f"{where}: tokenizer.json: {flag} of {str(token.get('content'))!r:.60}",
        expected=f"{expected}, as llama.cpp has no place for it",
        todo="export it to gptq, onnx or mlx, which carry tokenizer.json",
    )


def listed_added(metadata: Metadata, known: Iterable[str], *, stripping: bool) -> list[dict[str, Any]]:
    """tokenizer.json's added_tokens for a GGUF file; `known` are the texts that llama.cpp looks for in any case."""
    tokens, types = (_listed(metadata, key) for key in ("tokens", "token_type"))
    always = frozenset(known)
    added = []
    for number, text in enumerate(tokens):
        kind = types[number] if number < len(types) else NORMAL
        if kind in LOOKED_FOR or text in always:
            flags = {"single_word": False, "lstrip": False, "normalized": False}
            flags |= {"rstrip": stripping and text not in STAYING}
            special = LOOKED_FOR.get(kind, True) or text in always
            added.append({"id": number, "content": text, **flags, "special": special})
    return added


def _listed(metadata: Metadata, key: str) -> Sequence[Any]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    return found if isinstance(found, list | tuple) else ()
