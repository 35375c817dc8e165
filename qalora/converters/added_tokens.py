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

__all__ = ["KeptSpace", "check_added", "drops_as_phi3", "listed_added", "name_in_gguf", "strips"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
LOOKED_FOR = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
"""Types of tokens that are looked for in a text, and whether they are special."""

STAYING = ("<unk>", "<s>", "<|endoftext|>")
NEEDED = (*STAYING, "</s>")
"""Tokens that a Phi-3 has: without one of them llama.cpp does not load a model of that name."""

_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSpace:
    """Texts of added tokens beside which a tokenizer drops white space, and llama.cpp keeps it.

    where  the model, for a sentence
    """

    where: str
    behind: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.behind or self.before)

    def in_chat(self, text: str) -> str:
        """The first token that has such white space beside it in a text; "" for none."""
        sides = [(token, rf"{re.escape(token)}\s") for token in self.behind]
        sides += [(token, rf"\s{re.escape(token)}") for token in self.before]
        return next((token for token, wanted in sides if re.search(wanted, text)), "")

    def refusal(self, token: str = "") -> InputError:
        """What to raise where llama.cpp would have other tokens, because of this one."""
        flag = "rstrip" if token in self.behind or not self.before else "lstrip"
        return _refused(self.where, token or (self.behind or self.before)[0], flag)

    def note(self) -> str:
        """What a user should know where chats are the same."""
        sides = [(self.behind, "behind"), (self.before, "before")]
        said = [
            f"{side} {', '.join(texts[:3])}" + (f" and {len(texts) - 3} more" * (len(texts) > 3))
            for texts, side in sides
            if texts
        ]
        return (
            f"gguf: llama.cpp keeps white space that the tokenizer drops {' and '.join(said)}: the tokens of a chat "
            "are the same but for a message that begins or ends with it"
        )


def strips(name: object) -> bool:
    """Whether llama.cpp drops white space behind tokens in a model of this general.name."""
    return isinstance(name, str) and _PHI3.search(name) is not None


def name_in_gguf(name: str, *, stripping: bool) -> str:
    """The general.name by which llama.cpp does what the tokenizer does."""
    if strips(name) == stripping:
        return name
    return f"{name}-phi-3" if stripping else _PHI3.sub("phi 3", name)


def check_added(where: str, added: Iterable[Mapping[str, Any]], *, prefixed: bool) -> tuple[bool, KeptSpace]:
    """(whether white space behind the tokens is dropped as llama.cpp does it in a Phi-3, what it keeps otherwise).

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
    as_phi3 = drops_as_phi3(tokens)
    return as_phi3, KeptSpace(where=where, behind=() if as_phi3 else behind, before=before)


def drops_as_phi3(added: Iterable[Mapping[str, Any]]) -> bool:
    """Whether white space behind tokens of tokenizer.json is dropped as llama.cpp does it in a Phi-3."""
    flags = {str(token.get("content")): bool(token.get("rstrip")) for token in added}
    return {*flags} >= {*NEEDED} and all(drops == (text not in STAYING) for text, drops in flags.items())


def _refused(where: str, text: str, flag: str) -> InputError:
    expected = "none" if flag != "rstrip" else f"none, or what Phi-3 has: on all but {', '.join(STAYING)}"
    return InputError(
        f"{where}: tokenizer.json: {flag} of {text!r:.60}",
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
