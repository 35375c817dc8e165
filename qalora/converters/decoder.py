"""What a decoder computes: the numbers of a config, with what transformers assumes where the config is silent.

Graphs, GGUF's metadata and the comparison of configs all read this, so that a key of transformers' is
understood in one place, whatever version wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora.checkpoint import Checkpoint, module_of
from qalora.converters.families import LAYER_KINDS, Family, LayerParts, family_of
from qalora.converters.rope import Rope, rope_of
from qalora.converters.settings import (
    ATTENTION_SCALE,
    EMBEDDING_SCALE,
    LOGIT_DIVISOR,
    RESIDUAL_SCALE,
    layer_parts,
    norm_names,
    settings_of,
)
from qalora.errors import InputError, shown

__all__ = [
    "FULL",
    "LOCAL",
    "Decoder",
    "Layer",
    "check_activation",
    "check_tensors",
    "decoder_of",
    "tensor_shape",
    "used_ropes",
]

FULL, LOCAL = "full", "local"
"""The two kinds of rotary positions."""

SLIDING = LAYER_KINDS[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What differs from layer to layer.

    window  how many positions a token sees, its own included; None for all before it
    rope    the key of its rotary positions in `Decoder.ropes`; None for a layer without
    parts   what it holds
    """

    window: int | None
    rope: str | None
    parts: LayerParts


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The numbers of a decoder.

    activation       transformers' name of it
    scale            what queries times keys are multiplied with
    softcap          scores become softcap * tanh(score / softcap); None where they stay
    logit_softcap    the same for the logits
    embedding_scale  what embeddings are multiplied with
    residual_scale   what attention and the MLP give is multiplied with before it is added to the hidden state
    logit_divisor    what logits are divided by
    """

    family: Family
    layers: tuple[Layer, ...]
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int
    epsilon: float
    activation: str
    scale: float
    softcap: float | None
    logit_softcap: float | None
    embedding_scale: float
    residual_scale: float
    logit_divisor: float
    ropes: Mapping[str, Rope]


def decoder_of(config: Mapping[str, Any], where: object) -> Decoder:
    """The numbers of a config that `check_config` let pass."""
    family, settings = family_of(config, where), settings_of(config, where)
    heads, hidden = int(settings["num_attention_heads"]), int(settings["hidden_size"])
    head_size = int(settings.get("head_dim") or hidden // heads)
    ropes = {FULL: rope_of(settings, where)}
    if family.local_rope:
        ropes[LOCAL] = rope_of(settings, where, SLIDING)
    return Decoder(
        family=family,
        layers=_layers(settings, family),
        hidden=hidden,
        intermediate=int(settings[family.inner_key]),
        heads=heads,
        kv_heads=int(settings.get("num_key_value_heads") or heads),
        head_size=head_size,
        vocabulary=int(settings["vocab_size"]),
        positions=int(settings["max_position_embeddings"]),
        epsilon=float(settings["rms_norm_eps"]),
        activation=str(settings[family.activation_key]),
        scale=float(settings.get(ATTENTION_SCALE) or float(settings.get("query_pre_attn_scalar") or head_size) ** -0.5),
        softcap=settings.get("attn_logit_softcapping"),
        logit_softcap=settings.get("final_logit_softcapping"),
        embedding_scale=hidden**0.5 if family.scaled_embedding else float(settings.get(EMBEDDING_SCALE, 1.0)),
        residual_scale=float(settings.get(RESIDUAL_SCALE, 1.0)),
        logit_divisor=float(settings.get(LOGIT_DIVISOR, 1.0)),
        ropes=ropes,
    )


def check_activation(decoder: Decoder, where: object) -> None:
    """Refuse another activation than the family's own: graphs and runtimes know that one."""
    family = decoder.family
    if decoder.activation != family.activation:
        raise InputError(f"{where}: {family.activation_key}", expected=family.activation, got=shown(decoder.activation))


def used_ropes(decoder: Decoder) -> list[str]:
    """The kinds of rotary positions that some layer has."""
    return [kind for kind in decoder.ropes if any(layer.rope == kind for layer in decoder.layers)]


def check_tensors(model: Checkpoint) -> None:
    """Refuse a model whose tensors are not those that a graph of its decoder has."""
    family = family_of(model.config, model.path)
    known = {name for name, _ in family.outer} | set(model.linears) | {f"{module_of(n)}.bias" for n in model.linears}
    norms = norm_names(model.config, model.path)
    for name in sorted({*norms, "model.embed_tokens.weight"}):
        if name not in model.tensors:
            raise InputError(f"{model.path}: missing tensor {name}, which config.json requires")
    unknown = sorted(set(model.tensors) - known - set(norms))
    if unknown:
        raise InputError(f"{model.path}: tensor {unknown[0]!r} has no place in the graph of a {family.model_type}")
    decoder, table = decoder_of(model.config, model.path), model.tensors["model.embed_tokens.weight"].shape
    if table != (decoder.vocabulary, decoder.hidden):
        raise InputError(
            f"{model.path}: model.embed_tokens.weight",
            expected=f"shape {[decoder.vocabulary, decoder.hidden]}, as config.json says",
            got=str(list(table)),
        )


def tensor_shape(decoder: Decoder, name: str) -> tuple[int, ...] | None:
    """The shape of a weight, a bias or a norm, by transformers' name; None for a name that a decoder does not have."""
    hidden, inner, size = decoder.hidden, decoder.intermediate, decoder.head_size
    queries, keys = decoder.heads * size, decoder.kv_heads * size
    matrices = {
        "embed_tokens": (decoder.vocabulary, hidden),
        "lm_head": (decoder.vocabulary, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "qkv_proj": (queries + 2 * keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "gate_up_proj": (2 * inner, hidden),
        "down_proj": (hidden, inner),
        "input_linear": (2 * inner, hidden),
        "output_linear": (hidden, inner),
    }
    module, _, part = name.rpartition(".")
    last = module.rpartition(".")[2]
    if last in matrices:
        return matrices[last] if part == "weight" else matrices[last][:1]
    if part == "weight" and last in ("q_norm", "k_norm", "query_layernorm", "key_layernorm"):
        wide = queries if last.startswith("q") else keys
        return (size if decoder.family.normed == "head" else wide,)
    return (hidden,) if part == "weight" and last.endswith("norm") else None


def _layers(settings: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    window = settings.get("sliding_window")
    if family.windows == "none" or not settings.get("use_sliding_window", True):
        window = None
    layers = []
    for n, parts in enumerate(layer_parts(family, settings)):
        slides = window is not None and (family.windows == "all" or _slides(settings, family, n))
        rope = (LOCAL if family.local_rope and slides else FULL) if _rotates(settings, family, n) else None
        layers.append(Layer(window=int(window) if slides and window is not None else None, rope=rope, parts=parts))
    return tuple(layers)


def _slides(settings: Mapping[str, Any], family: Family, n: int) -> bool:
    """Whether layer n has the window, where some layers have it and some have not."""
    types = settings.get("layer_types")
    if types is not None:
        return bool(types[n] == SLIDING)
    if family.windows == "alternate":
        return bool((n + 1) % int(settings["sliding_window_pattern"]))
    if family.skips_rope:
        return not _rotates(settings, family, n)
    return bool(n >= int(settings["max_window_layers"]))


def _rotates(settings: Mapping[str, Any], family: Family, n: int) -> bool:
    """Whether layer n has rotary positions."""
    if not family.skips_rope:
        return True
    flags = settings.get("no_rope_layers")
    return bool(flags[n]) if flags else bool((n + 1) % int(settings["no_rope_layer_interval"]))
