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

from qalora.converters.decoder import FULL, LOCAL, Decoder, decoder_of
from qalora.converters.families import LAYER_KINDS
from qalora.converters.rope import LOCAL_THETA, ORIGINAL, PLACES, SHARE, Rope, two_tables
from qalora.converters.settings import settings_of
from qalora.errors import InputError

__all__ = ["mlx_config", "no_window", "window_beyond"]


def mlx_config(config: Mapping[str, Any], *, tied: bool) -> tuple[dict[str, Any], tuple[str, ...], int | None]:
    """The config to write, notes on what mlx-lm computes otherwise, and the tokens up to which it computes the same.

    tied  whether the output layer is the embedding

    Every number that mlx-lm has another default for is written out. Raises InputError for what it would compute
    otherwise from the first token on.
    """
    decoder, settings = decoder_of(config, "config.json"), settings_of(config, "config.json")
    _check(decoder, settings, tied=tied)
    rope_parameters, rope = settings["rope_parameters"], decoder.ropes[FULL]
    full, local = rope_parameters.get(LAYER_KINDS[0], rope_parameters), rope_parameters.get(LAYER_KINDS[1])
    if not config.get("rope_scaling"):
        rope_parameters = config.get("rope_parameters") or rope_parameters
    beside = {key: value for key, value in config.items() if key not in PLACES}
    missing = {key: value for key, value in _numbers(decoder, settings).items() if beside.get(key) is None}
    result = {**beside, **missing, **_lists(decoder), "rope_parameters": rope_parameters, "tie_word_embeddings": tied}
    result |= _rope(full, decoder)
    notes: list[str] = []
    ends: list[int] = []
    if two_tables(rope, decoder.positions):
        ends.append(rope.original)
        notes.append(f"mlx-lm has one list of rope factors: it is right up to {rope.original} tokens")
    if local is not None and LOCAL_THETA in decoder.family.mlx.defaults:
        result[LOCAL_THETA] = local["rope_theta"]
    if "layer_types" in decoder.family.mlx.unread:
        result["sliding_window_pattern"] = _pattern(decoder, settings)
    if decoder.family.mlx.rounded:
        notes += _scale_note(decoder)
    window = window_beyond(decoder)
    if window is not None:
        ends.append(window)
        notes.append(no_window(decoder, window))
    return result, tuple(notes), min(ends, default=None)


