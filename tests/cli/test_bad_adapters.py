"""Adapters that are damaged, to every command that takes one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bad_input import FIRST, Damage, cut, nothing, pickled_adapter, refused, tensor

ADAPTERS: list[tuple[str, Damage, str, str]] = [
    ("missing", nothing, "%absent", "absent"),
    ("of another model", nothing, "@other_adapter", "the adapter belongs to a different model"),
    ("cut", cut("adapter/adapter_model.safetensors", -1), "@adapter", "truncated"),
    ("config is no JSON", cut("adapter/adapter_config.json", 9), "@adapter", "adapter_config.json"),
    ("pickle", pickled_adapter, "@adapter", "convert_pickle.py"),
    (
        "NaN",
        tensor("adapter/adapter_model.safetensors", f"base_model.model.{FIRST}.lora_A.weight", lambda t: t * torch.nan),
        "@adapter",
        FIRST,
    ),
    (
        "wrong rank",
        tensor("adapter/adapter_model.safetensors", f"base_model.model.{FIRST}.lora_A.weight", lambda t: t[1:]),
        "@adapter",
        FIRST,
    ),
    (
        "ordinary LoRA",
        tensor(
            "adapter/adapter_model.safetensors",
            f"base_model.model.{FIRST}.lora_A.weight",
            lambda t: t.repeat_interleave(32, dim=1),
        ),
        "@adapter",
        FIRST,
    ),
]


@pytest.mark.parametrize(
    ("damage", "adapter", "sentence"), [row[1:] for row in ADAPTERS], ids=[row[0] for row in ADAPTERS]
)
def test_every_command_that_takes_an_adapter(place: Path, damage: Damage, adapter: str, sentence: str) -> None:
    damage(place / "in")
    for line in (
        f"fold @qalora {adapter} -o %out/deep",
        f"export @qalora --adapter {adapter} --to gguf --to onnx -o %out/deep",
        f"verify @qalora @gptq --adapter {adapter} --level weights",
        f"release @qalora --adapter {adapter} --to gguf -o %out/deep",
    ):
        refused(place, line, sentence)
