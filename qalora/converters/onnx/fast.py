"""The graph for ONNX Runtime and onnxruntime-genai: fused attention, MatMulNBits, and the pooled branch beside it.

    y = MatMulNBits(x; codes, scale, zero) + pool(x) @ residual

pool(x) is shared by q, k and v, and by gate and up. A batch of different lengths is padded on the right: the fused
attention counts the ones of the mask. It rotates queries and keys itself, caps scores and keeps to a window; norms of
queries and keys, a longrope's two tables, and heads that are rotated in part only stand before it as nodes; where the
norms come after the rotation, so does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.decoder import FULL, Decoder, decoder_of
from qalora.converters.onnx.carriers import block_size, middles
from qalora.converters.onnx.decoder import (
    TABLES,
    Linear,
    add_logits,
    added,
    embed,
    feed_forward,
    norm,
    projections,
    qk_norm,
    tempered,
)
from qalora.converters.onnx.embedding import look_up, unpack
from qalora.converters.onnx.graph import MS, OPSET, SIDES, Graph, cache_names, graph_inputs, graph_outputs
from qalora.converters.onnx.products import Product, add_linear, coded, scale_of, zero_bytes
from qalora.converters.rope import two_tables
from qalora.formats.onnx import Initializer

__all__ = ["fast_graph"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lengths:
    """Names of what attention asks for: the last position of each sequence and the length of the longest, int32; and
    the positions of the new tokens, int64 [batch, sequence], where queries and keys are rotated before attention."""

    last: str
    total: str
    positions: str | None


def fast_graph(
    model: Checkpoint,
    data: Mapping[str, Initializer],
    location: str,
    orders: Mapping[str, str],
    metadata: Mapping[str, str],
    accuracy_level: int,
    *,
    in_browsers: bool = False,
) -> Any:
    """The ModelProto, its weights as stubs; `in_browsers`: with what onnxruntime-web has in a browser too."""
    from onnx import helper

    decoder, graph = decoder_of(model.config, model.path), Graph(data=data, location=location, orders=orders)
    product = _product(graph, accuracy_level)

    def by_module(x: str, module: str) -> str:
        return add_linear(graph, model, x, module, product)

    lengths = _lengths(graph, decoder)
    hidden = embed(graph, decoder, (unpack if in_browsers else look_up)(graph, model))
    first = decoder.layers[0].parts.before[0]
    normed = norm(graph, decoder, hidden, f"model.layers.0.{first}", "layer0.normed") if first else hidden
    for n in range(len(decoder.layers)):
        hidden, normed = _layer(graph, decoder, n, hidden, normed, lengths, by_module)
    add_logits(graph, model, decoder, normed, by_module)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)]
    return graph.model(decoder, graph_outputs(decoder), graph_inputs(decoder), metadata, opset_imports=opsets)


def _rotated_before(decoder: Decoder) -> bool:
    """Whether attention cannot rotate by itself: two tables to choose from, a part of each head, or what comes between
    the rotation and the scores: norms, or a factor of queries."""
    rope = decoder.ropes[FULL]
    parted = two_tables(rope, decoder.positions) or rope.size(decoder.head_size) != decoder.head_size
    return parted or decoder.family.normed_late or rope.temperature is not None


def _lengths(graph: Graph, decoder: Decoder) -> _Lengths:
    from onnx import TensorProto

    axis, one = graph.constant("axis1", [1]), graph.constant("one", [1])
    total = graph.add("ReduceSum", ["attention_mask", axis], "mask_sum", keepdims=0)
    last = graph.add("Sub", [total, one], "last_position")
    seqlens = graph.add("Cast", [last], "seqlens_k", to=TensorProto.INT32)
    shape = graph.add("Shape", ["attention_mask"], "mask_shape")
    length = graph.add("Gather", [shape, graph.constant("index1", 1)], "mask_length", axis=0)
    whole = graph.add("Cast", [length], "total_length", to=TensorProto.INT32)
    positions = _positions(graph, decoder, total) if _rotated_before(decoder) else None
    return _Lengths(last=seqlens, total=whole, positions=positions)


def _positions(graph: Graph, decoder: Decoder, total: str) -> str:
    """The row of the rotary tables for each new token: its position; past the first table where the longest sequence is
    beyond the original context. The first of `sequence` new tokens of a row stands at max(0, ones - sequence)."""
    index, zero = graph.constant("index1", 1), graph.constant("zero_scalar", 0)
    ids = graph.add("Shape", ["input_ids"], "ids_shape")
    sequence = graph.add("Gather", [ids, index], "sequence_length", axis=0)
    first = graph.add("Max", [graph.add("Sub", [total, sequence], "first_or_less"), zero], "first_position")
    rope = decoder.ropes[FULL]
    if two_tables(rope, decoder.positions):
        longest = graph.add("ReduceMax", [total], "longest", keepdims=0)
        original = graph.constant("original_context", rope.original)
        beyond = graph.add("Greater", [longest, original], "beyond_original")
        first = graph.add("Add", [first, graph.add("Where", [beyond, original, zero], "table_start")], "first_row")
    steps = graph.add("Range", [zero, sequence, graph.constant("one_scalar", 1)], "steps")
    column = graph.add("Unsqueeze", [first, graph.constant("axis1", [1])], "first_column")
    return graph.add("Add", [column, steps], "position_rows")


def _layer(
    graph: Graph, decoder: Decoder, n: int, hidden: str, normed: str, lengths: _Lengths, linear: Linear
) -> tuple[str, str]:
    """One layer; gives the hidden state before its last addition's normalisation, and the normalised one."""
    path, out = f"model.layers.{n}", f"layer{n}"
    mixed = linear(_attention(graph, decoder, n, normed, lengths, linear), f"{path}.self_attn.o_proj")
    mixed = added(graph, decoder, n, mixed, 0)
    middle = decoder.layers[n].parts.before[1]
    hidden, normed = _add_norm(graph, decoder, hidden, mixed, f"{path}.{middle}" if middle else "", f"{out}.middle")
    down = added(graph, decoder, n, feed_forward(graph, decoder, n, normed, linear), 1)
    last = n + 1 == len(decoder.layers)
    next_norm = "" if last else decoder.layers[n + 1].parts.before[0]
    following = "model.norm" if last else f"model.layers.{n + 1}.{next_norm}" if next_norm else ""
    return _add_norm(graph, decoder, hidden, down, following, f"{out}.end")


