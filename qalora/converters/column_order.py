"""Act-order columns put into the order of their groups, for formats whose groups are runs of columns.

    order   int64 [in]     column `order[i]` of the weight stands at `i`: the first group's columns, then the second's,
                           each group's as they stood

A format gathers its activations by the order, which is exact. Modules with equal groups share one order.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.errors import ExactnessError, FormatError
from qalora.tensor import GroupQuantTensor, pack_codes

__all__ = ["natural", "order_of", "ordered", "shared_orders"]


def shared_orders(target: str, model: Checkpoint, coded: Container[str]) -> dict[str, str]:
    """{module: the first module that a graph computes with the same groups}, for each weight that was quantized with
    act-order and is held as codes.

    Reads a row of each of these. ExactnessError for groups that have not `group_size` columns each.
    """
    found: dict[str, str] = {}
    first: dict[bytes, str] = {}
    for name in dict.fromkeys([*model.linears, *model.tensors]):
        lazy = model.tensors[name]
        if name in coded and lazy.spec is not None and lazy.spec.act_order:
            module = module_of(name)
            found[module] = first.setdefault(order_of(f"{target}: {module}", _row(lazy)).numpy().tobytes(), module)
    return found


def _row(lazy: LazyTensor) -> GroupQuantTensor:
    row = lazy.rows(0, 1)
    if not isinstance(row, GroupQuantTensor):
        raise TypeError(f"{lazy.name} is not quantized")
    return row


def order_of(where: str, tensor: GroupQuantTensor) -> Tensor:
    """int64 [in]: the columns group by group. ExactnessError, which names `where`, if a group has not `group_size` of
    them."""
    if tensor.g_idx is None:
        raise ValueError(f"{where}: its spec promises act-order, and it has no g_idx")
    counts = torch.bincount(tensor.g_idx, minlength=tensor.groups)
    uneven = (counts != tensor.group_size).nonzero().flatten()
    if len(uneven):
        group = int(uneven[0])
        raise ExactnessError(
            f"{where}: g_idx",
            expected=f"{tensor.group_size} columns in each group",
            got=f"{int(counts[group])} in group {group}",
            todo="export it to gptq, or quantize without act-order",
        )
    return torch.argsort(tensor.g_idx, stable=True)


def ordered(where: str, tensor: GroupQuantTensor) -> GroupQuantTensor:
    """The weight with its columns in the order of their groups, which are runs then; inverse of `natural`."""
    if tensor.g_idx is None:
        return tensor
    codes = tensor.codes()[:, order_of(where, tensor)]
    return replace(tensor, packed=pack_codes(codes, tensor.bits), g_idx=None)


def natural(where: str, tensor: GroupQuantTensor, order: Tensor) -> GroupQuantTensor:
    """The weight with its columns where they were, and its g_idx. FormatError for an order that is no permutation."""
    places = torch.arange(tensor.shape[1])
    if not torch.equal(order.sort().values, places):
        raise FormatError(
            where,
            expected=f"each of 0..{len(places) - 1} once",
            got="numbers that repeat or are out of range",
        )
    codes, g_idx = torch.empty_like(tensor.codes()), torch.empty(len(places), dtype=torch.int32)
    codes[:, order] = tensor.codes()
    g_idx[order] = (places // tensor.group_size).int()
    return replace(tensor, packed=pack_codes(codes, tensor.bits), g_idx=g_idx)
