"""Mistral 7B and Nemo: Llamas with a window in every layer, and llama.cpp takes them for Llamas."""

from qalora.converters.families import llama
from qalora.converters.families.record import DEFAULTS, Family, MlxLm

__all__ = ["FAMILY"]

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    permuted=("self_attn.q_proj", "self_attn.k_proj"),
    defaults={**DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
    windows="all",
    gguf=llama.FAMILY.gguf,
    mlx=MlxLm(defaults={"rope_theta": 1e4, "tie_word_embeddings": True}),
    tiny={"sliding_window": 12},
)