def _attention(graph: Graph, decoder: Decoder, n: int, normed: str, lengths: _Lengths, linear: Linear) -> str:
    layer, out = decoder.layers[n], f"layer{n}"
    heads = projections(graph, decoder, n, normed, linear)
    tables = [] if layer.rope is None else [f"{TABLES[layer.rope]}.{side}" for side in ("cos", "sin")]
    if layer.rope is not None and lengths.positions is not None:
        for at, name in enumerate("qk"):
            heads[at] = _rotate(graph, decoder, heads[at], name, [lengths.positions, *tables], out)
        heads[0] = tempered(graph, decoder, heads[0], lengths.positions, [2], f"{out}.q_tempered")
        tables = []
    if decoder.family.normed_late:
        heads[:2] = (qk_norm(graph, decoder, n, heads[at], name) for at, name in enumerate("qk"))
    past = [cache_names(n, side)[0] for side in SIDES]
    present = [cache_names(n, side)[1] for side in SIDES]
    optional: dict[str, Any] = {}
    if layer.window is not None:
        optional["local_window_size"] = layer.window
    if decoder.softcap is not None:
        optional["softcap"] = float(decoder.softcap)
    return graph.add(
        "GroupQueryAttention",
        [*heads, *past, lengths.last, lengths.total, *tables],
        f"{out}.attended",
        domain=MS,
        outputs=[f"{out}.attended", *present],
        num_heads=decoder.heads,
        kv_num_heads=decoder.kv_heads,
        scale=decoder.scale,
        do_rotary=int(bool(tables)),
        rotary_interleaved=int(decoder.family.interleaved),
        **optional,
    )


def _rotate(graph: Graph, decoder: Decoder, x: str, name: str, inputs: list[str], out: str) -> str:
    """Queries or keys by the rows of the tables."""
    partial: dict[str, Any] = {}
    size = decoder.ropes[FULL].size(decoder.head_size)
    if size != decoder.head_size:
        partial = {"rotary_embedding_dim": size, "num_heads": decoder.heads if name == "q" else decoder.kv_heads}
    if decoder.family.interleaved:
        partial["interleaved"] = 1
    return graph.add("RotaryEmbedding", [x, *inputs], f"{out}.{name}_rotated", domain=MS, **partial)


def _add_norm(graph: Graph, decoder: Decoder, hidden: str, change: str, module: str, out: str) -> tuple[str, str]:
    """hidden + change, and its normalisation, in one node; where there is no norm, the sum twice."""
    if not module:
        total = graph.add("Add", [hidden, change], f"{out}.sum")
        return total, total
    graph.add(
        "SkipSimplifiedLayerNormalization",
        [hidden, change, f"{module}.weight"],
        f"{out}.normed",
        domain=MS,
        outputs=[f"{out}.normed", "", "", f"{out}.sum"],
        epsilon=decoder.epsilon,
    )
    return f"{out}.sum", f"{out}.normed"


def _product(graph: Graph, accuracy_level: int) -> Product:
    """MatMulNBits. Its zero point is 8 where it is given none."""

    def product(x: str, module: str, half: str, lazy: LazyTensor, y: str) -> str:
        spec = coded(lazy)
        inputs = [x, f"{module}.codes{half}", scale_of(graph, module, lazy, spec, half)]
        if spec.zeros == "integer" or middles(spec.bits)[half] != 8:
            inputs.append(zero_bytes(graph, module, lazy, spec, half))
        return graph.add(
            "MatMulNBits",
            inputs,
            y,
            domain=MS,
            K=lazy.shape[1],
            N=lazy.shape[0],
            bits=4,
            block_size=block_size(module, spec),
            accuracy_level=accuracy_level,
        )

    return product
