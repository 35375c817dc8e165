"""Seed-OSS: a Llama with biases at queries, keys and values, and heads of a size of their own."""

from qalora.converters.families.record import DEFAULTS, MLP, QKV, Family, LayerParts, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

NORMS = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "post_attention_norm"))

FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    layers=(LayerParts(norms=NORMS),),
    biased={"attention_bias": QKV, "attention_out_bias": ("self_attn.o_proj",), "mlp_bias": MLP},
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    gguf=LlamaCpp(architecture="seed_oss", biases=QKV),
    mlx=MlxLm(
        defaults={
            "rope_theta": 1e4,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "attention_out_bias": False,
            "mlp_bias": False,
        },
        wanted=("attention_bias",),
    ),
    genai="decoder",
    transformersjs=False,
    tiny={"head_dim": 32},
)
