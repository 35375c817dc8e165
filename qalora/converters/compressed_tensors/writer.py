"""Write a planned compressed-tensors folder, a layer at a time; embedding and output layer by rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.compressed_tensors.planner import CompressedPlan
from qalora.converters.decoded import decoded
from qalora.converters.folder import write_folder
from qalora.converters.gptq.beside import ADAPTER_CONFIG, ADAPTER_WEIGHTS, lora_names, plain_lora
from qalora.converters.plan import Plan, Progress
from qalora.converters.specs import narrowed
from qalora.errors import InputError
from qalora.formats.compressed_tensors import pack_rows, pack_zeros
from qalora.formats.output import write_json
from qalora.formats.safetensors import SafetensorsWriter, ShardedWriter
from qalora.formats.share import Share
from qalora.residual import to_residual
from qalora.tensor import GroupQuantTensor, all_finite, integer_zeros

__all__ = ["write"]


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the folder."""
    if not isinstance(plan, CompressedPlan):
        raise TypeError(f"expected CompressedPlan, got {type(plan).__name__}")
    words = plan.words

    def write_rows(weights: ShardedWriter, lazy: LazyTensor, row: int, tile: Tensor | GroupQuantTensor) -> None:
        if isinstance(tile, GroupQuantTensor) and lazy.name in words:
            _write_layer(weights, lazy.name, tile)
        else:
            weights.write(lazy.name, decoded(lazy, tile, weights.layout.entry(lazy.name).dtype), row)

    base = tuple(row for row in plan.tensors if row.file != ADAPTER_WEIGHTS)
    _write_adapter(plan, folder, progress, share)
    write_folder(
        replace(plan, tensors=base), model, folder, progress, write_rows, lambda lazy: lazy.name in words, share=share
    )


def _write_layer(weights: ShardedWriter, name: str, tensor: GroupQuantTensor) -> None:
    """One layer; zero points that are not whole numbers become the nearest ones, which the plan calls a loss."""
    module, entries = module_of(name), weights.layout
    dtype = entries.entry(f"{module}.weight_scale").dtype
    scale = tensor.scale.to(dtype)
    if not all_finite(scale):
        got = f"{float(tensor.scale.abs().max()):.6g}"
        raise InputError(f"{name}: scales", expected="values within float16's 65504", got=got)
    weights.write(f"{module}.weight_packed", pack_rows(tensor.packed))
    weights.write(f"{module}.weight_scale", scale)
    weights.write(f"{module}.weight_shape", torch.tensor(tensor.shape, dtype=torch.int64))
    if f"{module}.weight_zero_point" in entries.where:
        zero = integer_zeros(tensor)
        zero = to_residual(tensor, "nearest").zero if zero is None else zero
        weights.write(f"{module}.weight_zero_point", pack_zeros(zero, tensor.bits))


def _write_adapter(plan: CompressedPlan, folder: Path, progress: Progress, share: Share) -> None:
    if plan.beside is None or plan.adapter is None:
        return
    if share.frame and plan.adapter_config is not None:
        write_json(folder / ADAPTER_CONFIG, plan.adapter_config)
    with SafetensorsWriter(folder / ADAPTER_WEIGHTS, plan.beside, share) as weights:
        for row in plan.tensors:
            if row.file != ADAPTER_WEIGHTS or not share.writes(row.name):
                continue
            module = module_of(row.name)
            for name, part in zip(lora_names(module), plain_lora(plan.adapter.layers[module]), strict=True):
                weights.write(name, narrowed(name, part, plan.beside.entries[name].dtype))
            progress(row.name, row.nbytes)
