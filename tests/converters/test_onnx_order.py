"""Act-order in both ONNX graphs: the order is gathered once for each activation, and every tensor comes back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters import load
from qalora.converters.column_order import natural, order_of, ordered
from qalora.converters.onnx import read
from qalora.converters.onnx.slots import write_adapter_file
from qalora.converters.tokenizer import load_tokenizer
from qalora.converters.torch_module import build
from qalora.errors import FormatError
from qalora.parity.reference import Forward, Reference
from qalora.parity.runtimes import open_runtime
from qalora.testing import assert_same_model, assert_same_tensor, lazily, random_adapter, random_model, random_tensor

GRAPHS = ["", "portable"]
TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(7))


def groups_at_random(columns: int, group_size: int, seed: int) -> torch.Tensor:
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    return (order // group_size).to(torch.int32)


def act_order(source: Checkpoint, seeds: Callable[[str], int | None], **options: Any) -> Checkpoint:
    """A random model with groups at random from a seed for each module; None for runs of columns."""
    model = random_model(source, **options)
    tensors = dict(model.tensors)
    for name in model.linears:
        tensor, seed, spec = tensors[name].load_quantized(), seeds(name), tensors[name].spec
        if seed is not None and spec is not None:
            mixed = replace(tensor, g_idx=groups_at_random(tensor.shape[1], tensor.group_size, seed))
            tensors[name] = lazily(
                name, mixed, zeros=spec.zeros, scale_dtype=spec.scale_dtype, min_dtype=spec.min_dtype
            )
    return replace(model, tensors=tensors)


def by_input(name: str) -> int | None:
    """As GPTQ makes them: modules that read the same activation have one order; the last down_proj has none."""
    if "layers.1.mlp.down" in name:
        return None
    kinds = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 3, "up_proj": 3, "down_proj": 4}
    return kinds[name.split(".")[-2]] + 10 * int(name.split(".")[2])


def feed(model: Checkpoint, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    empty = np.zeros((tokens.shape[0], 2, 0, 16), dtype=np.float32)
    past = {f"past_key_values.{n}.{side}": empty for n in range(2) for side in ("key", "value")}
    return {"input_ids": tokens.numpy(), "attention_mask": np.ones(tuple(tokens.shape), dtype=np.int64), **past}


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def assert_logits(got: np.ndarray, model: Checkpoint, tokens: torch.Tensor) -> None:
    """Within 8 times torch's own float32 error, as in test_onnx."""
    module = build(model)
    single = module(input_ids=tokens).logits
    double = module.double()(input_ids=tokens).logits
    noise = float((single.double() - double).abs().max())
    error = float((torch.from_numpy(got).double() - double).abs().max())
    assert error <= 8 * noise, f"{error:.2g} with torch at {noise:.2g}"


@pytest.mark.parametrize("zeros", ["real", "integer"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 32), (4, 32), (5, 16), (6, 64), (8, 32)])
def test_tensors_come_back_with_their_g_idx(
    untied: Checkpoint, bits: int, group_size: int, zeros: Any, tmp_path: Path
) -> None:
    model = act_order(untied, by_input, bits=bits, group_size=group_size, zeros=zeros)
    plan = export(model, "onnx", tmp_path)[0]
    assert sum(", columns by groups" in row.carrier for row in plan.tensors) == len(model.linears) - 1
    for graph in GRAPHS:
        found = read(tmp_path / "onnx" / graph)
        assert_same_model(found, model)
        for name in model.linears:
            spec = found.tensors[name].spec
            assert spec is not None and spec.act_order is (by_input(name) is not None)
        assert_logits(session(tmp_path / "onnx" / graph).run(["logits"], feed(model, TOKENS))[0], model, TOKENS)


def test_onnx_reference_computes_it(untied: Checkpoint, tmp_path: Path) -> None:
    model = act_order(untied, by_input)
    export(model, "onnx", tmp_path)
    path = tmp_path / "onnx" / "portable" / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    found = ReferenceEvaluator(onnx.load(path)).run(["logits"], feed(model, TOKENS[:1]))[0]
    assert_logits(found, model, TOKENS[:1])


