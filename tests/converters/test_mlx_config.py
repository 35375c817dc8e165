"""mlx-lm computes what transformers does, family by family, from the config that is written for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora.converters.mlx.config import mlx_config
from qalora.errors import InputError
from qalora.parity.runtimes import open_runtime

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THETA = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 128}
OWN_YARN = {**YARN, "attention_factor": 0.9, "beta_fast": 16, "beta_slow": 2}
MSCALES = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "long_factor": [2.0 + n / 8 for n in range(8)],
    "short_factor": [1.0 + n / 16 for n in range(8)],
}
PHI3 = {"model_type": "phi3", "original_max_position_embeddings": 128}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": THETA}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, yarn with a factor of its own": ("llama", {"rope_parameters": OWN_YARN}),
    "llama, yarn with two scales": ("llama", {"rope_parameters": MSCALES}),
    "mistral": ("mistral", {"rope_parameters": THETA, "sliding_window": 64}),
    "qwen2": ("qwen2", {"rope_parameters": THETA}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"rope_parameters": THETA}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 64}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": ALTERNATING}),
    "phi3": ("phi3", {"rope_parameters": THETA}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "phi3, longrope, half a head": (
        "phi3",
        {
            "rope_parameters": {
                **LONGROPE,
                "partial_rotary_factor": 0.5,
                "long_factor": [2.0] * 4,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
            },
            "original_max_position_embeddings": 128,
        },
    ),
    "qwen3, yarn": ("qwen3", {"rope_parameters": YARN}),
    "smollm3": ("smollm3", {"rope_parameters": THETA, "no_rope_layer_interval": 2}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_computes_what_transformers_does(case: str, tmp_path: Path) -> None:
    """Float weights, logits of about 3, in one pass and step by step: within 1e-5."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, more = CASES[case]
    torch.manual_seed(0)
    settings = AutoConfig.for_model(family, **{**SIZES, **more})
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms of 1 and small weights would hide mistakes
            one = parameter.ndim == 1 and not family.startswith("gemma")  # whose norms are 1 + weight
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 2 else 0.2) + one)
    model.save_pretrained(tmp_path)
    place = tmp_path / "config.json"
    config, _, longest = mlx_config(json.loads(place.read_text("utf-8")), tied=bool(settings.tie_word_embeddings))
    place.write_text(json.dumps(config), encoding="utf-8")
    tokens = [(7 * n) % 60 for n in range(40)]
    assert longest is None or longest >= len(tokens)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    runtime = open_runtime("mlx", tmp_path)
    assert float((runtime.logits(tokens) - expected).abs().max()) < 1e-5
    assert float((runtime.steps(tokens) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, "no sliding window for mistral: it is right up to 64 tokens"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "no sliding window for qwen2: it is right up to 16 tokens",
        ),
        (
            {"model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
            "one list of rope factors: it is right up to 128 tokens",
        ),
        ({"model_type": "gemma3_text", "hidden_size": 1152}, "embeddings by 34 instead of 33.9411"),
    ],
)
def test_what_mlx_lm_computes_otherwise_is_a_note(config: dict[str, Any], words: str) -> None:
    written, (note,), longest = mlx_config({**SIZES, **config}, tied=True)
    assert words in note
    assert longest is None or f"up to {longest} tokens" in note
    assert {key: written[key] for key in config} == config  # all of it reads back


def test_old_configs_are_understood() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    written, notes, longest = mlx_config(
        {**SIZES, "model_type": "llama", "rope_theta": 5e4, "rope_scaling": scaling}, tied=True
    )
    assert (written["rope_theta"], notes, longest) == (5e4, (), None)
    assert written["rope_scaling"]["type"] == "linear" and written["rope_scaling"]["factor"] == 2.0
    written, _, _ = mlx_config({**SIZES, "model_type": "qwen2"}, tied=True)
    assert (written["rope_theta"], written["rope_scaling"]) == (1e4, None)  # mlx-lm's own default is 1e6


@pytest.mark.parametrize(
    ("config", "tied", "words"),
    [
        ({"model_type": "qwen3", "attention_bias": True}, True, "attention_bias: expected a qwen3 without"),
        ({"model_type": "gemma2", "attention_bias": True}, True, "attention_bias: expected a gemma2 without"),
        ({"model_type": "gemma3_text", "attention_bias": True}, True, "attention_bias: expected a gemma3_text without"),
        ({"model_type": "qwen2", "head_dim": 32}, True, "head_dim: expected 16, hidden_size over heads for qwen2"),
        ({**PHI3, "head_dim": 32}, True, "head_dim: expected 16, hidden_size over heads for phi3"),
        ({"model_type": "llama", "hidden_act": "gelu"}, True, "hidden_act: expected silu for llama"),
        ({"model_type": "gemma2", "hidden_activation": "silu"}, True, "hidden_activation: expected gelu_pytorch_tanh"),
        ({"model_type": "gemma2"}, False, "lm_head: expected a gemma2 whose output layer is the embedding"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 8.0}, True, "final_logit_softcapping: expected"),
        ({"model_type": "gemma2", "rope_parameters": LINEAR}, True, "rope_type: expected default for gemma2"),
        ({"model_type": "phi3", "rope_parameters": LINEAR}, True, "rope_type: expected default or longrope for phi3"),
        ({**PHI3, "rope_parameters": {**LONGROPE, "factor": 9.0}}, True, "longrope factor: expected 4"),
        (
            {**PHI3, "rope_parameters": {**LONGROPE, "attention_factor": 9.0}},
            True,
            r"longrope attention_factor: expected 1\.13",
        ),
        ({"model_type": "llama", "rope_parameters": {**YARN, "truncate": False}}, True, "rope truncate: expected True"),
    ],
)
def test_what_mlx_lm_computes_otherwise_at_any_length_is_refused(
    config: dict[str, Any], tied: bool, words: str
) -> None:
    with pytest.raises(InputError, match=f"mlx: {words}"):
        mlx_config({**SIZES, **config}, tied=tied)


def test_a_yarn_without_a_factor_has_that_of_the_contexts() -> None:
    without = {key: value for key, value in YARN.items() if key != "factor"}
    written, _, _ = mlx_config({**SIZES, "model_type": "llama", "rope_parameters": without}, tied=True)
    assert written["rope_scaling"]["factor"] == 512 / 128
    assert written["rope_parameters"] == without


def test_a_factor_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="factor: expected a number above 0, got 'x'"):
        mlx_config({**SIZES, "model_type": "llama", "rope_parameters": {**YARN, "factor": "x"}}, tied=True)


@pytest.mark.parametrize("kinds", [["sliding_attention"] * 4, ["full_attention", "sliding_attention"] * 2])
def test_layers_in_no_pattern_are_refused(kinds: list[str]) -> None:
    with pytest.raises(InputError, match="mlx: layer_types: expected every n-th layer full_attention"):
        mlx_config({**SIZES, "model_type": "gemma3_text", "layer_types": kinds}, tied=True)
