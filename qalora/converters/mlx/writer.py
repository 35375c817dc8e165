"""Write a planned MLX folder, a layer at a time; embedding and output layer by rows."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.folder import write_folder
from qalora.converters.mlx.planner import mlx_group_size
from qalora.converters.plan import Plan, Progress
from qalora.converters.specs import narrowed
from qalora.formats.mlx import pack_words
from qalora.formats.safetensors import ShardedWriter
from qalora.formats.share import Share
from qalora.tensor import GroupQuantTensor

__all__ = ["write"]


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the folder."""
    write_folder(plan, model, folder, progress, _write_rows, share=share)


def _write_rows(weights: ShardedWriter, lazy: LazyTensor, row: int, tile: Tensor | GroupQuantTensor) -> None:
    if isinstance(tile, Tensor):
        weights.write(lazy.name, tile, row)
        return
    module, groups = module_of(lazy.name), tile.regrouped(mlx_group_size(lazy))
    weights.write(f"{module}.weight", pack_words(groups.packed), row)
    for part, values in (("scales", groups.scale), ("biases", groups.min)):
        name = f"{module}.{part}"
        weights.write(name, narrowed(name, values, weights.layout.entry(name).dtype), row)
