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

from qalora.converters.decoder import Decoder, decoder_of
from qalora.converters.families import LAYER_KINDS, family_of, settings_of
from qalora.converters.rope import LOCAL_THETA, ORIGINAL, PLACES, SHARE
from qalora.errors import InputError

__all__ = ["mlx_config", "no_window", "number", "window_beyond"]

WINDOWED = ("mistral", "phi3", "gemma2", "qwen2", "qwen3")
"""Families with a sliding window that mlx-lm does not have."""

WITHOUT_BIAS = ("qwen3", "gemma2", "gemma3_text")
"""Families whose attention has no biases there."""

ROPES = {"phi3": ("default", "longrope"), "gemma2": ("default",)}
"""Families whose rope mlx-lm does not scale in every way."""


def mlx_config(config: Mapping[str, Any], *, tied: bool) -> tuple[dict[str, Any], tuple[str, ...], int | None]:
    """The config to write, notes on what mlx-lm computes otherwise, and the tokens up to which it computes the same.

    tied  whether the output layer is the embedding

    Every number that mlx-lm has another default for is written out. Raises InputError for what it would compute
    otherwise from the first token on.
    """
    decoder, settings = decoder_of(config, "config.json"), settings_of(config, "config.json")
    family, rope = decoder.family.model_type, settings["rope_parameters"]
    _check(config, family, tied=tied)
    beside = {key: value for key, value in config.items() if key not in PLACES}
    missing = {key: value for key, value in _numbers(decoder, settings).items() if beside.get(key) is None}
    said = rope if config.get("rope_scaling") else config.get("rope_parameters") or rope
    found = {**beside, **missing, **_lists(decoder), "rope_parameters": said, "tie_word_embeddings": tied}
    full, local = rope.get(LAYER_KINDS[0], rope), rope.get(LAYER_KINDS[1])
    notes: list[str] = []
    ends: list[int] = []
    found |= _rope(full, config, family)
    original = found.get("original_max_position_embeddings")
    listed = "long_factor" in (found["rope_scaling"] or {})
    if listed and type(original) is int and original < decoder.positions:
        ends.append(original)
        notes.append(f"mlx-lm has one list of rope factors: it is right up to {original} tokens")
    if local is not None:
        found[LOCAL_THETA] = local["rope_theta"]
    if family == "gemma3_text":
        found["sliding_window_pattern"] = _pattern(decoder, settings)
        notes += _scale_note(decoder.hidden)
    window = window_beyond(decoder)
    if window is not None:
        ends.append(window)
        notes.append(no_window(decoder, window))
    return found, tuple(notes), min(ends, default=None)


def _numbers(decoder: Decoder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a config may leave out, and mlx-lm has no default for, or another one than transformers."""
    found: dict[str, Any] = {"num_key_value_heads": decoder.kv_heads, "rms_norm_eps": decoder.epsilon}
    if "head_dim" in decoder.family.defaults:
        found["head_dim"] = decoder.head_size
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
        if decoder.family.defaults.get(key) is not None:
            found[key] = settings[key]
    return found


def _lists(decoder: Decoder) -> dict[str, Any]:
    """The lists by layers of a family that has layers without rotary positions, as long as mlx-lm wants them."""
    if not decoder.family.skips_rope:
        return {}
    return {
        "no_rope_layers": [int(layer.rope is not None) for layer in decoder.layers],
        "layer_types": [LAYER_KINDS[layer.window is not None] for layer in decoder.layers],
    }


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
    if family == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if settings[key] is None:
                raise _refuse(key, "a gemma2 with it", "None")
    if family == "gemma3_text":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(key) is not None:
                raise _refuse(key, "a gemma3 without", config[key])


def _rope(rope: Mapping[str, Any], config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The keys of the rotary positions; `rope` is that of the layers that attend to everything."""
    kind = str(rope["rope_type"])
    if kind not in ROPES.get(family, (kind,)):
        raise _refuse("rope_type", f"{' or '.join(ROPES[family])} for {family}", kind)
    found: dict[str, Any] = {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    if rope.get(SHARE) is not None:
        found[SHARE] = rope[SHARE]
    if kind == "default":
        return found
    scaling = {**rope, "type": kind}
    if kind == "yarn":
        scaling |= _yarn(rope)
    elif kind == "longrope":
        original = rope[ORIGINAL]
        _check_longrope(rope, config, original)
        scaling |= {"long_factor": rope.get("short_factor"), "original_max_position_embeddings": original}
        found["original_max_position_embeddings"] = original
    return {**found, "rope_scaling": scaling}


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    """mscale and mscale_all_dim that make mlx-lm's factor transformers' attention_factor."""
    if rope.get("truncate") is False:
        raise _refuse("rope truncate", "True", "False")
    factor = number(rope, "factor")
    step = 0.1 * math.log(factor) if factor > 1 else 0.0
    if rope.get("attention_factor") is not None:
        attention = number(rope, "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = (1 + step * number(rope, "mscale")) / (1 + step * number(rope, "mscale_all_dim"))
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
    if rope.get("factor") is not None and not math.isclose(number(rope, "factor"), ratio):
        raise _refuse("longrope factor", f"{ratio:g}, of the context lengths", rope["factor"])
    wanted = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    if rope.get("attention_factor") is not None and not math.isclose(number(rope, "attention_factor"), wanted):
        raise _refuse("longrope attention_factor", f"{wanted:g}, of the context lengths", rope["attention_factor"])


def number(rope: Mapping[str, Any], key: str) -> float:
    """A finite number of a scaling; InputError for what is none."""
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"mlx: rope {key}", expected="a number", got=repr(value)[:60])
    return float(value)


def no_window(decoder: Decoder, window: int) -> str:
    """What a user should know of a window that mlx-lm has not."""
    return f"mlx-lm has no sliding window for {decoder.family.model_type}: it is right up to {window} tokens"


def window_beyond(decoder: Decoder) -> int | None:
    """The window that the model has and mlx-lm has not, if the context is longer."""
    windows = [layer.window for layer in decoder.layers if layer.window is not None]
    lacking = decoder.family.model_type in WINDOWED and windows and min(windows) < decoder.positions
    return min(windows) if lacking else None


def _pattern(decoder: Decoder, settings: Mapping[str, Any]) -> int:
    """n, where every n-th layer attends to everything; at least one of those that layer_types names has to."""
    if settings["layer_types"] is None:
        return int(settings["sliding_window_pattern"])
    full = [layer.window is None for layer in decoder.layers]
    pattern = full.index(True) + 1 if True in full else 0
    if not pattern or full != [(n + 1) % pattern == 0 for n in range(len(full))]:
        got = ", ".join(LAYER_KINDS[not whole] for whole in full)
        raise _refuse("layer_types", "every n-th layer full_attention", got)
    return pattern


def _scale_note(hidden: int) -> list[str]:
    """Gemma 3 multiplies embeddings by sqrt(hidden), which mlx-lm rounds to bfloat16, with its 8 significant bits."""
    import torch

    scale = torch.tensor(hidden, dtype=torch.float32).sqrt()
    rounded = scale.bfloat16().float()
    if torch.equal(scale, rounded):
        return []
    return [f"mlx-lm multiplies Gemma 3's embeddings by {float(rounded):g} instead of {float(scale):.6g}"]
