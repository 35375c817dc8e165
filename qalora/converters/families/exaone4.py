"""EXAONE 4 without a window, the 1.2B: norms after attention and MLP only, and norms of queries and keys by heads."""

from dataclasses import replace

from qalora.converters.families.record import AFTER, DEFAULTS, QK_NORMS, Family, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

FAMILY = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    layers=(replace(AFTER, norms=(*AFTER.norms, *QK_NORMS)),),
    defaults={
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 32,
        "head_dim": None,
        "sliding_window": 4096,
        "layer_types": None,
    },
    only={"sliding_window": None},
    gguf=LlamaCpp(architecture="exaone4", ropes=("default", "linear", "yarn", "llama3")),
    mlx=MlxLm(
        defaults={"rope_theta": None, "tie_word_embeddings": None},
        wanted=("sliding_window", "sliding_window_pattern"),
        ordered=True,
    ),
    genai="decoder",
    transformersjs=False,
    tiny={"sliding_window": None, "layer_types": ["full_attention"] * 2},
)
