"""Phi-3, 3.5 and 4: fused projections, a longrope, heads that may be rotated in part."""

from qalora.converters.families.record import DEFAULTS, Family, LayerParts, LlamaCpp, MlxLm

__all__ = ["FAMILY", "FUSED"]

FUSED = (
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)

FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    layers=(LayerParts(linears=FUSED),),
    defaults={
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
    },
    rope_aliases={"su": "longrope", "yarn": "longrope"},
    ropes=("default", "longrope"),
    windows="all",
    gguf=LlamaCpp(architecture="phi3", ropes=("default", "longrope")),
    mlx=MlxLm(
        defaults={
            "rope_theta": 1e4,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
        unread=("head_dim",),
        aliases={"su": "longrope"},
    ),
    tiny={"sliding_window": 12, "hidden_size": 128, "bos_token_id": 1, "eos_token_id": 2},
)
