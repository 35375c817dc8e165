"""The numbers of a config, each in one place, as transformers' class of its family reads them; and the names of the
tensors that they announce: `model.layers.<n>.<module>.weight`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qalora.converters.families import LAYER_KINDS, Family, LayerParts, family_of, reads
from qalora.converters.rope import ALPHA, LOCAL_THETA, PLACES, SHARE, joined_parameters, rope_of, stretched
from qalora.errors import InputError, shown

__all__ = [
    "ATTENTION_SCALE",
    "EMBEDDING_SCALE",
    "LOGIT_DIVISOR",
    "MULTIPLIERS",
    "RESIDUAL_SCALE",
    "bias_names",
    "check_config",
    "layer_parts",
    "linear_names",
    "norm_names",
    "settings_of",
]

EMBEDDING_SCALE, RESIDUAL_SCALE = "embedding_multiplier", "residual_multiplier"
ATTENTION_SCALE, LOGIT_DIVISOR = "attention_multiplier", "logits_scaling"
MULTIPLIERS = (EMBEDDING_SCALE, RESIDUAL_SCALE, ATTENTION_SCALE, LOGIT_DIVISOR)
"""Granite's names of its factors, which another family may have too."""


def settings_of(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The numbers of a config, each in one place: what transformers' class reads of it, with the family's defaults.

    What it leaves out counts, or what it has as null where null says nothing. All that it says of rotary positions is
    in `rope_parameters`, as `joined_parameters` makes it; keys of SOME that the family does not have are not there.
    """
    family = family_of(config, where)
    filled = {key: value for key, value in config.items() if value is not None or key not in _NEVER_NULL}
    settings = {**family.defaults, **{key: filled[key] for key in filled if reads(family, key)}, **family.fixed}
    joined = joined_parameters(settings, where, family.rope_aliases, family.rope_keys)
    if joined.get(ALPHA):
        joined = stretched(joined, settings, where)
    return {**{key: value for key, value in settings.items() if key not in PLACES}, "rope_parameters": joined}


_NEVER_NULL = (
    "hidden_act",
    "hidden_activation",
    "max_window_layers",
    "no_rope_layer_interval",
    "original_max_position_embeddings",
    SHARE,
    "rms_norm_eps",
    LOCAL_THETA,
    "rope_theta",
    "sliding_window_pattern",
)


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a config whose sizes are none; what reads it later can rely on them."""
    family, settings = family_of(config, where), settings_of(config, where)
    for key, value in family.only.items():
        if settings.get(key) != value:
            expected = f"{json.dumps(value)}, since no other {family.model_type} is read here"
            raise InputError(f"{where}: {key}", expected=expected, got=shown(settings.get(key)))
    for key, most, required in (*_SIZES, (family.inner_key, 1 << 24, True)):
        size = settings.get(key)
        if size is None and not required:
            continue
        if type(size) is not int or not 0 < size <= most:
            raise InputError(f"{where}: {key}", expected=f"a whole number from 1 to {most}", got=shown(size))
    heads = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    if heads % kv_heads or (settings.get("head_dim") is None and settings["hidden_size"] % heads):
        raise InputError(
            f"{where}: num_attention_heads",
            expected=f"a multiple of num_key_value_heads = {kv_heads}, and a divisor of hidden_size",
            got=str(heads),
        )
    epsilon = settings.get("rms_norm_eps")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise InputError(f"{where}: rms_norm_eps", expected="a number between 0 and 1", got=shown(epsilon))
    for key in (key for key in MULTIPLIERS if key in settings and settings[key] is None):
        raise InputError(f"{where}: {key}", expected="a number above 0", got="null")
    for key in _FACTORS:
        value = settings.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9):
            raise InputError(f"{where}: {key}", expected="a number above 0", got=shown(value))
    if type(settings.get("max_window_layers", 0)) is not int:
        raise InputError(
            f"{where}: max_window_layers", expected="a whole number", got=shown(settings["max_window_layers"])
        )
    _check_layers(settings, family, where)
    _check_whole(config, where)
    for kind in LAYER_KINDS if family.local_rope else LAYER_KINDS[:1]:
        rope = rope_of(settings, where, kind)
        share = rope.share
        if family.ropes and rope.kind not in family.ropes:
            expected = f"{' or '.join(family.ropes)} in a {family.model_type}"
            raise InputError(f"{where}: rope_type", expected=expected, got=shown(rope.kind))
        lacking = [key for key in family.rope_keys if family.ropes and key not in rope.numbers]
        if lacking:
            raise InputError(
                f"{where}: rope_parameters", expected=f"a {lacking[0]} in a {family.model_type}", got="none"
            )
        if share != 1 and SHARE not in family.defaults:
            raise InputError(f"{where}: {SHARE}", expected=f"none in a {family.model_type}", got=str(share))


