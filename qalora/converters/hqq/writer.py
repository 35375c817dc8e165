"""Write a planned HQQ folder, a layer at a time; embedding and output layer by rows."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.decoded import decoded, is_quantized
from qalora.converters.folder import write_folder
from qalora.converters.hqq.planner import descriptors, parameter_type
from qalora.converters.plan import Plan, Progress
from qalora.converters.real_zeros import scale_and_zero
from qalora.converters.specs import narrowed
from qalora.formats.hqq import pack_groups
from qalora.formats.safetensors import ShardedWriter
from qalora.formats.share import Share
from qalora.tensor import GroupQuantTensor, QuantSpec

__all__ = ["write"]

ENCODED = 1 << 20
"""Weights whose scales and zero points are made before they are written, in the cache."""


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the folder."""

    def whole(lazy: LazyTensor) -> bool:
        return is_quantized(lazy, model)

    def write_rows(weights: ShardedWriter, lazy: LazyTensor, row: int, tile: Tensor | GroupQuantTensor) -> None:
        if isinstance(tile, GroupQuantTensor) and lazy.spec is not None and whole(lazy):
            _write_layer(weights, lazy, lazy.spec, tile)
        else:
            weights.write(lazy.name, decoded(lazy, tile, weights.layout.entry(lazy.name).dtype), row)

    write_folder(plan, model, folder, progress, write_rows, whole, share=share)


def _write_layer(weights: ShardedWriter, lazy: LazyTensor, spec: QuantSpec, tensor: GroupQuantTensor) -> None:
    module, dtype = module_of(lazy.name), parameter_type(spec)
    words = weights.layout.entry(f"{module}.W_q").shape[0]
    step = max(1, ENCODED // spec.group_size)
    for start in range(0, words, step):
        part = pack_groups(tensor.packed, spec.group_size, spec.bits, start, start + step)
        weights.write(f"{module}.W_q", part, start)
    step = max(1, ENCODED // lazy.shape[1])
    for start in range(0, lazy.shape[0], step):
        scale, zero = scale_and_zero("hqq", lazy.name, tensor.rows(start, start + step), spec)
        for name, values in (("scale", scale), ("zero", zero)):
            narrow = narrowed(f"{lazy.name}: {name}", values, dtype)
            weights.write(f"{module}.{name}", narrow.reshape(-1, 1), start * tensor.groups)
    for name, value in descriptors(spec, lazy.shape).items():
        weights.write(f"{module}.{name}", value)
