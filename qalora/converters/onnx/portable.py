"""The portable graph: standard operators, and quantized products as functions of our own domain in the same file.

    ai.qalora::GroupQuantizedMatMul(x, codes, scale, zero) -> x @ dequantize(codes, scale, zero)
    ai.qalora::GroupQuantizedMatMulReal(x, pooled, codes, scale, zero, residual) -> the same + pooled @ residual

A function's body is standard operators (DequantizeLinear, MatMul, Add), so that no native library is needed, and
onnx.reference runs the model too. The mask may have zeros anywhere: batches can be padded on either side.

ONNX Runtime turns DequantizeLinear + MatMul into MatMulNBits, at accuracy level 4 (int8 activations) unless the session
has session.qdq_matmulnbits_accuracy_level = "1"; genai_config.json beside the graph says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.onnx.carriers import block_size
from qalora.converters.onnx.decoder import (
    OPSET,
    SIDES,
    Decoder,
    Graph,
    cache_names,
    decoder_of,
    graph_inputs,
    graph_outputs,
)
from qalora.converters.onnx.fast import add_table_product
from qalora.formats.onnx import Initializer

__all__ = ["DOMAIN", "portable_graph"]

DOMAIN = "ai.qalora"
MASKED = -3.4028234663852886e38


def portable_graph(model: Checkpoint, data: Mapping[str, Initializer], metadata: Mapping[str, str]) -> Any:
    """The ModelProto, its weights as stubs."""
    from onnx import helper

    decoder, graph = decoder_of(model), Graph(data=data)
    positions, bias = _positions(graph), _attention_bias(graph)
    hidden = graph.add("Gather", ["model.embed_tokens.weight", "input_ids"], "embedded")
    for n in range(decoder.layers):
        hidden = _layer(graph, model, decoder, n, hidden, positions, bias)
    norm = _norm(graph, decoder, hidden, "model.norm.weight", "normed")
    if not model.tied and model.tensors["lm_head.weight"].spec is not None:
        graph.add("Identity", [_linear(graph, model, norm, "lm_head")], "logits")
    else:
        add_table_product(graph, norm, "model.embed_tokens.weight" if model.tied else "lm_head.weight", decoder)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return graph.model(
        decoder,
        graph_outputs(decoder),
        graph_inputs(decoder),
        metadata,
        opset_imports=opsets,
        functions=[_function(real=False), _function(real=True)],
    )


def _function(*, real: bool) -> Any:
    """The quantized product, with and without the part that real zero points leave over."""
    from onnx import AttributeProto, helper

    dequantize = helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["weight"], axis=0)
    size = dequantize.attribute.add()
    size.name, size.type, size.ref_attr_name = "block_size", AttributeProto.INT, "block_size"
    nodes = [dequantize, helper.make_node("MatMul", ["x", "weight"], ["product" if real else "y"])]
    inputs = ["x", "codes", "scale", "zero"]
    if real:
        inputs = ["x", "pooled", "codes", "scale", "zero", "residual"]
        nodes.append(helper.make_node("MatMul", ["pooled", "residual"], ["branch"]))
        nodes.append(helper.make_node("Add", ["product", "branch"], ["y"]))
    return helper.make_function(
        DOMAIN,
        "GroupQuantizedMatMulReal" if real else "GroupQuantizedMatMul",
        inputs,
        ["y"],
        nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=["block_size"],
    )


def _positions(graph: Graph) -> str:
    """The position of each new token: how many ones stand before it in its row of the mask."""
    axis = graph.constant("mask_axis", 1)
    counted = graph.add("CumSum", ["attention_mask", axis], "mask_counted")
    from_zero = graph.add("Sub", [counted, graph.constant("one", [1])], "mask_positions")
    positive = graph.add("Max", [from_zero, graph.constant("zero_positions", [0])], "mask_positive")
    sequence, total = _lengths(graph)
    first = graph.add("Sub", [total, sequence], "past_length")
    return graph.add("Slice", [positive, first, total, graph.constant("axis1", [1])], "positions")


def _lengths(graph: Graph) -> tuple[str, str]:
    index = graph.constant("index1", [1])
    ids, mask = graph.add("Shape", ["input_ids"], "ids_shape"), graph.add("Shape", ["attention_mask"], "mask_shape")
    sequence = graph.add("Gather", [ids, index], "sequence_length", axis=0)
    return sequence, graph.add("Gather", [mask, index], "total_length", axis=0)


def _attention_bias(graph: Graph) -> str:
    """float32 [batch, 1, sequence, total]: 0 where a token may look, the lowest float where not."""
    from onnx import TensorProto, helper

    zero, one = graph.constant("zero_scalar", 0), graph.constant("one_scalar", 1)
    axis0 = graph.constant("axis0", [0])
    total = graph.add("Squeeze", ["total_length", axis0], "total_scalar")
    past = graph.add("Squeeze", ["past_length", axis0], "past_scalar")
    columns = graph.add("Range", [zero, total, one], "columns")
    rows = graph.add(
        "Unsqueeze", [graph.add("Range", [past, total, one], "row_numbers"), graph.constant("axis1", [1])], "rows"
    )
    causal = graph.add("LessOrEqual", [columns, rows], "causal")
    kept = graph.add("Cast", ["attention_mask"], "mask_bool", to=TensorProto.BOOL)
    kept = graph.add("Unsqueeze", [kept, graph.constant("axes12", [1, 2])], "mask_wide")
    allowed = graph.add("And", [causal, kept], "allowed")
    for name, value in (("bias_zero", 0.0), ("bias_masked", MASKED)):
        graph.constants.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    return graph.add("Where", [allowed, "bias_zero", "bias_masked"], "attention_bias")


def _norm(graph: Graph, decoder: Decoder, x: str, weight: str, out: str) -> str:
    return graph.add("RMSNormalization", [x, weight], out, axis=-1, epsilon=decoder.epsilon)


def _layer(graph: Graph, model: Checkpoint, decoder: Decoder, n: int, hidden: str, positions: str, bias: str) -> str:
    path, out = f"model.layers.{n}", f"layer{n}"
    norm = _norm(graph, decoder, hidden, f"{path}.input_layernorm.weight", f"{out}.normed")
    mixed = _attention(graph, model, decoder, n, norm, positions, bias)
    hidden = graph.add("Add", [hidden, mixed], f"{out}.middle")
    norm = _norm(graph, decoder, hidden, f"{path}.post_attention_layernorm.weight", f"{out}.middle_normed")
    gate, up = _linear(graph, model, norm, f"{path}.mlp.gate_proj"), _linear(graph, model, norm, f"{path}.mlp.up_proj")
    active = graph.add("Mul", [gate, graph.add("Sigmoid", [gate], f"{out}.sigmoid")], f"{out}.silu")
    gated = graph.add("Mul", [active, up], f"{out}.gated")
    return graph.add("Add", [hidden, _linear(graph, model, gated, f"{path}.mlp.down_proj")], f"{out}.end")


def _attention(graph: Graph, model: Checkpoint, decoder: Decoder, n: int, norm: str, positions: str, bias: str) -> str:
    out, rotated = f"layer{n}", []
    for name, count in (("q", decoder.heads), ("k", decoder.kv_heads), ("v", decoder.kv_heads)):
        flat = _linear(graph, model, norm, f"model.layers.{n}.self_attn.{name}_proj")
        shape = graph.constant(f"heads_{count}", [0, 0, count, decoder.head_size])
        split = graph.add("Reshape", [flat, shape], f"{out}.{name}_split")
        heads = graph.add("Transpose", [split], f"{out}.{name}_heads", perm=[0, 2, 1, 3])
        if name != "v":
            tables = ["rotary.cos", "rotary.sin", positions]
            heads = graph.add("RotaryEmbedding", [heads, *tables], f"{out}.{name}_rotated")
        rotated.append(heads)
    past = [cache_names(n, side)[0] for side in SIDES]
    present = [cache_names(n, side)[1] for side in SIDES]
    attended = graph.add(
        "Attention",
        [*rotated, bias, *past],
        f"{out}.attended_heads",
        outputs=[f"{out}.attended_heads", *present],
        scale=decoder.head_size**-0.5,
    )
    back = graph.add("Transpose", [attended], f"{out}.attended_split", perm=[0, 2, 1, 3])
    flat_shape = graph.constant("flat_heads", [0, 0, decoder.heads * decoder.head_size])
    flat = graph.add("Reshape", [back, flat_shape], f"{out}.attended")
    return _linear(graph, model, flat, f"model.layers.{n}.self_attn.o_proj")


def _linear(graph: Graph, model: Checkpoint, x: str, module: str) -> str:
    lazy = model.tensors[f"{module}.weight"]
    y = f"{module}.out"
    parts = [f"{module}.{part}" for part in ("codes", "scale", "zero")]
    if lazy.spec is None:
        product = graph.add("MatMul", [x, f"{module}.weight"], y)
    elif lazy.spec.zeros == "integer":
        block = block_size(module, lazy.spec)
        product = graph.add("GroupQuantizedMatMul", [x, *parts], y, domain=DOMAIN, block_size=block)
    else:
        pooled = graph.pooled(x, lazy.spec.group_size, lazy.shape[1] // lazy.spec.group_size)
        product = graph.add(
            "GroupQuantizedMatMulReal",
            [x, pooled, *parts, f"{module}.residual"],
            y,
            domain=DOMAIN,
            block_size=block_size(module, lazy.spec),
        )
    if f"{module}.bias" in model.tensors:
        product = graph.add("Add", [product, f"{module}.bias"], f"{y}.biased")
    return product