def _numbers(decoder: Decoder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a config may leave out, and mlx-lm has no default for, or another one than transformers."""
    numbers: dict[str, Any] = {"num_key_value_heads": decoder.kv_heads, "rms_norm_eps": decoder.epsilon}
    if "head_dim" in decoder.family.defaults:
        numbers["head_dim"] = decoder.head_size
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
        if decoder.family.defaults.get(key) is not None:
            numbers[key] = settings[key]
    return numbers | {key: settings.get(key) for key in decoder.family.mlx.wanted}


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


def _check(decoder: Decoder, settings: Mapping[str, Any], *, tied: bool) -> None:
    """What mlx-lm's modules have no place for, or pass over."""
    family, mlx = decoder.family, decoder.family.mlx
    name = family.model_type
    if decoder.activation != family.activation:
        raise _refuse(family.activation_key, f"{family.activation} for {name}", decoder.activation)
    for key in family.biased:
        if key in mlx.unread and settings[key]:
            raise _refuse(key, f"a {name} without", "True")
    usual = decoder.hidden // decoder.heads
    if "head_dim" in mlx.unread and decoder.head_size != usual:
        raise _refuse("head_dim", f"{usual}, hidden_size over heads for {name}", decoder.head_size)
    if mlx.ties == "always" and not tied:
        raise _refuse("lm_head", f"a {name} whose output layer is the embedding", "one of its own")
    if mlx.ties == "never" and tied:
        raise _refuse("lm_head", f"a {name} with an output layer of its own", "the embedding")
    local = decoder.ropes.get(LOCAL)
    if local is not None and LOCAL_THETA not in mlx.defaults and local.theta != decoder.ropes[FULL].theta:
        raise _refuse("rope_theta", f"{decoder.ropes[FULL].theta:g} in every layer of a {name}", f"{local.theta:g}")
    for key, cap in (("attn_logit_softcapping", decoder.softcap), ("final_logit_softcapping", decoder.logit_softcap)):
        if key in mlx.unread and cap is not None:
            raise _refuse(key, f"a {name} without", cap)
        if key in mlx.defaults and cap is None:
            raise _refuse(key, f"a {name} with it", "None")


def _rope(parameters: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    """The keys of the rotary positions; `parameters`: those in the config of layers that attend to everything."""
    rope, mlx = decoder.ropes[FULL], decoder.family.mlx
    known = ("default",) if "rope_scaling" in mlx.unread else decoder.family.ropes or (rope.kind,)
    if rope.kind not in known:
        raise _refuse("rope_type", f"{' or '.join(known)} for {decoder.family.model_type}", rope.kind)
    keys: dict[str, Any] = {"rope_theta": parameters["rope_theta"], "rope_scaling": None}
    if parameters.get(SHARE) is not None:
        keys[SHARE] = parameters[SHARE]
    if rope.kind == "default":
        return keys
    if mlx.inside:
        _check_inside(rope)
        return keys
    scaling = {**parameters, "type": rope.kind}
    if rope.kind == "yarn":
        scaling |= _yarn(rope)
    elif rope.kind == "longrope":
        _check_longrope(rope, decoder.positions)
        keys[ORIGINAL] = rope.original
        scaling |= {"long_factor": parameters["short_factor"], ORIGINAL: rope.original}
    return {**keys, "rope_scaling": scaling}


def _check_inside(rope: Rope) -> None:
    """What mlx-lm makes of the numbers of yarn in rope_parameters, as they are."""
    numbers = rope.numbers
    if numbers.get("truncate") is False:
        raise _refuse("rope truncate", "True", "False")
    if "attention_factor" in numbers or ("mscale" in numbers) != ("mscale_all_dim" in numbers):
        raise _refuse("yarn", "mscale and mscale_all_dim, or neither, and no attention_factor", dict(numbers))


def _yarn(rope: Rope) -> dict[str, Any]:
    """mscale and mscale_all_dim that make mlx-lm's factor transformers' attention_factor."""
    numbers = rope.numbers
    if numbers.get("truncate") is False:
        raise _refuse("rope truncate", "True", "False")
    step = 0.1 * math.log(numbers["factor"]) if numbers["factor"] > 1 else 0.0
    if "attention_factor" in numbers:
        attention = float(numbers["attention_factor"])
    elif "mscale" in numbers and "mscale_all_dim" in numbers:
        attention = (1 + step * numbers["mscale"]) / (1 + step * numbers["mscale_all_dim"])
    else:
        attention = 1 + step
    if step == 0 and attention != 1:
        raise _refuse("attention_factor", "1 where factor is 1", attention)
    mscale = (attention - 1) / step if step else 1.0
    return {"factor": numbers["factor"], "mscale": mscale, "mscale_all_dim": 0.0}


def _check_longrope(rope: Rope, positions: int) -> None:
    """mlx-lm takes the factor from the two context lengths, and the size of cos and sin from that."""
    if rope.original < 2:
        raise _refuse(ORIGINAL, "2 or more", rope.original)
    ratio = positions / rope.original
    factor, attention = rope.numbers.get("factor"), rope.numbers.get("attention_factor")
    if factor is not None and not math.isclose(factor, ratio):
        raise _refuse("longrope factor", f"{ratio:g}, of the context lengths", factor)
    expected = math.sqrt(1 + math.log(ratio) / math.log(rope.original)) if ratio > 1 else 1.0
    if attention is not None and not math.isclose(attention, expected):
        raise _refuse("longrope attention_factor", f"{expected:g}, of the context lengths", attention)


def no_window(decoder: Decoder, window: int) -> str:
    """What a user should know of a window that mlx-lm has not."""
    return f"mlx-lm has no sliding window for {decoder.family.model_type}: it is right up to {window} tokens"


def window_beyond(decoder: Decoder) -> int | None:
    """The window that the model has and mlx-lm has not, if the context is longer."""
    windows = [layer.window for layer in decoder.layers if layer.window is not None]
    lacking = not decoder.family.mlx.window and windows and min(windows) < decoder.positions
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


def _scale_note(decoder: Decoder) -> list[str]:
    """It multiplies embeddings by sqrt(hidden) in bfloat16, which has 8 significant bits."""
    import torch

    scale = torch.tensor(decoder.hidden, dtype=torch.float32).sqrt()
    rounded = scale.bfloat16().float()
    if torch.equal(scale, rounded):
        return []
    name = decoder.family.model_type
    return [f"mlx-lm multiplies a {name}'s embeddings by {float(rounded):g} instead of {float(scale):.6g}"]
