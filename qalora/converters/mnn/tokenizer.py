"""The tokenizer as MNN's engine reads it, tokenizer.mtok, which it loads no model without.

    text    "430 4", counts of special, end and prefix tokens, and their ids, a line each
    binary  normalizer, pre-tokenizer, model, decoder, added tokens, chat template, end token, flags, begin token

It is made of tokenizer.json where that is a BPE whose parts MNN has all: of bytes, with no normalizer or NFC, digits, a
split by a pattern; or SentencePiece's, of characters that fall back to bytes, with a space before every part of a text
between added tokens, or before none. Elsewhere the file knows no words: the engine takes and gives token ids then.

A text is not put into NFC: MNN's own NFC knows single characters alone, and takes joiners, marks of direction and other
invisible characters, which emoji and Persian have, for spaces. Source: MNN 3.6.1,
transformers/llm/engine/src/tokenizer/tokenizer.cpp, PipelineTokenizer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.cutting import without_digits
from qalora.converters.ends import ends_of
from qalora.converters.sentencepiece import SPACE
from qalora.converters.tokenizer import UnknownCutError, has_tokenizer, load_tokenizer

__all__ = ["NAME", "tokenizer_file", "without_words"]

NAME = "tokenizer.mtok"

_NFC = "mnn: its tokenizer does not put a text into NFC: a letter and an accent that are two characters stay two"


def without_words(ends: Sequence[int]) -> bytes:
    """A tokenizer that knows no words, with the tokens at which generation ends."""
    head = f"430 4\n0 {len(ends)} 0\n{' '.join(map(str, ends))}\n".encode()
    one_word = struct.pack("<BIBBI", 0, 1, 0, 0, 0) + _text("?") + struct.pack("<I", 0)
    return head + bytes(2) + one_word + struct.pack("<BIIHBH", 0, 0, 0, 0, 0, 0)


def tokenizer_file(model: Checkpoint) -> tuple[bytes, tuple[str, ...]]:
    """The file, and what a user should know of it."""
    ends = ends_of(model).ids
    if not has_tokenizer(model):
        return without_words(ends), ()
    try:
        tokenizer = load_tokenizer(model)
    except UnknownCutError:
        return without_words(ends), (_left_out("its rule for cutting text is not known here"),)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return without_words(ends), (_left_out("it is no tokenizer of the library tokenizers"),)
    said = json.loads(backend.to_str())
    added, words = said.get("added_tokens", []), len(said["model"]["vocab"])
    try:
        body = b"".join(
            [
                _normalizer(said.get("normalizer")),
                _cut(said.get("pre_tokenizer"), pieces=bool(said["model"].get("byte_fallback"))),
                _bpe(said["model"], {token["content"] for token in added}),
                _decoder(said.get("decoder")),
                _added(added, backend, words),
                _template(tokenizer),
            ]
        )
        prefix = _prefix(tokenizer)
    except _UnknownPartError as error:
        return without_words(ends), (_left_out(str(error)),)
    special = sorted({token["id"] for token in added if token["special"]})
    numbers = " ".join(map(str, (*special, *ends, *prefix)))
    head = f"430 4\n{len(special)} {len(ends)} {len(prefix)}\n{numbers}\n".encode()
    notes = (_NFC,) if "NFC" in _kinds(said.get("normalizer")) else ()
    return head + body, (*notes, *_silent(added, words))


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
"""What SentencePiece falls back to."""

_MODEL_KEYS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)
"""Settings of a BPE that are refused where `_bpe` does not see that they change nothing."""


class _UnknownPartError(Exception):
    """A part of a tokenizer that MNN has not."""


def _left_out(reason: str) -> str:
    return f"mnn: the words of the tokenizer are left out, so that MNN takes token ids alone: {reason}"


def _text(text: str) -> bytes:
    content = text.encode()
    if len(content) > 0xFFFF:
        raise _UnknownPartError("a text in it is longer than 65,535 bytes")
    return struct.pack("<H", len(content)) + content


def _normalizer(part: Mapping[str, Any] | None) -> bytes:
    """The normalizer; NFC as none."""
    kind = None if part is None else part["type"]
    if part is None:
        return b"\0"
    if kind == "Prepend":
        return b"\x02" + _text(part["prepend"])
    if kind == "Replace":
        return b"\x03" + _replaced(part)
    if kind == "Sequence":
        return b"\x04" + struct.pack("<I", len(part["normalizers"])) + b"".join(map(_normalizer, part["normalizers"]))
    if kind != "NFC":
        raise _UnknownPartError(f"its normalizer is {kind}")
    return b"\0"


def _kinds(part: Mapping[str, Any] | None) -> set[str]:
    """The types of a normalizer and of its parts."""
    return set() if part is None else {part["type"]}.union(*map(_kinds, part.get("normalizers", [])))


def _silent(added: Sequence[Mapping[str, Any]], words: int) -> tuple[str, ...]:
    """What MNN's engine writes nothing for: added tokens behind the model's own words."""
    plain = [token["content"] for token in added if not token["special"] and token["id"] >= words]
    if not plain:
        return ()
    return (f"mnn: its engine writes no text for the tokens {', '.join(plain[:3])}{' ...' * (len(plain) > 3)}",)


def _replaced(part: Mapping[str, Any]) -> bytes:
    """A text and what takes its place."""
    text = part["pattern"].get("String")
    if not text:
        raise _UnknownPartError("it replaces by a pattern, or an empty text")
    return _text(text) + _text(part["content"])


def _cut(part: Mapping[str, Any] | None, *, pieces: bool = False) -> bytes:
    """The pre-tokenizer; pieces: SentencePiece's, which needs none."""
    if part is None and pieces:
        return b"\0"
    part = None if part is None else without_digits(part)  # MNN's own kind of that name knows ASCII's digits alone
    kind = None if part is None else part["type"]
    if part is None or kind not in ("Sequence", "ByteLevel", "Split"):
        raise _UnknownPartError(f"its pre-tokenizer is {kind}")
    if kind == "Sequence":
        parts = [_cut(each) for each in part["pretokenizers"]]
        return b"\x06" + struct.pack("<I", len(parts)) + b"".join(parts)
    if kind == "ByteLevel":
        if part.get("add_prefix_space"):
            raise _UnknownPartError("it puts a space before a text")
        return struct.pack("<BB", 1, bool(part.get("use_regex", True)))
    pattern = part["pattern"].get("Regex")
    if pattern is None or part.get("behavior") != "Isolated" or part.get("invert"):
        raise _UnknownPartError("it splits by a text, or removes or joins what it splits by")
    return b"\x04" + _text(pattern) + bytes(2)


