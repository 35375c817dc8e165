"""Hunyuan, dense: norms of queries and keys by heads, after their rotation; a rope whose alpha stretches its base."""

from qalora.converters.families.record import ATTENTION, DEFAULTS, NORMS, Family, LayerParts, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

HEAD_NORMS = (("self_attn.query_layernorm", "attn_q_norm"), ("self_attn.key_layernorm", "attn_k_norm"))

FAMILY = Family(
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    layers=(LayerParts(norms=(*NORMS, *HEAD_NORMS)),),
    biased={"attention_bias": ATTENTION},
    defaults={**DEFAULTS, "rms_norm_eps": 1e-5, "attention_bias": False},
    rope_keys=("alpha",),
    normed_late=True,
    gguf=LlamaCpp(architecture="hunyuan-dense", ropes=("default",)),
    mlx=MlxLm(
        defaults={"rope_theta": 1e4, "max_position_embeddings": 32768, "tie_word_embeddings": False},
        unread=("rope_scaling",),
        ordered=True,
    ),
    genai="hunyuandensev1",
    tiny={"head_dim": 32},
)
