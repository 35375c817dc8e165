"""Models in several files: every format that is written as safetensors, and the loaders that open it."""

import json
from pathlib import Path

import pytest
import torch

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions, Plan
from qalora.errors import InputError
from qalora.formats.safetensors import read_header
from qalora.quantization import quantize
from qalora.testing import assert_parity, assert_same_model, random_model, tiny_llama

LIMIT = 40_000
"""The embedding of a tiny model, 256 rows of 64 float32, is larger; some layers go into one file."""
TOKENS = [(7 * n) % 250 for n in range(24)]
TARGETS = ("gptq", "hqq", "mlx", "qalora")


def written(model: Checkpoint, target: str, out: Path, limit: int = LIMIT) -> Plan:
    (plan,) = export(model, [target], out, ExportOptions(max_shard_size=limit))
    return plan


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_split_comes_back(tiny_untied: Path, tmp_path: Path, target: str, bits: int) -> None:
    model = random_model(load(tiny_untied), bits=bits)
    plan = written(model, target, tmp_path)
    folder = tmp_path / target
    assert not (folder / "model.safetensors").exists()
    assert_same_model(load(folder), model)
    assert {path.name for path in folder.iterdir()} == set(plan.files)
    assert all((folder / name).stat().st_size == size for name, size in plan.files.items() if size is not None)


@pytest.mark.parametrize("target", TARGETS)
def test_the_files_are_those_of_the_plan(tiny_untied: Path, tmp_path: Path, target: str) -> None:
    model = random_model(load(tiny_untied), zeros="integer")
    plan = written(model, target, tmp_path)
    folder = tmp_path / target
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    headers = {file.name: read_header(file) for file in files}
    stored = {name: file for file, header in headers.items() for name in header.entries}
    assert index["weight_map"] == stored and list(index["weight_map"]) == sorted(stored)
    sizes = {file: sum(entry.nbytes for entry in header.entries.values()) for file, header in headers.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert sum(tensor.nbytes for tensor in plan.tensors) == sum(sizes.values())
    for tensor in plan.tensors:
        module = tensor.name.removesuffix(".weight")
        parts = {file for name, file in stored.items() if name == tensor.name or name.rpartition(".")[0] == module}
        assert parts == {tensor.file}, tensor.name
        assert tensor.offset in {entry.offset for entry in headers[tensor.file].entries.values()}
    for file, size in sizes.items():
        assert size <= LIMIT or len({tensor.name for tensor in plan.tensors if tensor.file == file}) == 1
    metadata = {json.dumps(dict(header.metadata), sort_keys=True) for header in headers.values()}
    assert len(metadata) == 1


def test_one_file_where_it_fits(tiny_untied: Path, tmp_path: Path) -> None:
    model = random_model(load(tiny_untied))
    size = sum(tensor.nbytes for tensor in written(model, "qalora", tmp_path / "a").tensors)
    for limit, whole in ((size, True), (size - 1, False)):
        plan = written(model, "qalora", tmp_path / str(limit), limit)
        assert ("model.safetensors" in plan.files) is whole
        assert ("model.safetensors.index.json" in plan.files) is not whole
    single = (tmp_path / str(size) / "qalora" / "model.safetensors").read_bytes()
    written(model, "qalora", tmp_path / "default", ExportOptions().max_shard_size)
    assert single == (tmp_path / "default" / "qalora" / "model.safetensors").read_bytes()


def test_a_size_that_makes_too_many_files(tmp_path: Path, tiny_untied: Path) -> None:
    deep = load(tiny_llama(tmp_path / "deep", config={"num_hidden_layers": 30}))
    with pytest.raises(InputError, match=r"max_shard_size: expected a size .* at most 200 files, got 1 bytes"):
        written(random_model(deep), "qalora", tmp_path / "out", 1)
    with pytest.raises(InputError, match="max_shard_size: expected a size such as 200MB"):
        written(random_model(load(tiny_untied)), "qalora", tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_missing(tiny_untied: Path, tmp_path: Path) -> None:
    written(random_model(load(tiny_untied)), "gptq", tmp_path)
    lost = sorted((tmp_path / "gptq").glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=f"{lost.name}: No such file"):
        load(tmp_path / "gptq")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["hqq", "mlx"])
def test_its_own_runtime_computes_the_same(tiny: Path, tmp_path: Path, target: str) -> None:
    model = random_model(load(tiny))
    written(model, target, tmp_path)
    assert_parity(model, [tmp_path / target], tokens=TOKENS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["gptq", "qalora"])
def test_transformers_opens_it(tiny_untied: Path, tmp_path: Path, target: str) -> None:
    """GPTQModel's words with the residual beside them, which stays one file, and our own folder: as from one file."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    model = quantize(load(tiny_untied), bits=4, group_size=32)
    options = {"quantization_config": GPTQConfig(bits=4, backend="gptq_torch")} if target == "gptq" else {}
    logits = []
    for place, limit in (("split", LIMIT), ("whole", 1 << 40)):
        plan = written(model, target, tmp_path / place, limit)
        assert ("model.safetensors" in plan.files) == (place == "whole")
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / place / target, dtype=torch.float32, **options)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits.append(opened(torch.tensor([TOKENS])).logits)
    assert torch.equal(*logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gptqmodel_opens_it(tiny: Path, tmp_path: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel

    model = random_model(load(tiny), zeros="integer")
    written(model, "gptq", tmp_path)
    place = str(tmp_path / "gptq")
    loaded = GPTQModel.load(place, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    for name in model.linears:
        module = loaded.model.get_submodule(name.removesuffix(".weight"))
        expected = model.tensors[name].load_quantized().dequantize().half()
        assert torch.equal(type(module).dequantize_weight(module).T, expected), name
