"""The config of an MLX folder that others made, as mlx-lm reads it; `config` writes what it wants to find.

mlx-lm looks for a number in one place and has a default of its own where it is not there, so that a config that
transformers 5 wrote can be another model there: all but Qwen 3 pass over rope_parameters. What it computes counts.
Source: mlx-lm 0.32, mlx_lm/models/*.py, class ModelArgs, and rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qalora.converters.decoder import decoder_of
from qalora.converters.essentials import differences
from qalora.converters.families import LAYER_KINDS, Family, family_of
from qalora.converters.mlx.config import mlx_config, no_window, window_beyond
from qalora.converters.rope import LOCAL_THETA, ORIGINAL, PLACES, SHARE
from qalora.converters.settings import check_config
from qalora.errors import InputError, shown

__all__ = ["as_it_was", "as_mlx_reads", "ties"]

TRADITIONAL = "rope_traditional"
"""mlx-lm's key for rotary positions that turn neighbours."""

YARNS = ("yarn", "deepseek_yarn", "telechat3-yarn")


def ties(config: Mapping[str, Any], family: Family, *, stored: bool) -> bool:
    """Whether mlx-lm ties the output layer to the embedding; stored: whether the folder has one of its own."""
    if family.mlx.ties == "said":
        return bool(config.get("tie_word_embeddings", family.mlx.defaults["tie_word_embeddings"]))
    return family.mlx.ties == "always" or not stored


def as_it_was(config: Mapping[str, Any], where: str, *, tied: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config that one of ours was written from, and notes; or as `as_mlx_reads`, if it was edited.

    tied  whether the output layer is the embedding
    """
    original = {key: value for key, value in config.items() if key not in PLACES or key == "rope_parameters"}
    check_config(original, where)
    again, _, _ = mlx_config(original, tied=tied)
    if decoder_of(_read(again, where), where) == decoder_of(_read(config, where), where):
        return original, ()
    return as_mlx_reads(config, where, meant=original)


def as_mlx_reads(
    config: Mapping[str, Any], where: str, *, meant: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config that says to transformers what this one says to mlx-lm, and notes.

    meant  what the config stands for, where that is known; else what transformers reads of it

    A window that mlx-lm has not stays, with a note: up to it both compute the same. Raises InputError for what no
    config says to transformers.
    """
    read, meant = _read(config, where), config if meant is None else meant
    check_config(read, where)
    window = window_beyond(decoder_of(read, where))
    notes = () if window is None else (f"{where}: {no_window(decoder_of(read, where), window)}",)
    differ = _differ(read, meant, where)
    if not differ:
        return dict(meant), notes
    return read, (f"{where}: mlx-lm's reading of config.json counts: {'; '.join(differ)}", *notes)


def _differ(read: Mapping[str, Any], meant: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """What mlx-lm reads otherwise than the config means to transformers."""
    ours = decoder_of(read, where)
    try:
        theirs = decoder_of(meant, where)
    except InputError as error:
        return (f"transformers has none ({error})",)
    notes = differences(read, meant)
    if notes or ours.positions == theirs.positions:
        return notes
    return (f"max_position_embeddings: {ours.positions} instead of {theirs.positions}",)


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All numbers as mlx-lm takes them, in the places where transformers looks for them."""
    family = family_of(config, where)
    mlx = family.mlx
    neighbours = bool(mlx.defaults.get(TRADITIONAL))
    if bool(config.get(TRADITIONAL, neighbours)) != neighbours and not mlx.ordered:
        expected = str(neighbours).lower()
        raise InputError(f"{where}: {TRADITIONAL}", expected=expected, got=shown(config[TRADITIONAL]))
    windows = isinstance(config.get("layer_types"), list) and LAYER_KINDS[1] in config["layer_types"]
    if family.windows == "none" and windows:
        expected = f"{LAYER_KINDS[0]} alone in a {family.model_type}"
        raise InputError(f"{where}: layer_types", expected=expected, got=LAYER_KINDS[1])
    defaults = {key: value for key, value in mlx.defaults.items() if key not in ("tie_word_embeddings", TRADITIONAL)}
    passed = (*PLACES, *mlx.unread, *(() if ORIGINAL in mlx.defaults else (ORIGINAL,)))
    own = {key: value for key, value in config.items() if key not in passed}
    read = {**defaults, **own, family.activation_key: family.activation, **_rope(config, family)}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in mlx.unread:
            read[key] = None
    return read


def _rope(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Its rotary positions as transformers' `rope_parameters`."""
    mlx = family.mlx
    scaling = config.get("rope_scaling") if "rope_scaling" not in mlx.unread else None
    theta = config.get("rope_theta", mlx.defaults["rope_theta"])
    parameters = config.get("rope_parameters")
    if mlx.inside and isinstance(parameters, Mapping):
        return {"rope_parameters": dict(parameters)}
    if mlx.parameters and isinstance(parameters, Mapping):
        theta = parameters.get("rope_theta") if theta is None else theta
        scaling = parameters if scaling is None else scaling
    scaled = dict(scaling) if isinstance(scaling, Mapping) else {}
    kind = scaled.pop("type", None) or scaled.get("rope_type") or "default"
    kind = mlx.aliases.get(kind, kind) if isinstance(kind, str) else kind
    full = {**_scaled(kind, scaled), "rope_theta": theta}
    if family.local_rope:
        apart = LOCAL_THETA in mlx.defaults
        local_theta = config.get(LOCAL_THETA, mlx.defaults[LOCAL_THETA]) if apart else theta
        local = {"rope_type": "default", "rope_theta": local_theta}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    share = {SHARE: config.get(SHARE, 1.0)} if SHARE in family.defaults else {}
    return {"rope_parameters": {**full, **share}}


def _scaled(kind: object, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a kind of scaling, with mlx-lm's defaults, and without those that it does not read."""
    if kind in YARNS:
        own = {key: numbers[key] for key in ("factor", ORIGINAL, "beta_fast", "beta_slow") if key in numbers}
        sizes = {key: numbers.get(key, default) for key, default in (("mscale", 1), ("mscale_all_dim", 0))}
        step = 0.1 * math.log(max(1.0, _number(numbers, "factor")))
        top, bottom = (1 + step * _or_none(sizes, key) for key in sizes)
        usual = sizes["mscale"] == 1 and sizes["mscale_all_dim"] == 0
        attention = {} if usual else {"attention_factor": top / bottom}
        return {"rope_type": "yarn", ORIGINAL: 4096, **own, **attention}
    if kind == "llama3":
        return {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192, **numbers, "rope_type": kind}
    if kind == "longrope":  # it has one list, and takes the size of cos and sin from the two contexts
        own = {key: value for key, value in numbers.items() if key not in ("factor", "attention_factor")}
        return {**own, "rope_type": kind, "short_factor": numbers.get("long_factor")}
    return {**numbers, "rope_type": kind}


def _or_none(sizes: Mapping[str, Any], key: str) -> float:
    return _number(sizes, key) if sizes[key] else 0.0


def _number(scaling: Mapping[str, Any], key: str) -> float:
    """A finite number of a scaling; InputError for what is none."""
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"mlx: rope {key}", expected="a number", got=shown(value))
    return float(value)
