"""Write a planned HQQ folder, a layer at a time; embedding and output layer by rows."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.decoded import decoded
from qalora.converters.folder import write_folder
from qalora.converters.hqq.planner import descriptors, is_quantized, parameter_type
from qalora.converters.plan import Plan, Progress
from qalora.errors import InputError
from qalora.formats.hqq import pack_groups, to_zeros
from qalora.formats.safetensors import ShardedWriter
from qalora.tensor import GroupQuantTensor, QuantSpec, integer_zeros

__all__ = ["write"]


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress) -> None:
    """Write the folder."""

    def whole(lazy: LazyTensor) -> bool:
        return is_quantized(lazy, model)

    def write_rows(weights: ShardedWriter, lazy: LazyTensor, row: int, tile: Tensor | GroupQuantTensor) -> None:
        if isinstance(tile, GroupQuantTensor) and lazy.spec is not None and whole(lazy):
            _write_layer(weights, lazy, lazy.spec, tile)
        else:
            weights.write(lazy.name, decoded(lazy, tile, weights.layout.entry(lazy.name).dtype), row)

    write_folder(plan, model, folder, progress, write_rows, whole)


def _write_layer(weights: ShardedWriter, lazy: LazyTensor, spec: QuantSpec, tensor: GroupQuantTensor) -> None:
    module, dtype = module_of(lazy.name), parameter_type(spec)
    scale, zero = tensor.scale, integer_zeros(tensor) if spec.zeros == "integer" else None
    if zero is None:
        if spec.zeros == "integer":
            raise ValueError(f"{lazy.name}: its spec promises integer zeros, and it has none")
        try:
            scale, zero = to_zeros(tensor.scale, tensor.min)
        except InputError as error:
            raise InputError(f"hqq: {lazy.name}: {error}") from error
    weights.write(f"{module}.W_q", pack_groups(tensor.codes(), spec.group_size, spec.bits))
    for name, values in (("scale", scale), ("zero", zero)):
        narrow = values.to(dtype)
        if not bool((narrow.float() == values).all()):
            raise ValueError(f"{lazy.name}: its spec promises a {name} that {dtype} holds, and it has others")
        weights.write(f"{module}.{name}", narrow.reshape(-1, 1))
    for name, value in descriptors(spec, lazy.shape).items():
        weights.write(f"{module}.{name}", value)
