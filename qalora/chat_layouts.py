"""Chat models as families publish them, with small vocabularies: tokenizer, token ids of the configs, chat template.

What a layout has of its family: which special tokens there are, whether they stand before the words or after them, how
text is cut, what begins a text, which of the tokens config.json, generation_config.json and the tokenizer name as
their own, and the shape of the chat template. What it has not: the words, which are learned on the spot from Python's
own help texts, and special tokens that strip white space. `qalora.testing` hands them on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qalora.demo import demo_text

__all__ = ["CHAT_LAYOUTS", "ChatLayout", "chat_layout"]

WORDS = 384
"""Tokens that are learned, single bytes included."""

SPACE = "\u2581"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

CUTS: dict[str, str] = {
    "llama-bpe": _CONTRACTIONS + _WORD + r"\p{N}{1,3}" + _REST,
    "qwen2": _CONTRACTIONS + _WORD + r"\p{N}" + _REST,
    "gpt-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Rules of byte-level tokenizers that cut by a regular expression, by llama.cpp's names of them."""

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif"
    " %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI4 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """A layout in terms of tokens' texts.

    family          config.json's model_type
    cut             how text is cut: a key of CUTS, "smollm" (digits alone, then GPT-2's rule), or of SentencePiece's
                    ways "gemma", "llama" and "mistral"
    first, last     special tokens before and after the words; those of `plain` are added tokens that are not special
    bos, eos, pad   the tokenizer's own; begins: it puts BOS before every text
    config, generation   the tokens of config.json and generation_config.json, by key without "_token_id"; None: no
                    such file
    rows            the rows of the embedding are a multiple of this
    settings        other keys of config.json
    """

    family: str
    cut: str
    template: str
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    begins: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None
    rows: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)


_LLAMA3_FIRST = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>")
_LLAMA3_LAST = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_PLAIN = ("<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
_QWEN_ENDS = ["<|im_end|>", "<|endoftext|>"]
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
_PHI3_LAST = ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>")

_LLAMA3_FACTS: dict[str, Any] = {
    "family": "llama",
    "cut": "llama-bpe",
    "template": _LLAMA3,
    "last": (*_LLAMA3_FIRST, *_LLAMA3_LAST),
    "bos": "<|begin_of_text|>",
    "begins": True,
}
_QWEN_FACTS: dict[str, Any] = {
    "cut": "qwen2",
    "template": _CHATML,
    "last": (*_QWEN_SPECIAL, *_QWEN_PLAIN),
    "plain": _QWEN_PLAIN,
    "pad": "<|endoftext|>",
    "rows": 32,
}
_GEMMA_FACTS: dict[str, Any] = {
    "cut": "gemma",
    "template": _GEMMA,
    "first": _GEMMA_TOKENS,
    "bos": "<bos>",
    "eos": "<eos>",
    "pad": "<pad>",
    "begins": True,
}

_LAYOUTS: dict[str, _Facts] = {
    "llama3": _Facts(
        **_LLAMA3_FACTS,
        eos="<|eot_id|>",
        config={"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
        generation={"bos": "<|begin_of_text|>", "eos": ["<|end_of_text|>", "<|eot_id|>"]},
    ),
    "llama3.1": _Facts(
        **_LLAMA3_FACTS,
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        config={"bos": "<|begin_of_text|>", "eos": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]},
        generation={"bos": "<|begin_of_text|>", "eos": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]},
    ),
    "llama3-base": _Facts(
        **_LLAMA3_FACTS,
        eos="<|end_of_text|>",
        config={"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
        generation={"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
    ),
    "gemma2": _Facts(
        family="gemma2",
        **_GEMMA_FACTS,
        config={"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
        generation={"bos": "<bos>", "eos": ["<eos>", "<end_of_turn>"], "pad": "<pad>"},
    ),
    "gemma3": _Facts(
        family="gemma3_text",
        **_GEMMA_FACTS,
        config={"bos": "<bos>", "eos": ["<eos>", "<end_of_turn>"], "pad": "<pad>"},
        generation={"bos": "<bos>", "eos": ["<eos>", "<end_of_turn>"], "pad": "<pad>"},
    ),
    "phi3": _Facts(
        family="phi3",
        cut="llama",
        template=_PHI3,
        first=("<unk>", "<s>", "</s>"),
        last=_PHI3_LAST,
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        config={"bos": "<s>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
        generation={"bos": "<s>", "eos": ["<|endoftext|>", "<|assistant|>", "<|end|>"], "pad": "<|endoftext|>"},
    ),
    "phi4-mini": _Facts(
        family="phi3",
        cut="gpt-4o",
        template=_PHI4,
        last=("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        config=dict.fromkeys(("bos", "eos", "pad"), "<|endoftext|>"),
        generation={"bos": "<|endoftext|>", "eos": ["<|end|>", "<|endoftext|>"], "pad": "<|endoftext|>"},
        settings={"partial_rotary_factor": 0.75},
    ),
    "qwen2.5": _Facts(
        family="qwen2",
        **_QWEN_FACTS,
        eos="<|im_end|>",
        config={"bos": "<|endoftext|>", "eos": "<|im_end|>"},
        generation={"bos": "<|endoftext|>", "eos": _QWEN_ENDS, "pad": "<|endoftext|>"},
    ),
    "qwen2.5-base": _Facts(
        family="qwen2",
        **_QWEN_FACTS,
        eos="<|endoftext|>",
        config={"bos": "<|endoftext|>", "eos": "<|endoftext|>"},
        generation={"bos": "<|endoftext|>", "eos": "<|endoftext|>"},
    ),
    "qwen3": _Facts(
        family="qwen3",
        **_QWEN_FACTS,
        eos="<|im_end|>",
        config={"bos": "<|endoftext|>", "eos": "<|im_end|>"},
        generation={"bos": "<|endoftext|>", "eos": _QWEN_ENDS, "pad": "<|endoftext|>"},
    ),
    "mistral": _Facts(
        family="mistral",
        cut="mistral",
        template=_MISTRAL,
        first=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        begins=True,
        config={"bos": "<s>", "eos": "</s>"},
        generation={"bos": "<s>", "eos": "</s>"},
    ),
    "smollm2": _Facts(
        family="llama",
        cut="smollm",
        template=_CHATML,
        first=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"),
        bos="<|im_start|>",
        eos="<|im_end|>",
        pad="<|im_end|>",
        config={"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"},
        generation={"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"},
    ),
    "smollm3": _Facts(
        family="smollm3",
        cut="llama-bpe",
        template=_CHATML,
        last=(*_LLAMA3_FIRST, "<|im_start|>", "<|im_end|>"),
        bos=None,
        eos="<|im_end|>",
        pad="<|im_end|>",
        config={"bos": "<|begin_of_text|>", "eos": "<|im_end|>", "pad": "<|finetune_right_pad_id|>"},
        generation={"bos": "<|begin_of_text|>", "eos": "<|im_end|>", "pad": "<|finetune_right_pad_id|>"},
    ),
}

CHAT_LAYOUTS: tuple[str, ...] = tuple(_LAYOUTS)
"""The names that `chat_layout` knows; "-base" is a family's base model, without instruction tuning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLayout:
    """What stands around the weights of a chat model.

    family      config.json's model_type
    cut         the rule that cuts text, by llama.cpp's name of it; or "gemma", "llama", "mistral" of SentencePiece's
    tokenizer   as transformers' class, with its chat template
    rows        the rows of the embedding, which may be more than the tokenizer's tokens
    config      keys of config.json: the token ids, and what else the layout needs
    generation  generation_config.json, or None for none
    """

    name: str
    family: str
    cut: str
    tokenizer: Any
    rows: int
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None

    def token(self, text: str) -> int:
        """The id of a token by its text."""
        number = self.tokenizer.convert_tokens_to_ids(text)
        assert isinstance(number, int), f"{self.name} has no token {text}"
        return number

    def write_generation(self, folder: Path) -> None:
        """Put generation_config.json into a folder, or take it away."""
        path = folder / "generation_config.json"
        if self.generation is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(json.dumps(self.generation, indent=2), encoding="utf-8")


def chat_layout(name: str) -> ChatLayout:
    """The layout of a family's chat model, one of CHAT_LAYOUTS; made anew at each call, so that it may be changed."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    facts = _LAYOUTS[name]
    made = Tokenizer.from_str(_tokenizer(name))
    own = {
        f"{key}_token": token for key, token in (("bos", facts.bos), ("eos", facts.eos), ("pad", facts.pad)) if token
    }
    unknown = {"unk_token": "<unk>"} if "<unk>" in facts.first else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **own, **unknown)
    tokenizer.chat_template = facts.template
    rows = -(-len(tokenizer) // facts.rows) * facts.rows
    config: dict[str, Any] = {f"{key}_token_id": None for key in ("bos", "eos", "pad")}
    config |= _ids(facts.config, made) | {"vocab_size": rows, **facts.settings}
    generation = None if facts.generation is None else _ids(facts.generation, made)
    return ChatLayout(
        name=name,
        family=facts.family,
        cut=facts.cut,
        tokenizer=tokenizer,
        rows=rows,
        config=config,
        generation=generation,
    )


def _ids(tokens: Mapping[str, Any], made: Any) -> dict[str, Any]:
    """Texts by short names as ids by configs' keys."""
    return {
        f"{key}_token_id": made.token_to_id(text) if isinstance(text, str) else [made.token_to_id(one) for one in text]
        for key, text in tokens.items()
    }


@cache
def _tokenizer(name: str) -> str:
    """tokenizer.json of a layout."""
    facts = _LAYOUTS[name]
    pieces = facts.cut in ("gemma", "llama", "mistral")
    words, merges = _learned(pieces=pieces)
    taken = set(facts.first)
    vocabulary = {token: n for n, token in enumerate((*facts.first, *(word for word in words if word not in taken)))}
    start = len(vocabulary)
    listed = [(vocabulary[token], token) for token in facts.first]
    listed += [(start + n, token) for n, token in enumerate(facts.last)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": n, "content": token, **flags, "special": token not in facts.plain} for n, token in listed]
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": pieces}
    model |= {"unk_token": "<unk>" if pieces else None, "fuse_unk": pieces, "ignore_merges": facts.cut == "llama-bpe"}
    normalizer, cutting, decoder = _way(facts.cut)
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


def _beginning(facts: _Facts, ids: Mapping[str, int]) -> dict[str, Any] | None:
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


def _way(cut: str) -> tuple[Any, Any, Any]:
    """Normalizer, pre-tokenizer and decoder of tokenizer.json."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    fallen = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    stripped = {"type": "Sequence", "decoders": [*fallen, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    if cut == "gemma":
        split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        return replace, split, {"type": "Sequence", "decoders": fallen}
    if cut == "llama":
        prepend = {"type": "Prepend", "prepend": SPACE}
        return {"type": "Sequence", "normalizers": [prepend, replace]}, None, stripped
    if cut == "mistral":
        return None, {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}, stripped
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cut == "smollm"}
    if cut == "smollm":
        first: dict[str, Any] = {"type": "Digits", "individual_digits": True}
    else:
        first = {"type": "Split", "pattern": {"Regex": CUTS[cut]}, "behavior": "Isolated", "invert": False}
    normalizer = {"type": "NFC"} if cut == "qwen2" else None
    return normalizer, {"type": "Sequence", "pretokenizers": [first, level]}, {**level, "use_regex": True}


@cache
def _learned(*, pieces: bool) -> tuple[Sequence[str], Sequence[Any]]:
    """Tokens in their order, and joins: of characters with bytes to fall back to, or of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = demo_text()[:20_000]
    if not pieces:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
        single = [f"<0x{n:02X}>" for n in range(256)]
        size = 256 + WORDS // 2
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=single, max_token_length=12, show_progress=False)
    made.train_from_iterator(text.split("\n") if pieces else [text], trainer)
    model = json.loads(made.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), model["merges"]
