"""The graph of a decoder as MNN's LLM engine runs it.

    input_ids       float32 [new, 1, hidden]: the embeddings, which the engine looks up by itself
    attention_mask  float32: a scalar where every token sees those before it, which the engine's CPU kernels know
    position_ids    int32 [1, new]
    logits_index    int32 [1]: the first position whose logits are asked for: 0, or -1
    logits          float32 [1, asked for, vocabulary]

The cache is in the operator Attention, whose scale is the head size ** -0.5. Weights are in the file beside the graph.

Source: MNN 3.6.1, transformers/llm/engine/src/llm.cpp; transformers/llm/export/utils/transformers.py, mnn_converter.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.decoder import Decoder, check_activation, decoder_of, used_ropes
from qalora.converters.mnn.graph import END, Graph
from qalora.converters.rope import check_rope, frequencies, two_tables
from qalora.errors import InputError

__all__ = ["EMBEDDING", "FAMILIES", "FREQUENCIES", "VERSION", "build", "check_decoder", "engine_config"]

EMBEDDING = "model.embed_tokens"
FREQUENCIES = "rotary.{}.frequencies"
VERSION = "3.6.1"
"""The version of MNN whose schema and operators the graph has."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""What is built here: norms before attention and MLP, halves that are rotated, no window, no caps."""


def check_decoder(decoder: Decoder, where: object) -> None:
    """Refuse what the graph does not do."""
    family = decoder.family
    check_activation(decoder, where)
    if family.model_type not in FAMILIES:
        expected = f"one of {', '.join(FAMILIES)}"
        raise InputError("mnn: model_type", expected=expected, got=family.model_type, todo="use gguf")
    for kind in used_ropes(decoder):
        rope = decoder.ropes[kind]
        check_rope(rope, decoder.head_size, where)
        if two_tables(rope, decoder.positions) or rope.temperature is not None:
            raise _missing("rotary positions that change with the length of the text")
        if rope.size(decoder.head_size) != decoder.head_size:
            raise _missing("heads that are rotated in part")
    if any(layer.window is not None for layer in decoder.layers):
        raise _missing("a sliding window")
    if decoder.scale != decoder.head_size**-0.5:
        raise _missing("scores with a scale of their own")
    if decoder.head_size % 2:
        raise InputError(f"{where}: head size", expected="an even number", got=str(decoder.head_size), todo="use gguf")


def engine_config(decoder: Decoder) -> dict[str, Any]:
    """What llm_config.json says of a decoder to MNN's engine."""
    return {
        "hidden_size": decoder.hidden,
        "layer_nums": len(decoder.layers),
        "key_value_shape": [2, 1, 0, decoder.kv_heads, decoder.head_size],
        "attention_mask": "float",
        "attention_type": "full",
        "is_visual": False,
    }


def _missing(what: str) -> InputError:
    return InputError(f"mnn: {what}", expected="a model without", got="one with", todo="use gguf")


def build(model: Checkpoint, place: Callable[[str], Mapping[str, Any]]) -> bytes:
    """The graph; place: what an operator says of the bytes of a linear module, or of a norm."""
    return _Builder(model, place).build()


