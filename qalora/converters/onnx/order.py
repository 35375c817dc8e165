"""Act-order in the graphs: columns put into the order of their groups, and activations gathered to match.

    <module>.order   INT64 [in]     as `qalora.converters.column_order` says

    ordered = Gather(x, <module>.order, axis -1)       then everything as with groups that are runs of columns

This is exact, and as fast as consecutive groups; MatMulNBits' own g_idx is not used, since ONNX Runtime computes wrong
products from it beside packed zero points. Modules with equal groups share one order, and q, k and v, or gate and up,
one Gather. The reader takes the order that the graph gathers by, so a graph with another Gather is another weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.formats.onnx import Initializer

__all__ = ["ORDER", "order_part", "read_orders", "ungathered"]

ORDER = ".order"


def order_part(module: str, columns: int) -> Initializer:
    """The initializer of a module's order."""
    return Initializer(name=f"{module}{ORDER}", dtype="INT64", shape=(columns,))


def read_orders(proto: Any) -> Mapping[str, str]:
    """{module: name of the order by which the graph gathers what its codes are multiplied with}."""
    gathers = _gathers(proto.graph)
    found = {}
    for node in proto.graph.node:
        for name in node.input[1:]:
            if str(name).endswith(".codes") and node.input[0] in gathers:  # bytes: no UTF-8
                found[name.removesuffix(".codes")] = gathers[node.input[0]].input[1]
    return found


def ungathered(graph: Any, x: str) -> str:
    """The activation that an order was applied to; x itself where none was."""
    gather = _gathers(graph).get(x)
    return x if gather is None else str(gather.input[0])


def _gathers(graph: Any) -> dict[str, Any]:
    """{output: node} of the Gathers by an order."""
    gathers = [node for node in graph.node if node.op_type == "Gather" and len(node.input) == 2 and node.output]
    return {node.output[0]: node for node in gathers if str(node.input[1]).endswith(ORDER)}
