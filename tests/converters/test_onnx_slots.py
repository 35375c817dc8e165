"""Slots for LoRAs in both graphs, filled by ONNX Runtime and onnxruntime-genai themselves; and adapter files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator

from qalora.adapter import Adapter, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.onnx.reader import read
from qalora.converters.onnx.slots import read_adapter_file, rounded_modules, slot_names, write_adapter_file
from qalora.converters.plan import ExportOptions
from qalora.converters.torch_module import build
from qalora.errors import FormatError, InputError
from qalora.parity.reference import Forward, Reference
from qalora.quantization import quantize
from qalora.testing import assert_same_model, random_adapter, random_model, tiny_llama

TOKENS = [(7 * n) % 200 for n in range(40)]
GRAPHS = ("model.onnx", "portable/model.onnx")


def made(model: Checkpoint, *, rank: int = 4, scaling: float = 0.5, seed: int = 1, **options: Any) -> Adapter:
    return random_adapter(model, rank=rank, seed=seed, a_size=0.1, b_size=0.1, minima=None, scaling=scaling, **options)


def exported(model: Checkpoint, folder: Path, slots: Adapter | None) -> Path:
    export(model, ["onnx"], folder, ExportOptions(lora_slots=frozenset(slots.layers if slots else ())))
    return folder / "onnx"


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(model: Checkpoint) -> dict[str, Any]:
    heads, size = int(model.config["num_key_value_heads"]), int(model.config["head_dim"])
    past = np.zeros((1, heads, 0, size), dtype=np.float32)
    names = [f"past_key_values.{n}.{side}" for n in range(2) for side in ("key", "value")]
    ids, mask = np.array([TOKENS]), np.ones((1, len(TOKENS)), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": mask, **dict.fromkeys(names, past)}


def logits(opened: Any, model: Checkpoint, *adapters: Path) -> torch.Tensor:
    run = onnxruntime.RunOptions()
    held = []
    for path in adapters:
        held.append(onnxruntime.LoraAdapter())
        held[-1].Load(str(path))
        run.add_active_adapter(held[-1])
    return torch.from_numpy(opened.run(["logits"], feed(model), run)[0][0])


def noise_bound(reference: Reference, forward: Forward) -> float:
    """Four times what summing the columns in another order makes, as in the gates; never below 1e-5."""
    exact = reference.logits(TOKENS, forward)
    return max(4 * float((reference.logits(TOKENS, replace(forward, permuted=True)) - exact).abs().max()), 1e-5)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Checkpoint:
    return quantize(load(tiny), bits=4, group_size=32)


@pytest.mark.parametrize("graph", GRAPHS)
def test_onnx_runtime_fills_the_slots(model: Checkpoint, tmp_path: Path, graph: str) -> None:
    """One session: without an adapter the base, with one the base and that adapter, with another another rank."""
    adapter, other = made(model), made(model, rank=7, seed=2)
    opened = session(exported(model, tmp_path, adapter) / graph)
    assert [node.name for node in opened.get_inputs()][:2] == ["input_ids", "attention_mask"]
    assert len(opened.get_overridable_initializers()) == 2 * len(model.linears)
    for name, used in (("a", adapter), ("b", other)):
        write_adapter_file(used, None, tmp_path / f"{name}.onnx_adapter")
        reference, side = Reference(model, used), Forward(weights="side")
        wanted = reference.logits(TOKENS, side)
        found = logits(opened, model, tmp_path / f"{name}.onnx_adapter")
        bound = noise_bound(reference, side)
        assert float((found - wanted).abs().max()) <= bound
        base = reference.logits(TOKENS, Forward())
        assert float((logits(opened, model) - base).abs().max()) <= bound < float((wanted - base).abs().max()) / 1000


@pytest.mark.parametrize("graph", GRAPHS)
def test_empty_slots_change_no_bit(model: Checkpoint, tmp_path: Path, graph: str) -> None:
    plain = session(exported(model, tmp_path / "plain", None) / graph)
    slotted = session(exported(model, tmp_path / "slots", made(model)) / graph)
    assert torch.equal(logits(plain, model), logits(slotted, model))
    assert_same_model(read(tmp_path / "slots" / "onnx" / graph), read(tmp_path / "plain" / "onnx" / graph))


@pytest.mark.parametrize(("bits", "zeros"), [(8, "real"), (4, "integer"), (None, "real")])
def test_every_kind_of_linear_has_a_place(tiny: Path, tmp_path: Path, bits: int | None, zeros: Any) -> None:
    """Two halves, no residual, and a float model's MatMul; some modules only."""
    source = load(tiny)
    model = source if bits is None else random_model(source, bits=bits, zeros=zeros)
    adapter = made(model, modules=None if bits is None else {"v_proj"})
    folder = exported(model, tmp_path, adapter)
    write_adapter_file(adapter, None, tmp_path / "a.onnx_adapter")
    wide = {name: lazy.load_float().double() for name, lazy in model.tensors.items() if name in model.linears}
    for module, layer in adapter.layers.items():
        change = layer.factor * (layer.b.double() @ layer.a.double())
        wide[f"{module}.weight"] = wide[f"{module}.weight"] + change.repeat_interleave(32, dim=1)
    module = build(model).double()
    for name, weight in wide.items():
        module.get_submodule(name.removesuffix(".weight")).weight.copy_(weight)
    wanted = module(input_ids=torch.tensor([TOKENS])).logits[0].detach()
    noise = float((module.float()(input_ids=torch.tensor([TOKENS])).logits[0].detach() - wanted).abs().max())
    for graph in GRAPHS:
        opened = session(folder / graph)
        assert len(opened.get_overridable_initializers()) == 2 * len(adapter.layers)
        found = logits(opened, model, tmp_path / "a.onnx_adapter").double()
        # two halves and the residual are sums of their own: up to 16 times torch's noise in float32
        assert float((found - wanted).abs().max()) <= 16 * noise
        assert float((logits(opened, model).double() - wanted).abs().max()) > 160 * noise