def _bpe(part: Mapping[str, Any], added: Collection[str]) -> bytes:
    """The model; added: the texts of added tokens, which are cut out before."""
    if part.get("type") != "BPE":
        raise _UnknownPartError(f"its model is {part.get('type')}")
    vocabulary: dict[str, int] = part["vocab"]
    pieces = bool(part.get("byte_fallback"))
    if pieces and (missing := next((byte for byte in BYTES if byte not in vocabulary), None)):
        raise _UnknownPartError(f"it falls back to bytes, and has no {missing}")
    ours = {"unk_token", "byte_fallback"} if pieces else set[str]()  # no character is unknown then
    if part.get("ignore_merges"):
        if (missed := _not_joined(part, added)) is not None:
            raise _UnknownPartError(f"its model has ignore_merges, and its merges do not make the word {missed!r}")
        ours.add("ignore_merges")
    for key in _MODEL_KEYS:
        if part.get(key) and key not in ours:
            raise _UnknownPartError(f"its model has {key}")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise _UnknownPartError("the numbers of its words have gaps")
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in part["merges"]]
    merges = [(vocabulary[one], vocabulary[other], rank) for rank, (one, other) in enumerate(pairs)]
    words = [_text(word) + struct.pack("<I", vocabulary[word]) for word in sorted(vocabulary)]
    head = struct.pack("<BIBBI", 0, len(words), 0, 0, len(merges))
    return head + b"".join(words) + b"".join(struct.pack("<III", *merge) for merge in sorted(merges))