class _Builder:
    def __init__(self, model: Checkpoint, place: Callable[[str], Mapping[str, Any]]) -> None:
        self.model, self.place = model, place
        self.graph = Graph(version=VERSION)
        self.decoder = decoder_of(model.config, model.path)
        self.angles: dict[str, tuple[str, str]] = {}

    def build(self) -> bytes:
        graph, decoder = self.graph, self.decoder
        hidden = graph.input("input_ids", (-1, 1, decoder.hidden), "DT_FLOAT")
        graph.input("attention_mask", (1, 1, -1, -1), "DT_FLOAT")
        graph.input("position_ids", (1, -1), "DT_INT32")
        graph.input("logits_index", (1,), "DT_INT32")
        hidden = graph.shaped(hidden, "embedded", 1, -1, decoder.hidden)
        for kind in used_ropes(decoder):
            self.angles[kind] = self._angles(kind)
        for n in range(len(decoder.layers)):
            hidden = self._layer(n, hidden)
        asked = graph.sliced(hidden, "logits_index", END, 1, "asked")
        head = EMBEDDING if self.model.tied else "lm_head"
        logits = self._linear(self._norm(asked, "model.norm"), head, "logits")
        return graph.content([logits])

    def _angles(self, kind: str) -> tuple[str, str]:
        """cos and sin, float32 [1, new, 1, head size], each half the same."""
        graph, decoder, out = self.graph, self.decoder, f"rotary.{kind}"
        (table,), factor = frequencies(decoder.ropes[kind], decoder.head_size, decoder.positions, self.model.path)
        numbers = graph.floats(FREQUENCIES.format(kind), (1, 1, 1, len(table)), table.tolist())
        positions = graph.add("Cast", ["position_ids"], f"{out}.positions", srcT="DT_INT32", dstT="DT_FLOAT")
        positions = graph.shaped(positions, f"{out}.columns", 1, -1, 1, 1)
        half = graph.binary("MUL", positions, numbers, f"{out}.half")
        angles = graph.joined(half, half, f"{out}.angles")
        found = []
        for side in ("COS", "SIN"):
            values = graph.unary(side, angles, f"{out}.{side.lower()}")
            if factor != 1.0:
                by = graph.floats(f"{values}.factor", (1, 1, 1, 1), (factor,))
                values = graph.binary("MUL", values, by, f"{values}_scaled")
            found.append(values)
        return found[0], found[1]

    def _layer(self, n: int, hidden: str) -> str:
        graph, out, (first, second) = self.graph, f"layer{n}", self.decoder.layers[n].parts.before
        mixed = self._attention(n, self._norm(hidden, f"model.layers.{n}.{first}"))
        hidden = graph.binary("ADD", hidden, mixed, f"{out}.middle")
        down = self._feed_forward(n, self._norm(hidden, f"model.layers.{n}.{second}"))
        return graph.binary("ADD", hidden, down, f"{out}.end")

    def _norm(self, x: str, module: str) -> str:
        """x / sqrt(mean(x^2) + epsilon) * weight over the last axis."""
        main = {"axis": [-1], "epsilon": self.decoder.epsilon, **self.place(module), "useRMSNorm": True}
        return self.graph.add("LayerNorm", [x], module, **main)

    def _linear(self, x: str, module: str, out: str = "") -> str:
        rows, columns = self.model.tensors[f"{module}.weight"].shape
        return self.graph.linear(x, module, (rows, columns), self.place(module), out or f"{module}.out")

    def _attention(self, n: int, normed: str) -> str:
        graph, decoder, path = self.graph, self.decoder, f"model.layers.{n}.self_attn"
        layer, heads = decoder.layers[n], []
        for name, count in (("q", decoder.heads), ("k", decoder.kv_heads), ("v", decoder.kv_heads)):
            flat = self._linear(normed, f"{path}.{name}_proj")
            x = graph.shaped(flat, f"layer{n}.{name}", 1, -1, count, decoder.head_size)
            norm = layer.parts.named(f"attn_{name}_norm")
            if norm:
                x = self._norm(x, f"model.layers.{n}.{norm}")
            if name != "v" and layer.rope is not None:
                x = self._rotated(x, layer.rope, f"layer{n}.{name}")
            heads.append(x)
        mixed = graph.add("Attention", [*heads, "attention_mask"], f"layer{n}.attention", kv_cache=True, layer_index=n)
        return self._linear(mixed, f"{path}.o_proj")

    def _rotated(self, x: str, kind: str, out: str) -> str:
        """x, [1, new, heads, head size], with its halves rotated."""
        graph, half, (cos, sin) = self.graph, self.decoder.head_size // 2, self.angles[kind]
        first = graph.sliced(x, graph.sizes(0), half, 3, f"{out}.first")
        second = graph.sliced(x, graph.sizes(half), END, 3, f"{out}.second")
        across = graph.joined(graph.unary("NEG", second, f"{out}.minus"), first, f"{out}.across")
        straight = graph.binary("MUL", x, cos, f"{out}.straight")
        turned = graph.binary("MUL", across, sin, f"{out}.turned")
        return graph.binary("ADD", straight, turned, f"{out}.rotated")

    def _feed_forward(self, n: int, normed: str) -> str:
        """down(silu(gate) * up)."""
        graph, parts, out = self.graph, self.decoder.layers[n].parts, f"layer{n}"
        gate, up, down = (f"model.layers.{n}.{parts.named(f'ffn_{name}')}" for name in ("gate", "up", "down"))
        active = graph.unary("SILU", self._linear(normed, gate), f"{out}.active")
        return self._linear(graph.binary("MUL", active, self._linear(normed, up), f"{out}.gated"), down)
