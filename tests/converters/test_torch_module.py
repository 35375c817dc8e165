"""Our torch module against transformers' own loaders, parameter by parameter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qalora
from qalora.converters import load
from qalora.converters.torch_module import build
from qalora.errors import FormatError, InputError
from qalora.testing import tiny_llama


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    wanted = theirs.state_dict()
    found = ours.state_dict()
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    for (name, mine), (_, value) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(mine, value), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_float_folder(tmp_path: Path, tied: bool, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    config = {"tie_word_embeddings": tied, "dtype": dtype, "attention_bias": not tied}
    folder = tiny_llama(tmp_path / "model", config=config)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same(build(load(folder)), theirs)


def with_key(folder: Path, **keys: Any) -> Path:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    content = {key: value for key, value in {**config, **keys}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_an_output_layer_that_the_config_denies_is_used(tmp_path: Path) -> None:
    """As transformers does where both are stored; every format says what is so, whatever the config said."""
    from transformers import AutoModelForCausalLM

    folder = with_key(tiny_llama(tmp_path / "model", config={"tie_word_embeddings": False}), tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    model = load(folder)
    same(build(model), theirs)
    assert model.config["tie_word_embeddings"] is False
    assert any("output layer of its own" in note for note in model.notes)
    qalora.export(qalora.quantize(model), ["gptq", "qalora", "hqq", "mlx"], tmp_path / "dist")
    for name in ("gptq", "qalora", "hqq", "mlx"):
        assert json.loads((tmp_path / "dist" / name / "config.json").read_text("utf-8"))["tie_word_embeddings"] is False


@pytest.mark.parametrize("said", [False, None])
def test_an_output_layer_that_is_missing_is_refused(tmp_path: Path, said: bool | None) -> None:
    """transformers would fill it with random numbers: a Llama's default is an output layer of its own."""
    folder = with_key(tiny_llama(tmp_path / "model"), tie_word_embeddings=said)
    with pytest.raises(FormatError, match=r"missing tensor lm_head\.weight, which config\.json requires"):
        load(folder)


def test_shards(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model"), dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same(build(load(tmp_path / "shards")), theirs)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_smollm2(smollm2: Path) -> None:
    """Each time, parity/test_foreign.py compares transformers' load of it, every weight and the logits."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    same(build(load(smollm2)), theirs)


def test_a_config_that_lies(tiny: Path) -> None:
    model = load(tiny)
    with pytest.raises(FormatError, match=r"shape \[64, 64\]|expected shape"):
        build(replace(model, config={**model.config, "intermediate_size": 96}))
    with pytest.raises(InputError, match="a config that transformers takes"):
        build(replace(model, config={**model.config, "hidden_size": "wide"}))
    tensors = {name: lazy for name, lazy in model.tensors.items() if name != "model.norm.weight"}
    with pytest.raises(FormatError, match=r"model\.norm\.weight"):
        build(replace(model, tensors=tensors))
