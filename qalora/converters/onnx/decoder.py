"""The parts of a decoder that both graphs build alike, from standard operators; `linear` is each graph's own product.

Initializers have the names of transformers' tensors. A norm of a family with `norm_offset` is held as 1 + weight.
Rotary tables are `rotary.cos`, `rotary.sin` (and `rotary_local.*`), [rows, rotated elements / 2], as `rotary_table`
lays them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.converters.decoder import FULL, LOCAL, Decoder, check_activation, used_ropes
from qalora.converters.onnx.graph import Graph
from qalora.converters.rope import check_rope, rotary_table, table_rows
from qalora.errors import InputError
from qalora.formats.onnx import Initializer

__all__ = [
    "TABLES",
    "Linear",
    "add_logits",
    "add_softcap",
    "added",
    "check_decoder",
    "embed",
    "feed_forward",
    "norm",
    "projections",
    "qk_norm",
    "rotary_parts",
    "rotary_tables",
    "tempered",
]

MAX_POSITIONS = 1 << 20

TABLES = {FULL: "rotary", LOCAL: "rotary_local"}
"""The name of each kind's rotary tables, before `.cos` and `.sin`."""

Linear = Callable[[str, str], str]
"""Adds the product of an activation with the weight of a module; gives the product's name."""


def check_decoder(decoder: Decoder, where: object) -> None:
    """Refuse what the graphs do not do."""
    check_activation(decoder, where)
    if decoder.head_size % 16:
        raise InputError(
            f"{where}: head size", expected="a multiple of 16", got=str(decoder.head_size), todo="use gguf"
        )
    if not 0 < decoder.positions <= MAX_POSITIONS:
        raise InputError(
            f"{where}: max_position_embeddings", expected=f"1..{MAX_POSITIONS}", got=str(decoder.positions)
        )
    for kind in used_ropes(decoder):
        check_rope(decoder.ropes[kind], decoder.head_size, where)


