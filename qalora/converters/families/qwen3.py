"""Qwen 3, dense: norms of queries and keys, by heads."""

from qalora.converters.families.qwen2 import QWEN
from qalora.converters.families.record import ATTENTION, NORMS, QK_NORMS, QKV, Family, LayerParts, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layers=(LayerParts(norms=(*NORMS, *QK_NORMS)),),
    biased={"attention_bias": ATTENTION},
    defaults={**QWEN, "head_dim": 128, "attention_bias": False},
    windows="typed",
    gguf=LlamaCpp(architecture="qwen3", biases=QKV),
    mlx=MlxLm(
        defaults={"rope_theta": None, "tie_word_embeddings": True},
        unread=("attention_bias",),
        parameters=True,
        ordered=True,
    ),
    tiny={"head_dim": 32},
)
