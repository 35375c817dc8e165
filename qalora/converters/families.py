"""Model families: what a decoder's tensors are called, here and in GGUF, and how it differs from a Llama.

Names are `model.layers.<n>.<module>.weight` in transformers and `blk.<n>.<gguf>.weight` in GGUF. A family is data:
`qalora.converters.decoder` turns it and a config into the numbers that graphs and metadata are made of. README.md
beside this file says how a family is added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qalora.converters.rope import LOCAL_THETA, PLACES, SHARE, joined_parameters, rope_of
from qalora.errors import InputError

__all__ = [
    "FAMILIES",
    "LAYER_KINDS",
    "SOME",
    "Family",
    "bias_names",
    "check_config",
    "family_of",
    "linear_names",
    "norm_names",
    "settings_of",
]

Names = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of decoders; what is not said is a Llama's.

    model_type      transformers' config.model_type
    architecture    transformers' class
    gguf            general.architecture of GGUF files
    genai           model.type in onnxruntime-genai's config
    linears         (module of a layer, GGUF name) of the linear weights, in the order of computation
    norms           (module of a layer, GGUF name) of the norms
    outer           (transformers' tensor, GGUF tensor) outside the layers; the output layer is absent where it is tied
    permuted        modules whose rows GGUF stores in llama.cpp's rotary order: rows of a head [2, d/2] -> [d/2, 2]
    biases          linear modules that have a bias in every model of the family
    biased          linear modules that have one where the config has this key
    defaults        what transformers takes for a key that a config leaves out, where it changes the logits; a key of
                    SOME that is not here is one that transformers' class does not read
    fixed           what holds in every model of the family, whatever a config says
    rope_aliases    other names of rope kinds
    ropes           the kinds that transformers' class takes, where it does not take every one
    activation      the one activation of the family, and the key that names it
    norm_offset     norms multiply with 1 + weight; GGUF and the graphs hold that sum
    scaled_embedding  embeddings are multiplied with the root of hidden_size
    windows         which layers have the sliding window, if sliding_window is set: none, all, those that layer_types
                    name, or by that list and, without it, all but every sliding_window_pattern-th ("alternate")
    local_rope      layers with a window have rotary positions of their own
    skips_rope      some layers have no rotary positions
    """

    model_type: str
    architecture: str
    gguf: str
    genai: str
    linears: Names
    norms: Names
    outer: Names
    permuted: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    biased: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    ropes: tuple[str, ...] = ()
    activation: str = "silu"
    activation_key: str = "hidden_act"
    norm_offset: bool = False
    scaled_embedding: bool = False
    windows: Literal["none", "all", "typed", "alternate"] = "none"
    local_rope: bool = False
    skips_rope: bool = False

    def has(self, module: str) -> bool:
        """Whether a layer has this linear module or norm."""
        return any(name == module for name, _ in (*self.linears, *self.norms))

    def reads(self, key: str) -> bool:
        """Whether transformers' class reads a key of a config: one of SOME where the family has it, and any other."""
        return key not in SOME or key in self.defaults

    def adds_one(self, name: str) -> bool:
        """Whether a tensor is a norm that multiplies with 1 + weight.

        transformers takes that sum in float32, and graphs and GGUF hold it: w + 1 is rounded once, w' = (w + 1) - 1 is
        what is read back, and w' + 1 is the same again.
        """
        return self.norm_offset and name.endswith("norm.weight")


SOME = (
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "layer_types",
    "max_window_layers",
    "mlp_bias",
    "no_rope_layer_interval",
    "no_rope_layers",
    "query_pre_attn_scalar",
    LOCAL_THETA,
    "sliding_window",
    "sliding_window_pattern",
    "use_sliding_window",
)
"""Keys that the classes of some families read; in a config of another one they say nothing."""

