"""What of a transformers config changes the logits, and what two configs have otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import torch

from qalora.converters.decoder import FULL, decoder_of
from qalora.converters.settings import EMBEDDING_SCALE, LOGIT_DIVISOR, RESIDUAL_SCALE, settings_of

__all__ = ["differences", "essentials"]


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """What changes the logits and is not the same in two configs, such as "rope.factor: 4.0 instead of None"."""
    a, b = essentials(mine), essentials(theirs)
    return tuple(f"{key}: {a.get(key)} instead of {b.get(key)}" for key in sorted(a | b) if a.get(key) != b.get(key))


def essentials(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a transformers config changes the logits, in one form whatever version wrote it; reals as float32."""
    decoder, settings = decoder_of(config, "config.json"), settings_of(config, "config.json")
    numbers = {
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.intermediate,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_size,
        "vocab_size": decoder.vocabulary,
        "activation": decoder.activation,
        **{
            key: bool(settings.get(key))
            for key in dict.fromkeys(("attention_bias", "mlp_bias", *decoder.family.biased))
        },
        "rms_norm_eps": decoder.epsilon,
        "attention scale": decoder.scale,
        "attn_logit_softcapping": decoder.softcap,
        "final_logit_softcapping": decoder.logit_softcap,
        "windows": _runs(layer.window if (layer.window or 0) < decoder.positions else None for layer in decoder.layers),
        "rotary positions": _runs(layer.rope for layer in decoder.layers),
        **{key: settings[key] for key in (EMBEDDING_SCALE, RESIDUAL_SCALE, LOGIT_DIVISOR) if key in settings},
    }
    for kind, rope in decoder.ropes.items():
        where = "rope" if kind == FULL else f"rope.{kind}"
        numbers |= {f"{where}.{key}": value for key, value in rope.parameters().items()}
    return {key: _float32(value) for key, value in numbers.items()}


def _runs(values: Iterable[Any]) -> str:
    """What follows each other in the layers, such as "5 x 1024, 1 x None"."""
    return ", ".join(f"{len(list(run))} x {value}" for value, run in groupby(values))


def _float32(value: Any) -> Any:
    if isinstance(value, list):
        return [_float32(part) for part in value]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return torch.tensor(float(value), dtype=torch.float32).item() if number else value
