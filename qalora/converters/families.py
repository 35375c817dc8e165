"""Model families: what a decoder's tensors are called, here and in GGUF. A family is data; code belongs to the targets.

Names are `model.layers.<n>.<module>.weight` in transformers and `blk.<n>.<gguf>.weight` in GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora.errors import InputError

__all__ = ["FAMILIES", "Family", "check_config", "family_of", "linear_names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of decoders.

    model_type    transformers' config.model_type
    architecture  transformers' class
    gguf          general.architecture of GGUF files
    linears       (module of a layer, GGUF name) of the linear weights, in the order of computation
    norms         (module of a layer, GGUF name) of the norms
    outer         (transformers' tensor, GGUF tensor) outside the layers; the output layer is absent where it is tied
    permuted      modules whose rows GGUF stores in llama.cpp's rotary order: rows of a head [2, d/2] -> [d/2, 2]
    """

    model_type: str
    architecture: str
    gguf: str
    linears: tuple[tuple[str, str], ...]
    norms: tuple[tuple[str, str], ...]
    outer: tuple[tuple[str, str], ...]
    permuted: tuple[str, ...]


_OUTER = (
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        gguf="llama",
        linears=(
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ),
        norms=(("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")),
        outer=_OUTER,
        permuted=("self_attn.q_proj", "self_attn.k_proj"),
    ),
}


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family of a transformers config; InputError names those there are. `where` names the model."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{where}: model_type",
            expected=f"one of {', '.join(FAMILIES)}",
            got=repr(model_type),
            todo="see the README",
        )
    return FAMILIES[model_type]


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a config whose sizes are none; what reads it later can rely on them."""
    for key, most, required in _SIZES:
        size = config.get(key)
        if size is None and not required:
            continue
        if type(size) is not int or not 0 < size <= most:
            raise InputError(f"{where}: {key}", expected=f"a whole number from 1 to {most}", got=repr(size)[:60])
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % kv_heads or (config.get("head_dim") is None and config["hidden_size"] % heads):
        raise InputError(
            f"{where}: num_attention_heads",
            expected=f"a multiple of num_key_value_heads = {kv_heads}, and a divisor of hidden_size",
            got=str(heads),
        )
    epsilon = config.get("rms_norm_eps", 1e-6)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise InputError(f"{where}: rms_norm_eps", expected="a number between 0 and 1", got=repr(epsilon)[:60])
    _check_rope(config, where)


def _check_rope(config: Mapping[str, Any], where: object) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or not isinstance(rope.get("rope_type", rope.get("type", "default")), str):
        raise InputError(f"{where}: rope_parameters", expected="an object with rope_type", got=repr(rope)[:60])
    sizes = {**rope, "rope_theta": rope.get("rope_theta") or config.get("rope_theta") or 10000.0}
    for key in ("rope_theta", "factor"):
        size = sizes.get(key, 1.0)
        if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < 1e30:
            raise InputError(f"{where}: {key}", expected="a number above 0", got=repr(size)[:60])
    if sizes.get("rope_type", sizes.get("type", "default")) == "linear" and "factor" not in sizes:
        raise InputError(f"{where}: rope_parameters", expected="a factor for linear scaling", got="none")


_SIZES = (
    ("num_hidden_layers", 10_000, True),
    ("hidden_size", 1 << 24, True),
    ("intermediate_size", 1 << 24, True),
    ("num_attention_heads", 1 << 16, True),
    ("num_key_value_heads", 1 << 16, False),
    ("head_dim", 1 << 16, False),
    ("vocab_size", 1 << 28, True),
    ("max_position_embeddings", 1 << 28, True),
)
"""Sizes in a config: the largest that is believed, and whether it has to be there."""


def linear_names(config: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """The names of the linear weights of every layer, in the order of computation; the config is checked first."""
    family = family_of(config, where)
    check_config(config, where)
    layers = int(config["num_hidden_layers"])
    return tuple(f"model.layers.{n}.{module}.weight" for n in range(layers) for module, _ in family.linears)
