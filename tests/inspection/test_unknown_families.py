"""A model of a family that is not read: inspect says what is missing, the nearest family, and what to report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qalora.cli import main
from qalora.converters.families.mechanisms import missing_in
from qalora.errors import InputError
from qalora.inspection import inspect

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

UNKNOWN: dict[str, tuple[dict[str, Any], str, str]] = {
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16},
        "a mixture of experts: its expert weights and their router are not read yet (num_",
        "qwen3",
    ),
    "stablelm": ({}, "no architecture that is known here", ""),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of short convolutions: they are not read yet", ""),
}
"""What a tiny model has beside SIZES, what is missing, and the nearest family ("" for any)."""


@pytest.mark.parametrize("family", UNKNOWN)
def test_inspect_says_what_is_missing(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    more, words, near = UNKNOWN[family]
    config = AutoConfig.for_model(family, **SIZES, **more)
    with torch.no_grad():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        inspect(tmp_path)
    said = str(caught.value)
    assert f"got '{family}'; it is {words}" in said
    assert f"the nearest family that is read is {near}" in said
    assert f"model_type '{family}', transformers '" in said
    assert "its config.json, and the tensors of layer 0: " in said
    listed = said.rpartition("layer 0: ")[2]
    assert "self_attn.k_proj.weight [" in listed or "conv" in listed
    assert listed.count("experts.N.") <= 3
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert shown.exit_code == 2
    assert "\n" not in said


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"n_routed_experts": 64, "kv_lora_rank": 512}, ["a mixture of experts", "latent attention (MLA)"]),
        ({"mamba_d_state": 128}, ["Mamba layers"]),
        ({"mamba_d_state": 128, "layer_types": ["attention"]}, []),
        ({"layer_types": ["linear_attention", "full_attention"]}, ["layers of linear attention"]),
        ({"text_config": {"linear_num_key_heads": 16}}, ["a model of text and images", "layers of linear attention"]),
        ({"layer_types": ["chunked_attention", "full_attention"]}, ["a kind of layers that is not known here"]),
        ({"num_local_experts": 0, "num_experts": True, "layer_types": [3, None], "kv_lora_rank": None}, []),
        ({"model_type": "phi"}, []),
        ({"model_type": "gemma3", "text_config": {"num_experts": 8}, "vision_config": {}}, ["a mixture of experts"]),
    ],
)
def test_what_a_config_says_that_no_family_has(config: dict[str, Any], found: list[str]) -> None:
    said = [words for words, _ in missing_in(config)]
    assert len(said) == len(found)
    assert all(words.startswith(start) for words, start in zip(said, found, strict=True))
    assert all(evidence for _, evidence in missing_in(config))
