"""Our own folder gives back what was put in, and quantizing a folder is quantizing its tensors."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from qalora.checkpoint import Checkpoint
from qalora.converters import load, native
from qalora.converters.exports import export
from qalora.errors import InputError
from qalora.formats.safetensors import read_header
from qalora.quantization import ZEROS, quantize, quantize_tensor
from qalora.tensor import BITS, GroupQuantTensor
from qalora.testing import assert_same_tensor, byte_tokenizer, tiny_llama


def _written(model: Checkpoint, out: Path) -> Checkpoint:
    export(model, ["qalora"], out)
    return load(out / "qalora")


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("bits", BITS)
def test_every_tensor_comes_back(tiny_untied: Path, tmp_path: Path, bits: int, zeros: str) -> None:
    base = load(tiny_untied)
    model = quantize(base, bits=bits, group_size=None if bits == 2 else 32, zeros=zeros)  # type: ignore[arg-type]
    read = _written(model, tmp_path)
    assert read.layout == "qalora"
    assert read.config == base.config
    assert set(read.tensors) == set(base.tensors)
    assert read.linears == base.linears
    for name, lazy in read.tensors.items():
        if name in base.linears:
            weight = base.tensors[name].load_float()
            size = weight.shape[1] if bits == 2 else 32
            assert lazy.spec == model.tensors[name].spec
            assert_same_tensor(lazy.load_quantized(), quantize_tensor(weight, bits=bits, group_size=size, zeros=zeros))
        else:
            assert torch.equal(lazy.load_float(), base.tensors[name].load_float())


def test_rows_and_tiles_are_the_tensor(tiny_untied: Path, tmp_path: Path) -> None:
    read = _written(quantize(load(tiny_untied), group_size=32), tmp_path)
    lazy = read.tensors["model.layers.1.mlp.up_proj.weight"]
    whole = lazy.load_quantized()
    part = lazy.rows(3, 50)
    assert isinstance(part, GroupQuantTensor)
    assert_same_tensor(part, whole.rows(3, 50))
    tiles = list(lazy.float_tiles(tile_bytes=64 * 4 * 10))
    assert [row for row, _ in tiles] == list(range(0, 128, 10))
    assert torch.equal(torch.cat([tile for _, tile in tiles]), whole.dequantize())


def test_act_order_and_mixed_widths_come_back(tiny_untied: Path, tmp_path: Path) -> None:
    base = load(tiny_untied)
    four, three = quantize(base, bits=4, group_size=32), quantize(base, bits=3, group_size=64)
    name = base.linears[3]
    order = torch.randperm(64).to(torch.int32) // 32
    lazy = four.tensors[name]
    assert lazy.spec is not None
    shuffled = replace(
        lazy,
        spec=replace(lazy.spec, act_order=True),
        read=lambda start, stop: replace(lazy.read(start, stop), g_idx=order),
    )
    mixed = replace(four, tensors={**four.tensors, base.linears[0]: three.tensors[base.linears[0]], name: shuffled})
    read = _written(mixed, tmp_path)
    for changed in (base.linears[0], base.linears[1], name):
        assert read.tensors[changed].spec == mixed.tensors[changed].spec
        assert_same_tensor(read.tensors[changed].load_quantized(), mixed.tensors[changed].load_quantized())


def test_the_same_model_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    digests = []
    for place in ("a", "b"):
        export(quantize(load(tiny)), ["qalora"], tmp_path / place)
        files = sorted((tmp_path / place).rglob("*.*"))
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
    assert (tmp_path / "a" / "qalora" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    plan = native.plan(quantize(load(tiny)), native.ExportOptions())
    folder = tmp_path / "a" / "qalora"
    assert {path.name for path in folder.iterdir()} == set(plan.files)
    assert all((folder / name).stat().st_size == size for name, size in plan.files.items() if size is not None)


def test_what_comes_with_a_gguf_file_is_planned(tmp_path: Path) -> None:
    """Its metadata, and the tokenizer that is made of them."""
    source = tiny_llama(tmp_path / "float", tokenizer=byte_tokenizer())
    export(quantize(load(source), group_size=32), ["gguf"], tmp_path)
    (plan,) = export(load(next((tmp_path / "gguf").glob("*.gguf"))), ["qalora"], tmp_path)
    files = {path.name: path.stat().st_size for path in (tmp_path / "qalora").iterdir()}
    assert {"metadata.gguf", "tokenizer.json"} <= set(files) == set(plan.files)
    assert all(files[name] == size for name, size in plan.files.items() if size is not None)


def test_the_package_reads_the_file(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantize(load(tiny_untied), bits=4, group_size=32)
    _written(model, tmp_path)
    config = json.loads((tmp_path / "qalora" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == {
        "quant_method": "qalora",
        "version": 1,
        "bits": 4,
        "group_size": 32,
        "zero": None,
        "modules": {},
    }
    module = model.linears[0].removesuffix(".weight")
    with safetensors.safe_open(tmp_path / "qalora" / "model.safetensors", "pt") as file:
        tensor = model.tensors[model.linears[0]].load_quantized()
        assert torch.equal(file.get_tensor(f"{module}.codes"), tensor.packed)
        assert torch.equal(file.get_tensor(f"{module}.scale").float(), tensor.scale)
        assert torch.equal(file.get_tensor(f"{module}.min").float(), tensor.min)


def test_sharded_folders_are_read(tiny_untied: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_untied).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    single, sharded = load(tiny_untied), load(tmp_path / "sharded")
    for name in single.tensors:
        assert torch.equal(single.tensors[name].load_float(), sharded.tensors[name].load_float())


def test_integers_are_not_rounded_again_unasked(tiny_untied: Path) -> None:
    model = quantize(load(tiny_untied), bits=4, group_size=32)
    with pytest.raises(InputError, match="rounding them again loses more"):
        quantize(model, bits=3)
    again = quantize(model, bits=3, group_size=32, requantize=True)
    assert again.tensors[again.linears[0]].load_quantized().bits == 3


def test_a_group_that_does_not_divide_is_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", config={"vocab_size": 32, "hidden_size": 48, "num_attention_heads": 2})
    with pytest.raises(
        InputError, match=r"q_proj\.weight: group_size: expected a divisor of in = 48, got 32; these fit: 16, 48"
    ):
        quantize(load(folder), group_size=32)


@pytest.mark.parametrize("form", ["float", "qalora", "mlx", "hqq", "gptq"])
def test_a_buffer_that_config_determines_is_no_tensor(form: str, tiny_untied: Path, tmp_path: Path) -> None:
    """Early Llama checkpoints hold the rotary frequencies of each layer, which GGUF and ONNX have no place for."""
    folder = tmp_path / form
    if form == "float":
        shutil.copytree(tiny_untied, folder)
    else:
        export(quantize(load(tiny_untied), group_size=32), [form], tmp_path)
    before = load(folder)
    weights, header = folder / "model.safetensors", read_header(folder / "model.safetensors")
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    stored = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({**stored, **buffers}, weights, metadata=dict(header.metadata))
    after = load(folder)
    assert set(after.tensors) == set(before.tensors)
    if form == "float":
        export(quantize(after, group_size=32), ["gguf"], tmp_path / "out")
