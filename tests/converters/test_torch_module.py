"""Our torch module against transformers' own loaders, parameter by parameter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

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


def test_shards(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model"), dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same(build(load(tmp_path / "shards")), theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_smollm2(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    same(build(load(smollm2)), theirs)


def test_a_config_that_lies(tiny: Path) -> None:
    model = load(tiny)
    with pytest.raises(FormatError, match=r"shape \[64, 64\]|expected shape"):
        build(replace(model, config={**model.config, "intermediate_size": 96}))
    with pytest.raises(InputError, match="one that transformers takes"):
        build(replace(model, config={**model.config, "hidden_size": "wide"}))
    tensors = {name: lazy for name, lazy in model.tensors.items() if name != "model.norm.weight"}
    with pytest.raises(FormatError, match=r"model\.norm\.weight"):
        build(replace(model, tensors=tensors))
