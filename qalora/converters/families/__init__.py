"""Model families: a file each, a line here. README.md of the folder above says how one is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.converters.families import (
    ernie4_5,
    exaone4,
    gemma2,
    gemma3_text,
    glm4,
    granite,
    granitemoehybrid,
    hunyuan_v1_dense,
    llama,
    ministral3,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
)
from qalora.converters.families.mechanisms import missing_in
from qalora.converters.families.record import EVERYWHERE, LAYER_KINDS, Family, LayerParts, Variant
from qalora.converters.families.wrappers import WRAPPERS
from qalora.errors import InputError, shown

__all__ = [
    "FAMILIES",
    "LAYER_KINDS",
    "SOME",
    "VARIANTS",
    "Family",
    "LayerParts",
    "Variant",
    "family_of",
    "reads",
]

_ALL = (
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    mistral.FAMILY,
    gemma2.FAMILY,
    gemma3_text.FAMILY,
    phi3.FAMILY,
    smollm3.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    granite.FAMILY,
    seed_oss.FAMILY,
    hunyuan_v1_dense.FAMILY,
    ernie4_5.FAMILY,
    glm4.FAMILY,
    exaone4.FAMILY,
    ministral3.FAMILY,
)

VARIANTS: dict[str, Variant] = {variant.model_type: variant for variant in (granitemoehybrid.VARIANT,)}
"""What is read as a family of another name, by transformers' config.model_type."""

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
"""Each family by transformers' config.model_type."""

SOME = tuple(sorted({key for family in _ALL for key in family.defaults} - EVERYWHERE))
"""Keys that the classes of some families read; in a config of another one they say nothing."""


def reads(family: Family, key: str) -> bool:
    """Whether transformers' class reads a key of a config: one of SOME where the family has it, and any other."""
    return key not in SOME or key in family.defaults


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family of a transformers config; InputError names those there are. `where` names the model."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{where}: model_type",
            expected=f"one of {', '.join(FAMILIES)}",
            got=shown(model_type),
            todo=_missing(config),
        )
    return FAMILIES[model_type]


def _missing(config: Mapping[str, Any]) -> str:
    """What a model of no family here would need, or where the decoder of a wrapper is read."""
    if str(config.get("model_type")) in WRAPPERS:
        return "its decoder is read from a folder of floats, GPTQ, MLX or ours, whose config.json has text_config"
    return "; ".join(words for words, _ in missing_in(config)) or "see the README"
