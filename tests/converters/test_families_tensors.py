"""What tensors a family has, in folders and in GGUF files: read by transformers, or missing, or called otherwise."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.torch_module import build
from qalora.errors import FormatError, InputError
from qalora.parity.weights import compare_weights
from qalora.testing import byte_tokenizer, tiny_model

OPENED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3")
"""The families whose GGUF files transformers reads."""

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))


def written(model: Checkpoint, folder: Path) -> Path:
    """The GGUF file of an export."""
    export(model, "gguf", folder)
    return next((folder / "gguf").glob("*.gguf"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3: the family with the most norms."""
    return tiny_model(tmp_path_factory.mktemp("gemma") / "model", "gemma3_text")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", OPENED)
def test_transformers_opens_the_gguf_file(family: str, tmp_path: Path) -> None:
    """A foreign reader of what we wrote: names, order of rows, norms and config. It takes heads of Qwen3 to be 128 and
    the padding of Phi-3 to be token 32000, as they are in the published models."""
    from transformers import AutoModelForCausalLM

    sizes: dict[str, dict[str, Any]] = {"qwen3": {"head_dim": 128}, "phi3": {"vocab_size": 32064}}
    folder = tiny_model(tmp_path / "model", family, tokenizer=byte_tokenizer(), config=sizes.get(family))
    path = written(load(folder), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = build(load(folder)).state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours[name]), name


def test_norms_of_one_plus_a_weight_are_compared_as_they_are_used(tmp_path: Path) -> None:
    """A float32 weight so small that 1 + weight drops bits of it: transformers drops them too, and nothing differs."""
    model = load(tiny_model(tmp_path / "model", "gemma2"))
    name = "model.layers.0.input_layernorm.weight"
    small = torch.linspace(-1e-3, 1e-3, 64) / 3
    lazy = replace(model.tensors[name], read=lambda start, stop: small[start:stop])
    changed = replace(model, tensors={**model.tensors, name: lazy})
    again = load(written(changed, tmp_path))
    assert not torch.equal(again.tensors[name].load_float(), small)
    assert torch.equal(again.tensors[name].load_float() + 1, small + 1)
    assert compare_weights(again, changed).total.same
    assert not compare_weights(again, model).total.same


def with_sight(text: Checkpoint, folder: Path, **outer: Any) -> Any:
    """A Gemma 3 of text and images around a text model's config, written to a folder."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sight = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=dict(text.config),
        vision_config={**sight, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=250,
        **outer,
    )
    whole = Gemma3ForConditionalGeneration(config).float().eval()
    whole.save_pretrained(folder)
    return whole


@pytest.mark.parametrize("renamed", [False, True])
def test_the_text_part_of_gemma_3_is_read(renamed: bool, gemma: Path, tmp_path: Path) -> None:
    """Against the whole model of transformers, given text; its tensors are called otherwise by some versions."""
    from safetensors.torch import load_file, save_file

    text = load(gemma)
    whole = with_sight(text, tmp_path / "model")
    if renamed:
        path = tmp_path / "model" / "model.safetensors"
        tensors = {
            name.replace("language_model.model.", "model.language_model."): x for name, x in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    model = load(tmp_path / "model")
    assert model.config["model_type"] == "gemma3_text"
    assert set(model.tensors) == set(text.tensors)
    assert "the decoder of a gemma3" in model.notes[0]
    with torch.no_grad():
        wanted, module = whole(input_ids=TOKENS).logits, build(model)
        found = module(input_ids=TOKENS).logits
        noise = float((module.double()(input_ids=TOKENS).logits - found).abs().max())
    assert float((found - wanted).abs().max()) <= 8 * noise  # as in test_families


@pytest.fixture(scope="module")
def granite_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Granite 4 without experts and Mamba, as transformers saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "shared_intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    factors = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1}
    plain = {"num_local_experts": 0, "position_embedding_type": "rope", "layer_types": ["attention"] * 2}
    more = {"vocab_size": 256, "num_key_value_heads": 2, "logits_scaling": 6.0, "tie_word_embeddings": True}
    config = AutoConfig.for_model("granitemoehybrid", **sizes, **factors, **plain, **more)
    torch.manual_seed(1)
    whole = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    folder = tmp_path_factory.mktemp("granite") / "model"
    whole.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("published", [False, True])
def test_a_granite_4_without_experts_is_a_granite(published: bool, granite_4: Path, tmp_path: Path) -> None:
    """Against transformers' own class; its config as transformers 5 writes it, and as it is published."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(granite_4, tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    if published:
        path = tmp_path / "model" / "config.json"
        config = json.loads(path.read_text())
        del config["rope_parameters"]
        config |= {"layer_types": ["attention"] * 2, "rope_theta": 10000, "rope_scaling": None}
        path.write_text(json.dumps(config))
    model = load(tmp_path / "model")
    assert "is a granite: it is read as one" in model.notes[0]
    assert not [key for key in model.config if key.startswith(("mamba", "shared"))]
    with torch.no_grad():
        wanted, module = whole(input_ids=TOKENS).logits, build(model)
        found = module(input_ids=TOKENS).logits
        noise = float((module.double()(input_ids=TOKENS).logits - found).abs().max())
    assert float((found - wanted).abs().max()) <= 8 * noise  # as in test_families


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_local_experts": 8}, "num_local_experts: expected 0: of granitemoehybrid, what a granite computes"),
        ({"position_embedding_type": "nope"}, 'position_embedding_type: expected "rope"'),
        ({"layer_types": ["attention", "mamba"]}, "layer_types: expected attention or full_attention alone"),
        ({"layer_types": None}, "layer_types: expected attention or full_attention alone"),
    ],
)
def test_a_granite_4_that_is_no_granite_is_refused(
    changes: dict[str, Any], words: str, granite_4: Path, tmp_path: Path
) -> None:
    shutil.copytree(granite_4, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=words):
        load(tmp_path / "model")


