"""SmolLM3: a Llama whose every fourth layer has no rotary positions."""

from qalora.converters.families.record import ATTENTION, DEFAULTS, MLP, Family, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    permuted=("self_attn.q_proj", "self_attn.k_proj"),
    biased={"attention_bias": ATTENTION, "mlp_bias": MLP},
    defaults={
        **DEFAULTS,
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
    gguf=LlamaCpp(architecture="smollm3", unrotated=4),
    mlx=MlxLm(defaults={"rope_theta": 1e4, "tie_word_embeddings": True}, window=True),
    tiny={"num_hidden_layers": 4, "bos_token_id": 1, "eos_token_id": 2},
)
