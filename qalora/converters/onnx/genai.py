"""genai_config.json: what onnxruntime-genai wants to know of a graph. Source: its src/config.cpp."""

from __future__ import annotations

from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.decoder import Decoder

__all__ = ["ACCURACY_LEVEL", "genai_config"]

ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
"""Session option: "1" keeps ONNX Runtime from int8 activations where it fuses DequantizeLinear + MatMul."""


def genai_config(model: Checkpoint, decoder: Decoder, *, portable: bool) -> dict[str, Any]:
    """The config of one graph. The fused attention of the fast one writes into the cache in place."""
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if portable:
        options[ACCURACY_LEVEL] = "1"
    end = _token(model, "eos_token_id", 0)
    return {
        "model": {
            "type": decoder.family.genai,
            "bos_token_id": _first(_token(model, "bos_token_id", end)),
            "eos_token_id": end,
            "pad_token_id": _first(_token(model, "pad_token_id", end)),
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


def _token(model: Checkpoint, key: str, default: Any) -> Any:
    found = model.config.get(key)
    return default if found is None or found == [] else found


def _first(token: Any) -> Any:
    return token[0] if isinstance(token, list) else token
