"""transformers' config as mlx-lm reads it.

mlx-lm takes what it knows from config.json and its own defaults for the rest; a key that it looks for elsewhere is
passed over without a word, and the model computes something else. Where the two differ:

| transformers 5 | mlx-lm 0.32 |
|---|---|
| rope_parameters with rope_theta and rope_type | rope_theta, and rope_scaling with type; null for the default rope |
| rope_parameters by kind of layer (Gemma 3) | rope_theta and rope_scaling of the full ones, rope_local_base_freq |
| yarn's attention_factor | mscale, of which it is 1 + 0.1 * mscale * ln(factor) |
| longrope (Phi-3): short factors within the original context, long ones beyond | long_factor at any length |
| layer_types (Gemma 3) | sliding_window_pattern: every n-th layer attends to everything |
| sliding_window (Mistral, Phi-3, Gemma 2, Qwen with use_sliding_window) | attends to everything |
| tie_word_embeddings false by default (Llama) | true by default |

The config that is written makes the model right within the window and the original context, and says so in a note;
what mlx-lm would compute otherwise at any length is refused. What came from transformers stays in it, so that it reads
back as it was. Source: mlx-lm, mlx_lm/models/*.py, class ModelArgs, and rope_utils.py. The tests hold each family's
logits against transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qalora.converters.families import family_of, settings_of
from qalora.errors import InputError

__all__ = ["mlx_config"]

WINDOWED = ("mistral", "phi3", "gemma2")
"""Families with a sliding window that mlx-lm does not have."""

WITHOUT_BIAS = ("qwen3", "gemma2", "gemma3_text")
"""Families whose attention has no biases there."""

ROPES = {"phi3": ("default", "longrope"), "gemma2": ("default",)}
"""Families whose rope mlx-lm does not scale in every way."""


def mlx_config(config: Mapping[str, Any], *, tied: bool) -> tuple[dict[str, Any], tuple[str, ...], int | None]:
    """The config to write, notes on what mlx-lm computes otherwise, and the tokens up to which it computes the same.

    tied  whether the output layer is the embedding

    Raises InputError for what it would compute otherwise from the first token on.
    """
    family = str(config.get("model_type"))
    _check(config, family, tied=tied)
    found = {**config, "tie_word_embeddings": tied}
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": _theta(config)}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    notes: list[str] = []
    ends: list[int] = []
    if isinstance(full, Mapping):
        found |= _rope(full, config, family)
        original = found.get("original_max_position_embeddings")
        listed = "long_factor" in (found["rope_scaling"] or {})
        if listed and type(original) is int and original < config["max_position_embeddings"]:
            ends.append(original)
            notes.append(f"mlx-lm has one list of rope factors: it is right up to {original} tokens")
    if isinstance(local, Mapping):
        found["rope_local_base_freq"] = local.get("rope_theta", 10000.0)
    if family == "gemma3_text":
        found["sliding_window_pattern"] = _pattern(config)
        notes += _scale_note(int(config["hidden_size"]))
    window = _window(config, family)
    if window is not None:
        ends.append(window)
        notes.append(f"mlx-lm has no sliding window for {family}: it is right up to {window} tokens")
    return found, tuple(notes), min(ends, default=None)


def _refuse(what: str, expected: str, got: object) -> InputError:
    return InputError(
        f"mlx: {what}", expected=f"{expected}, as in mlx-lm", got=str(got)[:120], todo="use another format"
    )


def _check(config: Mapping[str, Any], family: str, *, tied: bool) -> None:
    """What mlx-lm's modules have no place for, or pass over."""
    known, settings = family_of(config, "config.json"), settings_of(config, "config.json")
    if settings[known.activation_key] != known.activation:
        raise _refuse(known.activation_key, f"{known.activation} for {family}", settings[known.activation_key])
    if family in WITHOUT_BIAS and config.get("attention_bias"):
        raise _refuse("attention_bias", f"a {family} without", "True")
    if family == "qwen2" and config.get("head_dim") is not None:
        usual = int(config["hidden_size"]) // int(config["num_attention_heads"])
        if config["head_dim"] != usual:
            raise _refuse("head_dim", f"{usual}, hidden_size over heads for qwen2", config["head_dim"])
    if family == "gemma2" and not tied:
        raise _refuse("lm_head", "a gemma2 whose output layer is the embedding", "one of its own")
    if family == "gemma3_text":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(key) is not None:
                raise _refuse(key, "a gemma3 without", config[key])


