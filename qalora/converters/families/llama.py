"""Llama 2, 3 and later, and what has its shape under other names: SmolLM2, Falcon 3, R1's small ones."""

from qalora.converters.families.record import ATTENTION, DEFAULTS, MLP, Family, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    permuted=("self_attn.q_proj", "self_attn.k_proj"),
    biased={"attention_bias": ATTENTION, "mlp_bias": MLP},
    defaults={**DEFAULTS, "attention_bias": False, "mlp_bias": False},
    gguf=LlamaCpp(
        architecture="llama",
        ropes=("default", "linear", "yarn", "llama3"),
        biases=(*ATTENTION, *MLP),
        sized=False,
    ),
    mlx=MlxLm(defaults={"rope_theta": 1e4, "tie_word_embeddings": True}),
)
