"""Tokenizers compared: what an artefact's own makes of a text, against the reference's.

Logits are compared over the same token ids, so that no tokenizer can hide a difference there; this is where one shows.
Compared are the vocabularies, the ids of the texts of `qalora.parity.tokenizer_texts` (a passage, chats, each added
token), the special tokens, those that are put around a text, and the text of each chat template. A GGUF file's
tokenizer is read from its metadata. Where an artefact runs, its runtime's own tokenizer gets the same texts. What
several artefacts bring is opened once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.added_tokens import strips
from qalora.converters.first_tokens import PROBE, around, tokens_around
from qalora.converters.huggingface import LICENCES
from qalora.converters.sentencepiece import SPACE
from qalora.converters.tokenizer import (
    UnknownCutError,
    has_tokenizer,
    load_tokenizer,
    template_name,
    tokenizer_part,
    with_line_ends,
)
from qalora.formats.gguf import metadata_bytes
from qalora.parity.evidence import TokenizerFindings
from qalora.parity.runtimes import Tokenizing
from qalora.parity.tokenizer_texts import Part, parts_of, untried

__all__ = ["TokenizerCheck"]

FILLER = re.compile(r"\[PAD\d+\]|<\|?(?:unused|pad|reserved)[^>]*>")
"""Names of ids that no text has, which writers choose as they like."""

EOS = "eos_token_id"
"""Of a GGUF file it is one of the model's end tokens, and not always the tokenizer's: gate `end` is for those."""

SPECIAL = ("bos_token_id", EOS, "pad_token_id", "unk_token_id")

FILES = frozenset({"text", "chat", "token", "spaces"})
"""What the files of an artefact do as transformers does; GGUF has not all places for spaces."""

OTHER_FILES = (*LICENCES, "generation_config.json")
"""Companion files that say nothing of a tokenizer."""

NEAR = 24
"""Characters before a token that differ in the sentence about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What a tokenizer does; ids: by the texts that were asked."""

    vocabulary: Mapping[str, int]
    ids: Mapping[str, tuple[int, ...]]
    around: tuple[tuple[int, ...], tuple[int, ...]]
    special: Mapping[str, int | None]
    templates: Mapping[str, str]
    decode: Callable[[Sequence[int]], str]


class TokenizerCheck:
    """The reference's tokenizer, opened when it is first needed, and what was said of others beside it."""

    def __init__(self, reference: Checkpoint) -> None:
        self._reference = reference
        self._opened: Any = None
        self._facts: _Facts | None = None
        self._parts: tuple[Part, ...] = ()
        self._untried = ""
        self._cache: dict[bytes, TokenizerFindings] = {}

    def opened(self) -> Any:
        """The reference's tokenizer as transformers' class, always the same one; None where it has none, or one whose
        rule for cutting text is not known here: only GGUF files with the same tokenizer are compared with that.
        """
        if self._opened is None and has_tokenizer(self._reference):
            try:
                self._opened = _opened(self._reference)
            except UnknownCutError:
                return None
        return self._opened

    def compare(self, artifact: Checkpoint) -> TokenizerFindings | None:
        """What the artefact's own tokenizer does otherwise; None where one of the two has none."""
        if not (has_tokenizer(artifact) and has_tokenizer(self._reference)):
            return None
        if _same_files(artifact, self._reference):
            return TokenizerFindings()
        key = _digest(artifact)
        if key not in self._cache:
            known = self._known()
            mine = _facts(artifact, _opened(artifact), known.ids)
            follows = FILES if artifact.gguf is None else FILES - {"spaces"}
            texts = self._differing(lambda part: mine.ids[part.text], known.decode, follows)
            self._cache[key] = TokenizerFindings(wrong=(*_differences(mine, known), *texts.wrong), limits=texts.limits)
        return self._cache[key]

    def compare_runtime(self, runtime: Tokenizing | None) -> TokenizerFindings | None:
        """What a runtime's own tokenizer makes of the texts otherwise; None where it or the reference has none."""
        if runtime is None or self.opened() is None:
            return None
        known = self._known()
        findings = self._differing(
            lambda part: tuple(runtime.tokenize(part.text, special=part.kind != "text")), known.decode, runtime.follows
        )
        if "around" not in runtime.follows:
            return findings
        own = around(runtime.tokenize(PROBE), runtime.tokenize(PROBE, special=True, around=True))
        return TokenizerFindings(wrong=(*findings.wrong, *_of_ends(own, known.around)), limits=findings.limits)

    def _differing(
        self,
        ids: Callable[[Part], tuple[int, ...]],
        decode: Callable[[Sequence[int]], str],
        follows: frozenset[str],
    ) -> TokenizerFindings:
        """The first text of each kind of which something else is made; what a runtime does not follow is its limit.

        Chats are exact, or wrong.
        """
        wrong: dict[str, str] = {}
        limits = {"chat": self._untried} if self._untried else {}
        for part in self._parts:
            mine = ids(part)
            if mine != part.ids:
                spaced = "spaces" not in follows and mine in part.spaced
                limit = part.kind != "chat" and (part.kind not in follows or spaced)
                (limits if limit else wrong).setdefault(part.kind, _of_text(part, mine, decode))
        return TokenizerFindings(wrong=tuple(wrong.values()), limits=tuple(limits.values()))

    def _known(self) -> _Facts:
        if self._facts is None:
            tokenizer = self.opened() or _opened(self._reference)  # which says why there is none
            self._parts, self._untried = parts_of(tokenizer, _rows(self._reference)), untried(tokenizer)
            self._facts = _facts(self._reference, tokenizer, (part.text for part in self._parts))
        return self._facts


