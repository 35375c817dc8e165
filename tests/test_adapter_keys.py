"""Names of an adapter's tensors: wrappers that can mean one thing only are taken out, and anything else is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalora.adapter import Adapter, read_adapter, write_adapter
from qalora.adapter.keys import plain_name
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.errors import InputError
from qalora.testing import random_adapter, random_model, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return random_model(load(tiny_llama(tmp_path_factory.mktemp("keys"))))


@pytest.fixture
def place(model: Checkpoint, tmp_path: Path) -> Path:
    write_adapter(random_adapter(model), tmp_path / "adapter")
    return tmp_path


def said(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "Error(" not in text
    assert "\n" not in text
    return text


P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        (f"{P}{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{P}{P}{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{P}{P}{P}{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"module.{P}{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"_orig_mod.{P}{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{P}_orig_mod.{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"module._orig_mod.{P}module.{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{P}model._orig_mod.layers.0.self_attn.q_proj.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{P}model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"_fsdp_wrapped_module.{P}{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{P}model.language_model.layers.0.self_attn.q_proj.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{P}language_model.{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{P}layers.0.self_attn.q_proj.lora_A.weight", f"{Q}.lora_A.weight"),
        (f"{Q}.lora_A.default.weight", f"{Q}.lora_A.default.weight"),
        (f"{P}language_model.lm_head.lora_B.weight", "lm_head.lora_B.weight"),
    ],
)
def test_wrappers_are_taken_out_of_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def respelled(folder: Path, change: Callable[[str], str], **config: Any) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file({change(name): value for name, value in load_file(path).items()}, path)
    if config:
        kept = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps({**kept, **config}), encoding="utf-8")
    return folder


def same(one: Adapter, other: Adapter) -> bool:
    return one.layers.keys() == other.layers.keys() and all(
        torch.equal(layer.a, other.layers[path].a) and layer.factor == other.layers[path].factor
        for path, layer in one.layers.items()
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda name: P + name,
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("model.layers", "model._orig_mod.layers"),
        lambda name: name.replace("model.layers", "model.language_model.layers"),
        lambda name: name.replace(f"{P}model.", P),
        lambda name: name.replace(P, ""),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
)
def test_an_adapter_of_a_wrapped_model_is_the_same(
    change: Callable[[str], str], place: Path, model: Checkpoint
) -> None:
    before = read_adapter(place / "adapter", model)
    assert same(read_adapter(respelled(place / "adapter", change), model), before)


def test_two_names_of_one_module_are_refused(place: Path) -> None:
    path = place / "adapter" / "adapter_model.safetensors"
    held = load_file(path)
    name = next(iter(held))
    save_file({**held, f"module.{name}": held[name].clone()}, path)
    text = said(lambda: read_adapter(place / "adapter"))
    assert "once for each module" in text
    assert f"it beside '{name}'" in text or f"it beside 'module.{name}'" in text


def test_modules_of_another_model_are_told_beside_those_of_this(place: Path, model: Checkpoint) -> None:
    (place / "adapter" / "qalora_adapter.json").unlink()
    respelled(place / "adapter", lambda name: name.replace("layers.", "blocks."))
    text = said(lambda: read_adapter(place / "adapter", model, convention="paper"))
    assert "model.blocks.0." in text
    assert "such as model.layers.0.self_attn.q_proj" in text


def test_an_expression_that_means_the_wrapped_name_is_refused(place: Path) -> None:
    folder = respelled(
        place / "adapter",
        lambda name: name.replace("model.layers", "model.language_model.layers"),
        alpha_pattern={r"model\.language_model\.layers\.0\..*q_proj": 99},
    )
    assert "alpha_pattern of model.language_model.layers.0" in said(lambda: read_adapter(folder))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{P}model.embed_tokens.lora_embedding_A", "a LoRA of an embedding"),
        (f"{P}{Q}.lora_magnitude_vector", "DoRA"),
        (f"{P}{Q}.lora_B.bias", "a bias in lora_B"),
        (f"{P}{Q}.hada_w1_a", "LoHa"),
        (f"{P}{Q}.ia3_l", "IA3"),
    ],
)
def test_what_is_no_lora_is_called_by_its_name(name: str, kind: str, place: Path) -> None:
    path = place / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(path), name: torch.ones(4, 4)}, path)
    text = said(lambda: read_adapter(place / "adapter"))
    assert name in text
    assert f"got {kind}" in text