def _theta(config: Mapping[str, Any]) -> float:
    default = 1e6 if config.get("model_type") == "gemma3_text" else 1e4
    return float(config.get("rope_theta") or default)


def _rope(rope: Mapping[str, Any], config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The keys of the rotary positions; `rope` is that of the layers that attend to everything."""
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    kind = "longrope" if kind == "su" else kind
    if kind not in ROPES.get(family, (kind,)):
        raise _refuse("rope_type", f"{' or '.join(ROPES[family])} for {family}", kind)
    found: dict[str, Any] = {"rope_theta": rope.get("rope_theta") or _theta(config), "rope_scaling": None}
    if rope.get("partial_rotary_factor") is not None:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if kind == "default":
        return found
    scaling = {**rope, "type": kind}
    if kind == "yarn":
        scaling |= _yarn(rope)
    elif kind == "longrope":
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        _check_longrope(rope, config, original)
        scaling |= {"long_factor": rope.get("short_factor"), "original_max_position_embeddings": original}
        found["original_max_position_embeddings"] = original
    return {**found, "rope_scaling": scaling}


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    """mscale and mscale_all_dim that make mlx-lm's factor transformers' attention_factor."""
    if rope.get("truncate") is False:
        raise _refuse("rope truncate", "True", "False")
    factor = _number(rope, "factor")
    step = 0.1 * math.log(factor) if factor > 1 else 0.0
    if rope.get("attention_factor") is not None:
        attention = _number(rope, "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = (1 + step * _number(rope, "mscale")) / (1 + step * _number(rope, "mscale_all_dim"))
    else:
        attention = 1 + step
    if step == 0 and attention != 1:
        raise _refuse("attention_factor", "1 where factor is 1", attention)
    return {"mscale": (attention - 1) / step if step else 1.0, "mscale_all_dim": 0.0}


def _check_longrope(rope: Mapping[str, Any], config: Mapping[str, Any], original: object) -> None:
    """mlx-lm takes the factor from the two context lengths, and the size of cos and sin from that."""
    longest = config.get("max_position_embeddings")
    if type(original) is not int or type(longest) is not int or original < 2:
        raise _refuse("original_max_position_embeddings", "a whole number", original)
    ratio = longest / original
    if rope.get("factor") is not None and not math.isclose(_number(rope, "factor"), ratio):
        raise _refuse("longrope factor", f"{ratio:g}, of the context lengths", rope["factor"])
    wanted = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    if rope.get("attention_factor") is not None and not math.isclose(_number(rope, "attention_factor"), wanted):
        raise _refuse("longrope attention_factor", f"{wanted:g}, of the context lengths", rope["attention_factor"])


def _number(rope: Mapping[str, Any], key: str) -> float:
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"mlx: rope {key}", expected="a number", got=repr(value)[:60])
    return float(value)


def _window(config: Mapping[str, Any], family: str) -> int | None:
    """The window that the model has and mlx-lm has not, if the context is longer."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    used = family in WINDOWED or (family in ("qwen2", "qwen3") and config.get("use_sliding_window"))
    return window if used and type(window) is int and type(longest) is int and window < longest else None


def _pattern(config: Mapping[str, Any]) -> int:
    """n, where every n-th layer attends to everything; at least one has to."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list):
        given = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
        return given if type(given) is int and given > 0 else 6
    pattern = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    expected = [
        "full_attention" if pattern and (n + 1) % pattern == 0 else "sliding_attention" for n in range(len(kinds))
    ]
    if not pattern or kinds != expected:
        raise _refuse("layer_types", "every n-th layer full_attention", ", ".join(map(str, kinds)))
    return pattern


def _scale_note(hidden: int) -> list[str]:
    """Gemma 3 multiplies embeddings by sqrt(hidden), which mlx-lm rounds to bfloat16, with its 8 significant bits."""
    import torch

    scale = torch.tensor(hidden, dtype=torch.float32).sqrt()
    rounded = scale.bfloat16().float()
    if torch.equal(scale, rounded):
        return []
    return [f"mlx-lm multiplies Gemma 3's embeddings by {float(rounded):g} instead of {float(scale):.6g}"]
