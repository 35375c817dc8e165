"""`--shard`: the frozen base, spread over the processes of a run.

Each process holds its rows of every weight of the decoder layers, of the embedding, and of the output layer: runs of
ceil(rows / processes), of which the last may be shorter. What is small stays whole in all of them: the adapter with its
gradients and moments, norms and biases.

decoder layers   by torch's FSDP2, `fully_shard`, a decoder layer a unit: gathered before its forward and again before
                 its backward, and freed after each. Packed codes, scales and minima are gathered, a fifth of float32
                 weights; the products of a step (`qalora.training.fast`) are made of them at each use
tables           embedding and output layer: gathered before the lookup and before the loss, and freed. FSDP2 gathers
                 into one piece of memory and copies into others, twice the size of what is often the largest tensor; a
                 single tensor can be gathered in its place

The numbers that are multiplied are those of a run without it, so what is trained is the same, to the bit.

Every process takes part in every gathering. So all make the same number of forwards: one that has no sequences left
takes a sequence of which nothing is learned, whose gradients are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qalora.errors import InputError
from qalora.training.distributed import Processes
from qalora.training.layer import FoldedLinear

__all__ = ["Sharding", "Table", "whole"]

PACKED = ("packed", "scale", "minimum")
"""What a FoldedLinear holds of the base, with a row for each output."""


class Table:
    """A frozen weight [rows, columns] of which each process may hold a part."""

    def __init__(self, weight: Tensor) -> None:
        self._rows, self._count, self._processes = weight, len(weight), Processes()

    @classmethod
    def spread(cls, weight: Tensor, processes: Processes, device: torch.device) -> Table:
        """This process's rows of a weight, on a device."""
        table = cls(weight)
        each = -(-len(weight) // processes.size)
        mine = weight[each * processes.rank :][:each]
        table._rows = torch.zeros(each, weight.shape[1], dtype=weight.dtype, device=device)  # as many in each process
        table._rows[: len(mine)] = mine
        table._processes = processes
        return table

    def to(self, dtype: torch.dtype) -> Table:
        """The same in another dtype; itself where it has that one."""
        if self._rows.dtype == dtype:
            return self
        table = Table(self._rows.to(dtype))
        table._count, table._processes = self._count, self._processes
        return table

    def whole(self) -> Tensor:
        """The weight. Where processes hold parts, each calls this, and gets a tensor of its own."""
        return self._processes.gather_rows(self._rows)[: self._count]


class Sharding:
    """How a base is spread over processes. Nothing here sends anything; what it made does.

    Raises InputError for a torch whose `fully_shard` does not take integers yet.
    """

    def __init__(self, processes: Processes, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self._processes, self._device = processes, device
        self._mesh = init_device_mesh(device.type, (processes.size,))
        probe = nn.Module()
        probe.packed = nn.Parameter(torch.zeros(1, 1, dtype=torch.uint8, device=device), requires_grad=False)
        try:
            self._shard(probe, set())
        except RuntimeError as error:
            raise InputError(
                field="shard",
                expected="a torch whose fully_shard takes integers, such as 2.13",
                got=f"torch {torch.__version__}",
            ) from error

    def take_layer(self, layer: nn.Module) -> None:
        """Keep this process's rows of a decoder layer, whose linear layers are complete."""
        spread: set[nn.Parameter] = set()
        for part in layer.modules():
            if isinstance(part, FoldedLinear):
                for name in PACKED:
                    value = getattr(part, name)
                    delattr(part, name)
                    part.register_parameter(name, nn.Parameter(value, requires_grad=False))
                    spread.add(getattr(part, name))
            else:
                spread |= {parameter for parameter in part.parameters(recurse=False) if parameter.ndim > 1}
        self._shard(layer, set(layer.parameters()) - spread)

    def take_rest(self, module: Any) -> tuple[Table, Table]:
        """Embedding and output layer, one table where they are tied; the module is left without them.

        The decoder becomes the root of its layers for FSDP2, so that one is gathered while another computes.
        """
        ends = (module.model.embed_tokens, module.lm_head)
        weights = [end.weight.detach() for end in ends]
        tied = weights[0].data_ptr() == weights[1].data_ptr()
        for end in ends:
            end.weight = nn.Parameter(torch.empty(0, end.weight.shape[1]), requires_grad=False)
        embedding = self._table(weights[0])
        head = embedding if tied else self._table(weights[1])
        layers = {parameter for layer in module.model.layers for parameter in layer.parameters()}
        self._shard(module.model, set(module.model.parameters()) - layers)
        return embedding, head

    def _table(self, weight: Tensor) -> Table:
        return Table.spread(weight, self._processes, self._device)

    def _shard(self, module: nn.Module, ignored: set[nn.Parameter]) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=self._mesh, reshard_after_forward=True, ignored_params=ignored)


@contextmanager
def whole(layer: Any) -> Iterator[None]:
    """A block in which the weights of a decoder layer are whole, which may be spread. Every process runs it."""
    if not hasattr(layer, "unshard"):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()
