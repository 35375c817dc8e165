"""GLM-4 of 2025: norms around attention and MLP, half of a head rotated, neighbour by neighbour, a fused MLP."""

from qalora.converters.families.phi3 import FUSED
from qalora.converters.families.record import DEFAULTS, LINEARS, QKV, Family, LayerParts, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

NORMS = (
    ("input_layernorm", "attn_norm"),
    ("post_self_attn_layernorm", "post_attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("post_mlp_layernorm", "post_ffw_norm"),
)

FAMILY = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    layers=(
        LayerParts(
            linears=(*LINEARS[:4], *FUSED[2:]), norms=NORMS, after=("post_self_attn_layernorm", "post_mlp_layernorm")
        ),
    ),
    biased={"attention_bias": QKV},
    defaults={
        **DEFAULTS,
        "rms_norm_eps": 1.5625e-07,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    interleaved=True,
    gguf=LlamaCpp(architecture="glm4", ropes=("default",), biases=QKV),
    mlx=MlxLm(
        defaults={"rope_theta": None, "rope_traditional": True, "max_position_embeddings": 32768},
        wanted=("attention_bias",),
        unread=("rope_scaling",),
        ties="never",
    ),
    genai="decoder",
    transformersjs=False,
    tiny={"head_dim": 32, "tie_word_embeddings": False},
)
