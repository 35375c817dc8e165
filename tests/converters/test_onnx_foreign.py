"""Graphs that others made: weights against ONNX Runtime's own kernels, configs from graphs, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.config_places import tidied
from qalora.converters.decoder import decoder_of
from qalora.converters.onnx import read
from qalora.converters.onnx.foreign_config import rope_of
from qalora.errors import FormatError, InputError
from qalora.formats.onnx import Stored
from qalora.tensor import GroupQuantTensor

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY, THETA = 64, 96, 4, 2, 48, 130000.0
SIZE = HIDDEN // HEADS
QKV = (HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE)
RNG = np.random.default_rng(0)


class Graph:
    """A decoder's weights and the nodes that use them, as onnxruntime-genai's builder names them; it computes nothing.

    Fused as asked for; `form` is how the linear weights are kept: bits, and what their zero points are.
    """

    def __init__(self, *, bits: int = 4, zeros: str = "packed", dtype: Any = np.float32, fused: bool = True) -> None:
        self.bits, self.zeros, self.dtype = bits, zeros, dtype
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray | Any] = {}
        self.add_embedding()
        attention = [("qkv_proj", sum(QKV))] if fused else list(zip(("q_proj", "k_proj", "v_proj"), QKV, strict=True))
        inner = [("gate_up_proj", 2 * INNER)] if fused else [("gate_proj", INNER), ("up_proj", INNER)]
        for module, rows in (*attention, ("o_proj", HIDDEN)):
            self.add_linear(f"/model/layers.0/attn/{module}", rows, HIDDEN)
        for module, rows in inner:
            self.add_linear(f"/model/layers.0/mlp/{module}", rows, HIDDEN)
        self.add_linear("/model/layers.0/mlp/down_proj", HIDDEN, INNER)
        self.add_linear("/lm_head", VOCABULARY, HIDDEN)
        for norm in ("0.input_layernorm", "0.post_attention_layernorm", "1.final_norm_layernorm"):
            self.initializers[f"model.layers.{norm}.weight"] = RNG.normal(1, 0.1, HIDDEN).astype(dtype)
        self.node("SimplifiedLayerNormalization", "/model/layers.0/input_layernorm/LayerNorm", ["x", "y"], epsilon=1e-5)
        self.node("Sigmoid", "/model/layers.0/mlp/act_fn/Sigmoid", ["x"])
        self.node("GroupQueryAttention", "/model/layers.0/attn/GroupQueryAttention", ["x"], num_heads=4, kv_num_heads=2)
        angles = np.outer(np.arange(64), THETA ** (-np.arange(0, SIZE, 2) / SIZE).astype(np.float32))
        self.initializers |= {"cos_cache": np.cos(angles).astype(dtype), "sin_cache": np.sin(angles).astype(dtype)}
        self.config: dict[str, Any] = {
            "model": {
                "type": "llama",
                "context_length": 64,
                "vocab_size": VOCABULARY,
                "eos_token_id": 2,
                "decoder": {
                    "hidden_size": HIDDEN,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 99,  # the graph's own is right
                    "num_key_value_heads": 99,
                    "head_size": SIZE,
                },
            }
        }

    def node(self, kind: str, name: str, inputs: list[str], **attributes: Any) -> Any:
        found = helper.make_node(kind, inputs, [f"{name}/output"], name=name, domain="com.microsoft", **attributes)
        self.nodes.append(found)
        return found

    def add_embedding(self) -> None:
        self.initializers["embedding"] = RNG.normal(0, 1, (VOCABULARY, HIDDEN)).astype(self.dtype)
        self.node("Gather", "/model/embed_tokens/Gather", ["embedding", "input_ids"])

    def add_linear(self, name: str, rows: int, columns: int, block: int = 16) -> None:
        if self.bits == 32:
            self.initializers[f"{name}.w"] = RNG.normal(0, 1, (columns, rows)).astype(self.dtype)
            self.node("MatMul", f"{name}/MatMul", [f"{name}/input", f"{name}.w"])
            return
        groups, inputs = columns // block, [f"{name}/input", f"{name}.q", f"{name}.s"]
        self.initializers[f"{name}.q"] = RNG.integers(0, 256, (rows, groups, block * self.bits // 8), dtype=np.uint8)
        self.initializers[f"{name}.s"] = RNG.normal(0, 0.1, (rows, groups)).astype(np.float16).astype(self.dtype)
        if self.zeros == "packed":
            size = (rows, math.ceil(groups * self.bits / 8))
            self.initializers[f"{name}.z"] = RNG.integers(0, 256, size, dtype=np.uint8).reshape(-1)
        if self.zeros == "floats":
            self.initializers[f"{name}.z"] = RNG.normal(7, 1, (rows, groups)).astype(np.float16).astype(self.dtype)
        inputs += [] if self.zeros == "none" else [f"{name}.z"]
        attributes = {"bits": self.bits, "block_size": block, "K": columns, "N": rows, "accuracy_level": 1}
        self.node("MatMulNBits", f"{name}/MatMulNBits", inputs, **attributes)

    def find(self, words: str) -> Any:
        return next(node for node in self.nodes if words in node.name)

    def set(self, words: str, key: str, value: int) -> None:
        """Change an attribute of a node."""
        next(found for found in self.find(words).attribute if found.name == key).i = value

    def write(self, folder: Path) -> Path:
        made = [
            numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
            for name, value in self.initializers.items()
        ]
        graph = helper.make_graph(self.nodes, "others", [], [], initializer=made)
        onnx.save(helper.make_model(graph), folder / "model.onnx")
        (folder / "genai_config.json").write_text(json.dumps(self.config), encoding="utf-8")
        return folder


def computed(graph: Graph, words: str) -> torch.Tensor:
    """The weight [out, in] as ONNX Runtime's kernel has it: the node's product with the unit matrix."""
    node = graph.find(words)
    columns = next((found.i for found in node.attribute if found.name == "K"), 0)
    columns = columns or graph.initializers[node.input[1]].shape[0]
    kind = TensorProto.FLOAT if graph.dtype == np.float32 else TensorProto.FLOAT16
    used = [numpy_helper.from_array(graph.initializers[name], name) for name in node.input[1:]]
    x = helper.make_tensor_value_info(node.input[0], kind, [columns, columns])
    y = helper.make_tensor_value_info(node.output[0], kind, None)
    alone = helper.make_node(
        node.op_type, node.input, node.output, domain="" if node.op_type == "MatMul" else node.domain
    )
    alone.attribute.extend(node.attribute)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([alone], "one", [x], [y], used), opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {node.input[0]: np.eye(columns, dtype=graph.dtype)})[0].T.copy())


def opened(graph: Graph, folder: Path) -> Checkpoint:
    return read(graph.write(folder))


def weight(model: Checkpoint, name: str) -> torch.Tensor:
    return model.tensors[f"model.layers.0.{name}.weight"].load_float().float()


@pytest.mark.parametrize("zeros", ["packed", "none", "floats"])
@pytest.mark.parametrize("bits", [2, 4, 8, 32])
@pytest.mark.parametrize("fused", [True, False])
def test_weights_are_those_of_the_kernel(bits: int, zeros: str, fused: bool, tmp_path: Path) -> None:
    if bits == 8 and zeros == "floats":
        pytest.skip("ONNX Runtime has no 8-bit kernel with float zero points")
    graph = Graph(bits=bits, zeros=zeros, fused=fused)
    model = opened(graph, tmp_path)
    names = ("q", "k", "v")
    if fused:
        q, k, v = computed(graph, "qkv_proj").split(QKV)
        gate, up = computed(graph, "gate_up_proj").chunk(2)
    else:
        q, k, v = (computed(graph, f"{name}_proj") for name in names)
        gate, up = computed(graph, "gate_proj"), computed(graph, "up_proj")
    expected = {f"self_attn.{name}_proj": part for name, part in zip(names, (q, k, v), strict=True)}
    expected |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": computed(graph, "down_proj")}
    expected["self_attn.o_proj"] = computed(graph, "o_proj")
    for name, want in expected.items():
        got = weight(model, name)
        # the kernel multiplies (code - zero) by scale, rounded once; here product and sum are rounded
        scale = model.tensors[f"model.layers.0.{name}.weight"].load()
        size = 0.0 if not isinstance(scale, GroupQuantTensor) else float(scale.scale.abs().max()) * (1 << bits) * 2
        assert (got - want).abs().max() <= 2.0**-23 * size, name
    assert torch.equal(model.tensors["lm_head.weight"].load_float(), computed(graph, "lm_head")) or bits != 32
    assert len(model.tensors) == 7 + 2 + 3
    lazy = model.tensors["model.layers.0.self_attn.k_proj.weight"]
    rows, whole = lazy.rows(3, 9), lazy.load()
    if isinstance(whole, GroupQuantTensor) and isinstance(rows, GroupQuantTensor):
        assert torch.equal(rows.dequantize(), whole.dequantize()[3:9])


def test_float16_graphs(tmp_path: Path) -> None:
    graph = Graph(dtype=np.float16)
    model = opened(graph, tmp_path)
    lazy = model.tensors["model.layers.0.mlp.down_proj.weight"]
    assert lazy.spec is not None and lazy.spec.scale_dtype == torch.float16
    scales = torch.from_numpy(graph.initializers["/model/layers.0/mlp/down_proj.s"]).float()
    assert torch.equal(lazy.load_quantized().scale, scales)
    assert model.tensors["model.norm.weight"].dtype == torch.float16
    assert model.config["rope_parameters"]["rope_theta"] == THETA


def test_the_config_is_the_graphs(tmp_path: Path) -> None:
    model = opened(Graph(), tmp_path)
    assert model.config == {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": SIZE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": THETA, "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    assert model.layout == "onnx" and "not written by qalora" in model.notes[0]


def test_biases(tmp_path: Path) -> None:
    graph = Graph()
    bias = RNG.normal(0, 1, sum(QKV)).astype(np.float32)
    graph.initializers["bias"] = bias
    graph.node("Add", "/model/layers.0/attn/qkv_proj/Add", ["x", "bias"])
    model = opened(graph, tmp_path)
    assert model.config["attention_bias"] and not model.config["mlp_bias"]
    parts = [model.tensors[f"model.layers.0.self_attn.{name}_proj.bias"].load_float() for name in "qkv"]
    assert torch.equal(torch.cat(parts), torch.from_numpy(bias)) and [len(part) for part in parts] == list(QKV)
    assert not model.tensors["model.layers.0.self_attn.o_proj.bias"].load_float().any()  # a graph adds what it has


@pytest.mark.parametrize(
    ("family", "node", "name"),
    [
        ("mistral", "/model/layers.0/attn/o_proj", "model.layers.0.self_attn.o_proj.bias"),
        ("llama", "/lm_head", "lm_head.bias"),
        ("qwen2", "/model/layers.0/mlp/down_proj", "model.layers.0.mlp.down_proj.bias"),
    ],
)
def test_a_bias_that_the_family_has_not_is_refused(family: str, node: str, name: str, tmp_path: Path) -> None:
    """The graph adds it, and no export of the family could."""
    graph = Graph()
    graph.config["model"]["type"] = family
    graph.find(f"{node}/MatMulNBits").input.extend(["", "bias"])
    rows = next(found.i for found in graph.find(f"{node}/MatMulNBits").attribute if found.name == "N")
    graph.initializers["bias"] = np.ones(rows, dtype=np.float32)
    with pytest.raises(InputError, match=rf"a node adds {name}, which a {family} does not have"):
        opened(graph, tmp_path)


def test_rotary_positions_are_the_graph_s(tmp_path: Path) -> None:
    """Its tables are what runs, whatever the config.json beside it says."""
    plain = opened(Graph(), tmp_path)
    said = {**plain.config, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    model = read(tmp_path)
    assert decoder_of(model.config, "here") == decoder_of(plain.config, "here")
    assert len(model.notes) == 2 and "the graph counts, not the config.json beside it" in model.notes[1]
    assert "rope.factor: None instead of 4.0" in model.notes[1] and not tidied(model.config, tmp_path)[1]


@pytest.mark.parametrize("kind", ["uint8", "int4", "int4 with zeros"])
def test_a_quantized_embedding_is_what_its_kernel_looks_up(kind: str, tmp_path: Path) -> None:
    graph = Graph()
    node, names = graph.nodes[0], ["table", "input_ids", "table.s", "table.z"]
    graph.nodes.remove(node)
    graph.initializers["table.s"] = RNG.normal(0, 1, (VOCABULARY, HIDDEN // 16)).astype(np.float16).astype(np.float32)
    if kind == "uint8":
        graph.initializers["table"] = RNG.integers(0, 256, (VOCABULARY, HIDDEN // 2), dtype=np.uint8)
        names = names[:3]
    else:
        sizes = {"table": HIDDEN, "table.z": HIDDEN // 16}
        for name in names[::3] if "zeros" in kind else ["table"]:
            data = RNG.integers(0, 256, VOCABULARY * sizes[name] // 2, dtype=np.uint8).tobytes()
            shape = [VOCABULARY, sizes[name]]
            graph.initializers[name] = helper.make_tensor(name, TensorProto.INT4, shape, data, raw=True)
        names = names if "zeros" in kind else names[:3]
    made = graph.node("GatherBlockQuantized", "/model/embed_tokens/Gather_Q4", names, block_size=16, quantize_axis=1)
    if kind == "uint8":
        made.attribute.append(helper.make_attribute("bits", 4))
    got = opened(graph, tmp_path).tensors["model.embed_tokens.weight"].load_float()
    used = [
        numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
        for name, value in graph.initializers.items()
        if name.startswith("table")
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [VOCABULARY])
    out = helper.make_tensor_value_info(made.output[0], TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    alone = helper.make_model(helper.make_graph([made], "one", [ids], [out], used), opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"input_ids": np.arange(VOCABULARY)})
    assert torch.equal(got, torch.from_numpy(want))


@pytest.mark.parametrize("form", ["floats", "quantized"])
def test_an_output_layer_that_is_the_embedding_is_tied(form: str, tmp_path: Path) -> None:
    graph = Graph(bits=32 if form == "floats" else 4, zeros="none")
    graph.nodes.pop(0)
    weight_name = graph.find("lm_head").input[1]
    if form == "floats":
        graph.node("Transpose", "/model/embed_tokens/Transpose", [weight_name], perm=[1, 0])
        graph.node("Gather", "/model/embed_tokens/Gather", ["/model/embed_tokens/Transpose/output", "input_ids"])
    else:
        graph.node("Reshape", "/model/embed_tokens/Reshape", [weight_name, "shape"])
        inputs = ["/model/embed_tokens/Reshape/output", "input_ids", "/lm_head.s"]
        graph.node("GatherBlockQuantized", "/model/embed_tokens/G", inputs, bits=4, block_size=16, quantize_axis=1)
    model = opened(graph, tmp_path)
    assert model.tied and model.config["tie_word_embeddings"]
    assert torch.equal(model.tensors["model.embed_tokens.weight"].load_float(), computed(graph, "lm_head"))


def tables(theta: float, half: int, dtype: str, factor: float = 1.0, change: Callable[[Any], Any] = lambda x: x) -> Any:
    """Rope tables computed in float32, as transformers does, then stored."""
    inverse = 1.0 / (theta ** (torch.arange(0, 2 * half, 2, dtype=torch.int64).float() / (2 * half)))
    angles = torch.outer(torch.arange(16).float() / factor, change(inverse))
    kind = torch.float32 if dtype == "FLOAT" else torch.float16
    return [
        Stored(dtype=dtype, shape=(16, half), path=Path("x"), inline=part.to(kind).numpy().tobytes())
        for part in (angles.cos(), angles.sin())
    ]


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize("half", [8, 32, 64])
@pytest.mark.parametrize("theta", [1e4, 1e5, 130000.0, 5e5, 1e6, 26000.0])
def test_the_rope_base_is_read_from_its_tables(theta: float, half: int, dtype: str) -> None:
    assert rope_of(*tables(theta, half, dtype)) == {"rope_theta": theta, "rope_type": "default"}


def test_linear_scaling_is_read_and_other_scaling_is_not() -> None:
    wanted = {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
    assert rope_of(*tables(1e4, 32, "FLOAT", factor=4.0)) == wanted
    assert rope_of(*tables(1e4, 32, "FLOAT", change=lambda f: torch.where(f < 0.1, f / 8, f))) is None
    assert rope_of(None, None) is None


def _without_config(graph: Graph) -> None:
    graph.config = {"model": 3}


def _g_idx_short(graph: Graph) -> None:
    graph.initializers["order"] = np.zeros(3, dtype=np.int32)
    graph.find("down_proj").input.append("order")


def _no_norm(graph: Graph) -> None:
    del graph.initializers["model.layers.1.final_norm_layernorm.weight"]


def _lying_scales(graph: Graph) -> None:
    graph.initializers["/lm_head.s"] = graph.initializers["/lm_head.s"][:-1]


def _scales_not_raw(graph: Graph) -> None:
    """As float_data, which is not read."""
    values = graph.initializers["/lm_head.s"]
    graph.initializers["/lm_head.s"] = helper.make_tensor("/lm_head.s", TensorProto.FLOAT, values.shape, values.ravel())


def _scaled_rope(graph: Graph) -> None:
    graph.initializers["sin_cache"] = graph.initializers["sin_cache"] * 0.5


def _another_operator(graph: Graph) -> None:
    graph.find("down_proj").op_type = "QMatMul"


def _without_inputs(graph: Graph) -> None:
    del graph.find("down_proj").input[:]


def _other_names(graph: Graph) -> None:
    for node in graph.nodes:
        node.name = node.name.replace("proj", "linear").replace("lm_head", "head")


def _two_epsilons(graph: Graph) -> None:
    graph.node("SkipSimplifiedLayerNormalization", "/n", ["x"], epsilon=1e-6)


def _as_real(words: str, key: str, value: float) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        found = next(found for found in graph.find(words).attribute if found.name == key)
        found.type, found.f = onnx.AttributeProto.FLOAT, value

    return change


REFUSED: dict[str, tuple[Callable[[Graph], None], str]] = {
    "no decoder in the config": (_without_config, "expected model.decoder"),
    "a g_idx of another length": (_g_idx_short, "a INT32 initializer of 96 elements"),
    "5 bits": (lambda graph: graph.set("down_proj", "bits", 5), "bits: expected one of 2, 4, 8"),
    "a block that does not divide": (lambda graph: graph.set("down_proj", "block_size", 36), "block_size that divides"),
    "block 0": (lambda graph: graph.set("down_proj", "block_size", 0), "block_size that divides"),
    "N below 0": (lambda graph: graph.set("down_proj", "N", -64), "N and K"),
    "an N that lies": (lambda graph: graph.set("down_proj", "N", 1 << 20), "initializer of"),
    "rows that heads do not cut": (lambda graph: graph.set("GroupQueryAttention", "num_heads", 6), "rows"),
    "no final norm": (_no_norm, "model.norm.weight"),
    "scales of another size": (_lying_scales, "'/lm_head.s': expected a FLOAT or FLOAT16 initializer of 192"),
    "scaled rope": (_scaled_rope, "put the model's config.json beside it"),
    "another operator": (_another_operator, "expected MatMulNBits or MatMul, got QMatMul"),
    "a node without inputs": (_without_inputs, "'': expected a UINT8 initializer"),
    "other names": (_other_names, "no node is named as"),
    "no embedding": (lambda graph: graph.nodes.pop(0), "expected a Gather of input_ids"),
    "two epsilons": (_two_epsilons, "one epsilon, got 1e-06, 1e-05"),
    "a real N": (_as_real("o_proj", "N", 64.0), "N: expected a whole number, got a real one, 64.0"),
    "a real K": (_as_real("o_proj", "K", 64.0), "K: expected a whole number, got a real one, 64.0"),
    "a real block": (_as_real("o_proj", "block_size", 16.0), "block_size: expected a whole number, got a real one"),
    "real bits": (_as_real("o_proj", "bits", math.nan), "bits: expected a whole number, got a real one, nan"),
    "real heads": (_as_real("GroupQuery", "num_heads", 4.0), "num_heads: expected a whole number, got a real one"),
    "heads no number": (lambda graph: graph.set("GroupQueryAttention", "num_heads", 0), "num_attention_heads"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    change, words = REFUSED[kind]
    graph = Graph()
    change(graph)
    with pytest.raises(InputError) as caught:
        opened(graph, tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["/lm_head.q", "down_proj", "MatMulNBits", "input_ids"])
def test_text_that_is_not_utf8_is_refused(text: str, tmp_path: Path) -> None:
    """Protobuf gives such a text as bytes, which no reader here takes."""
    path = Graph().write(tmp_path) / "model.onnx"
    data = path.read_bytes()
    assert text.encode() in data
    path.write_bytes(data.replace(text.encode(), text.encode()[:-1] + b"\xff"))
    with pytest.raises(FormatError, match=r"model.onnx: expected an ONNX model, got a \w+ that is not UTF-8$"):
        load(path.parent)


def test_data_that_is_not_raw_is_refused_when_it_is_read(tmp_path: Path) -> None:
    graph = Graph()
    _scales_not_raw(graph)
    model = opened(graph, tmp_path)
    with pytest.raises(FormatError, match="expected 768 raw bytes, got 0"):
        model.tensors["lm_head.weight"].load()


def test_a_graph_without_any_config_is_refused(tmp_path: Path) -> None:
    (Graph().write(tmp_path) / "genai_config.json").unlink()
    with pytest.raises(InputError, match=r"needs config\.json or genai_config\.json in its folder"):
        read(tmp_path)
