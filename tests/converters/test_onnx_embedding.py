"""A quantized embedding in the graph for ONNX Runtime: one place for look-up and output, exact, and back as it was."""

import math
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

from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export_jobs
from qalora.converters.onnx import read
from qalora.converters.plan import ExportOptions
from qalora.converters.tokenizer import load_tokenizer
from qalora.converters.torch_module import build
from qalora.errors import ExactnessError, FormatError, InputError
from qalora.parity.runtimes import open_runtime
from qalora.testing import assert_same_model, lazily, random_model, random_tensor

NAME = "model.embed_tokens.weight"
TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(7))


def coded(source: Checkpoint, bits: int, group_size: int, zeros: Any = "integer", dtype: Any = torch.float16) -> Any:
    """A random model whose embedding has codes too."""
    model = random_model(source)
    rows, columns = model.tensors[NAME].shape
    made = random_tensor(rows, columns, bits=bits, group_size=group_size, zeros=zeros, seed=99)
    lazy = lazily(NAME, made, zeros=zeros, scale_dtype=dtype, min_dtype=torch.float32)
    return replace(model, tensors={**model.tensors, NAME: lazy})


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])


def feed(tokens: torch.Tensor) -> dict[str, np.ndarray]:
    empty = np.zeros((tokens.shape[0], 2, 0, 16), dtype=np.float32)
    past = {f"past_key_values.{n}.{side}": empty for n in range(2) for side in ("key", "value")}
    return {"input_ids": tokens.numpy(), "attention_mask": np.ones(tuple(tokens.shape), dtype=np.int64), **past}


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 16), (4, 32), (5, 32), (6, 16), (8, 32)])
def test_the_embedding_comes_back_and_computes(tiny: Path, bits: int, group_size: int, tmp_path: Path) -> None:
    model = coded(load(tiny), bits, group_size)
    export(model, "onnx", tmp_path, onnx_embedding="quantized")
    assert_same_model(read(tmp_path / "onnx"), model)
    assert read(tmp_path / "onnx").tensors[NAME].spec.bits == bits  # type: ignore[union-attr]
    assert_same_model(read(tmp_path / "onnx" / "portable"), model)
    module = build(model)
    single = module(input_ids=TOKENS).logits
    double = module.double()(input_ids=TOKENS).logits
    noise = float((single.double() - double).abs().max())
    for graph in ("onnx", "onnx/portable"):
        found = session(tmp_path / graph).run(["logits"], feed(TOKENS))[0]
        assert float((torch.from_numpy(found).double() - double).abs().max()) <= 8 * noise  # as in test_onnx


@pytest.mark.parametrize("graph", ["onnx", "onnx/portable"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 32), (8, 64), (3, 64)])
def test_the_look_up_is_exact(tiny: Path, bits: int, group_size: int, graph: str, tmp_path: Path) -> None:
    """Rows all over the table, by the graph's own nodes, are the float32 embedding bit for bit."""
    model = coded(load(tiny), bits, group_size)
    export(model, "onnx", tmp_path, onnx_embedding="quantized")
    path = tmp_path / graph / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    shape = ["batch_size", "sequence_length", 64]
    name = "embedded" if bits > 4 or graph != "onnx" else "embedded_low"
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    path.write_bytes(proto.SerializeToString())
    ids = torch.linspace(0, model.tensors[NAME].shape[0] - 1, 256).long().view(4, 64)
    found = session(tmp_path / graph).run([name], feed(ids))[0]
    assert torch.equal(torch.from_numpy(found), model.tensors[NAME].load_float()[ids])


