"""transformers' config as mlx-lm reads it.

mlx-lm takes what it knows from config.json and its own defaults for the rest; a key that it looks for elsewhere is
passed over without a word, and the model computes something else. Where the two differ:

| transformers 5 | mlx-lm 0.32 |
|---|---|
| rope_parameters with rope_theta and rope_type | rope_theta, and rope_scaling with type; null for the default rope |
| rope_parameters by kind of layer (Gemma 3) | rope_theta and rope_scaling of the full ones, rope_local_base_freq |
| longrope (Phi-3): short factors within the original context, long ones beyond | long_factor at any length |
| layer_types (Gemma 3) | sliding_window_pattern: every n-th layer attends to everything |
| sliding_window (Mistral, Phi-3, Gemma 2) | attends to everything |
| tie_word_embeddings false by default (Llama) | true by default |

The config that is written makes the model right within the window and the original context, and says so in a note.
What came from transformers stays in it, so that it reads back as it was. Source: mlx-lm, mlx_lm/models/*.py, class
ModelArgs. The tests hold each family's logits against transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.errors import InputError

__all__ = ["mlx_config"]

WINDOWED = ("mistral", "phi3", "gemma2")
"""Families with a sliding window that mlx-lm does not have."""


def mlx_config(config: Mapping[str, Any], *, tied: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config to write, and notes on what mlx-lm computes otherwise; InputError where that cannot be said in it."""
    found = {**config, "tie_word_embeddings": tied}
    notes = []
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": _theta(config)}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    if isinstance(full, Mapping):
        kind = full.get("rope_type", full.get("type", "default"))
        found["rope_theta"] = full.get("rope_theta") or _theta(config)
        found["rope_scaling"] = None if kind == "default" else {**full, "type": kind}
        if kind in ("longrope", "su"):
            found["rope_scaling"]["long_factor"] = full.get("short_factor")
            original = full.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
            notes.append(f"mlx-lm has one list of rope factors: it is right up to {original} tokens")
    if isinstance(local, Mapping):
        found["rope_local_base_freq"] = local.get("rope_theta", 10000.0)
    if config.get("model_type") == "gemma3_text":
        found["sliding_window_pattern"] = _pattern(config)
        notes += _scale_note(int(config["hidden_size"]))
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    if config.get("model_type") in WINDOWED and type(window) is int and type(longest) is int and window < longest:
        notes.append(f"mlx-lm has no sliding window for {config['model_type']}: it is right up to {window} tokens")
    return found, tuple(notes)


def _theta(config: Mapping[str, Any]) -> float:
    default = 1e6 if config.get("model_type") == "gemma3_text" else 1e4
    return float(config.get("rope_theta") or default)


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
        raise InputError(
            "mlx: layer_types",
            expected="every n-th layer full_attention, as mlx-lm has it",
            got=", ".join(map(str, kinds))[:120],
            todo="export it to another format",
        )
    return pattern


def _scale_note(hidden: int) -> list[str]:
    """Gemma 3 multiplies embeddings by sqrt(hidden), which mlx-lm rounds to bfloat16, with its 8 significant bits."""
    import torch

    scale = torch.tensor(hidden, dtype=torch.float32).sqrt()
    rounded = scale.bfloat16().float()
    if torch.equal(scale, rounded):
        return []
    return [f"mlx-lm multiplies Gemma 3's embeddings by {float(rounded):g} instead of {float(scale):.6g}"]
