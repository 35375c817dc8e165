"""Tiny random models of text and images, as transformers' classes save them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qalora.testing import byte_tokenizer

_TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_SIGHT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_TILES = {**_SIGHT, "image_size": 28, "patch_size": 14}
_QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
_ROPE = {"rope_type": "default", "rope_theta": 1e6}

SIGHTED: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            **_TEXT,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
        },
        "vision_config": _TILES,
        "mm_tokens_per_image": 4,
        "image_token_index": 250,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_TEXT},
        "vision_config": {"model_type": "pixtral", **_TILES, "head_dim": 16},
        "image_token_index": 250,
        "tie_word_embeddings": False,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": _TILES,
        "image_token_id": 250,
        "scale_factor": 2,
    },
    "qwen2_5_vl": {
        "text_config": {
            **{key: value for key, value in _TEXT.items() if key != "head_dim"},
            "rope_parameters": {**_ROPE, "mrope_section": [4, 6, 6]},
        },
        "vision_config": {**_QWEN, "fullatt_block_indexes": [0]},
        "image_token_id": 250,
        "video_token_id": 251,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": {**_ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}},
        "vision_config": {**_QWEN, "deepstack_visual_indexes": [0]},
        "image_token_id": 250,
        "video_token_id": 251,
    },
}
"""What each kind's config has beside its defaults."""


def sighted_model(folder: Path, kind: str, **settings: Any) -> Path:
    """Write one, with a tokenizer of bytes and a file of its processor; gives the folder."""
    tokenizer = byte_tokenizer()
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    text = {**SIGHTED[kind]["text_config"], **own}
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **{**SIGHTED[kind], "text_config": text, **settings})
    whole = AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}\n')
    return folder
