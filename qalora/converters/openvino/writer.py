"""Write the folder, some rows at a time: while some are read, those before are encoded and written."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.column_order import order_of
from qalora.converters.decoder import decoder_of
from qalora.converters.ends import write_generation
from qalora.converters.openvino.carriers import ORDER, encode
from qalora.converters.openvino.files import MODEL
from qalora.converters.openvino.planner import DATA, OpenvinoPlan
from qalora.converters.plan import Plan, Progress
from qalora.converters.tokenizer import write_tokenizer
from qalora.formats.data_file import DataFile
from qalora.formats.openvino import ELEMENTS, Constant
from qalora.formats.output import write_json
from qalora.formats.share import Share
from qalora.formats.workers import JOB_BYTES, Workers
from qalora.tensor import GroupQuantTensor

__all__ = ["write"]


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the planned files."""
    if not isinstance(plan, OpenvinoPlan):
        raise TypeError(f"expected OpenvinoPlan, got {type(plan).__name__}")
    if share.frame:
        _write_small_files(plan, model, folder)
    family = decoder_of(model.config, model.path).family
    with DataFile(folder / DATA, plan.data, plan.size, share) as file, Workers() as workers:
        for row in plan.tensors:
            if not share.writes(row.name):
                continue
            lazy = model.tensors[row.name]
            if row.name in plan.coded:
                for start, tile in lazy.pieces(JOB_BYTES, multiple=2):
                    workers.do(_write_quantized, file, lazy, start, tile)
            else:
                offset = 1.0 if family.adds_one(row.name) else 0.0
                for start, tile in lazy.float_tiles():
                    workers.do(_write_float, file, plan.data[row.name], start, tile, offset)
            progress(row.name, row.nbytes)
        for name, values in plan.small.items() if share.frame else ():
            file.write(name, values.contiguous())


def _write_small_files(plan: OpenvinoPlan, model: Checkpoint, folder: Path) -> None:
    write_tokenizer(model, folder)
    write_generation(model, folder)
    write_json(folder / "config.json", plan.config)
    (folder / MODEL).write_bytes(plan.graph)
    for name, content in plan.beside.items():
        (folder / name).write_bytes(content)


def _write_quantized(file: DataFile, lazy: LazyTensor, row: int, tile: Tensor | GroupQuantTensor) -> None:
    if lazy.spec is None or isinstance(tile, Tensor):
        raise TypeError(f"{lazy.name} has no spec")
    module = module_of(lazy.name)
    for name, data in encode(module, tile, lazy.spec, row).items():
        file.write(name, data, row)
    if row == 0 and file.has(f"{module}{ORDER}"):
        file.write(f"{module}{ORDER}", order_of(f"openvino: {module}", tile))


def _write_float(file: DataFile, item: Constant, row: int, tile: Tensor, offset: float) -> None:
    values = tile.float() + offset if offset else tile
    file.write(item.name, values.to(ELEMENTS[item.element][2]).contiguous(), row)
