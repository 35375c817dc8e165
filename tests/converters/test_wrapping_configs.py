"""config.json of models of text and images as they are published: what the decoder is, and what is written back."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qalora.checkpoint import Checkpoint, Wrapper
from qalora.converters.essentials import essentials
from qalora.converters.families.wrappers import WRAPPERS
from qalora.converters.wrapping import names_at, text_settings, whole_config

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 2048},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 151936,
    },
    "Qwen3-VL-2B": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": True,
        "vision_config": {"depth": 24, "hidden_size": 1024, "out_hidden_size": 2048},
    },
    "Mistral-Small-3.1-24B": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "text_config": {
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024},
    },
    "SmolVLM2-500M": {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "image_token_id": 49190,
        "model_type": "smolvlm",
        "scale_factor": 4,
        "text_config": {
            "architectures": ["VLlama3ForCausalLM"],
            "head_dim": 64,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 15,
            "num_hidden_layers": 32,
            "num_key_value_heads": 5,
            "pad_token_id": 2,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 49280,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "smolvlm_vision", "hidden_size": 768},
        "vocab_size": 49280,
    },
    "nothing but sizes": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 99,
            "num_hidden_layers": 2,
        },
        "vocab_size": 152064,
    },
}


def opened(config: Mapping[str, Any]) -> Checkpoint:
    """A model without tensors."""
    kind = WRAPPERS[config["model_type"]]
    text, _ = text_settings(config, kind, Path("model"))
    wrapper = Wrapper(model_type=kind.model_type, config=config, text=text, names=names_at(kind.places[0]), carried={})
    return Checkpoint(path=Path("model"), layout="huggingface", config=text, tensors={}, linears=(), wrapper=wrapper)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_decoder_is_what_transformers_reads(name: str) -> None:
    from transformers import AutoConfig

    model = opened(PUBLISHED[name])
    theirs = AutoConfig.for_model(**copy.deepcopy(PUBLISHED[name])).text_config.to_dict()
    assert essentials(model.config) == essentials({**theirs, "model_type": model.config["model_type"]})


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_nothing_changed_is_written_as_it_was_published(name: str) -> None:
    model = opened(PUBLISHED[name])
    assert whole_config(model, model.config) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["Qwen2.5-VL-3B", "Qwen3-VL-2B"])
def test_what_changed_is_written_where_it_stood(name: str) -> None:
    """More tokens, an output layer of its own, and a rope that is said in another place, with its sections."""
    config = PUBLISHED[name]
    model = opened(config)
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}
    kept = {key: value for key, value in model.config.items() if key not in ("rope_scaling", "rope_theta")}
    more = {**kept, "vocab_size": 160000, "tie_word_embeddings": False, "rope_parameters": rope}
    written = whole_config(replace(model, config=more), more)
    inside = written.get("text_config", written)
    stated = config.get("text_config", config)["rope_scaling"]
    sections = {key: value for key, value in stated.items() if key.startswith("mrope")}
    assert inside["rope_parameters"] == {**rope, **sections} and "rope_scaling" not in inside
    assert inside["vocab_size"] == 160000 and not written["tie_word_embeddings"]
    assert written["vision_config"] == config["vision_config"] and written["model_type"] == config["model_type"]
    assert opened(written).config["vocab_size"] == 160000
