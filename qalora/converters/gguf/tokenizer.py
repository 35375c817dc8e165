"""A tokenizer as GGUF metadata, from what transformers makes of a model's files.

Byte-level BPE here, and what came from SentencePiece in `qalora.converters.sentencepiece`. The rules that cut text are
in `qalora.converters.cutting`, those of added tokens in `qalora.converters.added_tokens`; what is not known there is
refused: a wrong rule gives other tokens without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.added_tokens import OtherSpace, check_added, elsewhere, name_in_gguf
from qalora.converters.cutting import CUTS, name_of
from qalora.converters.first_tokens import tokens_around
from qalora.converters.sentencepiece import SPACE, Spaces, sentencepiece_entries, spaces_of
from qalora.converters.tokenizer import (
    TEMPLATE_KEY,
    chat_templates,
    has_tokenizer,
    load_tokenizer,
    read_json,
    template_name,
)
from qalora.errors import FormatError, InputError, shown
from qalora.formats.gguf import Metadata, Value, ValueType
from qalora.formats.text import check_text

__all__ = ["gguf_tokenizer"]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def gguf_tokenizer(
    model: Checkpoint, name: str | None = None, *, on_other_space: Callable[[OtherSpace, Metadata], None] | None = None
) -> dict[str, Value]:
    """GGUF's tokenizer metadata of a model, from what transformers makes of its files; without a tokenizer, model
    "none". general.name is among it: `name`, the model's own by default, or one by which llama.cpp does with white
    space what the tokenizer does.

    on_other_space  called with all the metadata where llama.cpp does otherwise with white space beside added tokens;
                    raises where that matters. Without it any is refused

    Raises InputError for a tokenizer that is no BPE, whose cutting rule llama.cpp has no name for, or that does to a
    text what llama.cpp does not.
    """
    if not has_tokenizer(model):
        return {"general.name": Value.text(name or model.path.name), "tokenizer.ggml.model": Value.text("none")}
    if "tokenizer.model" in model.files and "tokenizer.json" not in model.files:
        raise InputError(
            f"{model.path}: tokenizer.model", expected="tokenizer.json", todo="save the tokenizer as a fast one"
        )
    templates = _template_entries(model)
    tokenizer = load_tokenizer(model)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    try:
        entries, space = _entries(model, name or model.path.name, tokenizer, content)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(f"{model.path}: its tokenizer", expected="a BPE", got=shown(error)) from error
    entries |= templates
    if space and on_other_space is None:
        raise space.refusal()
    if space and on_other_space is not None:
        on_other_space(space, Metadata(entries=entries))
    return entries


def _entries(
    model: Checkpoint, name: str, tokenizer: Any, content: Mapping[str, Any]
) -> tuple[dict[str, Value], OtherSpace]:
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if content["model"].get(key):
            got = shown(content["model"][key])
            raise InputError(f"{model.path}: tokenizer.json: {key}", expected="none, as in llama.cpp", got=got)
    if content["model"].get("type") != "BPE":
        got = shown(content["model"].get("type"))
        raise InputError(
            f"{model.path}: tokenizer.json: model",
            expected="a BPE, as llama.cpp has it here",
            got=got,
            todo=elsewhere(),
        )
    added = _added(model, content)
    spaces = spaces_of(content)
    stripping, space = check_added(str(model.path), added, prefixed=spaces == "each")
    tokens, types = _vocabulary(
        content["model"]["vocab"], added, int(model.config["vocab_size"]), pieces=spaces is not None
    )
    if spaces is None:
        entries = _bpe_entries(model, content, tokens, types)
    else:
        entries = sentencepiece_entries(content["model"], tokens, types)
    for key, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = _special_id(model, tokenizer, ours, tokens)
        if token is not None:
            entries[f"{key}_token_id"] = Value.uint32(token)
    for key, adds in zip(("bos", "eos"), _around(model, tokenizer, entries), strict=True):
        entries[f"add_{key}_token"] = Value(type=ValueType.BOOL, value=adds)
    entries["add_space_prefix"] = Value(type=ValueType.BOOL, value=_prefix(tokenizer, spaces))
    result = {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    name_entry = {"general.name": Value.text(name_in_gguf(name, stripping=stripping))}
    return {**name_entry, **result}, space


def _prefix(tokenizer: Any, spaces: Spaces | None) -> bool:
    """llama.cpp's add_space_prefix. A tokenizer that puts a space before a text alone is taken as its chats need it,
    which begin with an added token and have no spaces behind those; or as plain text does, where it has no chats.
    """
    return spaces in ("each", "each without") or (spaces == "first" and not tokenizer.chat_template)


def _added(model: Checkpoint, content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The added tokens that the model's files name, or that it has a row for; transformers' classes add others, which
    they need for themselves, behind the last row.
    """
    rows = int(model.config["vocab_size"])
    own = read_json(model, "tokenizer.json") if "tokenizer.json" in model.files else {}
    own_texts = {token["content"] for token in own.get("added_tokens") or []}
    return [token for token in content.get("added_tokens") or [] if token["id"] < rows or token["content"] in own_texts]


