"""Write a planned torchao folder, some rows of a tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.decoded import decoded, is_quantized
from qalora.converters.folder import write_folder
from qalora.converters.plan import Plan, Progress
from qalora.converters.real_zeros import scale_and_zero
from qalora.converters.specs import narrowed
from qalora.formats.safetensors import ShardedWriter
from qalora.formats.share import Share
from qalora.formats.torchao import PARTS, is_lower, to_qdata
from qalora.tensor import GroupQuantTensor, QuantSpec

__all__ = ["write"]


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the folder."""

    def write_rows(weights: ShardedWriter, lazy: LazyTensor, row: int, tile: Tensor | GroupQuantTensor) -> None:
        if isinstance(tile, GroupQuantTensor) and lazy.spec is not None and is_quantized(lazy, model):
            _write_rows(weights, lazy, lazy.spec, row, tile)
        else:
            weights.write(lazy.name, decoded(lazy, tile, weights.layout.entry(lazy.name).dtype), row)

    write_folder(plan, model, folder, progress, write_rows, share=share)


def _write_rows(weights: ShardedWriter, lazy: LazyTensor, spec: QuantSpec, row: int, tile: GroupQuantTensor) -> None:
    qdata, scale, zero = (f"{module_of(lazy.name)}.{part}" for part in PARTS)
    scales, zeros = scale_and_zero("torchao", lazy.name, tile, spec)
    if is_lower(spec):
        zeros = zeros - (1 << (spec.bits - 1))
    kind = weights.layout.entry(zero).dtype
    weights.write(qdata, to_qdata(tile.packed, spec.bits, lower=is_lower(spec)), row)
    weights.write(scale, narrowed(scale, scales, weights.layout.entry(scale).dtype), row)
    weights.write(zero, zeros.to(kind) if kind is torch.int8 else zeros, row)
