"""Granite 3: a Llama with factors at embeddings, scores, what is added to the residual, and logits."""

from qalora.converters.families.record import ATTENTION, DEFAULTS, MLP, Family, LlamaCpp, MlxLm

__all__ = ["FACTORS", "FAMILY"]

FACTORS = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}

FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    permuted=("self_attn.q_proj", "self_attn.k_proj"),
    biased={"attention_bias": ATTENTION, "mlp_bias": MLP},
    defaults={**DEFAULTS, **FACTORS, "attention_bias": False, "mlp_bias": False},
    gguf=LlamaCpp(
        architecture="granite",
        ropes=("default", "linear", "yarn", "llama3"),
        biases=(*ATTENTION, *MLP),
        scaled=True,
        switched=True,
    ),
    mlx=MlxLm(
        defaults={"rope_theta": None, "tie_word_embeddings": True},
        wanted=("attention_bias", "mlp_bias", *FACTORS),
        unread=("head_dim",),
        ordered=True,
    ),
    tiny={
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_scaling": 6.0,
    },
)
