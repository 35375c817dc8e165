"""Where llama.cpp ends a generation, from a file's metadata, and the metadata that makes it end where a model does.

llama.cpp ends at every token of its EOG set: those that keys name (eos, eot, eom, and the three of fill-in-the-middle),
a number of its own where no key names eos, and every token of the vocabulary whose text it knows. The latter cannot
be switched off. What a model of ours ends at then, without those, stands in a key of ours, `qalora.end_tokens`, so
that it comes back as it was; it is believed no further than the other keys bear it out.

Source: llama.cpp, src/llama-vocab.cpp; the tests hold this against llama_vocab_is_eog of the library.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qalora.errors import InputError
from qalora.formats.gguf import Metadata, Value, ValueType

__all__ = ["FILLING", "KNOWN", "MARK", "NAMES", "Eog", "eog_of", "marked", "with_ends"]

MARK = "qalora.end_tokens"
"""Key of ours: what the model ends at, where llama.cpp ends at more."""

NAMES = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<|ifm|im_end|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[e~[",
    }
)
"""Texts of tokens that llama.cpp ends at, whatever a file says."""

FILLING: dict[str, tuple[str, ...]] = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>", "<|plamo:file_separator|>"),
}
"""The tokens of fill-in-the-middle that it ends at: the last part of a key, and the texts that stand for it where there
is none. Where a vocabulary has several of them, llama.cpp takes one by chance; here that is the first."""

KNOWN = NAMES | {text for texts in FILLING.values() for text in texts}
"""All of them."""

KEYS = ("eos", "eot", "eom", *FILLING)
DEFAULT_EOS = {"llama": 2, "gpt2": 11}
"""eos by tokenizer.ggml.model, where no key names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Eog:
    """llama.cpp's set of end tokens: those that the file's keys name, eos first, and those whose texts it knows."""

    from_keys: tuple[int, ...]
    from_texts: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.from_keys, *self.from_texts)))


def eog_of(metadata: Metadata) -> Eog | None:
    """llama.cpp's set of a file with this metadata; None for one without a vocabulary, which ends nowhere."""
    tokens = _tokens(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if not tokens or kind in (None, "none", "no_vocab"):
        return None
    keys = {key: _key(metadata, key, len(tokens)) for key in KEYS}
    if keys["eos"] is None:
        default = DEFAULT_EOS.get(str(kind))
        keys["eos"] = default if default is not None and default < len(tokens) else None
    place = {text: n for n, text in enumerate(tokens) if text in KNOWN}
    by_text = [place[text] for text in place if text in NAMES]
    for key, texts in FILLING.items():
        there = [place[text] for text in texts if text in place]
        by_text += there[:1] if keys[key] is None else []
    left = _taken_back({tokens[n] for n in (*by_text, *(key for key in keys.values() if key is not None))})
    keyed = dict.fromkeys(n for n in keys.values() if n is not None and tokens[n] not in left)
    return Eog(from_keys=tuple(keyed), from_texts=tuple(sorted(n for n in set(by_text) if tokens[n] not in left)))


def _taken_back(texts: set[str]) -> set[str]:
    """What llama.cpp takes out again: <|end|> in the vocabularies of gpt-oss and Solar, </s> in that of Gemma 4."""
    calls = bool(texts & {"<|call|>", "<|calls|>"})
    harmony = {"<|end|>"} if calls and texts & {"<|return|>", "<|flush|>"} else set()
    return harmony | ({"</s>"} if "<|tool_response>" in texts else set())


def marked(metadata: Metadata) -> tuple[int, ...] | None:
    """What our key says, where the others bear it out: a part of llama.cpp's set with all that keys name."""
    mark, eog = metadata.get(MARK), eog_of(metadata)
    if not isinstance(mark, tuple) or not all(type(n) is int for n in mark):
        return None
    if eog is None:
        return mark
    inside = set(mark) <= set(eog.ids)
    return mark if inside and set(eog.from_keys) - set(eog.from_texts) <= set(mark) else None


def with_ends(metadata: Metadata, ends: Sequence[int], own: int | None, where: object) -> Metadata:
    """The metadata changed so that llama.cpp ends at all of `ends`, and at nothing else but what it knows by name.

    own  the tokenizer's own end token: it is the file's eos where that changes nothing

    InputError where no keys can say it.
    """
    plain = _without(metadata, {MARK})
    eog = eog_of(plain)
    if eog is None:
        return plain.with_entries({MARK: _listed(ends)}) if ends else plain
    if set(eog.ids) == set(ends) and _name("eos") in plain.entries:
        return plain
    if not ends:
        raise InputError(
            f"gguf: {where}: no end token",
            expected="one, which llama.cpp requires",
            todo="name it as eos_token_id in generation_config.json",
        )
    key_values = _keys_for(plain, ends, own, where)
    dropped = {_name(key) for key in _SPARE} - set(key_values)
    changed = _without(plain, dropped).with_entries({key: Value.uint32(n) for key, n in key_values.items()})
    result, tokens = eog_of(changed), _tokens(changed)
    missing = sorted(set(ends) - set(() if result is None else result.ids))
    if missing:
        raise InputError(
            f"gguf: {where}: end token {missing[0]} {tokens[missing[0]]!r}",
            expected="one that llama.cpp ends at",
            got="one that it takes back beside the other special tokens of this vocabulary",
            todo="export it to another format",
        )
    return (
        changed if result is not None and set(result.ids) == set(ends) else changed.with_entries({MARK: _listed(ends)})
    )


_SPARE = ("eot", "eom")


def _keys_for(metadata: Metadata, ends: Sequence[int], own: int | None, where: object) -> dict[str, int]:
    """eos, and eot and eom where they are needed, by their keys."""
    bare = _without(metadata, {_name(key) for key in ("eos", *_SPARE)})
    known = eog_of(bare.with_entries({_name("eos"): Value.uint32(ends[0])}))
    covered = set() if known is None else {*known.from_texts, *(n for n in known.from_keys if n != ends[0])}
    needed = [n for n in ends if n not in covered]
    fits = own is not None and (own in ends or (own in covered and len(needed) <= len(_SPARE)))
    eos = own if own is not None and fits else next(iter(needed), ends[0])
    rest = [n for n in needed if n != eos]
    if len(rest) > len(_SPARE):
        tokens = _tokens(metadata)
        raise InputError(
            f"gguf: {where}: its end tokens",
            expected=f"at most {len(_SPARE)} beside eos whose names llama.cpp does not know",
            got=", ".join(f"{n} {tokens[n]!r}" for n in rest)[:200],
            todo="name fewer as eos_token_id in generation_config.json",
        )
    return {_name(key): n for key, n in zip(("eos", *_SPARE), (eos, *rest), strict=False)}


def _without(metadata: Metadata, keys: Collection[str]) -> Metadata:
    return Metadata(entries={key: value for key, value in metadata.entries.items() if key not in keys})


def _name(key: str) -> str:
    return f"tokenizer.ggml.{key}_token_id"


def _listed(ends: Sequence[int]) -> Value:
    return Value(type=ValueType.ARRAY, element=ValueType.UINT32, value=tuple(ends))


def _tokens(metadata: Metadata) -> tuple[str, ...]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return tokens if isinstance(tokens, tuple) else ()


def _key(metadata: Metadata, key: str, count: int) -> int | None:
    """What a key names; None where there is none, or no such token, which llama.cpp passes over."""
    token = metadata.get(_name(key))
    return token if type(token) is int and 0 <= token < count else None
