"""Gemma 2: norms of 1 + weight around attention and MLP, a window in every second layer, capped scores and logits."""

from qalora.converters.families.record import AROUND, ATTENTION, Family, LlamaCpp, MlxLm

__all__ = ["FAMILY", "GEMMA", "TINY"]

GEMMA = {
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
"""Defaults of Gemma's classes."""

TINY = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 12}

FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    layers=(AROUND,),
    biased={"attention_bias": ATTENTION},
    defaults={**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    fixed={"sliding_window_pattern": 2},
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    norm_offset=True,
    scaled_embedding=True,
    windows="alternate",
    gguf=LlamaCpp(
        architecture="gemma2",
        ropes=("default", "linear"),
        window=2,
        default=4096,
        capped=True,
        logits=True,
        big=46,
        tied=True,
    ),
    mlx=MlxLm(
        defaults={
            "rope_theta": 1e4,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 144.0,
        },
        unread=("rope_scaling", "attention_bias"),
        ties="always",
        padded=False,  # its scores and mask do not go together in a batch
    ),
    tiny={**TINY, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
)