def _check_layers(settings: Mapping[str, Any], family: Family, where: object) -> None:
    """Refuse lists with another number of layers or other kinds of them, and a window that is none."""
    layers = settings["num_hidden_layers"]
    types, rotating = settings.get("layer_types"), settings.get("no_rope_layers")
    for key, value, most in (("layer_types", types, layers), ("no_rope_layers", rotating, _SIZES[0][1])):
        if value is not None and (not isinstance(value, list) or not layers <= len(value) <= most):
            raise InputError(f"{where}: {key}", expected="a list with an entry for each layer", got=shown(value))
    if types is not None and not all(isinstance(kind, str) and kind in LAYER_KINDS for kind in types):
        other = next(kind for kind in types if not isinstance(kind, str) or kind not in LAYER_KINDS)
        raise InputError(f"{where}: layer_types", expected=" or ".join(LAYER_KINDS), got=shown(other))
    used = settings.get("use_sliding_window", True) and settings.get("sliding_window") is not None
    slides = family.windows == "alternate" if types is None else LAYER_KINDS[1] in types
    if slides and not used and family.windows != "all":
        expected = f"sliding_window{' and use_sliding_window' if 'use_sliding_window' in family.defaults else ''}"
        raise InputError(f"{where}: layer_types", expected=f"{expected} for its {LAYER_KINDS[1]}", got="none")


_FACTORS = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    *MULTIPLIERS,
)
"""Factors that a family may have; one that it has not is not in its settings."""

_DECODER = {
    "use_bidirectional_attention": (False, "a decoder, which looks back only"),
    "is_causal": (True, "a decoder, which looks back only"),
    "per_layer_config": ({}, "layers that are alike"),
    "text_config": ({}, "none in a model of text alone"),
}
"""Keys that transformers reads in any config: the value that changes nothing, and what is expected."""


def _check_whole(config: Mapping[str, Any], where: object) -> None:
    """Refuse what makes of any family another model."""
    for key, (usual, expected) in _DECODER.items():
        value = config.get(key)
        if value is not None and bool(value) != bool(usual):
            raise InputError(f"{where}: {key}", expected=expected, got=json.dumps(value, default=repr)[:60])


_SIZES = (
    ("num_hidden_layers", 10_000, True),
    ("hidden_size", 1 << 24, True),
    ("num_attention_heads", 1 << 16, True),
    ("num_key_value_heads", 1 << 16, False),
    ("head_dim", 1 << 16, False),
    ("vocab_size", 1 << 28, True),
    ("max_position_embeddings", 1 << 28, True),
    ("original_max_position_embeddings", 1 << 28, False),
    ("sliding_window", 1 << 28, False),
    ("sliding_window_pattern", 10_000, False),
    ("no_rope_layer_interval", 10_000, False),
)
"""Sizes in a config: the largest that is believed, and whether it has to be there."""


def layer_parts(family: Family, settings: Mapping[str, Any]) -> tuple[LayerParts, ...]:
    """What each layer holds, the first layer first."""
    layers = range(int(settings["num_hidden_layers"]))
    if len(family.layers) == 1:
        return (family.layers[0],) * len(layers)
    by_type = {kind: parts for parts in family.layers for kind in parts.types}
    return tuple(by_type[settings["layer_types"][n]] for n in layers)


def linear_names(config: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """The names of the linear weights of every layer, in the order of computation; the config is checked first."""
    family = family_of(config, where)
    check_config(config, where)
    layers = enumerate(layer_parts(family, settings_of(config, where)))
    return tuple(f"model.layers.{n}.{module}.weight" for n, parts in layers for module, _ in parts.linears)


def bias_names(config: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """The names of the biases that a model has: those of its family, and those that its config announces."""
    family, settings = family_of(config, where), settings_of(config, where)
    announced = [module for key, modules in family.biased.items() if settings.get(key) for module in modules]
    biased = (*family.biases, *announced)
    layers = enumerate(layer_parts(family, settings))
    return tuple(f"model.layers.{n}.{name}.bias" for n, parts in layers for name in biased if parts.has(name))


def norm_names(config: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """The names of all norms, layer by layer, and of the last one."""
    layers = enumerate(layer_parts(family_of(config, where), settings_of(config, where)))
    names = (f"model.layers.{n}.{module}.weight" for n, parts in layers for module, _ in parts.norms)
    return (*names, "model.norm.weight")
