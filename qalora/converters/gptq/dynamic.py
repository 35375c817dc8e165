"""GPTQModel's `dynamic`: rules for layers that differ from the rest of a checkpoint, or are left as floats.

    "dynamic": {"REGEX" or "+:REGEX": {"bits": 8, "group_size": 64, ...}, "-:REGEX": {}}

The first rule whose expression matches a module's path from its beginning decides; "-:" leaves the module out. What a
rule does not say is as everywhere. Source: GPTQModel 7.6.0, quantization/config.py: dynamic_get.

A rule is taken as far as it says how words are to be read: bits and group_size. What it says of how they were made
changes nothing here; anything else is refused with the rule.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qalora.adapter.peft_config import PATTERNS
from qalora.converters.patterns import check_steps, compiled
from qalora.errors import FormatError, json_kind, shown
from qalora.formats.gptq import BITS

__all__ = ["Rule", "check_rules", "parse_rules", "rule_of"]

OF_MAKING = frozenset(
    {
        "act_group_aware",
        "damp_auto_increment",
        "damp_percent",
        "desc_act",
        "fallback",
        "gptaq",
        "mse",
        "static_groups",
        "sym",
        "true_sequential",
        "v2",
        "v2_alpha",
    }
)
"""Keys of how codes were found. Zero points and the order of columns are stored, whatever `sym` and `desc_act` say."""

SAME = {"pack_dtype": "int32", "quant_method": "gptq", "method": "gptq"}
"""Keys that may say what is so everywhere, and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """text: as the file has it; out: whether its modules are left as floats; None: as everywhere."""

    text: str
    pattern: re.Pattern[str]
    out: bool
    bits: int | None
    group_size: int | None


def parse_rules(content: object, where: str) -> tuple[Rule, ...]:
    """The rules in their order; FormatError with the rule for one that says what is not understood here."""
    where = f"{where}: dynamic"
    if content is None:
        return ()
    if not isinstance(content, dict):
        raise FormatError(where, expected="an object of rules", got=json_kind(content))
    if len(content) > PATTERNS:
        raise FormatError(where, expected=f"at most {PATTERNS} rules", got=str(len(content)))
    return tuple(_rule(text, value, f"{where}: rule {text[:120]!r}") for text, value in content.items())


def _rule(text: str, content: object, where: str) -> Rule:
    out = text.startswith("-:")
    rule = {} if content is None else content
    if not isinstance(rule, dict):
        raise FormatError(where, expected="an object", got=json_kind(content))
    pattern = compiled(text[2:] if text[:2] in ("-:", "+:") else text, where)
    if out:
        return Rule(text=text, pattern=pattern, out=True, bits=None, group_size=None)
    _check_keys(rule, where)
    bits, group_size = rule.get("bits"), rule.get("group_size")
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise FormatError(f"{where}: bits", expected=f"one of {', '.join(map(str, BITS))}", got=shown(bits))
    if group_size is not None and (type(group_size) is not int or (group_size != -1 and group_size < 1)):
        raise FormatError(f"{where}: group_size", expected="-1 or a whole number from 1", got=shown(group_size))
    return Rule(text=text, pattern=pattern, out=False, bits=bits, group_size=group_size)


def _check_keys(rule: Mapping[str, Any], where: str) -> None:
    for key, value in rule.items():
        if key in ("bits", "group_size") or key in OF_MAKING or (key in SAME and value == SAME[key]):
            continue
        raise FormatError(
            f"{where} says {key[:60]!r}",
            expected="bits, group_size, or a setting of the method",
            got=shown(value),
            todo="quantize the model again without it",
        )


def check_rules(rules: Collection[Rule], modules: Collection[str], where: str) -> None:
    """FormatError for rules that could take long to be matched with the modules of a checkpoint."""
    check_steps([rule.pattern for rule in rules], modules, f"{where}: dynamic")


def rule_of(rules: Collection[Rule], module: str) -> Rule | None:
    """The rule that decides of a module."""
    return next((rule for rule in rules if rule.pattern.match(module)), None)
