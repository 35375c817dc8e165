"""OLMo 3: an OLMo 2 with a window in all layers but every fourth; rope scaling is for those without it."""

from qalora.converters.families import olmo2
from qalora.converters.families.record import ATTENTION, Family, MlxLm

__all__ = ["FAMILY"]

FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    layers=olmo2.FAMILY.layers,
    biased={"attention_bias": ATTENTION},
    defaults={**olmo2.FAMILY.defaults, "rope_theta": 5e5, "sliding_window": 4096, "layer_types": None},
    fixed={"rope_local_base_freq": 5e5, "sliding_window_pattern": 4},
    normed="all",
    windows="alternate",
    local_rope=True,
    gguf=olmo2.FAMILY.gguf,
    mlx=MlxLm(defaults={"rope_theta": None, "tie_word_embeddings": False}, window=True, ordered=True),
    genai="decoder",
    tiny={"tie_word_embeddings": False, "num_hidden_layers": 4, "sliding_window": 12},
)
