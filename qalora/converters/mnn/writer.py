"""Write the folder, some rows at a time: while some are read, those before are encoded and written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.mnn.carriers import TABLE, container, encode, float_table, has_bias, table_dtype
from qalora.converters.mnn.decoder import EMBEDDING
from qalora.converters.mnn.planner import MnnPlan
from qalora.converters.plan import Plan, Progress
from qalora.converters.tokenizer import write_tokenizer
from qalora.formats.data_file import DataFiles
from qalora.formats.mnn import header_bytes
from qalora.formats.share import Share
from qalora.formats.workers import JOB_BYTES, Workers
from qalora.tensor import GroupQuantTensor

__all__ = ["write"]


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the planned files."""
    if not isinstance(plan, MnnPlan):
        raise TypeError(f"expected MnnPlan, got {type(plan).__name__}")
    if share.frame:
        write_tokenizer(model, folder)
        for name, content in plan.small.items():
            (folder / name).write_bytes(content)
    files = {folder / name: held for name, held in plan.data.items()}
    with DataFiles(files, share) as file, Workers() as workers:
        for lazy in model.tensors.values() if share.frame else ():
            _write_frame(file, lazy, model)
        for row in plan.tensors:
            if not share.writes(row.name):
                continue
            lazy = model.tensors[row.name]
            if lazy.spec is not None:
                for start, tile in lazy.pieces(JOB_BYTES):
                    workers.do(_write_quantized, file, lazy, start, tile)
            elif len(lazy.shape) == 2:
                for start, values in lazy.float_tiles():
                    workers.do(_write_float, file, lazy, start, values)
            else:
                workers.do(_write_small, file, lazy)
            progress(row.name, row.nbytes)


def _write_frame(file: DataFiles, lazy: LazyTensor, model: Checkpoint) -> None:
    """The header of codes; the zeros in the place of a bias."""
    module = module_of(lazy.name)
    if file.has(f"{module}.bias") and not has_bias(model, module):
        file.write(f"{module}.bias", torch.zeros(lazy.shape[0]))
    if lazy.spec is None:
        return
    header = header_bytes((lazy.shape[0], lazy.shape[1]), container(module, lazy.spec.bits))
    file.write(f"{module}.header", torch.frombuffer(bytearray(header), dtype=torch.uint8))


def _write_quantized(file: DataFiles, lazy: LazyTensor, row: int, tile: Tensor | GroupQuantTensor) -> None:
    if isinstance(tile, Tensor):
        raise TypeError(f"{lazy.name} has no spec")
    for name, data in encode(module_of(lazy.name), tile).items():
        file.write(name, data, row)


def _write_float(file: DataFiles, lazy: LazyTensor, row: int, values: Tensor) -> None:
    """A float matrix; an embedding as a table, and for a tied output layer too."""
    if file.has(lazy.name):
        file.write(lazy.name, values.float().contiguous(), row)
    if module_of(lazy.name) == EMBEDDING:
        dtype = table_dtype(lazy)
        table = float_table(lazy.name, values) if dtype is torch.float32 else values.to(dtype)
        file.write(TABLE, table.contiguous(), row)


def _write_small(file: DataFiles, lazy: LazyTensor) -> None:
    """A bias; or the weight of a norm, and zeros."""
    values = lazy.load_float()
    if lazy.name.endswith(".bias"):
        file.write(lazy.name, values.float().contiguous())
    else:
        file.write(f"{module_of(lazy.name)}.norm", torch.stack([values.float(), torch.zeros(values.shape)]))
