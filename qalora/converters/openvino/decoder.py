"""The graph of a decoder, with its cache as state of the model.

    input_ids, attention_mask, position_ids   int64 [batch, new], [batch, all], [batch, new]
    beam_idx                                  int32 [batch]: which row of the cache each row goes on from
    logits                                    float32 [batch, new, vocabulary]

The mask may have zeros anywhere: a batch can be padded on either side. Angles are computed from positions, as
transformers does. Layers have the forms that OpenVINO fuses: RMS, RoPE, ScaledDotProductAttention with its cache, and
products with packed codes (`carriers`). The variables of the cache are called as optimum calls them, by which
openvino-genai knows their layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qalora.checkpoint import Checkpoint
from qalora.converters.decoder import FULL, Decoder, check_activation, decoder_of, used_ropes
from qalora.converters.openvino.carriers import weight
from qalora.converters.openvino.graph import LAST, Graph
from qalora.converters.rope import check_rope, frequencies, two_tables
from qalora.errors import InputError
from qalora.formats.openvino import Constant

__all__ = ["FREQUENCIES", "build", "check_decoder", "layer_end"]

FREQUENCIES = "rotary.{}.frequencies{}"
"""The constant of a kind of rotary positions; the second is that beyond the original context."""

MASKED = -3.4028234663852886e38
EMBEDDING = "model.embed_tokens"


def layer_end(n: int) -> str:
    """The layer that gives the hidden state after a decoder layer."""
    return f"layer{n}.end"


def check_decoder(decoder: Decoder, where: object) -> None:
    """Refuse what the graph does not do."""
    check_activation(decoder, where)
    for kind in used_ropes(decoder):
        check_rope(decoder.ropes[kind], decoder.head_size, where)
    if decoder.head_size % 2:
        raise InputError(f"{where}: head size", expected="an even number", got=str(decoder.head_size), todo="use gguf")


def build(model: Checkpoint, data: Mapping[str, Constant], orders: Mapping[str, str]) -> Graph:
    """The layers, from parameters to results."""
    builder = _Builder(model, Graph(data=data, orders=orders))
    builder.build()
    return builder.graph


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shapes:
    """Names of what every layer asks for.

    biases  for each window, float32 [batch, 1, new, all]: 0 where a token may look, the lowest float where not
    angles  for each kind of rotary positions, cos and sin, float32 [batch, 1, new, rotated elements, or half of them]
    """

    biases: Mapping[int | None, str]
    angles: Mapping[str, tuple[str, str]]


class _Builder:
    def __init__(self, model: Checkpoint, graph: Graph) -> None:
        self.model, self.graph = model, graph
        self.decoder = decoder_of(model.config, model.path)

    def build(self) -> None:
        graph, decoder = self.graph, self.decoder
        for name, shape, element in (
            ("input_ids", "?,?", "i64"),
            ("attention_mask", "?,?", "i64"),
            ("position_ids", "?,?", "i64"),
            ("beam_idx", "?", "i32"),
        ):
            graph.add("Parameter", [], name, outputs=(element,), called=name, shape=shape, element_type=element)
        hidden = self._embedded()
        shapes = self._shapes()
        for n in range(len(decoder.layers)):
            hidden = self._layer(n, hidden, shapes)
        self._logits(self._norm(hidden, "model.norm", "normed"))

    def _embedded(self) -> str:
        """[batch, new, hidden], scaled where the family does."""
        graph, lazy = self.graph, self.model.tensors[f"{EMBEDDING}.weight"]
        ids = graph.add("Convert", ["input_ids"], "ids32", outputs=("i32",), destination_type="i32")
        found = graph.add("Gather", [weight(graph, EMBEDDING, lazy), ids, graph.whole(0)], "embedded")
        scale = self.decoder.embedding_scale
        return found if scale == 1.0 else graph.add("Multiply", [found, graph.number(scale)], "embedded_scaled")

    def _shapes(self) -> _Shapes:
        graph = self.graph
        size = graph.add("ShapeOf", ["input_ids"], "ids_shape", outputs=("i64",))
        batch = graph.add("Gather", [size, graph.sizes(0), graph.whole(0)], "batch", outputs=("i64",))
        new = graph.add("Gather", [size, graph.whole(1), graph.whole(0)], "new", outputs=("i64",))
        return _Shapes(
            biases=self._biases(batch, new),
            angles={kind: self._angles(kind) for kind in used_ropes(self.decoder)},
        )

    def _biases(self, batch: str, new: str) -> dict[int | None, str]:
        graph, flag = self.graph, ("boolean",)
        size = graph.add("ShapeOf", ["attention_mask"], "mask_shape", outputs=("i64",))
        total = graph.add("Gather", [size, graph.whole(1), graph.whole(0)], "total", outputs=("i64",))
        past = graph.add("Subtract", [total, new], "past", outputs=("i64",))
        columns = graph.add("Range", [graph.whole(0), total, graph.whole(1)], "columns", outputs=("i64",))
        numbers = graph.add("Range", [past, total, graph.whole(1)], "row_numbers", outputs=("i64",))
        rows = graph.add("Unsqueeze", [numbers, graph.sizes(1)], "rows", outputs=("i64",))
        causal = graph.add("LessEqual", [columns, rows], "causal", outputs=flag)
        kept = graph.add("NotEqual", ["attention_mask", graph.whole(0)], "kept", outputs=flag)
        kept = graph.add("Unsqueeze", [kept, graph.sizes(1, 2)], "kept_wide", outputs=flag)
        found: dict[int | None, str] = {}
        for window in dict.fromkeys(layer.window for layer in self.decoder.layers):
            if window is None:
                allowed = graph.add("LogicalAnd", [causal, kept], "allowed", outputs=flag)
                found[None] = graph.add("Select", [allowed, graph.number(0.0), graph.number(MASKED)], "bias")
            else:
                whole = [batch, graph.sizes(1), *(self._vector(size) for size in (new, total))]
                shape = graph.add("Concat", whole, "bias_shape", outputs=("i64",), axis="0")
                found[window] = self._window_bias(window, columns, rows, causal, kept, shape)
        return found

    def _vector(self, x: str) -> str:
        return self.graph.add("Unsqueeze", [x, self.graph.sizes(0)], f"{x}_vector", outputs=("i64",))

    def _window_bias(self, window: int, columns: str, rows: str, causal: str, kept: str, shape: str) -> str:
        """The bias of a window, in the form by which openvino-genai's paged attention finds the window's size: it drops
        any mask, and knows a window by the layers that transformers' gpt-oss makes of one. Source: openvino,
        state_management_pattern.cpp, gpt_oss_sliding_window_pattern.
        """
        graph, name = self.graph, f"bias_{window}"
        edge = graph.add("Add", [rows, graph.whole(-window)], f"{name}.edge", outputs=("i64",))
        seen = graph.add("Greater", [columns, edge], f"{name}.within", outputs=("boolean",))
        for n, pair in enumerate(((causal, None), (None, kept), (causal, None), (None, kept))):
            inputs = [seen if one is None else one for one in pair]
            seen = graph.add("BitwiseAnd", inputs, f"{name}.seen{n}", outputs=("boolean",))
        every = graph.add("Broadcast", [seen, shape], f"{name}.every", outputs=("boolean",), mode="numpy")
        chosen = graph.add("Select", [every, graph.number(0.0), graph.number(MASKED)], f"{name}.chosen")
        return graph.sliced(chosen, 0, LAST, 1, 3, name)

    def _angles(self, kind: str) -> tuple[str, str]:
        """cos and sin of position times frequency, each half of the rotated elements the same; half of them where
        neighbours are rotated."""
        graph, decoder, rope = self.graph, self.decoder, self.decoder.ropes[kind]
        out = f"rotary.{kind}"
        tables, factor = frequencies(rope, decoder.head_size, decoder.positions, self.model.path)
        names = [
            graph.values(FREQUENCIES.format(kind, "_beyond" * n), table.view(1, -1, 1))
            for n, table in enumerate(tables)
        ]
        used = names[0]
        if two_tables(rope, decoder.positions):
            last = graph.add("ReduceMax", ["position_ids", graph.sizes(0, 1)], "last_position", outputs=("i64",))
            start = graph.whole(rope.original - 1)
            beyond = graph.add("Greater", [last, start], f"{out}.beyond", outputs=("boolean",))
            used = graph.add("Select", [beyond, names[1], names[0]], f"{out}.chosen")
        wide = graph.add("Unsqueeze", ["position_ids", graph.sizes(1)], "positions_wide", outputs=("i64",))
        positions = graph.add("Convert", [wide], "positions", destination_type="f32")
        # [batch, pairs, new]: a product of one column and one row, which transformers has too
        batch = graph.add("Concat", ["batch", graph.sizes(1), graph.sizes(1)], "batch_wide", outputs=("i64",), axis="0")
        used = graph.add("Broadcast", [used, batch], f"{out}.each")
        product = graph.add("MatMul", [used, positions], f"{out}.product")
        angles = graph.add("Transpose", [product, graph.sizes(0, 2, 1)], f"{out}.angles")
        if not decoder.family.interleaved:
            angles = graph.add("Concat", [angles, angles], f"{out}.both", axis="-1")
        found = []
        for side in ("Cos", "Sin"):
            name = f"{out}.{side.lower()}"
            values = graph.add(side, [angles], name)
            if factor != 1.0:
                values = graph.add("Multiply", [values, graph.number(factor)], f"{name}_scaled")
            found.append(graph.add("Unsqueeze", [values, graph.sizes(1)], f"{name}_wide"))
        return found[0], found[1]

    def _layer(self, n: int, hidden: str, shapes: _Shapes) -> str:
        graph, out, (first, second) = self.graph, f"layer{n}", self.decoder.layers[n].parts.before

        def normed(x: str, module: str, name: str) -> str:
            return self._norm(x, f"model.layers.{n}.{module}", name) if module else x

        mixed = self._attention(n, normed(hidden, first, f"{out}.normed"), shapes)
        hidden = graph.add("Add", [hidden, self._added(n, mixed, 0)], f"{out}.middle")
        down = self._feed_forward(n, normed(hidden, second, f"{out}.middle_normed"))
        return graph.add("Add", [hidden, self._added(n, down, 1)], layer_end(n))

    def _added(self, n: int, x: str, place: int) -> str:
        """What attention (place 0) or the MLP (1) adds to the hidden state: normed and scaled where the family does."""
        graph, module = self.graph, self.decoder.layers[n].parts.after[place]
        out, scale = f"layer{n}.{('mixed', 'down')[place]}", self.decoder.residual_scale
        if module:
            x = self._norm(x, f"model.layers.{n}.{module}", f"{out}_normed")
        return x if scale == 1.0 else graph.add("Multiply", [x, graph.number(scale)], f"{out}_scaled")

    def _norm(self, x: str, module: str, out: str) -> str:
        """x / sqrt(mean(x^2) + epsilon) * weight over the last axis."""
        graph = self.graph
        square = graph.add("Power", [x, graph.number(2.0)], f"{out}.square")
        mean = graph.add("ReduceMean", [square, graph.sizes(-1)], f"{out}.mean")
        shifted = graph.add("Add", [mean, graph.number(self.decoder.epsilon)], f"{out}.shifted")
        root = graph.add("Sqrt", [shifted], f"{out}.root")
        inverse = graph.add("Divide", [graph.number(1.0), root], f"{out}.inverse")
        scaled = graph.add("Multiply", [x, inverse], f"{out}.scaled")
        return graph.add("Multiply", [scaled, graph.stored(f"{module}.weight")], out)

    def _linear(self, x: str, module: str) -> str:
        graph, lazy = self.graph, self.model.tensors[f"{module}.weight"]
        inputs = [graph.ordered(x, module), weight(graph, module, lazy)]
        made = graph.add("MatMul", inputs, f"{module}.out", transpose_b="true")
        if f"{module}.bias" not in self.model.tensors:
            return made
        return graph.add("Add", [made, graph.wide(f"{module}.bias")], f"{module}.biased")

    def _attention(self, n: int, normed: str, shapes: _Shapes) -> str:
        graph, decoder, layer, out = self.graph, self.decoder, self.decoder.layers[n], f"layer{n}"
        counts, heads = {"q": decoder.heads, "k": decoder.kv_heads, "v": decoder.kv_heads}, {}
        for name, flat in zip(counts, self._projections(n, normed), strict=True):
            early = name != "v" and not decoder.family.normed_late
            if early and decoder.family.normed == "all":
                flat = self._head_norm(n, flat, name)
            split = graph.add("Reshape", [flat, graph.sizes(0, 0, counts[name], decoder.head_size)], f"{out}.{name}")
            if early and decoder.family.normed != "all":
                split = self._head_norm(n, split, name)
            turned = graph.turned(split, f"{out}.{name}_heads")
            if name != "v" and layer.rope is not None:
                turned = self._rotated(turned, layer.rope, shapes, f"{out}.{name}_rotated")
            if name == "q":
                turned = self._tempered(turned, f"{out}.q_tempered")
            if name != "v" and decoder.family.normed_late:
                turned = self._head_norm(n, turned, name)
            heads[name] = turned
        attended = self._attended(n, heads, shapes)
        back = graph.turned(attended, f"{out}.attended_split")
        flat = graph.add("Reshape", [back, graph.sizes(0, 0, decoder.heads * decoder.head_size)], f"{out}.attended")
        return self._linear(flat, f"model.layers.{n}.self_attn.o_proj")

    def _projections(self, n: int, normed: str) -> list[str]:
        """Queries, keys and values, [batch, new, heads * head size] each."""
        path, decoder = f"model.layers.{n}.self_attn", self.decoder
        if not decoder.layers[n].parts.has("self_attn.qkv_proj"):
            return [self._linear(normed, f"{path}.{name}_proj") for name in "qkv"]
        sizes = [count * decoder.head_size for count in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
        return self._split(self._linear(normed, f"{path}.qkv_proj"), sizes, f"layer{n}.qkv")

    def _split(self, x: str, sizes: list[int], name: str) -> list[str]:
        inputs = [x, self.graph.whole(-1), self.graph.sizes(*sizes)]
        self.graph.add("VariadicSplit", inputs, name, outputs=("f32",) * len(sizes))
        return [f"{name}:{n}" for n in range(len(sizes))]

    def _head_norm(self, n: int, x: str, name: str) -> str:
        """Queries ("q") or keys ("k") normed where the layer has a norm of them."""
        module = self.decoder.layers[n].parts.named(f"attn_{name}_norm")
        return self._norm(x, f"model.layers.{n}.{module}", f"layer{n}.{name}_normed") if module else x

    def _rotated(self, x: str, kind: str, shapes: _Shapes, out: str) -> str:
        """x, [batch, heads, new, head size], rotated: its halves, or neighbours, as far as the rope goes."""
        graph, whole = self.graph, self.decoder.head_size
        size = self.decoder.ropes[kind].size(whole)
        rest = ""
        if size < whole:
            x, rest = self._split(x, [size, whole - size], f"{out}.parts")
        cos, sin = shapes.angles[kind]
        if self.decoder.family.interleaved:
            turned = self._neighbours(x, cos, sin, size, out)
        else:
            first = graph.sliced(x, 0, size // 2, 1, 3, f"{out}.first")
            second = graph.sliced(x, size // 2, LAST, 1, 3, f"{out}.second")
            minus = graph.add("Multiply", [second, graph.number(-1.0)], f"{out}.minus")
            across = graph.add("Concat", [minus, first], f"{out}.across", axis="-1")
            straight = graph.add("Multiply", [x, cos], f"{out}.straight")
            across = graph.add("Multiply", [across, sin], f"{out}.turned")
            turned = graph.add("Add", [straight, across], f"{out}.sum")
        return graph.add("Concat", [turned, rest], out, axis="-1") if rest else turned

    def _neighbours(self, x: str, cos: str, sin: str, size: int, out: str) -> str:
        """Each pair of neighbours (a, b) becomes (a cos - b sin, b cos + a sin)."""
        graph = self.graph
        even, odd = (graph.sliced(x, at, LAST, 2, 3, f"{out}.{('even', 'odd')[at]}") for at in (0, 1))
        parts = []
        for one, other, sign in ((even, odd, "Subtract"), (odd, even, "Add")):
            straight = graph.add("Multiply", [one, cos], f"{one}.cos")
            across = graph.add("Multiply", [other, sin], f"{other}.sin")
            part = graph.add(sign, [straight, across], f"{one}.sum")
            parts.append(graph.add("Unsqueeze", [part, graph.sizes(-1)], f"{one}.wide"))
        pairs = graph.add("Concat", parts, f"{out}.pairs", axis="-1")
        return graph.add("Reshape", [pairs, graph.sizes(0, 0, 0, size)], f"{out}.sum")

    def _tempered(self, queries: str, out: str) -> str:
        """Queries times 1 + beta * ln(1 + floor(position / original)), in a family that has such a beta."""
        rope = self.decoder.ropes[FULL]
        if rope.temperature is None:
            return queries
        graph, one = self.graph, self.graph.number(1.0)
        turns = graph.add("Divide", ["position_ids", graph.whole(rope.original)], "turns", outputs=("i64",))
        wide = graph.add("Convert", [turns], "turns32", destination_type="f32")
        grown = graph.add("Log", [graph.add("Add", [wide, one], "turns_next")], "turns_log")
        times = graph.add("Multiply", [grown, graph.number(rope.temperature)], "growth")
        factor = graph.add("Add", [times, one], "temperature")
        shaped = graph.add("Unsqueeze", [factor, graph.sizes(1, 3)], "temperature_wide")
        return graph.add("Multiply", [queries, shaped], out)

    def _cached(self, n: int, side: str, new: str) -> str:
        """All keys or values, [batch, key-value heads, all, head size]: those of the state, then the new ones."""
        graph, heads, size = self.graph, self.decoder.kv_heads, self.decoder.head_size
        name, variable = f"layer{n}.{side}", f"past_key_values.{n}.{side}present.{n}.{side}"
        shape = ["batch", *map(graph.sizes, (heads, 0, size))]
        empty = graph.add("Concat", shape, "empty_shape", outputs=("i64",), axis="0")
        empty = graph.add("Broadcast", [graph.number(0.0), empty], "empty", mode="numpy")
        shaped = f"?,{heads},?,{size}"
        past = graph.add(
            "ReadValue", [empty], f"{name}.state", variable_id=variable, variable_type="f32", variable_shape=shaped
        )
        past = graph.add("Gather", [past, "beam_idx", graph.whole(0)], f"{name}.past")
        whole = graph.add("Concat", [past, new], f"{name}.all", axis="2")
        graph.add("Assign", [whole], f"{name}.kept", variable_id=variable)
        return whole

    def _attended(self, n: int, heads: Mapping[str, str], shapes: _Shapes) -> str:
        """[batch, heads, new, head size]. Capped scores have no fused operator."""
        graph, decoder, out = self.graph, self.decoder, f"layer{n}"
        bias = shapes.biases[decoder.layers[n].window]
        keys, values = (
            self._repeated(self._cached(n, side, heads[side[0]]), f"{out}.{side}s") for side in ("key", "value")
        )
        if decoder.softcap is None:
            inputs = [heads["q"], keys, values, bias, graph.number(decoder.scale)]
            return graph.add("ScaledDotProductAttention", inputs, f"{out}.attention")
        product = graph.add("MatMul", [heads["q"], keys], f"{out}.product", transpose_b="true")
        scores = graph.add("Multiply", [product, graph.number(decoder.scale)], f"{out}.scores")
        masked = graph.add("Add", [self._capped(scores, decoder.softcap, f"{out}.capped"), bias], f"{out}.masked")
        return graph.add("MatMul", [graph.add("SoftMax", [masked], f"{out}.weights"), values], f"{out}.attention")

    def _repeated(self, x: str, out: str) -> str:
        """Each head of keys or values once for every head of queries that it serves."""
        graph, decoder = self.graph, self.decoder
        times = decoder.heads // decoder.kv_heads
        if times == 1:
            return x
        one = graph.add("Unsqueeze", [x, graph.sizes(2)], f"{out}.one")
        every = graph.add("Broadcast", [one, graph.sizes(1, 1, times, 1, 1)], f"{out}.every")
        return graph.add("Reshape", [every, graph.sizes(0, decoder.heads, -1, decoder.head_size)], out)

    def _capped(self, x: str, cap: float, out: str) -> str:
        """cap * tanh(x / cap)."""
        graph, number = self.graph, self.graph.number(cap)
        divided = graph.add("Divide", [x, number], f"{out}.divided")
        return graph.add("Multiply", [graph.add("Tanh", [divided], f"{out}.tanh"), number], out)

    def _feed_forward(self, n: int, normed: str) -> str:
        """down(activation(gate) * up)."""
        graph, parts, out = self.graph, self.decoder.layers[n].parts, f"layer{n}"
        gate, up, down = (
            f"model.layers.{n}.{parts.named(f'ffn_{name}')}" if parts.named(f"ffn_{name}") else ""
            for name in ("gate", "up", "down")
        )
        if gate:
            halves = [self._linear(normed, gate), self._linear(normed, up)]
        else:  # both in one
            halves = self._split(self._linear(normed, up), [self.decoder.intermediate] * 2, f"{out}.gate_up")
        kind = "Swish" if self.decoder.activation == "silu" else "Gelu"
        active = graph.add(kind, [halves[0]], f"{out}.active")
        return self._linear(graph.add("Multiply", [active, halves[1]], f"{out}.gated"), down)

    def _logits(self, normed: str) -> None:
        graph, decoder, tied = self.graph, self.decoder, self.model.tied
        x = self._linear(normed, EMBEDDING if tied else "lm_head")
        if decoder.logit_divisor != 1.0:
            x = graph.add("Divide", [x, graph.number(decoder.logit_divisor)], "logits_divided")
        if decoder.logit_softcap is not None:
            x = self._capped(x, decoder.logit_softcap, "logits_capped")
        graph.layers[-1] = replace(graph.layers[-1], names="logits")
        graph.add("Result", [x], "result", outputs=())
