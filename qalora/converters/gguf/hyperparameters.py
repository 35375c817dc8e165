"""A decoder's numbers as GGUF metadata; `qalora.converters.gguf.configs` reads them.

What GGUF has no key for travels in keys of ours: `qalora.model_type` names the family where several share an
architecture (Mistral's is "llama" too), `qalora.config` is a JSON object of transformers' keys in CARRIED.
Sources: ggml-org/ggml, docs/gguf.md; gguf-py, constants.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qalora.converters.decoder import FULL, LOCAL, Decoder
from qalora.converters.gguf.loaders import LOG_MULTIPLIER, SCALES, TEMPERATURE, clipped_window, refuse
from qalora.converters.rope import Rope, llama3_factors
from qalora.formats.gguf import Value

__all__ = [
    "CARRIED",
    "CONFIG",
    "FREQS",
    "LONGROPE",
    "MODEL_TYPE",
    "factor_tensors",
    "hyperparameters",
    "yarn_attention",
]

MODEL_TYPE, CONFIG = "qalora.model_type", "qalora.config"

CARRIED = (
    "max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "rope_parameters",
)
"""The keys that `qalora.config` may have."""

FREQS = "rope_freqs.weight"
LONGROPE = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}


def hyperparameters(decoder: Decoder, settings: Mapping[str, Any], where: object) -> dict[str, Value]:
    """The metadata of the architecture. `settings` is the config with the family's defaults.

    InputError for what GGUF cannot say, or llama.cpp would compute otherwise.
    """
    refuse(decoder, where)
    loader, size, heads = decoder.family.gguf, decoder.head_size, decoder.heads
    clipped = clipped_window(decoder)
    integers = {
        "block_count": len(decoder.layers),
        "context_length": clipped or decoder.positions,
        "embedding_length": decoder.hidden,
        "feed_forward_length": decoder.intermediate,
        "attention.head_count": heads,
        "attention.head_count_kv": decoder.kv_heads,
        "vocab_size": decoder.vocabulary,
        "rope.dimension_count": decoder.ropes[FULL].size(size),
    }
    if loader.sized or size * heads != decoder.hidden:
        integers |= {"attention.key_length": size, "attention.value_length": size}
    floats = {
        "rope.freq_base": decoder.ropes[FULL].theta,
        "attention.layer_norm_rms_epsilon": decoder.epsilon,
    }
    windows = [layer.window for layer in decoder.layers if layer.window is not None]
    if windows and loader.window is not None:
        integers["attention.sliding_window"] = windows[0]
    if loader.scaled:
        floats |= {SCALES[key]: float(settings[key]) for key in SCALES}
    if loader.tempered:
        floats |= {TEMPERATURE: decoder.ropes[FULL].temperature or 0.0, LOG_MULTIPLIER: 1.0}
    if LOCAL in decoder.ropes and loader.local:
        floats["rope.freq_base_swa"] = decoder.ropes[LOCAL].theta
    for key, cap in (("attn", decoder.softcap), ("final", decoder.logit_softcap)):
        if cap is not None:
            floats[f"{key}_logit_softcapping"] = cap
    entries = {key: Value.uint32(value) for key, value in integers.items()}
    entries |= {key: Value.float32(value) for key, value in floats.items()}
    entries |= _scaling(decoder.ropes[FULL], decoder.positions)
    return {f"{loader.architecture}.{key}": value for key, value in entries.items()} | _carried(decoder, settings)


def _scaling(rope: Rope, positions: int) -> dict[str, Value]:
    """The keys below rope.scaling; llama3's and longrope's factors are tensors, which name no type."""
    entries: dict[str, Value] = {}
    if rope.kind in ("linear", "yarn"):
        entries |= {"type": Value.text(rope.kind), "factor": Value.float32(rope.numbers["factor"])}
    if rope.kind in ("yarn", "longrope"):
        entries["original_context_length"] = Value.uint32(rope.original)
    if rope.kind == "longrope":
        entries["attn_factor"] = Value.float32(rope.attention_factor(positions))
    if rope.kind == "yarn":
        entries["yarn_beta_fast"] = Value.float32(rope.numbers["beta_fast"])
        entries["yarn_beta_slow"] = Value.float32(rope.numbers["beta_slow"])
        factor = rope.numbers.get("attention_factor")
        if factor is not None:  # llama.cpp multiplies what it computes from the factor with this
            entries["attn_factor"] = Value.float32(factor / yarn_attention(rope.numbers["factor"]))
    return {f"rope.scaling.{key}": value for key, value in entries.items()}


def yarn_attention(factor: float) -> float:
    """What yarn multiplies cos and sin with, where nothing else is said."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _carried(decoder: Decoder, settings: Mapping[str, Any]) -> dict[str, Value]:
    """Our own keys, where GGUF's do not say all."""
    content: dict[str, Any] = {}
    if clipped_window(decoder) is not None:
        content = {key: settings[key] for key in CARRIED if key in settings and key != "rope_parameters"}
    rope = decoder.ropes[FULL]
    if rope.kind == "llama3" or (rope.kind == "yarn" and "attention_factor" in rope.numbers):
        content["rope_parameters"] = rope.parameters()
    entries = {}
    if decoder.family.model_type != decoder.family.gguf.architecture:
        entries[MODEL_TYPE] = Value.text(decoder.family.model_type)
    if content:
        entries[CONFIG] = Value.text(json.dumps(content, sort_keys=True))
    return entries


def factor_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The factors of rotary frequencies that GGUF holds as tensors, float32 [rotated elements / 2], by its name."""
    rope = decoder.ropes[FULL]
    if rope.kind == "llama3":
        return {FREQS: llama3_factors(rope, rope.size(decoder.head_size)).float()}
    if rope.kind == "longrope":
        return {name: torch.tensor(rope.numbers[key], dtype=torch.float32) for key, name in LONGROPE.items()}
    return {}
