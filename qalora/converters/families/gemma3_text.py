"""Gemma 3, the decoder of text: as Gemma 2, with norms of queries and keys in place of the caps, and layers with a
window that have rotary positions of their own. The larger ones are the text part of `gemma3`."""

from dataclasses import replace

from qalora.converters.families.gemma2 import GEMMA, TINY
from qalora.converters.families.record import AROUND, ATTENTION, QK_NORMS, Family, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    layers=(replace(AROUND, norms=(*AROUND.norms, *QK_NORMS)),),
    biased={"attention_bias": ATTENTION},
    defaults={
        **GEMMA,
        "final_logit_softcapping": None,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
    },
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    norm_offset=True,
    scaled_embedding=True,
    windows="alternate",
    local_rope=True,
    gguf=LlamaCpp(architecture="gemma3", ropes=("default", "linear"), window=6, logits=True, local=True, big=62),
    mlx=MlxLm(
        defaults={
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        unread=("attn_logit_softcapping", "final_logit_softcapping", "layer_types", "attention_bias"),
        window=True,
        ties="stored",
        ordered=True,
        rounded=True,
    ),
    tiny={**TINY, "num_hidden_layers": 6},
)
