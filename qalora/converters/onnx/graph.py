"""A list of nodes that becomes a decoder's graph, and the names of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qalora.converters.decoder import Decoder
from qalora.formats.onnx import Initializer, stub

__all__ = ["DATA", "IR_VERSION", "MS", "OPSET", "SIDES", "Graph", "cache_names", "graph_inputs", "graph_outputs"]

OPSET = 23
IR_VERSION = 11
DATA = "model.onnx.data"
MS = "com.microsoft"


@dataclass(slots=True, kw_only=True)
class Graph:
    """Nodes one behind the other; each method that adds one gives its output's name.

    data      the weights by name
    location  the file that holds them, seen from the graph's folder
    orders    what `column_order.shared_orders` gives
    """

    data: Mapping[str, Initializer]
    location: str = DATA
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    orders: Mapping[str, str] = field(default_factory=dict)
    _pools: dict[tuple[str, int], str] = field(default_factory=dict)
    _ordered: dict[tuple[str, str], str] = field(default_factory=dict)
    _once: set[str] = field(default_factory=set)

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        output: str,
        *,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node; `outputs` names all of them where there are several."""
        from onnx import helper

        names = [output] if outputs is None else list(outputs)
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"/{output}", domain=domain, **attributes))
        return output

    def once(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node whose output has no such name yet."""
        if output not in self._once:
            self._once.add(output)
            self.add(op, inputs, output, **attributes)
        return output

    def constant(self, name: str, values: Sequence[int] | float, dtype: str = "INT64") -> str:
        """A small constant in the model itself, added once; gives its name there."""
        from onnx import TensorProto, helper

        name = f"constant.{name}"
        if all(proto.name != name for proto in self.constants):
            shape = [len(values)] if isinstance(values, Sequence) else []
            flat = list(values) if isinstance(values, Sequence) else [values]
            self.constants.append(helper.make_tensor(name, getattr(TensorProto, dtype), shape, flat))
        return name

    def number(self, value: float) -> str:
        """A float32 scalar in the model itself."""
        return self.constant(f"number.{value!r}", value, "FLOAT")

    def pooled(self, x: str, group_size: int, groups: int) -> str:
        """The sum of an activation [batch, sequence, in] over each group, made once for each activation and size."""
        key = (x, group_size)
        if key not in self._pools:
            shape = self.constant(f"groups_{groups}x{group_size}", [0, 0, groups, group_size])
            axis = self.constant("last_axis", [-1])
            grouped = self.add("Reshape", [x, shape], f"{x}.groups{group_size}")
            self._pools[key] = self.add("ReduceSum", [grouped, axis], f"{x}.pooled{group_size}", keepdims=0)
        return self._pools[key]

    def ordered(self, x: str, module: str) -> str:
        """What a module's codes are multiplied with: x, gathered once for each order where there is act-order."""
        if module not in self.orders:
            return x
        key = (x, self.orders[module])
        if key not in self._ordered:
            self._ordered[key] = self.add("Gather", [x, f"{key[1]}.order"], f"{module}.in", axis=-1)
        return self._ordered[key]

    def model(
        self, decoder: Decoder, outputs: Sequence[Any], inputs: Sequence[Any], metadata: Mapping[str, str], **extra: Any
    ) -> Any:
        """The ModelProto: stubs for the weights, IR and opsets that every supported ONNX Runtime loads."""
        from onnx import helper

        stubs = [stub(item, self.location) for item in self.data.values()]
        graph = helper.make_graph(self.nodes, "decoder", list(inputs), list(outputs), [*stubs, *self.constants])
        model = helper.make_model(graph, producer_name="qalora", ir_version=IR_VERSION, **extra)
        helper.set_model_props(model, dict(sorted(metadata.items())))
        return model


def cache_names(layer: int, side: str) -> tuple[str, str]:
    """The input and output of a layer's cache; side is "key" or "value"."""
    return f"past_key_values.{layer}.{side}", f"present.{layer}.{side}"


def graph_inputs(decoder: Decoder) -> list[Any]:
    """input_ids, attention_mask and the cache."""
    from onnx import TensorProto, helper

    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
    ]
    return inputs + [
        _cache(decoder, n, side, 0, "past_sequence_length") for n in range(len(decoder.layers)) for side in SIDES
    ]


def graph_outputs(decoder: Decoder) -> list[Any]:
    """Logits and the cache."""
    from onnx import TensorProto, helper

    shape = ["batch_size", "sequence_length", decoder.vocabulary]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    return [logits] + [
        _cache(decoder, n, side, 1, "total_sequence_length") for n in range(len(decoder.layers)) for side in SIDES
    ]


SIDES = ("key", "value")


def _cache(decoder: Decoder, layer: int, side: str, which: int, length: str) -> Any:
    from onnx import TensorProto, helper

    shape = ["batch_size", decoder.kv_heads, length, decoder.head_size]
    return helper.make_tensor_value_info(cache_names(layer, side)[which], TensorProto.FLOAT, shape)