def _orders(folder: Path) -> tuple[list[str], list[str]]:
    """The Gathers by an order, and the orders stored."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    gathers = [node.input[1] for node in graph.node if node.op_type == "Gather" and node.input[1].endswith(".order")]
    return gathers, [item.name for item in graph.initializer if item.name.endswith(".order")]


@pytest.mark.parametrize("graph", GRAPHS)
def test_equal_groups_share_a_gather(untied: Checkpoint, graph: str, tmp_path: Path) -> None:
    """q, k and v; o; gate and up; down: four a layer, but the last layer's down_proj has no order. A v_proj of its own
    takes one more; where all groups of the model are equal, there is one order, and still a Gather an activation."""
    export(act_order(untied, by_input), "onnx", tmp_path / "a")
    gathers, stored = _orders(tmp_path / "a" / "onnx" / graph)
    assert len(gathers) == len(set(gathers)) == 7 and sorted(stored) == sorted(gathers)

    model = act_order(untied, lambda name: 99 if "v_proj" in name else by_input(name))
    export(model, "onnx", tmp_path / "b")
    gathers, stored = _orders(tmp_path / "b" / "onnx" / graph)
    assert len(gathers) == 9 and sorted(stored) == sorted(set(gathers)) and len(stored) == 8
    assert_same_model(read(tmp_path / "b" / "onnx" / graph), model)
    assert_logits(session(tmp_path / "b" / "onnx" / graph).run(["logits"], feed(model, TOKENS))[0], model, TOKENS)

    export(act_order(untied, lambda name: None if "down" in name else 1), "onnx", tmp_path / "c")
    gathers, stored = _orders(tmp_path / "c" / "onnx" / graph)
    assert len(gathers) == 6 and len(stored) == 1 and set(gathers) == set(stored)


def test_the_order_is_a_stable_sort(untied: Checkpoint, tmp_path: Path) -> None:
    """The stored numbers against a slow loop: the columns of group 0 as they stand, then those of group 1."""
    model = act_order(untied, by_input)
    export(model, "onnx", tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    g_idx = model.tensors[f"{name}.weight"].load_quantized().g_idx
    assert g_idx is not None
    wanted = [column for group in range(2) for column in range(64) if int(g_idx[column]) == group]
    for graph in GRAPHS:
        stored = {item.name: item for item in onnx.load(tmp_path / "onnx" / graph / "model.onnx").graph.initializer}
        assert numpy_helper.to_array(stored[f"{name}.order"]).tolist() == wanted


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_ordered_and_natural_are_inverse(bits: int) -> None:
    tensor = random_tensor(8, 128, bits=bits, group_size=32)
    assert ordered("a", tensor) is tensor
    tensor = replace(tensor, g_idx=groups_at_random(128, 32, 0))
    again = natural("a", ordered("a", tensor), order_of("a", tensor))
    assert_same_tensor(again, tensor)
    assert torch.equal(ordered("a", tensor).dequantize()[:, 5], tensor.dequantize()[:, order_of("a", tensor)[5]])


def test_an_order_that_is_no_permutation_is_refused(untied: Checkpoint, tmp_path: Path) -> None:
    export(act_order(untied, by_input), "onnx", tmp_path)
    folder, name = tmp_path / "onnx", "model.layers.0.self_attn.q_proj"
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    item = next(item for item in model.graph.initializer if item.name == f"{name}.order")
    place = next(int(entry.value) for entry in item.external_data if entry.key == "offset")
    with (folder / "portable" / "model.onnx.data").open("r+b") as file:
        file.seek(place)
        file.write(np.array([3, 3], dtype=np.int64).tobytes())
    for module in (name, name.replace("q_proj", "k_proj")):  # k_proj has q_proj's order
        with pytest.raises(FormatError, match=r"order: expected each of 0\.\.63 once"):
            read(folder).tensors[f"{module}.weight"].load()


def _another_type(model: Any) -> None:
    for item in model.graph.initializer:
        if item.name.endswith(".order"):
            item.data_type, item.dims[0] = onnx.TensorProto.INT32, item.dims[0] * 2


def _gone(model: Any) -> None:
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1].endswith(".order"):
            node.input[1] = "missing.order"


@pytest.mark.parametrize("change", [_another_type, _gone])
def test_an_order_that_is_no_order_is_refused(
    untied: Checkpoint, change: Callable[[Any], None], tmp_path: Path
) -> None:
    export(act_order(untied, by_input), "onnx", tmp_path)
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    change(model)
    (tmp_path / "onnx" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=r"order: expected INT64 \[128\], got (none|INT32)"):
        read(tmp_path / "onnx")


def test_a_graph_that_gathers_otherwise_is_another_weight(untied: Checkpoint, tmp_path: Path) -> None:
    model = act_order(untied, by_input)
    export(model, "onnx", tmp_path)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    gathers = [n for n in graph.graph.node if n.op_type == "Gather" and n.input[1].endswith("self_attn.q_proj.order")]
    gathers[0].input[1] = "model.layers.0.self_attn.o_proj.order"
    (tmp_path / "onnx" / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(AssertionError, match="g_idx: differs"):
        assert_same_model(read(tmp_path / "onnx"), model)


@pytest.mark.parametrize("graph", GRAPHS)
def test_slots_take_the_activation_as_it_was(untied: Checkpoint, graph: str, tmp_path: Path) -> None:
    """A plain LoRA knows nothing of the order: its A stands for columns where they were."""
    model = act_order(untied, by_input)
    adapter = random_adapter(model, pool_size=1, seed=1, a_size=0.1, b_size=0.1, minima=None, scaling=0.5)
    export(model, "onnx", tmp_path, lora_slots=frozenset(adapter.layers))
    write_adapter_file(adapter, None, tmp_path / "a.onnx_adapter")
    held, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    held.Load(str(tmp_path / "a.onnx_adapter"))
    options.add_active_adapter(held)
    tokens = TOKENS[0].tolist()
    found = session(tmp_path / "onnx" / graph).run(["logits"], feed(model, TOKENS[:1]), options)[0][0]
    reference = Reference(model, adapter)
    wanted = reference.logits(tokens, Forward(weights="side"))
    noise = float((reference.logits(tokens, Forward(weights="side", permuted=True)) - wanted).abs().max())
    error = float((torch.from_numpy(found) - wanted).abs().max())
    assert error <= max(4 * noise, 1e-5) < float((wanted - reference.logits(tokens, Forward())).abs().max()) / 100


@pytest.mark.slow
@pytest.mark.parametrize("zeros", ["real", "integer"])
def test_a_gptq_checkpoint_with_act_order_is_exported_and_verified(tiny: Path, zeros: Any, tmp_path: Path) -> None:
    """Through the command line, from a GPTQ folder with desc_act, to every runtime that verify has for ONNX."""
    model = act_order(load(tiny), by_input, zeros=zeros)
    export(model, "gptq", tmp_path / "base")
    base, out = str(tmp_path / "base" / "gptq"), tmp_path / "out"
    made = CliRunner().invoke(main, ["export", base, "--to", "onnx", "-o", str(out)])
    assert made.exit_code == 0, made.output
    proven = CliRunner().invoke(main, ["verify", base, str(out / "onnx"), "--max-tokens", "48"])
    assert proven.exit_code == 0, proven.output


@pytest.mark.slow
@pytest.mark.parametrize("graph", GRAPHS)
def test_genai_generates_the_same(tiny: Path, tmp_path: Path, graph: str) -> None:
    model = act_order(load(tiny), by_input)
    export(model, "onnx", tmp_path)
    prompt = load_tokenizer(model)("The Python language is")["input_ids"]
    runtime, oracle = open_runtime("onnxruntime-genai", tmp_path / "onnx" / graph), open_runtime("torch", model)
    top = oracle.logits([*prompt, *oracle.generate(prompt, 20)]).topk(2).values
    assert float((top[:, 0] - top[:, 1]).min()) > 1e-4, "a near tie would make this test a coin toss"
    assert runtime.generate(prompt, 20) == oracle.generate(prompt, 20)
