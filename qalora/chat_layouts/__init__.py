"""Chat models as families publish them, with small vocabularies: tokenizer, token ids of the configs, chat template.

What a layout has of its family: which special tokens there are, whether they stand before the words or after them, how
text is cut, what begins a text, which tokens drop white space beside them, which class and which keys
tokenizer_config.json names, which of the tokens config.json, generation_config.json and the tokenizer name as their
own, windows and rope of config.json, and the shape of the chat template. What it has not: the words, which are learned
on the spot from Python's own help texts. `qalora.testing` hands them on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qalora.chat_layouts.facts import SPACE, Facts
from qalora.chat_layouts.published import LAYOUTS
from qalora.converters.cutting import CUTS
from qalora.demo import demo_text

__all__ = ["CHAT_LAYOUTS", "PIECES", "ChatLayout", "chat_layout"]

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

PIECES = ("gemma", "llama", "mistral", "ernie")
"""Ways of SentencePiece."""

WORDS = 384
"""Tokens that are learned, single bytes included."""

CHAT_LAYOUTS: tuple[str, ...] = tuple(LAYOUTS)
"""The names that `chat_layout` knows; "-base" is a family's base model, without instruction tuning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLayout:
    """What stands around the weights of a chat model.

    family      config.json's model_type
    cut         the rule that cuts text, by llama.cpp's name of it; or one of PIECES
    tokenizer   as transformers' class, with its chat template
    rows        the rows of the embedding, which may be more than the tokenizer's tokens
    config      keys of config.json: the token ids, and what else the layout needs
    generation  generation_config.json, or None for none
    kind, adds, apart   tokenizer_config.json: tokenizer_class; whether it says add_bos_token; whether the chat template
                is a file of its own
    """

    name: str
    family: str
    cut: str
    tokenizer: Any
    rows: int
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    kind: str
    adds: bool
    apart: bool

    def token(self, text: str) -> int:
        """The id of a token by its text."""
        number = self.tokenizer.convert_tokens_to_ids(text)
        assert isinstance(number, int), f"{self.name} has no token {text}"
        return number

    def write(self, folder: Path) -> None:
        """Put the tokenizer's files and generation_config.json into a folder, or take the latter away."""
        self.tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text("utf-8")) | {"tokenizer_class": self.kind}
        special = {key: value for key, value in settings.items() if key.endswith("_token") and value is not None}
        flags = ("content", *_FLAGS, "special")
        settings["added_tokens_decoder"] = {
            str(number): {flag: getattr(token, flag) for flag in flags}
            for number, token in sorted(self.tokenizer.added_tokens_decoder.items())
        }
        if self.adds:
            begins = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
            settings |= {"add_bos_token": begins, "add_eos_token": False}
        if self.tokenizer.chat_template and not self.apart:
            (folder / "chat_template.jinja").unlink()
            settings["chat_template"] = self.tokenizer.chat_template
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
        path = folder / "generation_config.json"
        if self.generation is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(json.dumps(self.generation, indent=2), encoding="utf-8")


def chat_layout(name: str) -> ChatLayout:
    """The layout of a family's chat model, one of CHAT_LAYOUTS; made anew at each call, so that it may be changed."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    facts = LAYOUTS[name]
    tokens = Tokenizer.from_str(_tokenizer(name))
    own = {
        f"{key}_token": token for key, token in (("bos", facts.bos), ("eos", facts.eos), ("pad", facts.pad)) if token
    }
    unknown = {"unk_token": "<unk>"} if "<unk>" in facts.first else {}
    told = {**own, **unknown, **facts.more}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, clean_up_tokenization_spaces=False, **told)
    tokenizer.chat_template = facts.template
    rows = -(-len(tokenizer) // facts.rows) * facts.rows
    config: dict[str, Any] = {f"{key}_token_id": None for key in ("bos", "eos", "pad")}
    config |= _ids(facts.config, tokens) | {"vocab_size": rows, **facts.settings}
    generation = None if facts.generation is None else _ids(facts.generation, tokens)
    return ChatLayout(
        name=name,
        family=facts.family,
        cut=facts.cut,
        tokenizer=tokenizer,
        rows=rows,
        config=config,
        generation=generation,
        kind=facts.kind,
        adds=facts.adds,
        apart=facts.apart,
    )


def _ids(tokens: Mapping[str, Any], vocabulary: Any) -> dict[str, Any]:
    """Texts by short names as ids by configs' keys."""
    return {
        f"{key}_token_id": vocabulary.token_to_id(text)
        if isinstance(text, str)
        else [vocabulary.token_to_id(one) for one in text]
        for key, text in tokens.items()
    }