_OUTER = (
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
)
_LINEARS = (
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)
_FUSED = (
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)
_NORMS = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))
_QK_NORMS = (("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"))
_NORMS_AROUND = (
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
)
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_QWEN = {
    **_DEFAULTS,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        gguf="llama",
        genai="llama",
        linears=_LINEARS,
        norms=_NORMS,
        outer=_OUTER,
        permuted=("self_attn.q_proj", "self_attn.k_proj"),
        biased={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        defaults={**_DEFAULTS, "attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        gguf="qwen2",
        genai="qwen2",
        linears=_LINEARS,
        norms=_NORMS,
        outer=_OUTER,
        biases=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        defaults=_QWEN,
        windows="typed",
    ),
    "qwen3": Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        gguf="qwen3",
        genai="qwen3",
        linears=_LINEARS,
        norms=(*_NORMS, *_QK_NORMS),
        outer=_OUTER,
        biased={"attention_bias": _ATTENTION},
        defaults={**_QWEN, "head_dim": 128, "attention_bias": False},
        windows="typed",
    ),
    "mistral": Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        gguf="llama",
        genai="mistral",
        linears=_LINEARS,
        norms=_NORMS,
        outer=_OUTER,
        permuted=("self_attn.q_proj", "self_attn.k_proj"),
        defaults={**_DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    "gemma2": Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        gguf="gemma2",
        genai="gemma2",
        linears=_LINEARS,
        norms=_NORMS_AROUND,
        outer=_OUTER,
        biased={"attention_bias": _ATTENTION},
        defaults={**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fixed={"sliding_window_pattern": 2},
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        norm_offset=True,
        scaled_embedding=True,
        windows="alternate",
    ),
    "gemma3_text": Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        gguf="gemma3",
        genai="gemma3_text",
        linears=_LINEARS,
        norms=(*_NORMS_AROUND, *_QK_NORMS),
        outer=_OUTER,
        biased={"attention_bias": _ATTENTION},
        defaults={
            **_GEMMA,
            "final_logit_softcapping": None,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            LOCAL_THETA: 1e4,
            "sliding_window_pattern": 6,
        },
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        norm_offset=True,
        scaled_embedding=True,
        windows="alternate",
        local_rope=True,
    ),
    "phi3": Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        gguf="phi3",
        genai="phi3",
        linears=_FUSED,
        norms=_NORMS,
        outer=_OUTER,
        defaults={
            **_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 4096,
            SHARE: 1.0,
            "sliding_window": None,
        },
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        ropes=("default", "longrope"),
        windows="all",
    ),
    "smollm3": Family(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        gguf="smollm3",
        genai="smollm3",
        linears=_LINEARS,
        norms=_NORMS,
        outer=_OUTER,
        permuted=("self_attn.q_proj", "self_attn.k_proj"),
        biased={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        defaults={
            **_DEFAULTS,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        },
        windows="typed",
        skips_rope=True,
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
            todo=_missing(config),
        )
    return FAMILIES[model_type]


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _missing(config: Mapping[str, Any]) -> str:
    """What a model of no family here would need."""
    if any(isinstance(config.get(key), int) and config[key] > 1 for key in _EXPERTS):
        return "a mixture of experts: its expert weights and their router are not read yet"
    if isinstance(config.get("text_config"), Mapping):
        return "a model of text and images: save its text part as a model of its own"
    return "see the README"


def settings_of(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The numbers of a config, each in one place: what transformers' class reads of it, with the family's defaults.

    What it leaves out counts, or what it has as null where null says nothing. All that it says of rotary positions is
    in `rope_parameters`, as `joined_parameters` makes it; keys of SOME that the family does not have are not there.
    """
    family = family_of(config, where)
    said = {key: value for key, value in config.items() if value is not None or key not in _NEVER_NULL}
    settings = {**family.defaults, **{key: said[key] for key in said if family.reads(key)}, **family.fixed}
    joined = joined_parameters(settings, where, family.rope_aliases)
    return {**{key: value for key, value in settings.items() if key not in PLACES}, "rope_parameters": joined}


_NEVER_NULL = (
    "hidden_act",
    "hidden_activation",
    "max_window_layers",
    "no_rope_layer_interval",
    "original_max_position_embeddings",
    SHARE,
    "rms_norm_eps",
    LOCAL_THETA,
    "rope_theta",
    "sliding_window_pattern",
)


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a config whose sizes are none; what reads it later can rely on them."""
    family, settings = family_of(config, where), settings_of(config, where)
    for key, most, required in _SIZES:
        size = settings.get(key)
        if size is None and not required:
            continue
        if type(size) is not int or not 0 < size <= most:
            raise InputError(f"{where}: {key}", expected=f"a whole number from 1 to {most}", got=repr(size)[:60])
    heads = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    if heads % kv_heads or (settings.get("head_dim") is None and settings["hidden_size"] % heads):
        raise InputError(
            f"{where}: num_attention_heads",
            expected=f"a multiple of num_key_value_heads = {kv_heads}, and a divisor of hidden_size",
            got=str(heads),
        )
    epsilon = settings.get("rms_norm_eps")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise InputError(f"{where}: rms_norm_eps", expected="a number between 0 and 1", got=repr(epsilon)[:60])
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        value = settings.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9):
            raise InputError(f"{where}: {key}", expected="a number above 0", got=repr(value)[:60])
    if type(settings.get("max_window_layers", 0)) is not int:
        raise InputError(
            f"{where}: max_window_layers", expected="a whole number", got=repr(settings["max_window_layers"])
        )
    _check_layers(settings, family, where)
    _check_whole(config, where)
    for kind in LAYER_KINDS if family.local_rope else LAYER_KINDS[:1]:
        rope = rope_of(settings, where, kind)
        share = rope.share
        if family.ropes and rope.kind not in family.ropes:
            expected = f"{' or '.join(family.ropes)} in a {family.model_type}"
            raise InputError(f"{where}: rope_type", expected=expected, got=repr(rope.kind)[:60])
        if share != 1 and SHARE not in family.defaults:
            raise InputError(f"{where}: {SHARE}", expected=f"none in a {family.model_type}", got=str(share))


def _check_layers(settings: Mapping[str, Any], family: Family, where: object) -> None:
    """Refuse lists with another number of layers or other kinds of them, and a window that is none."""
    layers = settings["num_hidden_layers"]
    types, rotating = settings.get("layer_types"), settings.get("no_rope_layers")
    for key, value, most in (("layer_types", types, layers), ("no_rope_layers", rotating, _SIZES[0][1])):
        if value is not None and (not isinstance(value, list) or not layers <= len(value) <= most):
            raise InputError(f"{where}: {key}", expected="a list with an entry for each layer", got=repr(value)[:60])
    if types is not None and not all(isinstance(kind, str) and kind in LAYER_KINDS for kind in types):
        other = next(kind for kind in types if not isinstance(kind, str) or kind not in LAYER_KINDS)
        raise InputError(f"{where}: layer_types", expected=" or ".join(LAYER_KINDS), got=repr(other)[:60])
    used = settings.get("use_sliding_window", True) and settings.get("sliding_window") is not None
    slides = family.windows == "alternate" if types is None else LAYER_KINDS[1] in types
    if slides and not used and family.windows != "all":
        expected = f"sliding_window{' and use_sliding_window' if 'use_sliding_window' in family.defaults else ''}"
        raise InputError(f"{where}: layer_types", expected=f"{expected} for its {LAYER_KINDS[1]}", got="none")


LAYER_KINDS = ("full_attention", "sliding_attention")

_DECODER = {
    "use_bidirectional_attention": (False, "a decoder, which looks back only"),
    "is_causal": (True, "a decoder, which looks back only"),
    "per_layer_config": ({}, "layers that are alike"),
    "text_config": ({}, "none in a model of text alone"),
}
"""Keys that transformers reads in any config: the value that changes nothing, and what is expected."""


def _check_whole(config: Mapping[str, Any], where: object) -> None:
    """Refuse what makes of any family another model."""
    for key, (usual, expected) in _DECODER.items():
        value = config.get(key)
        if value is not None and bool(value) != bool(usual):
            raise InputError(f"{where}: {key}", expected=expected, got=json.dumps(value, default=repr)[:60])


_SIZES = (
    ("num_hidden_layers", 10_000, True),
    ("hidden_size", 1 << 24, True),
    ("intermediate_size", 1 << 24, True),
    ("num_attention_heads", 1 << 16, True),
    ("num_key_value_heads", 1 << 16, False),
    ("head_dim", 1 << 16, False),
    ("vocab_size", 1 << 28, True),
    ("max_position_embeddings", 1 << 28, True),
    ("original_max_position_embeddings", 1 << 28, False),
    ("sliding_window", 1 << 28, False),
    ("sliding_window_pattern", 10_000, False),
    ("no_rope_layer_interval", 10_000, False),
)
"""Sizes in a config: the largest that is believed, and whether it has to be there."""


def linear_names(config: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """The names of the linear weights of every layer, in the order of computation; the config is checked first."""
    family = family_of(config, where)
    check_config(config, where)
    layers = int(config["num_hidden_layers"])
    return tuple(f"model.layers.{n}.{module}.weight" for n in range(layers) for module, _ in family.linears)


def bias_names(config: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """The names of the biases that a model has: those of its family, and those that its config announces."""
    family, settings = family_of(config, where), settings_of(config, where)
    announced = [module for key, modules in family.biased.items() if settings.get(key) for module in modules]
    layers = range(int(config["num_hidden_layers"]))
    return tuple(f"model.layers.{n}.{module}.bias" for n in layers for module in (*family.biases, *announced))


def norm_names(config: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """The names of all norms, layer by layer, and of the last one."""
    norms, layers = family_of(config, where).norms, range(int(config["num_hidden_layers"]))
    return (*(f"model.layers.{n}.{module}.weight" for n in layers for module, _ in norms), "model.norm.weight")
