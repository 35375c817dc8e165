"""Added tokens, which are looked for in a text before it is cut: tokenizer.json's flags, and llama.cpp's rules.

llama.cpp looks for every token of type CONTROL, USER_DEFINED or UNKNOWN, the longest first, and for those whose text it
knows whatever their type. Its files have no flags. White space behind tokens is dropped in models whose general.name
says Phi-3, behind all of them but STAYING; nowhere else is anything dropped, and no token has to stand alone. A
tokenizer that drops white space otherwise (Phi-4's) is the same there where nothing it writes has any in such a place.

Source: llama.cpp, src/llama-vocab.cpp, llama_vocab::impl::load and tokenizer_st_partition; tokenizers, AddedToken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qalora.errors import InputError
from qalora.formats.gguf import Metadata

__all__ = ["OtherSpace", "as_phi3", "check_added", "elsewhere", "listed_added", "name_in_gguf", "strips"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
LOOKED_FOR = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
"""Types of tokens that are looked for in a text, and whether they are special."""

STAYING = ("<unk>", "<s>", "<|endoftext|>")
NEEDED = (*STAYING, "</s>")
"""Tokens that a Phi-3 has: without one of them llama.cpp does not load a model of that name."""

_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSpace:
    """Texts of added tokens beside which llama.cpp does otherwise with white space than the tokenizer.

    where           the model, for a sentence
    rstrip_missing  the tokenizer drops it behind them, and llama.cpp does not
    lstrip_missing  the tokenizer drops it in front of them, and llama.cpp does not
    rstrip_extra    llama.cpp drops it behind them, and the tokenizer does not
    """

    where: str
    rstrip_missing: tuple[str, ...] = ()
    lstrip_missing: tuple[str, ...] = ()
    rstrip_extra: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rstrip_missing or self.lstrip_missing or self.rstrip_extra)

    def in_chat(self, text: str) -> str:
        """The first token that has such white space beside it in a text; "" for none."""
        sides = [(token, rf"{re.escape(token)}\s") for token in (*self.rstrip_missing, *self.rstrip_extra)]
        sides += [(token, rf"\s{re.escape(token)}") for token in self.lstrip_missing]
        return next((token for token, pattern in sides if re.search(pattern, text)), "")

    def refusal(self, token: str = "") -> InputError:
        """What to raise where llama.cpp would have other tokens, because of this one."""
        flag = "lstrip" if self.lstrip_missing and token not in (*self.rstrip_missing, *self.rstrip_extra) else "rstrip"
        return _refused(self.where, token or (*self.rstrip_missing, *self.rstrip_extra, *self.lstrip_missing)[0], flag)

    def note(self) -> str:
        """What a user should know where chats are the same."""
        sides = (
            (self.rstrip_missing, "keeps white space that the tokenizer drops behind"),
            (self.lstrip_missing, "keeps white space that the tokenizer drops before"),
            (self.rstrip_extra, "drops white space that the tokenizer keeps behind"),
        )
        parts = [
            f"{side} {', '.join(texts[:3])}" + (f" and {len(texts) - 3} more" * (len(texts) > 3))
            for texts, side in sides
            if texts
        ]
        return (
            f"gguf: llama.cpp {', and '.join(parts)}: the tokens of a chat are the same but for a message that begins "
            "or ends with it"
        )


def strips(name: object) -> bool:
    """Whether llama.cpp drops white space behind tokens in a model of this general.name."""
    return isinstance(name, str) and _PHI3.search(name) is not None


def name_in_gguf(name: str, *, stripping: bool) -> str:
    """The general.name by which llama.cpp does what the tokenizer does."""
    if strips(name) == stripping:
        return name
    return f"{name}-phi-3" if stripping else _PHI3.sub("phi 3", name)


def check_added(where: str, added: Iterable[Mapping[str, Any]], *, prefixed: bool) -> tuple[bool, OtherSpace]:
    """(whether the model is a Phi-3 to llama.cpp, which drops white space behind its tokens; what differs then).

    added     tokenizer.json's added_tokens, those that the model has a row for
    prefixed  a normalizer puts a space before each part of a text

    InputError names a token with a flag that llama.cpp has no place for, whatever a text is.
    """
    tokens = list(added)
    for token in tokens:
        flags = ["single_word"] if token.get("single_word") else []
        flags += ["normalized"] if prefixed and token.get("normalized") else []
        if flags:
            raise _refused(where, str(token.get("content")), flags[0])
    texts = [str(token.get("content")) for token in tokens]
    behind, before = (
        tuple(text for text, token in zip(texts, tokens, strict=True) if token.get(flag))
        for flag in ("rstrip", "lstrip")
    )
    plain = OtherSpace(where=where, rstrip_missing=behind, lstrip_missing=before)
    if not behind or not {*texts} >= {*NEEDED}:
        return False, plain
    missing = tuple(text for text in behind if text in STAYING)
    extra = tuple(text for text in texts if text not in (*behind, *STAYING))
    if len(missing) + len(extra) >= len(behind):
        return False, plain
    return True, OtherSpace(where=where, rstrip_missing=missing, lstrip_missing=before, rstrip_extra=extra)


def as_phi3(added: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """tokenizer.json's added_tokens with the flags that llama.cpp gives those of a Phi-3."""
    return [{**token, "lstrip": False, "rstrip": token.get("content") not in STAYING} for token in added]


def elsewhere() -> str:
    """What to do with a tokenizer that a file of a model cannot hold: formats of folders have its own files."""
    from qalora.converters import TARGETS, target

    *others, last = (name for name in TARGETS if not target(name).tokenizer)
    return f"export it to {', '.join(others)} or {last}, which carry tokenizer.json"


def _refused(where: str, text: str, flag: str) -> InputError:
    expected = "none" if flag != "rstrip" else f"none, or what Phi-3 has: on all but {', '.join(STAYING)}"
    return InputError(
        f"{where}: tokenizer.json: {flag} of {text!r:.60}",
        expected=f"{expected}, as llama.cpp has no place for it",
        todo=elsewhere(),
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
    value = metadata.get(f"tokenizer.ggml.{key}")
    return value if isinstance(value, list | tuple) else ()