TWICE: dict[str, tuple[bool, dict[str, Any], dict[str, Any], str]] = {
    "untied outside": (False, {}, {"tie_word_embeddings": True}, "what counts: tie_word_embeddings False"),
    "untied inside": (True, {}, {"tie_word_embeddings": False}, "what counts: tie_word_embeddings True"),
    "positions outside": (
        True,
        {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {},
        "",
    ),
    "a base outside and inside": (True, {"rope_theta": 5.0}, {"rope_theta": 300.0}, "what counts: rope_theta 300.0"),
    "sizes outside": (
        True,
        {"vocab_size": 99, "hidden_size": 99, "head_dim": 8},
        {},
        "what counts: vocab_size 256, hidden_size 64, head_dim 32",
    ),
}
"""Tied or not, and changes of config.json outside and inside text_config; and what the note says, in any order."""


@pytest.mark.parametrize("case", TWICE)
def test_numbers_outside_and_inside_of_the_text_part(case: str, gemma: Path, tmp_path: Path) -> None:
    """As transformers reads the folder."""
    from transformers import Gemma3ForConditionalGeneration

    tied, outer, inner, words = TWICE[case]
    with_sight(load(gemma), tmp_path / "model", tie_word_embeddings=tied)
    path = tmp_path / "model" / "config.json"
    config = {**json.loads(path.read_text()), **outer}
    config["text_config"] |= inner
    path.write_text(json.dumps(config))
    whole = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "model", attn_implementation="eager").float()
    model = load(tmp_path / "model")
    assert model.tied == tied
    with torch.no_grad():
        wanted, module = whole.eval()(input_ids=TOKENS).logits, build(model)
        found = module(input_ids=TOKENS).logits
        noise = float((module.double()(input_ids=TOKENS).logits - found).abs().max())
    assert float((found - wanted).abs().max()) <= 8 * noise  # as in test_families
    said = " ".join(model.notes)
    assert all(part in said for part in words.removeprefix("what counts: ").split(", "))


@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize("module", ["self_attn.k_norm", "post_feedforward_layernorm"])
def test_a_norm_that_a_family_has_must_be_there(module: str, target: str, gemma: Path, tmp_path: Path) -> None:
    model = load(gemma)
    name = f"model.layers.3.{module}.weight"
    less = replace(model, tensors={key: lazy for key, lazy in model.tensors.items() if key != name})
    with pytest.raises(InputError, match=f"missing tensor {name}, which config.json requires"):
        export(less, target, tmp_path)


def test_a_bias_that_a_family_has_must_be_there(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path / "model", "qwen2")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"missing tensor .*1\.self_attn\.k_proj\.bias, which config"):
        load(folder)
