"""Ministral 3, the decoder of text: a Mistral with yarn, whose queries grow with their position."""

from qalora.converters.families.record import DEFAULTS, Family, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

FAMILY = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    permuted=("self_attn.q_proj", "self_attn.k_proj"),
    defaults={
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": ROPE,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": None,
    },
    ropes=("yarn",),
    rope_keys=("llama_4_scaling_beta",),
    windows="all",
    gguf=LlamaCpp(architecture="mistral3", ropes=("yarn",), tempered=True),
    mlx=MlxLm(defaults={"rope_theta": None, "tie_word_embeddings": True}, inside=True, ordered=True),
    genai="mistral",
    tiny={
        "head_dim": 32,
        "rope_parameters": {**ROPE, "factor": 4.0, "original_max_position_embeddings": 16},
    },
)
