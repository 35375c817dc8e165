"""Model families: what a decoder's tensors are called, here and in GGUF. A family is data; code belongs to the targets.

Names are `model.layers.<n>.<module>.weight` in transformers and `blk.<n>.<gguf>.weight` in GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora.errors import InputError

__all__ = ["FAMILIES", "Family", "family_of", "linear_names"]


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
    if model_type not in FAMILIES:
        raise InputError(
            f"{where}: model_type",
            expected=f"one of {', '.join(FAMILIES)}",
            got=repr(model_type),
            todo="see the README",
        )
    return FAMILIES[model_type]


def linear_names(config: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """The names of the linear weights of every layer, in the order of computation."""
    family = family_of(config, where)
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or not 0 < layers < 10_000:
        raise InputError(f"{where}: num_hidden_layers", expected="a whole number from 1", got=repr(layers))
    return tuple(f"model.layers.{n}.{module}.weight" for n in range(layers) for module, _ in family.linears)