def test_the_checker_and_the_reference_accept_the_portable_graph(model: Checkpoint, tmp_path: Path) -> None:
    """onnx.reference takes the slots as inputs, of rank 0 or more."""
    adapter = made(model)
    path = exported(model, tmp_path, adapter) / "portable" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    evaluator = ReferenceEvaluator(str(path))
    inputs = feed(model)
    for module, layer in adapter.layers.items():
        a, b = slot_names(module)
        inputs[a] = layer.a.repeat_interleave(32, dim=1).t().contiguous().numpy()
        inputs[b] = (layer.b * layer.factor).t().contiguous().numpy()
    found = torch.from_numpy(evaluator.run(["logits"], inputs)[0][0])
    reference, side = Reference(model, adapter), Forward(weights="side")
    assert float((found - reference.logits(TOKENS, side)).abs().max()) <= noise_bound(reference, side)


@pytest.mark.slow
def test_genai_fills_the_slots(model: Checkpoint, tmp_path: Path) -> None:
    import onnxruntime_genai

    adapter = made(model)
    opened = onnxruntime_genai.Model(str(exported(model, tmp_path, adapter)))
    write_adapter_file(adapter, None, tmp_path / "a.onnx_adapter")
    adapters = onnxruntime_genai.Adapters(opened)
    adapters.load(str(tmp_path / "a.onnx_adapter"), "a")
    reference = Reference(model, adapter)
    for weights in ("base", "side"):
        params = onnxruntime_genai.GeneratorParams(opened)
        params.set_search_options(max_length=64, do_sample=False)
        generator = onnxruntime_genai.Generator(opened, params)
        if weights == "side":
            generator.set_active_adapter(adapters, "a")
        generator.append_tokens(TOKENS)
        found = torch.from_numpy(generator.get_logits().reshape(-1).copy())
        forward = Forward(weights=weights)  # type: ignore[arg-type]
        wanted = reference.logits(TOKENS, forward)[-1]
        assert float((found - wanted).abs().max()) <= noise_bound(reference, forward)


def test_an_adapter_file_holds_the_plain_lora(model: Checkpoint, tmp_path: Path) -> None:
    adapter = made(model, scaling=0.3)
    assert len(rounded_modules(adapter)) == 14
    assert rounded_modules(made(model)) == ()
    write_adapter_file(adapter, None, tmp_path / "a.onnx_adapter")
    for module, (a, b) in read_adapter_file(tmp_path / "a.onnx_adapter").items():
        layer = adapter.layers[module]
        assert torch.equal(a.t(), (layer.a.double() * 0.3).float().repeat_interleave(32, dim=1))
        assert torch.equal(b.t(), layer.b)
    write_adapter_file(adapter, None, tmp_path / "b.onnx_adapter")
    assert (tmp_path / "a.onnx_adapter").read_bytes() == (tmp_path / "b.onnx_adapter").read_bytes()


def test_the_commands(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    write_adapter(made(model), tmp_path / "adapter")
    common = ["export", str(tiny), "--lora-slots", str(tmp_path / "adapter"), "-o", str(tmp_path)]
    assert CliRunner().invoke(main, [*common, "--to", "gguf"]).exit_code == 2
    result = CliRunner().invoke(main, [*common, "--to", "onnx"])
    assert result.exit_code == 0, result.output
    out = str(tmp_path / "a.onnx_adapter")
    result = CliRunner().invoke(
        main, ["adapter", "convert", str(tmp_path / "adapter"), "--to", "onnx-adapter", "-o", out]
    )
    assert (result.exit_code, "14 layers as an ONNX Runtime adapter" in result.output) == (0, True), result.output
    opened = session(tmp_path / "onnx" / "model.onnx")
    assert not torch.equal(logits(opened, model, Path(out)), logits(opened, model))
    found = json.loads(CliRunner().invoke(main, ["inspect", out, "--json"]).stdout)
    assert (found["layout"], found["layers"]) == ("onnx-adapter", [{"count": 14, "rank": 4, "pool_size": 1}])


def test_slots_for_another_model_are_refused(model: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "deep", config={"num_hidden_layers": 3})
    with pytest.raises(InputError, match=r"`lora_slots`: model\.layers\.2\..* is no linear layer of"):
        exported(model, tmp_path, made(load(folder)))
    assert not (tmp_path / "onnx").exists()


def test_what_is_no_adapter_file(tmp_path: Path) -> None:
    (tmp_path / "a.onnx_adapter").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="expected an ONNX Runtime adapter"):
        read_adapter_file(tmp_path / "a.onnx_adapter")
