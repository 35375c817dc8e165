"""The two ONNX graphs: weights bit for bit, logits in ONNX Runtime, onnx.reference and genai, against torch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from in_float64 import float64
from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.onnx import read
from qalora.converters.tokenizer import load_tokenizer
from qalora.errors import ExactnessError, FormatError, InputError
from qalora.parity.runtimes import open_runtime
from qalora.testing import assert_same_model, lazily, random_model, random_tensor, tiny_llama

GRAPHS = ["", "portable"]
TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(7))


def assert_close(got: np.ndarray, wanted: torch.Tensor, noise: float) -> None:
    """Within 8 times torch's own float32 error: the residual's branch has as many terms again, in another order."""
    error = float((torch.from_numpy(got).double() - wanted).abs().max())
    assert error <= 8 * noise, f"{error:.2g} with torch at {noise:.2g}"


def session(path: Path, provider: str = "CPUExecutionProvider") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(path / "model.onnx", options, providers=[provider])


def feed(model: Checkpoint, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, np.ndarray]:
    """Inputs with an empty cache."""
    empty = np.zeros((tokens.shape[0], 2, 0, 16), dtype=np.float32)
    past = {
        f"past_key_values.{n}.{side}": empty
        for n in range(model.config["num_hidden_layers"])
        for side in ("key", "value")
    }
    mask = torch.ones_like(tokens) if mask is None else mask
    return {"input_ids": tokens.numpy(), "attention_mask": mask.numpy(), **past}


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    logits: np.ndarray = session(path).run(["logits"], inputs)[0]
    return logits


@pytest.mark.parametrize("zeros", ["real", "integer", "symmetric"])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, 16), (3, 32), (4, 32), (4, 64), (4, None), (5, 16), (6, 64), (8, 32)]
)
def test_weights_come_back_bit_for_bit(
    untied: Checkpoint, bits: int, group_size: int | None, zeros: Any, tmp_path: Path
) -> None:
    model = random_model(untied, bits=bits, group_size=group_size, zeros=zeros)
    export(model, "onnx", tmp_path)
    wanted, noise = float64(model, TOKENS)
    for graph in GRAPHS:
        found = read(tmp_path / "onnx" / graph)
        assert_same_model(found, model)
        assert all(found.tensors[name].spec.bits == bits for name in model.linears)  # type: ignore[union-attr]
        assert_close(run(tmp_path / "onnx" / graph, feed(model, TOKENS)), wanted, noise)


VARIANTS: dict[str, Callable[[Path], Path]] = {
    "tied": lambda folder: tiny_llama(folder),
    "float16": lambda folder: tiny_llama(folder, config={"dtype": "float16"}),
    "head size of its own": lambda folder: tiny_llama(folder, config={"head_dim": 32}),
    "biases": lambda folder: tiny_llama(folder, config={"attention_bias": True, "mlp_bias": True}),
    "one head for each": lambda folder: tiny_llama(folder, config={"num_key_value_heads": 2, "num_attention_heads": 2}),
    "linear rope": lambda folder: tiny_llama(folder, config={"rope_parameters": rope("linear", factor=4.0)}),
    "yarn": lambda folder: tiny_llama(folder, config={"rope_parameters": rope("yarn", factor=4.0)}),
    "llama3": lambda folder: tiny_llama(
        folder,
        config={
            "rope_parameters": rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
        },
    ),
}


def rope(kind: str, **settings: float) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **settings}


@pytest.mark.parametrize("kind", VARIANTS)
def test_decoders_of_every_form(kind: str, tmp_path: Path) -> None:
    source = load(VARIANTS[kind](tmp_path / "model"))
    model = random_model(source)
    export(model, "onnx", tmp_path)
    wanted, noise = float64(model, TOKENS)
    config = model.config
    empty = np.zeros(
        (2, config["num_key_value_heads"], 0, config.get("head_dim") or 64 // config["num_attention_heads"]),
        dtype=np.float32,
    )
    inputs = {name: empty if name.startswith("past") else value for name, value in feed(model, TOKENS).items()}
    for graph in GRAPHS:
        assert_close(run(tmp_path / "onnx" / graph, inputs), wanted, noise)


def test_float_models_too(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    export(model, "onnx", tmp_path)
    wanted, noise = float64(model, TOKENS)
    for graph in GRAPHS:
        assert_same_model(read(tmp_path / "onnx" / graph), model)
        assert_close(run(tmp_path / "onnx" / graph, feed(model, TOKENS)), wanted, noise)


@pytest.fixture(scope="module")
def exported(untied: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    model = random_model(untied)
    folder = tmp_path_factory.mktemp("exported")
    export(model, "onnx", folder)
    return model, folder / "onnx"


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_token_at_a_time(exported: tuple[Checkpoint, Path], graph: str) -> None:
    """First five tokens, then one by one with the cache."""
    model, folder = exported
    wanted, noise = float64(model, TOKENS)
    opened = session(folder / graph)
    names = [output.name for output in opened.get_outputs()]
    past, made, at = {}, [], 0
    for stop in (5, *range(6, TOKENS.shape[1] + 1)):
        step = feed(model, TOKENS[:, at:stop], torch.ones(2, stop, dtype=torch.int64)) | past
        found = dict(zip(names, opened.run(names, step), strict=True))
        made.append(found.pop("logits"))
        past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        at = stop
    assert_close(np.concatenate(made, axis=1), wanted, noise)


@pytest.mark.parametrize(("graph", "side"), [("", "right"), ("portable", "right"), ("portable", "left")])
def test_batches_of_different_lengths(exported: tuple[Checkpoint, Path], graph: str, side: str) -> None:
    """Row 0 is whole, row 1 has 7 tokens and 5 of padding."""
    model, folder = exported
    short, length = TOKENS[1:, :7], TOKENS.shape[1]
    rows = slice(0, 7) if side == "right" else slice(length - 7, length)
    tokens, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    tokens[1], mask[1] = 0, 0
    tokens[1, rows], mask[1, rows] = short[0], 1
    found = run(folder / graph, feed(model, tokens, mask))
    for got, single in ((found[:1], TOKENS[:1]), (found[1:, rows], short)):
        assert_close(got, *float64(model, single))


@pytest.mark.parametrize("zeros", ["real", "integer"])
def test_the_portable_graph_is_standard(untied: Checkpoint, zeros: Any, tmp_path: Path) -> None:
    """Checked in full, and run by onnx.reference, which knows no operator of a vendor's."""
    from onnx.reference import ReferenceEvaluator

    model = random_model(untied, bits=3, zeros=zeros)
    export(model, "onnx", tmp_path)
    path = tmp_path / "onnx" / "portable" / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    wanted, noise = float64(model, TOKENS[:1])
    found = ReferenceEvaluator(onnx.load(path)).run(["logits"], feed(model, TOKENS[:1]))[0]
    assert_close(found, wanted, noise)
    domains = {function.domain for function in onnx.load(path, load_external_data=False).functions}
    assert domains == {"ai.qalora"}


