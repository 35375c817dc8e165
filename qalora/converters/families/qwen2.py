"""Qwen 2 and 2.5: biases at queries, keys and values."""

from qalora.converters.families.record import DEFAULTS, QKV, Family, LlamaCpp, MlxLm

__all__ = ["FAMILY", "QWEN"]

QWEN = {
    **DEFAULTS,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
"""Defaults of Qwen's classes."""

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    biases=QKV,
    defaults=QWEN,
    windows="typed",
    gguf=LlamaCpp(architecture="qwen2", biases=QKV),
    mlx=MlxLm(defaults={"rope_theta": 1e6, "tie_word_embeddings": True}, unread=("head_dim",)),
)
