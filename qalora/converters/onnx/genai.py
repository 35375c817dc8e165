"""genai_config.json: what onnxruntime-genai wants to know of a graph. Source: its src/config.cpp."""

from __future__ import annotations

from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.decoder import Decoder
from qalora.converters.ends import ends_of, special_token
from qalora.errors import InputError

__all__ = ["ACCURACY_LEVEL", "genai_config"]

ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
"""Session option: "1" keeps ONNX Runtime from int8 activations where it fuses DequantizeLinear + MatMul."""


def genai_config(model: Checkpoint, decoder: Decoder, *, portable: bool) -> dict[str, Any]:
    """The config of one graph. The fused attention of the fast one writes into the cache in place.

    InputError for a model that names no end token: the library takes the padding token where there is none.
    """
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if portable:
        options[ACCURACY_LEVEL] = "1"
    ends = ends_of(model).ids
    if not ends:
        raise InputError(
            f"onnx: {model.path}: no end token",
            expected="one, which onnxruntime-genai requires",
            todo="name it as eos_token_id in generation_config.json",
        )
    bos, pad = (special_token(model, kind) for kind in ("bos", "pad"))
    return {
        "model": {
            "type": decoder.family.genai or decoder.family.model_type,
            "bos_token_id": ends[0] if bos is None else bos,
            "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
            "pad_token_id": ends[0] if pad is None else pad,
            "vocab_size": decoder.vocabulary,
            "context_length": decoder.positions,
            "decoder": {
                "filename": "model.onnx",
                "session_options": options,
                "head_size": decoder.head_size,
                "hidden_size": decoder.hidden,
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": len(decoder.layers),
                "num_key_value_heads": decoder.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": decoder.positions,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": not portable,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
