"""GGUF LoRAs: llama.cpp itself applies them, over float and integer files; what they hold, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader, GGUFWriter

from qalora.adapter import Adapter, AdapterLayer, read_adapter, to_plain_lora, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.gguf.lora import plan_lora, read_lora, write_lora
from qalora.converters.torch_module import build
from qalora.errors import AdapterError, FormatError, InputError
from qalora.inspection import AdapterReport, FolderReport, inspect
from qalora.parity.foldcheck import compare_adapters
from qalora.parity.reference import Forward, Reference
from qalora.parity.roundings import Rounding
from qalora.parity.runtimes.llamacpp import LlamaCpp
from qalora.quantization import quantize
from qalora.testing import random_adapter, tiny_llama

TOKENS = [(7 * n) % 200 for n in range(40)]


def made(model: Checkpoint, *, pool: int = 32, size: float = 0.1, ranks: tuple[int, ...] = (4,)) -> Adapter:
    return random_adapter(model, rank=ranks, pool_size=pool, seed=1, a_size=size, b_size=size, minima=None, scaling=0.5)


def written(adapter: Adapter, model: Checkpoint, path: Path) -> Path:
    write_lora(adapter, model, path)
    return path


def base_file(model: Checkpoint, folder: Path) -> Path:
    export(model, ["gguf"], folder)
    return next((folder / "gguf").glob("*.gguf"))


def adapted_logits(model: Checkpoint, adapter: Adapter, dtype: torch.dtype) -> torch.Tensor:
    """W + dW in float64, then one pass of transformers in `dtype`."""
    module = build(model).double()
    for path, layer in adapter.layers.items():
        change = layer.factor * (layer.b.double() @ layer.a.double())
        module.get_submodule(path).weight.add_(change.repeat_interleave(layer.pool_size, dim=1))
    return module.to(dtype)(input_ids=torch.tensor([TOKENS])).logits[0].detach().double()


@pytest.mark.parametrize("config", [{}, {"num_key_value_heads": 1}, {"head_dim": 32}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("pool", [1, 32])
def test_llama_cpp_applies_it_over_a_float_file(tiny: Path, tmp_path: Path, config: dict[str, Any], pool: int) -> None:
    """F32 throughout: what is left is float32's own noise, of another order of sums."""
    model = load(tiny_llama(tmp_path / "model", config=config))
    adapter = made(model, pool=pool)
    file = base_file(model, tmp_path)
    runtime = LlamaCpp(file, 1, lora=written(adapter, model, tmp_path / "lora.gguf"))
    found = runtime.logits(TOKENS).double()
    runtime.close()
    double = adapted_logits(model, adapter, torch.float64)
    noise = float((adapted_logits(model, adapter, torch.float32) - double).abs().max())
    plain = LlamaCpp(file, 1)
    effect = float((plain.logits(TOKENS).double() - double).abs().max())
    plain.close()
    assert effect > 0.1  # the adapter does something: a wrong row order or factor would show
    assert float((found - double).abs().max()) <= 16 * noise < effect / 1000
    assert 16 * noise < 1e-4


def test_over_integers_it_is_right_to_the_8_bit_activations(tiny: Path, tmp_path: Path) -> None:
    """Over Q4_1 llama.cpp rounds the activations; the reference repeats that, and the bound is twice what it makes."""
    model = quantize(load(tiny), bits=4, group_size=32)
    adapter = made(model)
    runtime = LlamaCpp(base_file(model, tmp_path), 1, lora=written(adapter, model, tmp_path / "lora.gguf"))
    found = runtime.logits(TOKENS)
    runtime.close()
    reference = Reference(model, adapter)
    exact = reference.logits(TOKENS, Forward(weights="side"))
    rounded = reference.logits(TOKENS, Forward(weights="side", rounding=Rounding(kind="q8")))
    simulated = float((rounded - exact).square().mean().sqrt())
    effect = float((exact - reference.logits(TOKENS, Forward())).square().mean().sqrt())
    assert float((found - exact).square().mean().sqrt()) <= 2 * simulated < effect / 5


