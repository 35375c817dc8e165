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
from qalora.converters.families import LAYER_KINDS, check_config, family_of
from qalora.converters.mlx.config import mlx_config, no_window, number, window_beyond
from qalora.converters.rope import LOCAL_THETA, ORIGINAL, PLACES, SHARE
from qalora.errors import InputError

__all__ = ["as_it_was", "as_mlx_reads", "ties"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 1e4, "tie_word_embeddings": True},
    "mistral": {"rope_theta": 1e4, "tie_word_embeddings": True},
    "qwen2": {"rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"rope_theta": None, "tie_word_embeddings": True},
    "gemma2": {
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 144.0,
    },
    "gemma3_text": {
        "rope_theta": 1e6,
        LOCAL_THETA: 1e4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "phi3": {"rope_theta": 1e4, "max_position_embeddings": 131072, ORIGINAL: 4096, "tie_word_embeddings": False},
    "smollm3": {"rope_theta": 1e4, "tie_word_embeddings": True},
}
"""What mlx-lm takes for a key that a config leaves out, where transformers may take something else."""

UNREAD: dict[str, tuple[str, ...]] = {
    "qwen2": ("head_dim",),
    "qwen3": ("attention_bias",),
    "gemma2": ("rope_scaling", "attention_bias"),
    "gemma3_text": ("attn_logit_softcapping", "final_logit_softcapping", "layer_types", "attention_bias"),
    "phi3": ("head_dim",),
}
"""Keys that it does not read and transformers does."""

ONE_ORDER = ("qwen3", "gemma3_text")
"""Families whose pairs of rotated elements are always those of transformers, whatever rope_traditional says."""

YARNS = ("yarn", "deepseek_yarn", "telechat3-yarn")


def ties(config: Mapping[str, Any], *, stored: bool) -> bool:
    """Whether mlx-lm ties the output layer to the embedding; stored: whether the folder has one of its own."""
    family = str(config.get("model_type"))
    if family == "gemma3_text":
        return not stored
    return family == "gemma2" or bool(config.get("tie_word_embeddings", DEFAULTS[family]["tie_word_embeddings"]))


def as_it_was(config: Mapping[str, Any], where: str, *, tied: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config that one of ours was written from, and notes; or as `as_mlx_reads`, if it was edited.

    tied  whether the output layer is the embedding
    """
    kept = {key: value for key, value in config.items() if key not in PLACES or key == "rope_parameters"}
    check_config(kept, where)
    written, _, _ = mlx_config(kept, tied=tied)
    if decoder_of(_read(written, where), where) == decoder_of(_read(config, where), where):
        return kept, ()
    return as_mlx_reads(config, where, meant=kept)


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
    found = differences(read, meant)
    if found or ours.positions == theirs.positions:
        return found
    return (f"max_position_embeddings: {ours.positions} instead of {theirs.positions}",)


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All numbers as mlx-lm takes them, in the places where transformers looks for them."""
    known = family_of(config, where)
    family = known.model_type
    if config.get("rope_traditional") and family not in ONE_ORDER:
        raise InputError(f"{where}: rope_traditional", expected="false", got=repr(config["rope_traditional"])[:60])
    windows = isinstance(config.get("layer_types"), list) and LAYER_KINDS[1] in config["layer_types"]
    if family == "llama" and windows:
        expected = f"{LAYER_KINDS[0]} alone in a llama"
        raise InputError(f"{where}: layer_types", expected=expected, got=LAYER_KINDS[1])
    defaults = {key: value for key, value in DEFAULTS[family].items() if key != "tie_word_embeddings"}
    beside = () if family == "phi3" else (ORIGINAL,)
    passed = (*PLACES, *UNREAD.get(family, ()), *beside)
    said = {key: value for key, value in config.items() if key not in passed}
    read = {**defaults, **said, known.activation_key: known.activation, **_rope(config, family, defaults)}
    if family == "gemma3_text":
        read["attn_logit_softcapping"] = read["final_logit_softcapping"] = None
    return read


def _rope(config: Mapping[str, Any], family: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Its rotary positions as transformers' `rope_parameters`."""
    scaling = config.get("rope_scaling") if "rope_scaling" not in UNREAD.get(family, ()) else None
    theta = config.get("rope_theta", defaults["rope_theta"])
    parameters = config.get("rope_parameters")
    if family == "qwen3" and isinstance(parameters, Mapping):
        theta = parameters.get("rope_theta") if theta is None else theta
        scaling = parameters if scaling is None else scaling
    scaled = dict(scaling) if isinstance(scaling, Mapping) else {}
    kind = scaled.pop("type", None) or scaled.get("rope_type") or "default"
    kind = "longrope" if family == "phi3" and kind == "su" else kind
    full = {**_scaled(kind, scaled), "rope_theta": theta}
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.get(LOCAL_THETA, defaults[LOCAL_THETA])}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    share = {SHARE: config.get(SHARE, 1.0)} if family == "phi3" else {}
    return {"rope_parameters": {**full, **share}}


def _scaled(kind: object, said: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a kind of scaling, with mlx-lm's defaults, and without those that it does not read."""
    if kind in YARNS:
        kept = {key: said[key] for key in ("factor", ORIGINAL, "beta_fast", "beta_slow") if key in said}
        sizes = {key: said.get(key, default) for key, default in (("mscale", 1), ("mscale_all_dim", 0))}
        step = 0.1 * math.log(max(1.0, number(said, "factor")))
        top, bottom = (1 + step * _or_none(sizes, key) for key in sizes)
        usual = sizes["mscale"] == 1 and sizes["mscale_all_dim"] == 0
        attention = {} if usual else {"attention_factor": top / bottom}
        return {"rope_type": "yarn", ORIGINAL: 4096, **kept, **attention}
    if kind == "llama3":
        return {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192, **said, "rope_type": kind}
    if kind == "longrope":  # it has one list, and takes the size of cos and sin from the two contexts
        kept = {key: value for key, value in said.items() if key not in ("factor", "attention_factor")}
        return {**kept, "rope_type": kind, "short_factor": said.get("long_factor")}
    return {**said, "rope_type": kind}


def _or_none(sizes: Mapping[str, Any], key: str) -> float:
    return number(sizes, key) if sizes[key] else 0.0
