"""What a family of decoders is: the names of its tensors, how it differs from a Llama, what each runtime makes of it.

A family is data, in a module of its own beside this one; `qalora.converters.decoder` turns it and a config into the
numbers that graphs and metadata are made of. Nothing here or in such a module imports anything of qalora but these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "AFTER",
    "AROUND",
    "ATTENTION",
    "DEFAULTS",
    "EVERYWHERE",
    "LAYER_KINDS",
    "LINEARS",
    "MLP",
    "NORMS",
    "OUTER",
    "QKV",
    "QK_NORMS",
    "Family",
    "LayerParts",
    "LlamaCpp",
    "MlxLm",
    "Variant",
]

Names = tuple[tuple[str, str], ...]

LAYER_KINDS = ("full_attention", "sliding_attention")
"""What transformers' layer_types calls a layer that attends to everything, and one with a window."""

EVERYWHERE = frozenset(
    {
        "head_dim",
        "hidden_act",
        "hidden_activation",
        "max_position_embeddings",
        "num_attention_heads",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rms_norm_eps",
        "rope_parameters",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)
"""Keys of a config that are no family's own: what they say holds in every one, or is refused there."""


OUTER = (
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
)
LINEARS = (
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)
NORMS = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))
QK_NORMS = (("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"))
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (*QKV, "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """What a decoder layer of one kind holds.

    types    the layer_types that hold it; () where the layers of a family differ in no weight
    linears  (module of a layer, GGUF name) of the linear weights, in the order of computation
    norms    (module of a layer, GGUF name) of the norms
    before   the norms of what goes into attention and into the MLP; "" where there is none
    after    the norms of what comes out of attention and of the MLP; "" where there is none
    """

    linears: Names = LINEARS
    norms: Names = NORMS
    before: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    after: tuple[str, str] = ("", "")
    types: tuple[str, ...] = ()

    def has(self, module: str) -> bool:
        """Whether a layer has this linear module or norm."""
        return any(name == module for name, _ in (*self.linears, *self.norms))

    def named(self, gguf: str) -> str:
        """The module that GGUF calls so, such as attn_q_norm or ffn_gate; "" where there is none."""
        return next((name for name, own in (*self.linears, *self.norms) if own == gguf), "")


AROUND = LayerParts(
    norms=(
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ),
    before=("input_layernorm", "pre_feedforward_layernorm"),
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
)
"""Norms on both sides of attention and MLP."""

AFTER = LayerParts(norms=(AROUND.norms[1], AROUND.norms[3]), before=("", ""), after=AROUND.after)
"""Norms of what attention and MLP give, and none of what they take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """What llama.cpp's loader of an architecture takes for granted. Families of one architecture share the record.

    architecture  general.architecture of GGUF files
    ropes         transformers' rope kinds that it computes
    window        it keeps to attention.sliding_window, in all layers but every n-th; None: it has no window
    default       the window where no key names one; None: a file without it has other layers than those of the family
    capped        it caps scores, always
    logits        it caps logits where final_logit_softcapping says so
    local         layers with a window have rope.freq_base_swa
    big           the number of layers at which it scales scores by hidden/heads in place of the head size
    unrotated     every n-th layer has no rotary positions
    biases        the linear modules whose biases it reads
    tied          the output layer is always the embedding
    untied        files have an output layer always
    unclipped     a file without attention.sliding_window has no window in any layer
    scaled        it multiplies embeddings, scores, and what is added to the residual, and divides logits
    tempered      it reads what queries grow by, and takes yarn to have mscale and mscale_all_dim of 1
    switched      rope.scaling.finetuned, where it is false, switches rotary positions off
    sized         files give attention.key_length where it is hidden/heads too
    """

    architecture: str
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    window: int | None = None
    default: int | None = None
    capped: bool = False
    logits: bool = False
    local: bool = False
    big: int | None = None
    unrotated: int | None = None
    biases: tuple[str, ...] = ()
    tied: bool = False
    untied: bool = False
    unclipped: bool = False
    scaled: bool = False
    tempered: bool = False
    switched: bool = False
    sized: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxLm:
    """What mlx-lm's class of a model_type takes for granted.

    defaults    what it takes for a key that a config leaves out, where transformers may take something else
    wanted      keys that it has no default for, beside the sizes
    unread      keys that it does not read and transformers does
    window      it keeps to the family's window
    ties        what says that the output layer is the embedding: tie_word_embeddings ("said"), the folder, which has
                no lm_head then ("stored"), or nothing, as it always is, or never
    aliases     other names of rope kinds
    parameters  it reads rope_parameters where rope_theta and rope_scaling are not there
    inside      it reads rope_parameters alone
    ordered     it rotates transformers' pairs of elements, whatever rope_traditional says
    rounded     it multiplies embeddings with a root of hidden_size that it rounds to bfloat16
    padded      it takes a batch that is padded on the left
    """

    defaults: Mapping[str, Any]
    wanted: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    window: bool = False
    ties: Literal["said", "stored", "always", "never"] = "said"
    aliases: Mapping[str, str] = field(default_factory=dict)
    parameters: bool = False
    inside: bool = False
    ordered: bool = False
    rounded: bool = False
    padded: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of decoders; what is not said is a Llama's.

    model_type      transformers' config.model_type
    architecture    transformers' class
    layers          what a decoder layer holds, for each kind of layer
    outer           (transformers' tensor, GGUF tensor) outside the layers; the output layer is absent where it is tied
    permuted        modules whose rows GGUF stores in llama.cpp's rotary order: rows of a head [2, d/2] -> [d/2, 2]
    biases          linear modules that have a bias in every model of the family
    biased          linear modules that have one where the config has this key
    defaults        what transformers takes for a key that a config leaves out, where it changes the logits; a key that
                    stands here in other families only is one that transformers' class does not read
    fixed           what holds in every model of the family, whatever a config says
    only            the one value of a key that is read here, where transformers' class takes others too
    rope_aliases    other names of rope kinds
    rope_keys       numbers of rope_parameters that this family's class alone reads. alpha: a dynamic rope with it has
                    fixed frequencies, of the base theta * alpha^(d / (d - 2)); llama_4_scaling_beta: see
                    `Rope.temperature`
    ropes           the kinds that transformers' class takes, where it does not take every one
    activation      the one activation of the family, and the key that names it
    norm_offset     norms multiply with 1 + weight; GGUF and the graphs hold that sum
    scaled_embedding  embeddings are multiplied with the root of hidden_size
    windows         which layers have the sliding window, if sliding_window is set: none, all, those that layer_types
                    name, or by that list and, without it, all but every sliding_window_pattern-th ("alternate")
    inner_key       the key of the width of the MLP
    interleaved     rotary positions turn neighbours, elements 2j and 2j + 1, and not j and j + half of what is rotated
    normed          what a norm of queries or keys runs over: a head, or all of them at once
    normed_late     norms of queries and keys come after the rotation
    local_rope      layers with a window have rotary positions of their own
    skips_rope      some layers have no rotary positions
    gguf, mlx       what llama.cpp and mlx-lm take for granted
    genai           model.type in onnxruntime-genai's config, where it is not model_type
    transformersjs  whether transformers.js knows the model_type (its src/configs.js and src/models/registry.js)
    tiny            what the config of a tiny model has beside `qalora.testing`'s sizes: windows small enough to matter
    """

    model_type: str
    architecture: str
    gguf: LlamaCpp
    mlx: MlxLm
    defaults: Mapping[str, Any]
    layers: tuple[LayerParts, ...] = (LayerParts(),)
    outer: Names = OUTER
    permuted: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    biased: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    rope_keys: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ()
    activation: str = "silu"
    activation_key: str = "hidden_act"
    norm_offset: bool = False
    scaled_embedding: bool = False
    windows: Literal["none", "all", "typed", "alternate"] = "none"
    inner_key: str = "intermediate_size"
    interleaved: bool = False
    normed: Literal["head", "all"] = "head"
    normed_late: bool = False
    local_rope: bool = False
    skips_rope: bool = False
    genai: str = ""
    transformersjs: bool = True
    tiny: Mapping[str, Any] = field(default_factory=dict)

    @property
    def linears(self) -> Names:
        """The linear weights of layers of every kind."""
        return tuple(dict.fromkeys(pair for parts in self.layers for pair in parts.linears))

    @property
    def norms(self) -> Names:
        """The norms of layers of every kind."""
        return tuple(dict.fromkeys(pair for parts in self.layers for pair in parts.norms))

    def adds_one(self, name: str) -> bool:
        """Whether a tensor is a norm that multiplies with 1 + weight.

        transformers takes that sum in float32, and graphs and GGUF hold it: w + 1 is rounded once, w' = (w + 1) - 1 is
        what is read back, and w' + 1 is the same again.
        """
        return self.norm_offset and name.endswith("norm.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Another model_type, some of whose models are ones of a family under other names.

    model_type  transformers' config.model_type
    family      the model_type of the family
    which       the models that are ones of the family, in words
    only        what a config has to say, so that its model is one of the family
    lists       the words that a list in a config may hold then
    keys        the family's key of a number, and the one here
    dropped     how the keys begin that say nothing in the family
    modules     a module of a layer, and the family's modules whose rows it holds, equally many each
    """

    model_type: str
    family: str
    which: str
    only: Mapping[str, Any]
    lists: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]
    dropped: tuple[str, ...]
    modules: Mapping[str, tuple[str, ...]]