def test_what_the_file_holds(tiny: Path, tmp_path: Path) -> None:
    """gguf's own reader; A repeats its columns, B has llama.cpp's row order, one loop a row."""
    model = load(tiny)
    adapter = made(model)
    reader = GGUFReader(written(adapter, model, tmp_path / "lora.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": tiny.name,
        "general.file_type": 0,
        "adapter.lora.alpha": 2.0,
    }
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 2 * len(model.linears)
    layer = adapter.layers["model.layers.1.self_attn.k_proj"]
    a, b = tensors["blk.1.attn_k.weight.lora_a"], tensors["blk.1.attn_k.weight.lora_b"]
    assert a.shape == (4, 64)
    assert all(torch.equal(a[:, column], layer.a[:, column // 32]) for column in range(64))
    rows = [head * 16 + half * 8 + pair for head in range(2) for pair in range(8) for half in range(2)]
    assert torch.equal(b, layer.b[rows])
    assert torch.equal(tensors["blk.0.ffn_up.weight.lora_b"], adapter.layers["model.layers.0.mlp.up_proj"].b)


def test_what_is_written_is_what_is_read(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    adapter = made(model, ranks=(4, 5))
    path = written(adapter, model, tmp_path / "lora.gguf")
    again = read_lora(path, model)
    plain = to_plain_lora(adapter)
    assert set(again.layers) == set(plain.layers)
    for module, layer in again.layers.items():
        assert layer.pool_size == 1
        assert torch.equal(layer.b, plain.layers[module].b)
        change = plain.layers[module].factor * plain.layers[module].a
        assert torch.equal(layer.factor * layer.a, change) or module in plan_lora(adapter, model).rounded
    assert compare_adapters(again, adapter) == ()
    assert read_lora(written(again, model, tmp_path / "again.gguf"), model).layers.keys() == again.layers.keys()
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_somebody_elses_file(tiny: Path, tmp_path: Path) -> None:
    """Written by gguf's own writer, in float16, without alpha: the factor is 1 then."""
    model = load(tiny)
    writer = GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    a, b = np.random.default_rng(0).standard_normal((2, 64, 3)).astype(np.float16)
    writer.add_tensor("blk.0.attn_output.weight.lora_a", np.ascontiguousarray(a.T))
    writer.add_tensor("blk.0.attn_output.weight.lora_b", b)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    layer = read_lora(tmp_path / "lora.gguf", model).layers["model.layers.0.self_attn.o_proj"]
    assert (layer.factor, layer.rank) == (1.0, 3)
    assert torch.equal(layer.a, torch.from_numpy(a.T.copy()).float())
    assert torch.equal(layer.b, torch.from_numpy(b).float())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"attn_k.weight.lora_b", b"attn_k.weight.lora_c", "lora_a"),
        (b"blk.0.attn_k.weight.lora", b"blk.7.attn_k.weight.lora", "the adapter belongs to a different model"),
        (b"adapter.type", b"adapter.kind", "adapter.type: expected lora, got null"),
        (b"adapter.lora.alpha\x06\0\0\0\0\0\0\x40", b"adapter.lora.alpha\x06\0\0\0\0\0\xc0\x7f", "a finite float"),
    ],
)
def test_damaged_files(tiny: Path, tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    model = load(tiny)
    path = written(made(model), model, tmp_path / "lora.gguf")
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(InputError, match=words):
        read_lora(path, model)


def test_from_gguf_back_into_a_folder(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    adapter = made(model)
    path = written(adapter, model, tmp_path / "lora.gguf")
    words = ["adapter", "convert", str(path), "--to", "plain", "-o", str(tmp_path / "plain")]
    assert "give --base MODEL" in CliRunner().invoke(main, words).output
    assert CliRunner().invoke(main, [*words, "--base", str(tiny)]).exit_code == 0
    for module, layer in read_adapter(tmp_path / "plain", model).layers.items():
        assert torch.equal(layer.a, adapter.layers[module].a.repeat_interleave(32, dim=1))
        assert (layer.factor, torch.equal(layer.b, adapter.layers[module].b)) == (0.5, True)


def test_layers_that_differ_in_their_factor(tiny: Path, tmp_path: Path) -> None:
    """One alpha for the file: a factor off by a power of two is exact, any other rounds A, and is named."""
    model = load(tiny)
    adapter = made(model)
    layers = dict(adapter.layers)
    twice, other = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    for module, factor in ((twice, 1.0), (other, 0.3)):
        layer = layers[module]
        layers[module] = AdapterLayer(a=layer.a, b=layer.b, pool_size=32, scaling=factor, factor=factor)
    changed = Adapter(layers=layers, convention="paper")
    plan = plan_lora(changed, model)
    assert plan.rounded == (other,)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(written(changed, model, tmp_path / "l.gguf")).tensors}
    a = {name: torch.from_numpy(tensors[f"blk.0.ffn_{name}.weight.lora_a"].copy()) for name in ("up", "down")}
    assert torch.equal(a["up"], 2 * layers[twice].a.repeat_interleave(32, dim=1))
    wanted = (layers[other].a.double() * (0.3 / 0.5)).float()
    assert torch.equal(a["down"], wanted.repeat_interleave(32, dim=1))


def test_ranks_that_differ(tiny: Path, tmp_path: Path) -> None:
    """llama.cpp divides alpha by each layer's own rank."""
    model = load(tiny)
    adapter = made(model, ranks=(4, 5, 6))
    runtime = LlamaCpp(base_file(model, tmp_path), 1, lora=written(adapter, model, tmp_path / "lora.gguf"))
    found = runtime.logits(TOKENS).double()
    runtime.close()
    double = adapted_logits(model, adapter, torch.float64)
    noise = float((adapted_logits(model, adapter, torch.float32) - double).abs().max())
    assert float((found - double).abs().max()) <= 16 * noise


def test_the_command(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    adapter = made(model)
    write_adapter(adapter, tmp_path / "adapter")
    words = ["adapter", "convert", str(tmp_path / "adapter"), "--to", "gguf-lora", "-o", str(tmp_path / "lora.gguf")]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, "give --base MODEL" in result.output) == (2, True)
    result = CliRunner().invoke(main, [*words, "--base", str(tiny)])
    assert (result.exit_code, "14 layers as a GGUF LoRA" in result.output) == (0, True), result.output
    assert (tmp_path / "lora.gguf").read_bytes() == written(adapter, model, tmp_path / "other.gguf").read_bytes()
    assert CliRunner().invoke(main, [*words, "--base", str(tiny)]).exit_code == 2
    assert CliRunner().invoke(main, [*words, "--base", str(tiny), "--force"]).exit_code == 0
    found = json.loads(CliRunner().invoke(main, ["inspect", str(tmp_path / "lora.gguf"), "--json"]).stdout)
    assert (found["kind"], found["layout"], found["warnings"]) == ("adapter", "gguf-lora", [])
    assert found["layers"] == [{"count": 14, "rank": 4, "pool_size": 1}]


def test_inspect_sees_what_is_wrong_with_it(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    path = written(made(model, size=0.0), model, tmp_path / "lora.gguf")
    report = inspect(path)
    assert isinstance(report, AdapterReport)
    assert [finding.code for finding in report.warnings] == ["all-zero"]
    assert "28 of 28 matrices" in report.warnings[0].message


def test_a_base_and_its_lora_in_one_folder(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    file = base_file(model, tmp_path)
    lora = written(made(model), model, file.with_name("lora.gguf"))
    report = inspect(file.parent)
    assert isinstance(report, FolderReport)
    assert sorted(artifact.layout for artifact in report.artifacts) == ["gguf", "gguf-lora"]
    with pytest.raises(InputError, match=r"lora\.gguf is a LoRA, and no model"):
        load(lora)


def test_an_adapter_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = load(tiny_llama(tmp_path / "other", config={"hidden_size": 128, "num_attention_heads": 8}))
    with pytest.raises(AdapterError, match="the adapter belongs to a different model"):
        plan_lora(made(other), load(tiny))


def test_llama_cpp_refuses_a_file_that_is_none(tiny: Path, tmp_path: Path) -> None:
    file = base_file(load(tiny), tmp_path)
    with pytest.raises(FormatError, match=r"llama\.cpp does not load it"):
        LlamaCpp(file, 1, lora=file)