def rotary_parts(decoder: Decoder) -> list[Initializer]:
    """The initializers of the rotary tables."""
    parts = []
    for kind in used_ropes(decoder):
        rope = decoder.ropes[kind]
        shape = (table_rows(rope, decoder.positions), rope.size(decoder.head_size) // 2)
        parts += [Initializer(name=f"{TABLES[kind]}.{side}", dtype="FLOAT", shape=shape) for side in ("cos", "sin")]
    return parts


def rotary_tables(decoder: Decoder, where: object) -> Iterator[tuple[str, Tensor]]:
    """The data of `rotary_parts`, one kind of positions at a time."""
    for kind in used_ropes(decoder):
        tables = rotary_table(decoder.ropes[kind], decoder.head_size, decoder.positions, where)
        for side, table in zip(("cos", "sin"), tables, strict=True):
            yield f"{TABLES[kind]}.{side}", table


def embed(graph: Graph, decoder: Decoder, found: str | None = None) -> str:
    """Embeddings [batch, sequence, hidden], scaled where the family does; found: those that were looked up already."""
    found = found or graph.add("Gather", ["model.embed_tokens.weight", "input_ids"], "embedded")
    if decoder.embedding_scale == 1.0:
        return found
    return graph.add("Mul", [found, graph.number(decoder.embedding_scale)], "embedded_scaled")


def norm(graph: Graph, decoder: Decoder, x: str, module: str, out: str) -> str:
    """RMSNormalization over the last axis."""
    return graph.add("RMSNormalization", [x, f"{module}.weight"], out, axis=-1, epsilon=decoder.epsilon)


def projections(graph: Graph, decoder: Decoder, n: int, normed: str, linear: Linear) -> list[str]:
    """Queries, keys and values, [batch, sequence, heads * head size] each, before their rotation: normed, unless the
    family does that later."""
    path, out = f"model.layers.{n}.self_attn", f"layer{n}"
    counts = {"q": decoder.heads, "k": decoder.kv_heads, "v": decoder.kv_heads}
    if decoder.layers[n].parts.has("self_attn.qkv_proj"):
        sizes = graph.constant("qkv_sizes", [count * decoder.head_size for count in counts.values()])
        flat = [f"{out}.{name}" for name in counts]
        graph.add("Split", [linear(normed, f"{path}.qkv_proj"), sizes], flat[0], outputs=flat, axis=-1)
    else:
        flat = [linear(normed, f"{path}.{name}_proj") for name in counts]
    if not decoder.family.normed_late:
        flat[:2] = (qk_norm(graph, decoder, n, flat[at], name) for at, name in enumerate("qk"))
    return flat


def qk_norm(graph: Graph, decoder: Decoder, n: int, flat: str, name: str) -> str:
    """Queries ("q") or keys ("k"), [batch, sequence, heads * head size], normed where the layer has a norm of them."""
    module = decoder.layers[n].parts.named(f"attn_{name}_norm")
    if not module:
        return flat
    path, out = f"model.layers.{n}.{module}", f"layer{n}.{name}"
    if decoder.family.normed == "all":
        return norm(graph, decoder, flat, path, f"{out}_normed")
    count = decoder.heads if name == "q" else decoder.kv_heads
    shape = graph.constant(f"heads_{count}", [0, 0, count, decoder.head_size])
    split = graph.add("Reshape", [flat, shape], f"{out}_by_head")
    split = norm(graph, decoder, split, path, f"{out}_normed")
    whole = graph.constant(f"flat_{count}", [0, 0, count * decoder.head_size])
    return graph.add("Reshape", [split, whole], f"{out}_flat")


def tempered(graph: Graph, decoder: Decoder, queries: str, positions: str, axes: list[int], out: str) -> str:
    """Queries times 1 + beta * ln(1 + floor(position / original)), in a family that has such a beta.

    positions  int64 [batch, sequence]
    axes       those of queries that positions have not
    """
    beta = decoder.ropes[FULL].temperature
    if beta is None:
        return queries
    one = graph.number(1.0)
    original = graph.constant("original_context", decoder.ropes[FULL].original)
    turns = graph.once("Div", [positions, original], "position_turns")
    wide = graph.once("Cast", [turns], "position_turns_float", to=1)  # TensorProto.FLOAT
    grown = graph.once("Log", [graph.once("Add", [wide, one], "position_turns_next")], "position_log")
    times = graph.once("Mul", [grown, graph.number(beta)], "position_growth")
    factor = graph.once("Add", [times, one], "position_temperature")
    shape = graph.constant(f"temperature_axes_{len(axes)}", axes)
    return graph.add("Mul", [queries, graph.once("Unsqueeze", [factor, shape], "query_temperature")], out)


def feed_forward(graph: Graph, decoder: Decoder, n: int, normed: str, linear: Linear) -> str:
    """down(activation(gate) * up)."""
    parts, out = decoder.layers[n].parts, f"layer{n}"
    gate_module, up_module, down_module = (
        f"model.layers.{n}.{parts.named(f'ffn_{name}')}" if parts.named(f"ffn_{name}") else ""
        for name in ("gate", "up", "down")
    )
    if not gate_module:  # both in one
        sizes = graph.constant("gate_up_sizes", [decoder.intermediate, decoder.intermediate])
        halves = [f"{out}.gate", f"{out}.up"]
        graph.add("Split", [linear(normed, up_module), sizes], halves[0], outputs=halves, axis=-1)
        gate, up = halves
    else:
        gate, up = linear(normed, gate_module), linear(normed, up_module)
    if decoder.activation == "silu":
        active = graph.add("Mul", [gate, graph.add("Sigmoid", [gate], f"{out}.sigmoid")], f"{out}.silu")
    else:
        active = graph.add("Gelu", [gate], f"{out}.gelu", approximate="tanh")
    return linear(graph.add("Mul", [active, up], f"{out}.gated"), down_module)


def added(graph: Graph, decoder: Decoder, n: int, x: str, place: int) -> str:
    """What attention (place 0) or the MLP (1) adds to the hidden state: normed and scaled where the family does."""
    module, out = decoder.layers[n].parts.after[place], f"layer{n}.{('mixed', 'down')[place]}"
    if module:
        x = norm(graph, decoder, x, f"model.layers.{n}.{module}", f"{out}_normed")
    if decoder.residual_scale != 1.0:
        x = graph.add("Mul", [x, graph.number(decoder.residual_scale)], f"{out}_scaled")
    return x


def add_logits(graph: Graph, model: Checkpoint, decoder: Decoder, normed: str, linear: Linear) -> None:
    """The logits; a tied float output multiplies with the embedding as it is stored, [vocabulary, hidden]."""
    name = "logits" if decoder.logit_softcap is None and decoder.logit_divisor == 1.0 else "logits_uncapped"
    module = "model.embed_tokens" if model.tied else "lm_head"
    if f"{module}.codes" in graph.data:
        graph.add("Identity", [linear(normed, module)], name)
    else:
        _table_product(graph, normed, f"{module}.weight", decoder, name)
    if decoder.logit_divisor != 1.0:
        last = "logits" if decoder.logit_softcap is None else "logits_divided"
        name = graph.add("Div", [name, graph.number(decoder.logit_divisor)], last)
    if decoder.logit_softcap is not None:
        add_softcap(graph, name, decoder.logit_softcap, "logits")


def add_softcap(graph: Graph, x: str, cap: float, out: str) -> str:
    """cap * tanh(x / cap)."""
    number = graph.number(cap)
    divided = graph.add("Tanh", [graph.add("Div", [x, number], f"{out}.divided")], f"{out}.tanh")
    return graph.add("Mul", [divided, number], out)


def _table_product(graph: Graph, normed: str, weight: str, decoder: Decoder, out: str) -> None:
    """normed @ weight^T by Gemm, which takes the table as it is and needs no transposed copy."""
    rows = graph.add("Reshape", [normed, graph.constant("rows", [-1, decoder.hidden])], "output_rows")
    product = graph.add("Gemm", [rows, weight], "output_product", transB=1)
    shape = graph.add("Shape", ["input_ids"], "input_shape")
    wanted = graph.add("Concat", [shape, graph.constant("vocabulary", [decoder.vocabulary])], "logits_shape", axis=0)
    graph.add("Reshape", [product, wanted], out)
