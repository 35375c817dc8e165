"""What a device loads of an artefact: by hand, and the plan's figures against those of the files read back."""

from dataclasses import replace
from pathlib import Path

import pytest

from qalora.checkpoint import Checkpoint
from qalora.converters import huggingface, load
from qalora.converters.device_load import device_load_of, with_device_load
from qalora.converters.exports import export, export_jobs, plan_folder
from qalora.converters.plan import ExportOptions
from qalora.quantization import quantize
from qalora.testing import random_model, tiny_model


@pytest.fixture(scope="module", params=["tied", "untied", "biases"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny model with its output tied to the embedding, with one of its own, and one with biases."""
    family = "qwen2" if request.param == "biases" else "llama"
    config = {"tie_word_embeddings": request.param != "untied", "eos_token_id": 2}
    return quantize(load(tiny_model(tmp_path_factory.mktemp(request.param), family, config=config)), group_size=32)


@pytest.mark.parametrize("target", ["gptq", "gguf", "mlx", "hqq", "onnx", "openvino", "transformersjs", "qalora"])
def test_files_read_back_take_what_was_planned(model: Checkpoint, tmp_path: Path, target: str) -> None:
    (plan,) = export(model, [target], tmp_path)
    assert plan.device_load is not None
    (place,) = (tmp_path / target).glob("*.gguf") if target == "gguf" else [tmp_path / target]
    assert device_load_of(load(place)) == plan.device_load
    assert plan.device_load.nbytes == sum(row.nbytes for row in plan.tensors)


def test_bits_of_a_format_by_hand(tmp_path: Path) -> None:
    """4-bit codes, and 4 bytes for a group of 32; a float32 embedding."""
    model = random_model(huggingface.read(tiny_model(tmp_path / "tiny", "llama")), bits=4, group_size=32)
    plan = plan_folder(model, max_shard_size=1 << 40)
    assert plan.device_load is not None
    assert (plan.device_load.linear.bits, plan.device_load.embedding.bits) == (4 + 8 * 4 / 32, 32)
    rows, columns = model.tensors["model.embed_tokens.weight"].shape
    assert (plan.device_load.embedding.weights, plan.device_load.embedding.nbytes) == (
        rows * columns,
        4 * rows * columns,
    )
    text = f"linear layers 5.00 bits per weight, embedding 32.00 ({4 * rows * columns / 1000:.1f} kB)"
    assert str(plan.device_load) == text
    assert plan.to_json()["device_load"]["embedding"] == {"weights": rows * columns, "bytes": 4 * rows * columns}


def test_of_two_graphs_a_device_loads_one(model: Checkpoint) -> None:
    """Both graphs read one data file, which counts once; and so it is where a folder holds a model twice."""
    (both,), (fast,) = (export_jobs(model, ["onnx"], ExportOptions(onnx_graphs=graphs)) for graphs in ("both", "fast"))
    assert both.plan.device_load is not None and both.plan.device_load == fast.plan.device_load
    assert both.plan.device_load.nbytes == sum(row.nbytes for row in fast.plan.tensors)
    shapes = [model.tensors[name].shape for name in model.linears]
    assert both.plan.device_load.linear.weights == sum(rows * columns for rows, columns in shapes)
    elsewhere = tuple(replace(row, file=f"other/{row.file}", nbytes=7) for row in fast.plan.tensors)
    twice = replace(fast.plan, tensors=(*fast.plan.tensors, *elsewhere, *fast.plan.tensors))
    assert with_device_load(twice, model).device_load == fast.plan.device_load
