"""The portable graph: standard operators, and quantized products as functions of our own domain in the same file.

    ai.qalora::GroupQuantizedMatMul(x, codes, scale, zero) -> x @ dequantize(codes, scale, zero)^T

The function's body is standard operators (Transpose, DequantizeLinear, MatMul), so that no native library is needed,
and onnx.reference runs the model too. The mask may have zeros anywhere: batches can be padded on either side.

ONNX Runtime turns DequantizeLinear + MatMul into MatMulNBits, at accuracy level 4 (int8 activations) unless the session
has session.qdq_matmulnbits_accuracy_level = "1"; genai_config.json beside the graph says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.decoder import FULL, Decoder, decoder_of
from qalora.converters.onnx.carriers import block_size, middles
from qalora.converters.onnx.decoder import (
    TABLES,
    Linear,
    add_logits,
    add_softcap,
    added,
    embed,
    feed_forward,
    norm,
    projections,
    tempered,
)
from qalora.converters.onnx.embedding import unpack
from qalora.converters.onnx.graph import OPSET, SIDES, Graph, cache_names, graph_inputs, graph_outputs
from qalora.converters.onnx.products import Product, add_linear, coded, scale_of
from qalora.converters.rope import two_tables
from qalora.formats.onnx import Initializer

__all__ = ["DOMAIN", "portable_graph"]

DOMAIN = "ai.qalora"
MASKED = -3.4028234663852886e38


def portable_graph(
    model: Checkpoint,
    data: Mapping[str, Initializer],
    location: str,
    orders: Mapping[str, str],
    metadata: Mapping[str, str],
) -> Any:
    """The ModelProto, its weights as stubs."""
    from onnx import helper

    decoder, graph = decoder_of(model.config, model.path), Graph(data=data, location=location, orders=orders)
    product = _product(graph)

    def by_module(x: str, module: str) -> str:
        return add_linear(graph, model, x, module, product)

    positions, biases = _positions(graph, decoder), _attention_biases(graph, decoder)
    hidden = embed(graph, decoder, unpack(graph, model))
    for n in range(len(decoder.layers)):
        hidden = _layer(graph, decoder, n, hidden, positions, biases[decoder.layers[n].window], by_module)
    add_logits(graph, model, decoder, norm(graph, decoder, hidden, "model.norm", "normed"), by_module)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return graph.model(
        decoder,
        graph_outputs(decoder),
        graph_inputs(decoder),
        metadata,
        opset_imports=opsets,
        functions=[_function()],
    )


def _function() -> Any:
    """x @ (scale * (codes - zero))^T. ONNX Runtime knows the product by DequantizeLinear of a transposed weight."""
    from onnx import AttributeProto, helper

    names = ("codes", "scale", "zero")
    turned = [helper.make_node("Transpose", [name], [f"{name}_by_column"], perm=[1, 0]) for name in names]
    dequantize = helper.make_node("DequantizeLinear", [f"{name}_by_column" for name in names], ["weight"], axis=0)
    size = dequantize.attribute.add()
    size.name, size.type, size.ref_attr_name = "block_size", AttributeProto.INT, "block_size"
    return helper.make_function(
        DOMAIN,
        "GroupQuantizedMatMul",
        ["x", *names],
        ["y"],
        [*turned, dequantize, helper.make_node("MatMul", ["x", "weight"], ["y"])],
        [helper.make_opsetid("", OPSET)],
        attributes=["block_size"],
    )


def _positions(graph: Graph, decoder: Decoder) -> str:
    """The row of the rotary tables for each new token: how many ones stand before it in its row of the mask; past the
    first table where the longest sequence is beyond the original context."""
    axis = graph.constant("mask_axis", 1)
    counted = graph.add("CumSum", ["attention_mask", axis], "mask_counted")
    from_zero = graph.add("Sub", [counted, graph.constant("one", [1])], "mask_positions")
    positive = graph.add("Max", [from_zero, graph.constant("zero_positions", [0])], "mask_positive")
    sequence, total = _lengths(graph)
    first = graph.add("Sub", [total, sequence], "past_length")
    positions = graph.add("Slice", [positive, first, total, graph.constant("axis1", [1])], "positions")
    rope = decoder.ropes[FULL]
    if not two_tables(rope, decoder.positions):
        return positions
    longest = graph.add("ReduceMax", [counted], "longest", keepdims=0)
    original, zero = graph.constant("original_context", rope.original), graph.constant("zero_scalar", 0)
    beyond = graph.add("Greater", [longest, original], "beyond_original")
    start = graph.add("Where", [beyond, original, zero], "table_start")
    return graph.add("Add", [positions, start], "position_rows")


def _lengths(graph: Graph) -> tuple[str, str]:
    index = graph.constant("index1", [1])
    ids, mask = graph.add("Shape", ["input_ids"], "ids_shape"), graph.add("Shape", ["attention_mask"], "mask_shape")
    sequence = graph.add("Gather", [ids, index], "sequence_length", axis=0)
    return sequence, graph.add("Gather", [mask, index], "total_length", axis=0)


def _attention_biases(graph: Graph, decoder: Decoder) -> dict[int | None, str]:
    """For each window, float32 [batch, 1, sequence, total]: 0 where a token may look, the lowest float where not."""
    from onnx import TensorProto

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
    found: dict[int | None, str] = {}
    for window in dict.fromkeys(layer.window for layer in decoder.layers):
        seen, name = allowed, "attention_bias"
        if window is not None:
            name = f"attention_bias_{window}"
            edge = graph.add("Sub", [rows, graph.constant(f"window_{window}", window)], f"edge_{window}")
            within = graph.add("Greater", [columns, edge], f"within_{window}")
            seen = graph.add("And", [allowed, within], f"allowed_{window}")
        found[window] = graph.add("Where", [seen, graph.number(0.0), graph.number(MASKED)], name)
    return found


def _layer(graph: Graph, decoder: Decoder, n: int, hidden: str, positions: str, bias: str, linear: Linear) -> str:
    out, (first, second) = f"layer{n}", decoder.layers[n].parts.before

    def normed(x: str, module: str, name: str) -> str:
        return norm(graph, decoder, x, f"model.layers.{n}.{module}", name) if module else x

    mixed = _attention(graph, decoder, n, normed(hidden, first, f"{out}.normed"), positions, bias, linear)
    hidden = graph.add("Add", [hidden, added(graph, decoder, n, mixed, 0)], f"{out}.middle")
    down = feed_forward(graph, decoder, n, normed(hidden, second, f"{out}.middle_normed"), linear)
    return graph.add("Add", [hidden, added(graph, decoder, n, down, 1)], f"{out}.end")


def _attention(graph: Graph, decoder: Decoder, n: int, normed: str, positions: str, bias: str, linear: Linear) -> str:
    out, layer, heads = f"layer{n}", decoder.layers[n], []
    counts = {"q": decoder.heads, "k": decoder.kv_heads, "v": decoder.kv_heads}
    for name, flat in zip(counts, projections(graph, decoder, n, normed, linear), strict=True):
        shape = graph.constant(f"heads_{counts[name]}", [0, 0, counts[name], decoder.head_size])
        split = graph.add("Reshape", [flat, shape], f"{out}.{name}_split")
        turned = graph.add("Transpose", [split], f"{out}.{name}_heads", perm=[0, 2, 1, 3])
        if name != "v" and layer.rope is not None:
            turned = _rotate(graph, decoder, turned, layer.rope, positions, f"{out}.{name}_rotated")
        if name == "q":
            turned = tempered(graph, decoder, turned, positions, [1, 3], f"{out}.q_tempered")
        if name != "v" and decoder.family.normed_late:
            module = f"model.layers.{n}.{layer.parts.named(f'attn_{name}_norm')}"
            turned = norm(graph, decoder, turned, module, f"{out}.{name}_normed")
        heads.append(turned)
    attended = _attend(graph, decoder, n, heads, bias)
    back = graph.add("Transpose", [attended], f"{out}.attended_split", perm=[0, 2, 1, 3])
    flat_shape = graph.constant("flat_heads", [0, 0, decoder.heads * decoder.head_size])
    flat = graph.add("Reshape", [back, flat_shape], f"{out}.attended")
    return linear(flat, f"model.layers.{n}.self_attn.o_proj")


def _rotate(graph: Graph, decoder: Decoder, x: str, kind: str, positions: str, out: str) -> str:
    size = decoder.ropes[kind].size(decoder.head_size)
    partial: dict[str, Any] = {} if size == decoder.head_size else {"rotary_embedding_dim": size}
    if decoder.family.interleaved:
        partial["interleaved"] = 1
    tables = [f"{TABLES[kind]}.{side}" for side in ("cos", "sin")]
    return graph.add("RotaryEmbedding", [x, *tables, positions], out, **partial)


def _attend(graph: Graph, decoder: Decoder, n: int, heads: list[str], bias: str) -> str:
    """[batch, heads, sequence, head size]. Capped scores are written out, since versions of the Attention operator cap
    before the mask is added and after it: then -inf becomes -cap, and nothing is masked."""
    out = f"layer{n}.attended_heads"
    past, present = [[cache_names(n, side)[which] for side in SIDES] for which in (0, 1)]
    if decoder.softcap is None:
        names = [out, *present]
        return graph.add("Attention", [*heads, bias, *past], out, outputs=names, scale=decoder.scale)
    grouped = []
    for head, old, new in zip(heads[1:], past, present, strict=True):
        graph.add("Concat", [old, head], new, axis=2)
        grouped.append(graph.add("Unsqueeze", [new, graph.constant("axis2", [2])], f"{new}.grouped"))
    times = decoder.heads // decoder.kv_heads
    shape = graph.constant("query_groups", [0, decoder.kv_heads, times, -1, decoder.head_size])
    query = graph.add("Reshape", [heads[0], shape], f"{out}.query_groups")
    keys = graph.add("Transpose", [grouped[0]], f"{out}.keys", perm=[0, 1, 2, 4, 3])
    product = graph.add("MatMul", [query, keys], f"{out}.product")
    scores = graph.add("Mul", [product, graph.number(decoder.scale)], f"{out}.scores")
    capped = add_softcap(graph, scores, decoder.softcap, f"{out}.capped")
    masked = graph.add(
        "Add", [capped, graph.add("Unsqueeze", [bias, graph.constant("axis1", [1])], f"{out}.bias")], f"{out}.masked"
    )
    weights = graph.add("Softmax", [masked], f"{out}.weights", axis=-1)
    mixed = graph.add("MatMul", [weights, grouped[1]], f"{out}.groups")
    return graph.add("Reshape", [mixed, graph.constant("all_heads", [0, decoder.heads, -1, decoder.head_size])], out)


def _product(graph: Graph) -> Product:
    """The function of our own."""

    def product(x: str, module: str, half: str, lazy: LazyTensor, y: str) -> str:
        spec = coded(lazy)
        scale, zero = scale_of(graph, module, lazy, spec, half), _zeros(graph, module, lazy, half)
        inputs = [x, f"{module}.codes{half}", scale, zero]
        return graph.add("GroupQuantizedMatMul", inputs, y, domain=DOMAIN, block_size=block_size(module, spec))

    return product


def _zeros(graph: Graph, module: str, lazy: LazyTensor, half: str) -> str:
    """UINT4 [out, in/block]: the zero points of a half. ONNX has no Slice of UINT4."""
    from onnx import TensorProto, helper

    spec, rows = coded(lazy), lazy.shape[0]
    blocks = lazy.shape[1] // block_size(module, spec)
    if spec.zeros == "real":
        middle = middles(spec.bits)[half]
        shape = graph.constant(f"blocks_{rows}x{blocks}", [rows, blocks])
        value = helper.make_tensor("value", TensorProto.UINT8, [1], [middle])
        name = f"middle_{middle}.{rows}x{blocks}"
        wide = graph.once("ConstantOfShape", [shape], f"{name}.bytes", value=value)
    elif blocks % 2:
        name = f"{module}.zero{half}_rows"
        wide = graph.once("Cast", [f"{module}.zero{half}"], f"{name}.bytes", to=TensorProto.UINT8)
        limits = [graph.constant(f"number_{value}", [value]) for value in (0, blocks, 1)]
        wide = graph.once("Slice", [wide, *limits], f"{name}.cut")
    else:
        return f"{module}.zero{half}"
    return graph.once("Cast", [wide], name, to=TensorProto.UINT4)