def _around(model: Checkpoint, tokenizer: Any, entries: Mapping[str, Value]) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text, and EOS behind it; InputError where it puts anything else."""
    before, behind = tokens_around(tokenizer)
    bos, eos = ((entries[key].value,) if key in entries else None for key in ("bos_token_id", "eos_token_id"))
    if before not in ((), bos) or behind not in ((), eos):
        raise InputError(
            f"{model.path}: its tokenizer",
            expected="one that puts nothing around a text but BOS before it and EOS behind it, as llama.cpp does",
            got=f"{list(before)} before and {list(behind)} behind",
            todo=elsewhere(),
        )
    return bool(before), bool(behind)


def _bpe_entries(
    model: Checkpoint, content: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Value]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {
        "model": Value.text("gpt2"),
        "pre": Value.text(_pre_of(model, content)),
        "tokens": Value(type=ValueType.ARRAY, element=ValueType.STRING, value=tuple(tokens)),
        "token_type": Value(type=ValueType.ARRAY, element=ValueType.INT32, value=tuple(types)),
        "merges": Value(type=ValueType.ARRAY, element=ValueType.STRING, value=tuple(merges)),
    }


def _pre_of(model: Checkpoint, content: Mapping[str, Any]) -> str:
    flag = bool(content["model"].get("ignore_merges"))
    if content["model"].get("type") == "BPE":
        name = name_of(content["pre_tokenizer"], ignore_merges=flag)
        if name is not None:
            _check_normalizer(model, content.get("normalizer"))
            return name
        if name_of(content["pre_tokenizer"], ignore_merges=not flag) is not None:
            raise InputError(
                f"{model.path}: tokenizer.json: ignore_merges",
                expected=f"{not flag}, as llama.cpp has it with this rule for cutting text".lower(),
                got=str(flag).lower(),
                todo=elsewhere(),
            )
    raise InputError(
        f"{model.path}: tokenizer.json: its rule for cutting text is none that llama.cpp is known to have here",
        expected=f"byte-level BPE cut like {', '.join(CUTS)}, or SentencePiece's",
        todo="start from a GGUF file of the base model, whose tokenizer is carried over",
    )


def _check_normalizer(model: Checkpoint, normalizer: Mapping[str, Any] | None) -> None:
    """Refuse a byte-level BPE that changes a text before it is cut. llama.cpp does not; nor does it compose characters
    (NFC), which its own converter passes over, and which most texts have composed.
    """
    steps = [] if normalizer is None else [normalizer]
    if normalizer is not None and normalizer.get("type") == "Sequence":
        steps = list(normalizer["normalizers"])
    kinds = [str(step.get("type")) for step in steps]
    if set(kinds) - {"NFC"}:
        raise InputError(
            f"{model.path}: tokenizer.json: normalizer",
            expected="none, or NFC, since llama.cpp changes no text before it cuts it",
            got=shown(", ".join(kinds)),
            todo=elsewhere(),
        )


def _vocabulary(
    vocab: Mapping[str, int], added: list[Any], vocab_size: int, *, pieces: bool
) -> tuple[list[str], list[int]]:
    """Tokens and their types; pieces: SentencePiece's, which have U+2581 for a space."""
    tokens = [f"[PAD{n}]" for n in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, n in vocab.items():
        if not isinstance(n, int) or not 0 <= n < vocab_size:
            raise _outside(token, n, vocab_size)
        tokens[n], types[n] = token, NORMAL
    for entry in added:
        n = entry["id"]
        if not isinstance(n, int) or not 0 <= n < vocab_size:
            raise _outside(entry["content"], n, vocab_size)
        tokens[n], types[n] = entry["content"], CONTROL if entry.get("special") else USER_DEFINED
        if pieces and SPACE in entry["content"] and types[n] == USER_DEFINED and not entry.get("normalized"):
            types[n] = NORMAL  # no text has that character: such a run of spaces is joined, and not looked for
    return tokens, types


def _outside(token: object, n: object, vocab_size: int) -> InputError:
    return InputError(
        f"tokenizer.json: token {token!r:.80} has id {n!r:.40}",
        expected=f"0..{vocab_size - 1}, the rows that the model has",
        todo="resize the model's embedding for it (resize_token_embeddings), or remove the token",
    )


def _special_id(model: Checkpoint, tokenizer: Any, kind: str, tokens: list[str]) -> int | None:
    name = getattr(tokenizer, f"{kind}_token")
    if isinstance(name, str) and name in tokens:
        return tokens.index(name)
    number = model.config.get(f"{kind}_token_id")
    return number if isinstance(number, int) and 0 <= number < len(tokens) else None


def _template_entries(model: Checkpoint) -> dict[str, Value]:
    """The chat templates under gguf-py's keys: the default one, the others by their names, and the list of these."""
    templates = chat_templates(model)
    check_text(templates, f"{model.path}: its chat template")
    entries = {}
    if "default" in templates:
        entries[TEMPLATE_KEY] = Value.text(templates.pop("default"))
    names = sorted(template_name(name) for name in templates)
    twice = [name for name, following in pairwise(names) if name == following]
    if twice or "" in names:
        got = f"two that are {twice[0]} there" if twice else "one without"
        raise InputError(
            f"{model.path}/tokenizer_config.json: chat_template", expected="names that GGUF can tell apart", got=got
        )
    for name, text in templates.items():
        entries[f"{TEMPLATE_KEY}.{template_name(name)}"] = Value.text(text)
    if names:
        listed = Value(type=ValueType.ARRAY, element=ValueType.STRING, value=tuple(names))
        entries["tokenizer.chat_templates"] = listed
    return entries
