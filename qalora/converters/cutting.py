"""How text is cut before tokens are merged: tokenizer.json's pre_tokenizer, and llama.cpp's names of the same rules.

A rule that is not here is refused in both directions, as a wrong one gives other tokens without a word. Source of names
and rules: llama.cpp, src/llama-vocab.cpp; the tests hold each of them against the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CUTS", "Cut", "cut_named", "digits_by_expression", "in_known_words", "name_of", "without_digits"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _SIGNS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_MARKED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_PUNCTUATED = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*"
)


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_ALIKE = ((r"|\p{N}{1}|", r"|\p{N}|"), (r"[^\s\p{L}\p{N}\r\n]", r"[^\s\p{L}\p{N}]"))
"""Parts of expressions, and what CUTS has for them, which means the same: line ends are white space."""


def _by(*regexes: str) -> tuple[dict[str, Any], ...]:
    """Cut by expressions, one after the other, and by nothing else."""
    splits = (
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in regexes
    )
    return *splits, _byte_level(use_regex=False)


def _cased(end: str) -> str:
    """Words that may begin in upper case and end in lower case, or the other way round."""
    return f"{_START}{_UPPER}*{_LOWER}+{end}|{_START}{_UPPER}+{_LOWER}*{end}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A rule.

    steps          of tokenizer.json's pre_tokenizer, in their order
    ignore_merges  a piece of text that is a token becomes that token, whatever the merges would make of it
    also           llama.cpp's other names for the same rule
    begins         llama.cpp puts BOS before a text where a file does not say whether
    """

    steps: Sequence[Mapping[str, Any]]
    ignore_merges: bool = False
    also: tuple[str, ...] = ()
    begins: bool = False

    @property
    def pre_tokenizer(self) -> Mapping[str, Any]:
        """tokenizer.json's entry."""
        return self.steps[0] if len(self.steps) == 1 else {"type": "Sequence", "pretokenizers": list(self.steps)}


_LLAMA3 = _by(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}")

CUTS: dict[str, Cut] = {
    "gpt-2": Cut(
        steps=[_byte_level(use_regex=True)],
        also=(
            "phi-2",
            "gigachat",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "a.x-4.0",
            "mellum",
        ),
    ),
    "smollm": Cut(
        steps=[{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
        also=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    "llama-bpe": Cut(
        steps=_LLAMA3,
        ignore_merges=True,
        begins=True,
        also=("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    "smaug-bpe": Cut(steps=_LLAMA3, also=("dbrx", "glm4", "chatglm-bpe")),
    "qwen2": Cut(
        steps=_by(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"),
        also=("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2"),
    ),
    "qwen35": Cut(steps=_by(rf"{_CONTRACTIONS}|{_MARKED}|{_SPACES}")),
    "gpt-4o": Cut(
        steps=_by(
            rf"{_cased(_CONTRACTIONS + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        ),
        also=("llama4", "kanana2"),
    ),
    "deepseek-v3": Cut(
        steps=_by(r"\p{N}{1,3}", _HAN_AND_KANA, f"{_PUNCTUATED}|{_SPACES}"), also=("hunyuan-dense", "joyai-llm")
    ),
    "seed-coder": Cut(steps=_by(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}")),
    "tekken": Cut(
        steps=_by(rf"{_cased('')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"),
        ignore_merges=True,
        begins=True,
    ),
}
"""Rules by llama.cpp's name of them, tokenizer.ggml.pre."""

_BY_NAME = {name: cut for first, cut in CUTS.items() for name in (first, *cut.also)}


def cut_named(name: object) -> Cut | None:
    """The rule that llama.cpp calls so; None for one that is not known here."""
    return _BY_NAME.get(str(name))


def name_of(pre_tokenizer: Mapping[str, Any] | None, *, ignore_merges: bool) -> str | None:
    """llama.cpp's name for tokenizer.json's rule; None where it has none."""
    rule = [_plain(step) for step in _steps(pre_tokenizer)]
    known = ((name, cut) for name, cut in CUTS.items() if cut.ignore_merges == ignore_merges)
    return next((name for name, cut in known if [_plain(step) for step in cut.steps] == rule), None)


def in_known_words(pre_tokenizer: Mapping[str, Any] | None, *, ignore_merges: bool) -> Mapping[str, Any] | None:
    """The words of CUTS for a rule that has others of `_ALIKE`, which not every runtime takes; None for one that has
    none, or is not known here.
    """
    name = name_of(pre_tokenizer, ignore_merges=ignore_merges)
    if name is None:
        return None
    regexes = [_regex(step) for step in _steps(pre_tokenizer)]
    return CUTS[name].pre_tokenizer if any(_alike(regex) != regex for regex in regexes) else None


def digits_by_expression(pre_tokenizer: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The rule with each step `Digits` as the expression that means the same: tokenizers takes every number of Unicode
    for a digit, and other libraries 0 to 9 alone. None for a rule without such a step.
    """
    steps = _steps(pre_tokenizer)
    if not any(step.get("type") == "Digits" for step in steps):
        return None
    made = [without_digits(step) for step in steps]
    return made[0] if len(made) == 1 else {"type": "Sequence", "pretokenizers": made}


def without_digits(step: Mapping[str, Any]) -> Mapping[str, Any]:
    """A step `Digits` as the expression that means the same; every other step as it is."""
    if step.get("type") != "Digits":
        return step
    regex = r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    cutting = pre_tokenizer or {}
    steps: Sequence[Mapping[str, Any]] = cutting["pretokenizers"] if cutting.get("type") == "Sequence" else [cutting]
    return steps


def _regex(step: Mapping[str, Any]) -> str:
    """A step's expression, with what stands for line ends in their place; "" for one that has none."""
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    return regex.replace("\r", r"\r").replace("\n", r"\n") if isinstance(regex, str) else ""


def _alike(regex: str) -> str:
    for other, known in _ALIKE:
        regex = regex.replace(other, known)
    return regex


def _plain(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step without what does not change the tokens. An expression that matches all of a text may cut at its matches
    or remove what lies between them; it may have line ends in it or what stands for them.
    """
    step = without_digits(step)
    plain = {key: value for key, value in step.items() if key != "trim_offsets"}
    if regex := _regex(step):
        plain["pattern"] = {"Regex": _alike(regex)}
    if plain.get("behavior") == "Removed" and plain.get("invert"):
        plain |= {"behavior": "Isolated", "invert": False}
    return plain