@cache
def _tokenizer(name: str) -> str:
    """tokenizer.json of a layout."""
    facts = LAYOUTS[name]
    pieces = facts.cut in PIECES
    words, merges = _learned(pieces=pieces)
    special = set(facts.first)
    vocabulary = {token: n for n, token in enumerate((*facts.first, *(word for word in words if word not in special)))}
    start = len(vocabulary)
    listed = [(vocabulary[token], token) for token in facts.first]
    listed += [(start + n, token) for n, token in enumerate(facts.last)]
    added = []
    for n, token in listed:
        flags = dict.fromkeys(_FLAGS, False) | {"lstrip": token in facts.left, "rstrip": token in facts.right}
        added.append({"id": n, "content": token, **flags, "special": token not in facts.plain})
    runs = [token for token in facts.first if not token.strip(SPACE)]
    joins = [[run[:at], run[at:]] for run in runs for at in range(1, len(run))]
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": [*joins, *merges], "byte_fallback": pieces}
    model |= {
        "unk_token": "<unk>" if pieces else None,
        "fuse_unk": pieces,
        "ignore_merges": not pieces and facts.rule is None and CUTS[facts.cut].ignore_merges,
    }
    normalizer, cutting, decoder = _way(facts.cut, facts.rule)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": cutting,
        "post_processor": _beginning(facts, {token: n for n, token in listed}),
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False)


def _beginning(facts: Facts, ids: Mapping[str, int]) -> dict[str, Any] | None:
    """The step that puts BOS before a text."""
    if not facts.begins or facts.bos is None:
        return None
    bos, one, two = facts.bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, one],
        "pair": [start, one, {"SpecialToken": {"id": bos, "type_id": 1}}, two],
        "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
    }


def _way(cut: str, rule: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
    """Normalizer, pre-tokenizer and decoder of tokenizer.json."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    fallen = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    stripped = {"type": "Sequence", "decoders": [*fallen, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    if cut == "gemma":
        split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        return replace, split, {"type": "Sequence", "decoders": fallen}
    if cut == "ernie":
        return {"type": "Sequence", "normalizers": [replace]}, None, {"type": "Sequence", "decoders": fallen}
    if cut == "llama":
        prepend = {"type": "Prepend", "prepend": SPACE}
        return {"type": "Sequence", "normalizers": [prepend, replace]}, None, stripped
    if cut == "mistral":
        return None, {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}, stripped
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "NFC"} if cut == "qwen2" else None, rule or CUTS[cut].pre_tokenizer, level


@cache
def _learned(*, pieces: bool) -> tuple[Sequence[str], Sequence[Any]]:
    """Tokens in their order, and joins: of characters with bytes to fall back to, or of bytes."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    text = demo_text()[:20_000]
    if not pieces:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        words = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
        signs = pre_tokenizers.Split(Regex(rf"[^\p{{L}}{SPACE}]"), "isolated")  # no token joins letters and signs
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, signs])
        single = [f"<0x{n:02X}>" for n in range(256)]
        size = 256 + WORDS // 2
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=single, max_token_length=12, show_progress=False)
    tokenizer.train_from_iterator(text.split("\n") if pieces else [text], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), model["merges"]
