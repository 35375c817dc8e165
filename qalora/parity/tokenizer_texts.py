"""Texts that show whether two tokenizers are the same: a plain passage, rendered chats, and each added token in a text.

The reference's tokenizer makes them, with its chat template and its added tokens; every other one gets the very same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qalora.converters.added_tokens import as_phi3
from qalora.converters.chat_template import render_chat
from qalora.converters.sentencepiece import SPACE, normalizer_of, spaces_of
from qalora.errors import FormatError
from qalora.parity.text import default_text

__all__ = ["PASSAGE", "Part", "parts_of", "untried"]

PASSAGE = (
    default_text()[:8000] + "\n\n  We'll see, it's DON'T: 1234567890 3.14159 0x1F 10,000\n\n\n"
    "    def f(x):\n\t\treturn x ** 2  # na\u00efve \u00bd \u6f22\u5b57 \u0440\u0443\u0441 \U0001f600 ...\r\n   \n"
)
"""Without added tokens: digits, contractions, indentation, other scripts."""

_SYSTEM = {"role": "system", "content": "Answer in one sentence."}
_TURNS = (
    {"role": "user", "content": "Hello there, who are you?"},
    {"role": "assistant", "content": "I am a model.\nAsk me something."},
    {"role": "user", "content": "What is 2+2, and why isn't it 5?"},
    {"role": "assistant", "content": "It is 4."},
)
LONGEST = 20_000
"""Characters of a rendered chat that are looked at; a template may say more."""

MOST = 400
"""Added tokens that are tried, those with flags and those of the chats first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A text.

    kind    "text", "chat" or "token"
    name    what it is, for a sentence
    ids     what the reference's tokenizer makes of it, added tokens parsed and nothing put around
    spaced  what it would make of it with spaces where llama.cpp and onnxruntime-genai put them and keep them; nothing
            for most tokenizers
    """

    kind: str
    name: str
    text: str
    ids: tuple[int, ...]
    spaced: tuple[tuple[int, ...], ...]


def parts_of(tokenizer: Any, rows: int) -> tuple[Part, ...]:
    """The texts for a tokenizer of transformers' class, of a model with so many rows."""
    chats = _chats(tokenizer)
    chat_text = "".join(text for _, text in chats)
    texts = [("text", "a text", PASSAGE), *(("chat", name, text) for name, text in chats)]
    texts += [("token", f"{token!r:.60} in a text", _around(token)) for token in _added(tokenizer, rows, chat_text)]
    encode, others = _encoder(tokenizer), _spaced(tokenizer)
    return tuple(
        Part(kind=kind, name=name, text=text, ids=encode(text), spaced=tuple(other(text) for other in others))
        for kind, name, text in texts
    )


def untried(tokenizer: Any) -> str:
    """Why no chat is among the texts of a tokenizer with a chat template; "" where one is, or there is no template."""
    if not tokenizer.chat_template or _chats(tokenizer):
        return ""
    try:
        render_chat(tokenizer, _TURNS[:1], add_generation_prompt=True)
    except Exception as error:  # a template is a program; it raises what it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"no chat was compared, since the chat template writes none ({reason:.120})"
    return ""


def _encoder(tokenizer: Any) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _chats(tokenizer: Any) -> list[tuple[str, str]]:
    """A conversation as the chat template writes it, whole and up to the last answer; none without a template."""
    if not tokenizer.chat_template:
        return []
    named_texts = []
    for name, turns, prompt in (
        ("a chat", _TURNS, False),
        ("a chat that waits for an answer", _TURNS[:3], True),
        ("a chat with a system message", (_SYSTEM, *_TURNS[:1]), True),
    ):
        try:
            text = render_chat(tokenizer, turns, add_generation_prompt=prompt)
        except FormatError:  # it takes too long, and would again
            return []
        except Exception:  # a template that raises, on a system message for instance, has no such chat
            continue
        named_texts.append((name, text[:LONGEST]))
    return named_texts


def _around(token: str) -> str:
    """A token between letters, between spaces, on a line of its own, before lines, and twice."""
    token = token.replace(SPACE, " ")  # as a text has them
    return f"x{token}y {token} z\n{token}\n\nw\t{token}{token} v"


def _added(tokenizer: Any, rows: int, chat_text: str) -> list[str]:
    """Texts of added tokens that the model has a row for: of many, those that are most likely to matter."""
    known = [token for number, token in sorted(tokenizer.added_tokens_decoder.items()) if number < rows]
    flagged = [token.content for token in known if token.lstrip or token.rstrip or token.single_word]
    in_chats = [token.content for token in known if token.content in chat_text]
    texts = [token.content for token in known if token.content]
    step = max(1, len(texts) // MOST)
    return list(dict.fromkeys((*flagged, *in_chats, *texts[::step])))[:MOST]


def _spaced(tokenizer: Any) -> list[Callable[[str], tuple[int, ...]]]:
    """The tokenizer with a space in front of each part of a text, and nowhere, where its own way is neither; and with
    the flags of added tokens for white space that genai and llama.cpp know.
    """
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added, ways = content.get("added_tokens") or [], [content]
    if spaces_of(content) in ("first", "each without"):
        ways = [
            {**content, "normalizer": normalizer_of(prefix=prefix), "pre_tokenizer": None} for prefix in (True, False)
        ]
    if any(token.get("rstrip") or token.get("lstrip") for token in added):
        known = [[{**token, "lstrip": False} for token in added]]
        if as_phi3(added) != known[0]:
            known += [as_phi3(added), [{**token, "lstrip": False, "rstrip": False} for token in added]]
        ways = [{**way, "added_tokens": tokens} for way in ways for tokens in known]

    def other(way: Mapping[str, Any]) -> Callable[[str], tuple[int, ...]]:
        tokenizer = Tokenizer.from_str(json.dumps(way))
        return lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    return [other(way) for way in ways if way is not content]