@pytest.mark.parametrize(("bits", "zeros"), [(2, "real"), (4, "real"), (4, "integer"), (8, "real"), (6, "integer")])
@pytest.mark.parametrize("graph", GRAPHS)
def test_what_onnx_runtime_makes_of_a_graph(
    untied: Checkpoint, graph: str, bits: int, zeros: Any, tmp_path: Path
) -> None:
    """Everything made of constants is made when the model is loaded: a product, and a branch for real zero points."""
    model = random_model(untied, bits=bits, group_size=32, zeros=zeros)
    export(model, "onnx", tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    onnxruntime.InferenceSession(tmp_path / "onnx" / graph / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("MatMulNBits") == len(model.linears) * (2 if bits > 4 else 1)
    assert not {"DequantizeLinear", "ConstantOfShape", "Transpose"} & set(kinds) - ({"Transpose"} if graph else set())
    made = {output for node in nodes for output in node.output}
    for node in nodes:
        if node.op_type == "MatMulNBits":
            assert not made & set(node.input[1:]), f"{node.name} computes its weights at each call"


def test_the_fast_graph_computes_with_codes(exported: tuple[Checkpoint, Path]) -> None:
    model, folder = exported
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulNBits") == len(model.linears)
    assert kinds.count("GroupQueryAttention") == 2
    assert kinds.count("ReduceSum") == 2 * 4 + 1  # q, k, v share a pooled input; gate and up too; one sums the mask


@pytest.mark.parametrize("graph", GRAPHS)
def test_genai_generates_the_same(tiny: Path, tmp_path: Path, graph: str) -> None:
    model = random_model(load(tiny))
    export(model, "onnx", tmp_path)
    if graph:  # genai wants a tokenizer beside the graph only where it is asked to tokenize; ours stands once
        assert not (tmp_path / "onnx" / graph / "tokenizer.json").exists()
    prompt = load_tokenizer(model)("The Python language is")["input_ids"]
    runtime = open_runtime("onnxruntime-genai", tmp_path / "onnx" / graph)
    oracle = open_runtime("torch", model)
    logits = oracle.logits([*prompt, *oracle.generate(prompt, 20)])
    top = logits.topk(2).values
    assert float((top[:, 0] - top[:, 1]).min()) > 1e-4, "a near tie would make this test a coin toss"
    assert runtime.generate(prompt, 20) == oracle.generate(prompt, 20)


def test_the_same_bytes_at_every_run(untied: Checkpoint, tmp_path: Path) -> None:
    model = random_model(untied)
    for place in ("a", "b"):
        export(model, "onnx", tmp_path / place)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert Path("onnx/portable/model.onnx.data") in files and Path("onnx/model.onnx.data") not in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_plan_is_what_is_written(untied: Checkpoint, tmp_path: Path) -> None:
    plan = export(random_model(untied), "onnx", tmp_path)[0]
    written = {str(path.relative_to(tmp_path / "onnx")) for path in (tmp_path / "onnx").rglob("*") if path.is_file()}
    assert written == set(plan.files)
    for name, size in plan.files.items():
        assert size is None or (tmp_path / "onnx" / name).stat().st_size == size, name


@pytest.mark.parametrize("level", [0, 4])
def test_accuracy_level(untied: Checkpoint, level: int, tmp_path: Path) -> None:
    export(random_model(untied), "onnx", tmp_path, accuracy_level=level)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    levels = {a.i for node in graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {level}


def test_float32_minima_are_held_as_they_are(untied: Checkpoint, tmp_path: Path) -> None:
    """The graph adds z * scale to them in float32, which rounds here: C = -1.5 + 24 * 2**-24 is -1.5 + 12 * 2**-23."""

    def spread(tensor: Any) -> Any:
        wide = torch.full_like(tensor.scale, 3 * 2.0**-24)
        return replace(tensor, scale=wide, min=torch.full_like(wide, -1.5 + 2.0**-23))

    model = random_model(untied, min_dtype=torch.float32, change=spread)
    plan = export(model, "onnx", tmp_path)[0]
    assert not any(row.loss for row in plan.tensors)
    wanted, noise = float64(model, TOKENS)
    for graph in GRAPHS:
        assert_same_model(read(tmp_path / "onnx" / graph), model)
        assert_close(run(tmp_path / "onnx" / graph, feed(model, TOKENS)), wanted, noise)


def external(path: Path) -> dict[str, tuple[str, int, int]]:
    """{initializer: (file, offset, length)}"""
    found = {}
    for item in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in item.external_data}
        if entries:
            file = (path.parent / entries["location"]).resolve()
            found[item.name] = (str(file), int(entries["offset"]), int(entries["length"]))
    return found


def test_both_graphs_read_the_same_bytes(exported: tuple[Checkpoint, Path]) -> None:
    _, folder = exported
    fast, portable = external(folder / "model.onnx"), external(folder / "portable" / "model.onnx")
    assert fast == portable
    data = folder / "portable" / "model.onnx.data"
    assert {file for file, _, _ in fast.values()} == {str(data.resolve())}
    assert [path.name for path in folder.rglob("*.data")] == ["model.onnx.data"]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("zeros", ["real", "integer"])
def test_a_layer_takes_its_codes_scales_and_zero_points(
    untied: Checkpoint, bits: int, zeros: Any, tmp_path: Path
) -> None:
    """Nothing is stored twice: 4 or 8 bits for a code, float16 scale, float16 min or a nibble for each half's zero."""
    model = random_model(untied, bits=bits, group_size=32, zeros=zeros)
    plan = export(model, "onnx", tmp_path)[0]
    halves = 2 if bits > 4 else 1
    for name in model.linears:
        rows, columns = model.tensors[name].shape
        groups = columns // 32
        zero = 2 * groups if zeros == "real" else halves * ((groups + 1) // 2)
        row = next(row for row in plan.tensors if row.name == name)
        assert row.nbytes == rows * (halves * columns // 2 + 2 * groups + zero)


@pytest.mark.parametrize("graphs", ["fast", "portable"])
def test_one_graph_is_a_folder_of_its_own(tiny: Path, graphs: Any, tmp_path: Path) -> None:
    model = random_model(load(tiny))
    export(model, "onnx", tmp_path, onnx_graphs=graphs)
    folder = tmp_path / "onnx"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert external(folder / "model.onnx")["model.norm.weight"][0] == str((folder / "model.onnx.data").resolve())
    kinds = {node.domain for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}
    assert kinds == {"", "ai.qalora" if graphs == "portable" else "com.microsoft"}
    assert_same_model(read(folder), model)
    wanted, noise = float64(model, TOKENS)
    assert_close(run(folder, feed(model, TOKENS)), wanted, noise)
    prompt = load_tokenizer(model)("The Python language is")["input_ids"]
    oracle = open_runtime("torch", model)
    assert open_runtime("onnxruntime-genai", folder).generate(prompt, 8) == oracle.generate(prompt, 8)


def test_what_the_graphs_cannot_hold_is_refused(untied: Checkpoint, tmp_path: Path) -> None:
    name = untied.linears[0]
    with pytest.raises(ExactnessError, match=r"group_size: expected a multiple of 16, got 8"):
        export(random_model(untied, group_size=8), "onnx", tmp_path)
    tensor = random_tensor(64, 64, bits=4, group_size=32)
    uneven = replace(tensor, g_idx=(torch.arange(64) > 20).to(torch.int32))
    tensors = {**random_model(untied).tensors, name: lazily(name, uneven)}
    with pytest.raises(ExactnessError, match=r"q_proj: g_idx: expected 32 columns in each group, got 21 in group 0"):
        export(replace(untied, tensors=tensors), "onnx", tmp_path)
    odd = replace(untied, config={**untied.config, "hidden_act": "gelu"})
    with pytest.raises(InputError, match="hidden_act: expected silu, got 'gelu'"):
        export(odd, "onnx", tmp_path)
    with pytest.raises(InputError, match="head size: expected a multiple of 16, got 8"):
        export(load(tiny_llama(tmp_path / "small", config={"head_dim": 8})), "onnx", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def _edit(folder: Path, change: Callable[[Any], None]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _external(key: str, value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for entry in model.graph.initializer[0].external_data:
            if entry.key == key:
                entry.value = value

    return change


def _metadata(value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        next(entry for entry in model.metadata_props if entry.key == "qalora.tensors").value = value

    return change


def _version(model: Any) -> None:
    next(entry for entry in model.metadata_props if entry.key == "qalora.onnx").value = "3"


DAMAGE: dict[str, tuple[Callable[[Any], None], str]] = {
    "another graph": (lambda model: model.ClearField("metadata_props"), "no node is named as"),
    "a later version": (_version, "qalora.onnx: expected one of 1, 2, got '3'; update qalora"),
    "metadata no JSON": (_metadata("{"), "expected JSON"),
    "metadata of other sizes": (
        _metadata('{"model.layers.0.mlp.up_proj": [9, 32, "real", "float16", "float16"]}'),
        "bits",
    ),
    "group size 0": (_metadata('{"model.layers.0.mlp.up_proj": [4, 0, "real", "float16", "float16"]}'), "bits"),
    "outside the folder": (_external("location", "../secret"), "secret"),
    "absolute": (_external("location", "/etc/passwd"), "passwd"),
    "offset beyond": (_external("offset", "99999999999"), "expected 65536 bytes at 99999999999"),
    "negative offset": (_external("offset", "-4096"), "whole number"),
    "length that lies": (_external("length", "12"), "bytes"),
    "twice": (lambda model: model.graph.initializer.append(model.graph.initializer[0]), "twice"),
    "huge shape": (lambda model: model.graph.initializer[0].dims.append(1 << 60), "size"),
    "many dimensions": (
        lambda model: model.graph.initializer[0].dims.extend([1 << 47] * 20_000),
        "expected at most 8 dimensions, got 20002",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_graphs_are_refused(untied: Checkpoint, kind: str, tmp_path: Path) -> None:
    change, words = DAMAGE[kind]
    export(random_model(untied), "onnx", tmp_path)
    _edit(tmp_path / "onnx", change)
    with pytest.raises(FormatError, match=words):
        read(tmp_path / "onnx")


def test_a_changed_code_is_seen(untied: Checkpoint, tmp_path: Path) -> None:
    model = random_model(untied)
    plan = export(model, "onnx", tmp_path)[0]
    with (tmp_path / "onnx" / "portable" / "model.onnx.data").open("r+b") as file:
        file.seek(next(row.offset for row in plan.tensors if row.name == model.linears[3]))
        file.write(b"\x5a\xa5")
    with pytest.raises(AssertionError, match="packed"):
        assert_same_model(read(tmp_path / "onnx"), model)


def test_genai_config_tells_the_graph(exported: tuple[Checkpoint, Path]) -> None:
    _, folder = exported
    fast, portable = (json.loads((folder / graph / "genai_config.json").read_text("utf-8")) for graph in GRAPHS)
    assert fast["search"]["past_present_share_buffer"] is True
    assert portable["search"]["past_present_share_buffer"] is False
    assert portable["model"]["decoder"]["session_options"]["session.qdq_matmulnbits_accuracy_level"] == "1"


@pytest.mark.cuda
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not torch.cuda.is_available(),
    reason="no CUDA device: ONNX export on CUDAExecutionProvider against the CPU",
)
@pytest.mark.parametrize("graph", GRAPHS)
def test_cuda_gives_the_cpu_s_logits(exported: tuple[Checkpoint, Path], graph: str) -> None:
    model, folder = exported
    wanted, noise = float64(model, TOKENS)
    opened = session(folder / graph, "CUDAExecutionProvider")
    assert opened.get_providers()[0] == "CUDAExecutionProvider"
    found = opened.run(["logits"], feed(model, TOKENS))[0]
    # TF32 products have 11 significant bits where float32 has 24; without TF32 the CPU's bound holds.
    error = float((torch.from_numpy(found).double() - wanted).abs().max())
    assert error <= 8 * noise * 2**13
    assert bool((torch.from_numpy(found).argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9)
