"""The config of an MLX folder that others made, as mlx-lm reads it; `config` writes what it wants to find.

mlx-lm looks for a number in one place and has a default of its own where it is not there, so that a config that
transformers 5 wrote can be another model there: all but Qwen 3 pass over rope_parameters. What it computes counts.
Source: mlx-lm 0.32, mlx_lm/models/*.py, class ModelArgs, and rope_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.converters.decoder import decoder_of
from qalora.converters.essentials import differences
from qalora.converters.families import family_of
from qalora.converters.rope import LOCAL_THETA, ORIGINAL, PLACES, SHARE

__all__ = ["as_mlx_reads", "ties"]

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
    "gemma2": ("rope_scaling",),
    "gemma3_text": ("attn_logit_softcapping", "final_logit_softcapping", "layer_types"),
}
"""Keys that it does not read and transformers does."""


def ties(config: Mapping[str, Any], *, stored: bool) -> bool:
    """Whether mlx-lm ties the output layer to the embedding; stored: whether the folder has one of its own."""
    family = str(config.get("model_type"))
    if family == "gemma3_text":
        return not stored
    return family == "gemma2" or bool(config.get("tie_word_embeddings", DEFAULTS[family]["tie_word_embeddings"]))


def as_mlx_reads(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config that says to transformers what this one says to mlx-lm, and a note where the two differ."""
    family = family_of(config, where).model_type
    defaults = {key: value for key, value in DEFAULTS[family].items() if key != "tie_word_embeddings"}
    said = {key: value for key, value in config.items() if key not in PLACES and key not in UNREAD.get(family, ())}
    read = {**defaults, **said, **_rope(config, family, defaults)}
    if family == "gemma3_text":
        read["attn_logit_softcapping"] = read["final_logit_softcapping"] = None
    theirs, ours = decoder_of(config, where), decoder_of(read, where)
    if ours == theirs:
        return dict(config), ()
    context = f"max_position_embeddings: {ours.positions} instead of {theirs.positions}"
    differ = (*differences(read, config), *([context] if ours.positions != theirs.positions else []))
    return read, (f"{where}: mlx-lm's reading of config.json counts: {'; '.join(differ)}",)


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
    full = {**scaled, "rope_type": kind, "rope_theta": theta}
    if family == "phi3" and "long_factor" in full:
        full |= {"rope_type": "longrope", "short_factor": full["long_factor"]}  # it has no other list
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.get(LOCAL_THETA, defaults[LOCAL_THETA])}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    share = {SHARE: config.get(SHARE, 1.0)} if family == "phi3" else {}
    return {"rope_parameters": {**full, **share}}