def _same_files(one: Checkpoint, two: Checkpoint) -> bool:
    """Whether both have tokenizer.json, and every tokenizer file of one is the other's, byte for byte; or both GGUF
    metadata, and the same entries in it.
    """
    if one.gguf is not None and two.gguf is not None:
        same_name = strips(one.gguf.get("general.name")) == strips(two.gguf.get("general.name"))
        return same_name and tokenizer_part(one.gguf) == tokenizer_part(two.gguf)
    names = {name for model in (one, two) for name in model.files if "token" in name or "template" in name}
    if "tokenizer.json" not in names or one.gguf is not None or two.gguf is not None:
        return False
    return all(
        name in one.files and name in two.files and one.files[name].read_bytes() == two.files[name].read_bytes()
        for name in names
    )


def _digest(model: Checkpoint) -> bytes:
    """A digest of all that `_facts` looks at: files or metadata, and what the config says of them."""
    config_values = [model.config.get(key) for key in ("model_type", *SPECIAL)]
    parts = [json.dumps([config_values, _rows(model)], default=repr).encode()]
    if model.gguf is not None:
        parts += [metadata_bytes(tokenizer_part(model.gguf)), bytes([strips(model.gguf.get("general.name"))])]
    for name, path in sorted(model.files.items()):
        parts += [] if name in OTHER_FILES else [name.encode("utf-8", "surrogateescape"), path.read_bytes()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _rows(model: Checkpoint) -> int:
    """Tokens that the model has a row for."""
    return model.tensors["model.embed_tokens.weight"].shape[0]


def _opened(model: Checkpoint) -> Any:
    tokenizer = load_tokenizer(model)
    tokenizer.model_max_length = 1 << 30  # or it warns of a text that no model is to see
    return tokenizer


def _facts(model: Checkpoint, tokenizer: Any, texts: Iterable[str]) -> _Facts:
    return _Facts(
        vocabulary=_vocabulary(model, tokenizer),
        ids={text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts},
        around=tokens_around(tokenizer),
        special={key: _special(model, tokenizer, key) for key in SPECIAL if model.gguf is None or key != EOS},
        templates=_templates(tokenizer.chat_template),
        decode=tokenizer.decode,
    )


def _templates(value: object) -> dict[str, str]:
    """What transformers has as chat_template, by the names that GGUF knows; its lines as Jinja ends them."""
    by_name = value if isinstance(value, dict) else {"default": value}
    texts = {template_name(name): text for name, text in by_name.items() if isinstance(text, str)}
    return {name: with_line_ends(text).removesuffix("\n") for name, text in texts.items()}


def _vocabulary(model: Checkpoint, tokenizer: Any) -> dict[str, int]:
    """Tokens and ids that the model has a row for; those of GGUF's own list, to which transformers' conversion adds.

    transformers' classes add special tokens that a tokenizer lacks, behind the last row of the embedding.
    """
    listed = None if model.gguf is None else model.gguf.get("tokenizer.ggml.tokens")
    if isinstance(listed, list | tuple):
        runs = model.gguf is not None and model.gguf.get("tokenizer.ggml.model") == "llama"
        texts = (str(token) for token in listed)
        return {text if text.strip(" ") or not runs else SPACE * len(text): n for n, text in enumerate(texts)}
    rows = _rows(model)
    return {token: n for token, n in tokenizer.get_vocab().items() if n < rows}


def _special(model: Checkpoint, tokenizer: Any, key: str) -> int | None:
    """GGUF's own id; the tokenizer's, or the config's where the model has no such row: as `gguf_tokenizer` has it."""
    short = {"pad_token_id": "padding_token_id", "unk_token_id": "unknown_token_id"}.get(key, key)
    token = getattr(tokenizer, key, None) if model.gguf is None else model.gguf.get(f"tokenizer.ggml.{short}")
    rows = _rows(model)
    if model.gguf is None and not (isinstance(token, int) and token < rows):
        token = model.config.get(key)
    return token if isinstance(token, int) and token < rows else None


def _differences(mine: _Facts, theirs: _Facts) -> list[str]:
    sentences = [
        _of_vocabularies(mine.vocabulary, theirs.vocabulary),
        *_of_ends(mine.around, theirs.around),
    ]
    for key in SPECIAL:
        if key not in mine.special or key not in theirs.special:
            continue
        a, b = mine.special[key], theirs.special[key]
        optional = key in ("pad_token_id", "unk_token_id") and None in (a, b)
        sentences.append("" if a == b or optional else f"{key} is {a} instead of {b}")
    names = sorted({*mine.templates, *theirs.templates}, key=lambda name: (name != "default", name))
    sentences += [_of_templates(name, mine.templates.get(name), theirs.templates.get(name)) for name in names]
    return [sentence for sentence in sentences if sentence]


def _of_vocabularies(mine: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    other = [token for token, n in theirs.items() if not FILLER.fullmatch(token) and mine.get(token) != n]
    other += [token for token in mine if token not in theirs and not FILLER.fullmatch(token)]
    if not other:
        return ""
    first = min(other, key=lambda token: theirs.get(token, mine.get(token, 0)))
    ids = f"{first!r} is {mine.get(first, 'missing')} instead of {theirs.get(first, 'missing')}"
    return f"{len(other):,} tokens have other ids, such as {ids}"


_Ends = tuple[tuple[int, ...], tuple[int, ...]]


def _of_ends(mine: _Ends, theirs: _Ends) -> tuple[str, ...]:
    if mine == theirs:
        return ()
    ends = [f"{list(before)} before it and {list(behind)} behind it" for before, behind in (mine, theirs)]
    return (f"a text gets {ends[0]} instead of {ends[1]}",)


def _of_text(part: Part, mine: tuple[int, ...], decode: Callable[[Sequence[int]], str]) -> str:
    theirs = part.ids
    at = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    a, b = (f"{ids[at]} ({decode([ids[at]])!r})" if at < len(ids) else "none" for ids in (mine, theirs))
    return f"token {at} of {part.name} is {a} instead of {b}, after {decode(theirs[:at])[-NEAR:]!r}"


def _of_templates(name: str, mine: str | None, theirs: str | None) -> str:
    if mine == theirs:
        return ""
    which = "chat template" if name == "default" else f"chat template {name!r}"
    if mine is None or theirs is None:
        return f"it has no {which}" if mine is None else f"it has a {which}, and the reference none"
    at = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    a, b = mine[at : at + NEAR], theirs[at : at + NEAR]
    return f"the {which} differs from character {at} on: {a!r} instead of {b!r}"