def test_nothing_is_stored_twice(tiny: Path, tmp_path: Path) -> None:
    model = coded(load(tiny), 8, 32)
    plan = export(model, "onnx", tmp_path, onnx_embedding="quantized")[0]
    rows, columns = model.tensors[NAME].shape
    row = next(row for row in plan.tensors if row.name == NAME)
    groups = columns // 32
    assert row.carrier == "8 bits in two 4-bit halves"
    assert row.nbytes == rows * columns + rows * groups * 2 + 2 * rows * (groups // 2)
    data = "portable/model.onnx.data"
    assert (tmp_path / "onnx" / data).stat().st_size == plan.files[data]
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GatherBlockQuantized") == 2
    assert kinds.count("MatMulNBits") == len(model.linears) + 2
    assert NAME not in {item.name for item in graph.initializer}


def test_codes_are_the_default_where_they_can_be_looked_up(tiny: Path, tmp_path: Path) -> None:
    model = coded(load(tiny), 8, 32)
    export(model, "onnx", tmp_path)
    assert_same_model(read(tmp_path / "onnx"), model)
    for kind in ("floats", "real zeros", "wide scales"):
        other = REFUSED[kind][0](load(tiny))
        export(other, "onnx", tmp_path / kind)
        table = read(tmp_path / kind / "onnx").tensors[NAME]
        assert table.spec is None
        assert torch.equal(table.load_float(), other.tensors[NAME].load_float())


def test_float32_on_request(tiny: Path, tmp_path: Path) -> None:
    model = coded(load(tiny), 8, 32)
    export(model, "onnx", tmp_path, onnx_embedding="float32")
    for graph in ("onnx", "onnx/portable"):
        table = read(tmp_path / graph).tensors[NAME]
        assert table.spec is None
        assert torch.equal(table.load_float(), model.tensors[NAME].load_float())


REFUSED: dict[str, tuple[Callable[[Checkpoint], Checkpoint], type[Exception], str]] = {
    "floats": (random_model, InputError, "expected codes, got floats"),
    "real zeros": (lambda source: coded(source, 4, 32, "real"), ExactnessError, "got real zero points"),
    "wide scales": (lambda source: coded(source, 4, 32, dtype=torch.float32), ExactnessError, "got .*float32"),
    "groups of 8": (lambda source: coded(source, 4, 8), ExactnessError, "group_size: expected a multiple of 16, got 8"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_look_up_cannot_take_is_refused(tiny: Path, kind: str, tmp_path: Path) -> None:
    make, error, words = REFUSED[kind]
    with pytest.raises(error, match=words):
        export(make(load(tiny)), "onnx", tmp_path, onnx_embedding="quantized")
    assert not list(tmp_path.iterdir())


def test_an_output_of_its_own_and_other_words_are_refused(tiny_untied: Path, tmp_path: Path) -> None:
    model = coded(load(tiny_untied), 8, 32)
    with pytest.raises(InputError, match=r"expected an output tied to it, got lm_head\.weight"):
        export(model, "onnx", tmp_path, onnx_embedding="quantized")
    with pytest.raises(InputError, match="onnx_embedding: expected one of auto, float32, quantized, got 'int8'"):
        export(model, "onnx", tmp_path, onnx_embedding="int8")


def test_a_table_elsewhere_is_refused(tiny: Path, tmp_path: Path) -> None:
    export(coded(load(tiny), 8, 32), "onnx", tmp_path, onnx_embedding="quantized")
    path = tmp_path / "onnx" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    item = next(item for item in graph.graph.initializer if item.name == "model.embed_tokens.table_high")
    next(entry for entry in item.external_data if entry.key == "offset").value = "0"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(FormatError, match="table_high: expected the bytes of its codes, got another place or shape"):
        read(tmp_path / "onnx")


@pytest.mark.parametrize("kind", ["other bytes", "other rows"])
def test_a_table_in_the_graph_itself_is_compared_too(tiny: Path, kind: str, tmp_path: Path) -> None:
    export(coded(load(tiny), 4, 32), "onnx", tmp_path, onnx_embedding="quantized")
    path = tmp_path / "onnx" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    own, table = (
        next(item for item in graph.graph.initializer if item.name == f"model.embed_tokens.{kind}")
        for kind in ("codes", "table")
    )
    for item in (own, table):
        item.ClearField("data_location")
        item.ClearField("external_data")
        item.raw_data = b"\x21" * math.prod(item.dims)
    if kind == "other bytes":
        table.raw_data = bytes(len(table.raw_data))
    else:
        table.dims[:] = [table.dims[0] // 2, table.dims[1] * 2]
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(FormatError, match="table: expected the bytes of its codes, got another place or shape"):
        read(tmp_path / "onnx")


@pytest.mark.slow
def test_smollm2_is_verified_and_half_as_large(smollm2: Path, tmp_path: Path) -> None:
    """Its own Q8_0 table, through the command line, by ONNX Runtime and onnxruntime-genai."""
    (wide,) = export_jobs(load(smollm2), ["onnx"], ExportOptions(onnx_embedding="float32"))
    made = CliRunner().invoke(main, ["export", str(smollm2), "--to", "onnx", "-o", str(tmp_path)])
    assert made.exit_code == 0, made.output
    size, folder = wide.plan.files["portable/model.onnx.data"], tmp_path / "onnx"
    assert size is not None and size - (folder / "portable" / "model.onnx.data").stat().st_size > 75e6
    line = ["verify", str(smollm2), str(folder / "model.onnx"), "--max-tokens", "64"]
    proven = CliRunner().invoke(main, line)
    assert proven.exit_code == 0, proven.output


def test_genai_generates_the_same(tiny: Path, tmp_path: Path) -> None:
    model = coded(load(tiny), 8, 32)
    export(model, "onnx", tmp_path, onnx_embedding="quantized")
    prompt = load_tokenizer(model)("The Python language is")["input_ids"]
    runtime, oracle = open_runtime("onnxruntime-genai", tmp_path / "onnx"), open_runtime("torch", model)
    top = oracle.logits([*prompt, *oracle.generate(prompt, 20)]).topk(2).values
    assert float((top[:, 0] - top[:, 1]).min()) > 1e-4, "a near tie would make this test a coin toss"
    assert runtime.generate(prompt, 20) == oracle.generate(prompt, 20)
