"""Act-order in the graphs: columns put into the order of their groups, and activations gathered to match.

    <module>.order   INT64 [in]     column `order[i]` of the weight stands at `i`: the first group's columns, then the
                                    second's, each group's as they stood

    ordered = Gather(x, <module>.order, axis -1)       then everything as with groups that are runs of columns

This is exact, and as fast as consecutive groups; MatMulNBits' own g_idx is not used, since ONNX Runtime computes wrong
products from it beside packed zero points. Modules with equal groups share one order, and q, k and v, or gate and up,
one Gather. The reader takes the order that the graph gathers by, so a graph with another Gather is another weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import LazyTensor
from qalora.errors import ExactnessError, FormatError
from qalora.formats.onnx import Initializer
from qalora.tensor import GroupQuantTensor, pack_codes

__all__ = ["ORDER", "natural", "order_of", "order_part", "ordered", "read_orders", "shared_orders", "ungathered"]

ORDER = ".order"


def order_part(module: str, columns: int) -> Initializer:
    """The initializer of a module's order."""
    return Initializer(name=f"{module}{ORDER}", dtype="INT64", shape=(columns,))


def shared_orders(weights: Iterable[LazyTensor]) -> dict[str, str]:
    """{module: the first module with the same groups}, for each weight that was quantized with act-order.

    Reads a row of each of these. ExactnessError for groups that have not `group_size` columns each.
    """
    found: dict[str, str] = {}
    first: dict[bytes, str] = {}
    for lazy in weights:
        if lazy.spec is not None and lazy.spec.act_order:
            module = lazy.name.removesuffix(".weight")
            found[module] = first.setdefault(order_of(module, _row(lazy)).numpy().tobytes(), module)
    return found


def _row(lazy: LazyTensor) -> GroupQuantTensor:
    row = lazy.rows(0, 1)
    if not isinstance(row, GroupQuantTensor):
        raise TypeError(f"{lazy.name} is not quantized")
    return row


def order_of(module: str, tensor: GroupQuantTensor) -> Tensor:
    """int64 [in]: the columns group by group. ExactnessError where a group has not `group_size` of them."""
    if tensor.g_idx is None:
        raise ValueError(f"{module}: its spec promises act-order, and it has no g_idx")
    counts = torch.bincount(tensor.g_idx, minlength=tensor.groups)
    uneven = (counts != tensor.group_size).nonzero().flatten()
    if len(uneven):
        group = int(uneven[0])
        raise ExactnessError(
            f"onnx: {module}: g_idx",
            expected=f"{tensor.group_size} columns in each group",
            got=f"{int(counts[group])} in group {group}",
            todo="export it to gptq, or quantize without act-order",
        )
    return torch.argsort(tensor.g_idx, stable=True)


def ordered(module: str, tensor: GroupQuantTensor) -> GroupQuantTensor:
    """The weight with its columns in the order of their groups, which are runs then; inverse of `natural`."""
    if tensor.g_idx is None:
        return tensor
    codes = tensor.codes()[:, order_of(module, tensor)]
    return replace(tensor, packed=pack_codes(codes, tensor.bits), g_idx=None)


def natural(module: str, tensor: GroupQuantTensor, order: Tensor) -> GroupQuantTensor:
    """The weight with its columns where they were, and its g_idx. FormatError for an order that is no permutation."""
    places = torch.arange(tensor.shape[1])
    if not torch.equal(order.sort().values, places):
        raise FormatError(
            f"{module}{ORDER}",
            expected=f"each of 0..{len(places) - 1} once",
            got="numbers that repeat or are out of range",
        )
    codes, g_idx = torch.empty_like(tensor.codes()), torch.empty(len(places), dtype=torch.int32)
    codes[:, order] = tensor.codes()
    g_idx[order] = (places // tensor.group_size).int()
    return replace(tensor, packed=pack_codes(codes, tensor.bits), g_idx=g_idx)


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