def _not_joined(part: Mapping[str, Any], added: Collection[str]) -> str | None:
    """A word that joins alone do not make of its characters, and that is not added.

    Where there is none, ignore_merges changes no text.
    """
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel

    joins = Tokenizer.from_str(json.dumps({"version": "1.0", "model": {**part, "ignore_merges": False}}))
    letters = set(ByteLevel.alphabet())
    cut_before = {word for word in added if word.isascii() or not letters.issuperset(word)}  # no text has such a word
    words = {word: n for word, n in part["vocab"].items() if word not in cut_before}
    found = joins.encode_batch_fast(list(words), add_special_tokens=False)
    return next((word for (word, n), one in zip(words.items(), found, strict=True) if one.ids != [n]), None)


_DECODERS = {"ByteLevel": 0, "ByteFallback": 1, "Fuse": 4, "Replace": 5, "Strip": 6, "Sequence": 7}


def _decoder(part: Mapping[str, Any] | None, *, fused: bool = False) -> bytes:
    """The decoder; fused: whether the tokens were put together before."""
    kind = None if part is None else part["type"]
    if part is None or kind not in _DECODERS:
        raise _UnknownPartError(f"its decoder is {kind}")
    head = bytes([_DECODERS[kind]])
    if kind == "Replace":
        return head + _replaced(part)
    if kind == "Strip":
        if not fused or max(part["start"], part["stop"]) > 1:
            raise _UnknownPartError("its decoder strips each token, or several characters")
        return head + _text(part["content"]) + struct.pack("<II", part["start"], part["stop"])
    if kind == "Sequence":
        made = []
        for one in part["decoders"]:
            made.append(_decoder(one, fused=fused))
            fused = fused or one["type"] == "Fuse"
        return head + struct.pack("<I", len(made)) + b"".join(made)
    return head


def _added(tokens: Sequence[Mapping[str, Any]], backend: Any, words: int) -> bytes:
    """The added tokens. MNN finds them in a text before it normalizes it; special ones among the words first of all, by
    their text with a space for U+2581, in the order of their ids, whatever stands around them.
    """
    made, before = [], list[str]()
    for token in sorted(tokens, key=lambda one: int(one["id"])):
        content, changed = token["content"], token["content"]
        if token.get("single_word"):
            raise _UnknownPartError("an added token is one between other words alone")
        if token.get("normalized") and backend.normalizer is not None:
            changed = backend.normalizer.normalize_str(content)
        if changed != content:
            raise _UnknownPartError(f"the added token {content!r} is one in the normalized text alone")
        flags = [bool(token.get(key)) for key in ("special", "lstrip", "rstrip")]
        if flags[0] and token["id"] < words:
            if any(flags[1:]) or SPACE in content or content.startswith("<0x"):
                raise _UnknownPartError(f"the special token {content!r} takes spaces, or is another text")
            if any(content.startswith(one) for one in before):
                raise _UnknownPartError(f"the special token {content!r} begins like another")
            before.append(content)
        made.append(struct.pack("<IBBB", token["id"], *flags) + _text(content))
    return struct.pack("<I", len(made)) + b"".join(made)


def _template(tokenizer: Any) -> bytes:
    """Chat template, end token, flags, and begin token."""
    template = tokenizer.chat_template
    content = template.encode() if isinstance(template, str) else b""
    cleaned = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    end, begin = (_text(token or "") for token in (tokenizer.eos_token, tokenizer.bos_token))
    return struct.pack("<I", len(content)) + content + end + struct.pack("<B", cleaned) + begin


def _prefix(tokenizer: Any) -> list[int]:
    """The tokens that are put before a text."""
    with_them, text = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    before: list[int] = with_them[: len(with_them) - len(text)]
    if [*before, *text] != with_them:
        raise _UnknownPartError("it puts tokens behind a text")
    return before
