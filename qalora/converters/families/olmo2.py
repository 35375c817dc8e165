"""OLMo 2: norms after attention and MLP only, and norms of queries and keys over all heads at once."""

from dataclasses import replace

from qalora.converters.families.record import AFTER, ATTENTION, DEFAULTS, QK_NORMS, Family, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    layers=(replace(AFTER, norms=(*AFTER.norms, *QK_NORMS)),),
    biased={"attention_bias": ATTENTION},
    defaults={**DEFAULTS, "rms_norm_eps": 1e-5, "attention_bias": False},
    normed="all",
    gguf=LlamaCpp(architecture="olmo2", window=4, unclipped=True, untied=True),
    mlx=MlxLm(defaults={"rope_theta": 1e4, "tie_word_embeddings": True}),
    genai="decoder",
    tiny={"tie_word_embeddings": False},
)
