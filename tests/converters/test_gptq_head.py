"""An output layer in GPTQ words: read, kept where every loader reads it, and opened by those loaders."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.inspection import inspect
from qalora.parity.runtimes import open_runtime
from qalora.quantization import quantize
from qalora.tensor import GroupQuantTensor
from qalora.testing import (
    assert_parity,
    assert_same_model,
    byte_tokenizer,
    lazily,
    random_model,
    random_tensor,
    tiny_llama,
)

HEAD = "lm_head.weight"
TOKENS = [(7 * n) % 250 for n in range(24)]
EVERY_LAYER = "block_name_to_quantize"


def tamed(tensor: GroupQuantTensor) -> GroupQuantTensor:
    return replace(tensor, scale=tensor.scale / 4, min=tensor.min / 4)


def with_head(model: Checkpoint, *, bits: int = 4, group_size: int = 32, zeros: str = "integer") -> Checkpoint:
    """The model with an output layer of integers."""
    rows, columns = model.tensors[HEAD].shape
    kind: Any = "real" if zeros == "real" else "integer"
    made = random_tensor(rows, columns, bits=bits, group_size=group_size, seed=99, zeros=kind)
    if zeros == "symmetric":
        made = replace(made, min=-made.scale * (1 << (bits - 1)))
    head = lazily(HEAD, made, zeros=kind, min_dtype=torch.float16 if kind == "real" else torch.float32)
    return replace(model, tensors={**model.tensors, HEAD: head})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny Llama with an output layer of its own, 288 rows, and a tokenizer, which GPTQModel wants."""
    config = {"tie_word_embeddings": False, "vocab_size": 288}
    return load(tiny_llama(tmp_path_factory.mktemp("m"), tokenizer=byte_tokenizer(), config=config))


def settings_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config == json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))
    return config  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("blocks", "head", "label"),
    [
        ("integer", "integer", "gptq_v2"),
        ("integer", "symmetric", "gptq_v2"),
        ("symmetric", "symmetric", "gptq"),
        ("real", "symmetric", "gptq"),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_stays_words(source: Checkpoint, tmp_path: Path, bits: int, blocks: Any, head: str, label: str) -> None:
    model = with_head(random_model(source, bits=bits, zeros=blocks), bits=bits, zeros=head)
    (plan,) = export(model, ["gptq"], tmp_path)
    settings = settings_of(tmp_path / "gptq")
    assert (settings["lm_head"], settings[EVERY_LAYER], settings["checkpoint_format"]) == (True, "", label)
    assert f"{bits}-bit words, own zero points" in {row.carrier for row in plan.tensors if row.name == HEAD}
    again = load(tmp_path / "gptq")
    assert_same_model(again, model)
    assert again.tensors[HEAD].spec is not None and again.notes == ()


@pytest.mark.parametrize(
    ("blocks", "changes"),
    [
        ("integer", {"bits": 8}),
        ("integer", {"group_size": 64}),
        ("integer", {"zeros": "real"}),
        ("symmetric", {"zeros": "integer"}),  # would make of a folder that every kernel reads one that some misread
        ("real", {"zeros": "integer"}),
    ],
)
def test_it_becomes_floats_where_a_loader_would_misread_it(
    source: Checkpoint, tmp_path: Path, blocks: Any, changes: dict[str, Any]
) -> None:
    model = with_head(random_model(source, zeros=blocks), **changes)
    export(model, ["gptq"], tmp_path)
    settings = settings_of(tmp_path / "gptq")
    assert settings["lm_head"] is False and EVERY_LAYER not in settings
    lazy = load(tmp_path / "gptq").tensors[HEAD]
    assert torch.equal(lazy.load_float(), model.tensors[HEAD].load_float())
    assert lazy.spec is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("blocks", "head"), [("integer", "integer"), ("symmetric", "symmetric"), ("real", "symmetric")]
)
def test_transformers_computes_with_it(source: Checkpoint, tmp_path: Path, blocks: Any, head: str) -> None:
    """With a residual beside it too."""
    model = with_head(quantize(source, zeros=blocks), zeros=head)
    export(model, ["gptq"], tmp_path)
    assert_parity(model, [tmp_path / "gptq"], tokens=TOKENS)
    assert not [finding for finding in inspect(tmp_path / "gptq").warnings if "output layer" in finding.message]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zeros", ["integer", "symmetric"])
def test_gptqmodel_reads_it(source: Checkpoint, tmp_path: Path, zeros: Any) -> None:
    from gptqmodel import BACKEND, GPTQModel

    model = with_head(random_model(source, zeros=zeros), zeros=zeros)
    export(model, ["gptq"], tmp_path)
    place = str(tmp_path / "gptq")
    module = GPTQModel.load(place, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model.lm_head
    expected = model.tensors[HEAD].load_quantized().dequantize().half()
    assert torch.equal(type(module).dequantize_weight(module).T, expected)  # the method, not compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_what_gptqmodel_packs_is_read(
    source: Checkpoint, tmp_path: Path, packed_by_gptqmodel: Any, version: str
) -> None:
    """Where transformers alone would not read it: said by inspect, and put right in our own runtime."""
    model = with_head(random_model(source, zeros="symmetric", change=tamed), zeros="symmetric")
    folder, expected = packed_by_gptqmodel(model, tmp_path / "gptq", sym=True, version=version)
    read = load(folder)
    for name, weight in expected.items():
        assert torch.equal(read.tensors[name].load_float().half(), weight), name
    assert HEAD in expected
    (found,) = (finding for finding in inspect(folder).warnings if "output layer" in finding.message)
    assert found.code == "runtime" and "lm_head.qweight" in found.evidence
    reference = open_runtime("torch", read).logits(TOKENS)
    got = open_runtime("gptqmodel", folder).logits(TOKENS)
    assert (got - reference).norm() < 2e-3 * reference.norm()  # the kernel's weights are rounded to float16, 2**-11
