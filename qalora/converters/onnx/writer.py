"""Write the graphs and their data, some rows at a time: while some are read, those before are encoded and written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.column_order import order_of
from qalora.converters.decoder import decoder_of
from qalora.converters.ends import GENERATION, write_generation
from qalora.converters.onnx.carriers import encode
from qalora.converters.onnx.decoder import rotary_tables
from qalora.converters.onnx.order import ORDER
from qalora.converters.onnx.planner import GRAPH, OnnxPlan
from qalora.converters.onnx.weights import Weights
from qalora.converters.plan import Plan, Progress
from qalora.converters.tokenizer import write_tokenizer
from qalora.formats.data_file import DataFiles
from qalora.formats.output import write_json
from qalora.formats.share import Share
from qalora.formats.workers import JOB_BYTES, Workers
from qalora.tensor import GroupQuantTensor

__all__ = ["write", "write_weights"]


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the planned files."""
    if not isinstance(plan, OnnxPlan):
        raise TypeError(f"expected OnnxPlan, got {type(plan).__name__}")
    if share.frame:
        _write_small_files(plan, model, folder)
    write_weights(plan.weights, model, folder / plan.file, progress, share)


def write_weights(weights: Weights, model: Checkpoint, first: Path, progress: Progress, share: Share) -> None:
    """Write the data files, of which the first is called so."""
    nbytes = {row.name: row.nbytes for row in weights.rows(model, first.name)}
    decoder = decoder_of(model.config, model.path)
    with _data_files(weights, first, share) as file, Workers() as workers:
        for name, lazy in model.tensors.items():
            if not share.writes(name):
                continue
            if name in weights.coded:
                for start, tile in lazy.pieces(JOB_BYTES):
                    workers.do(_write_quantized, file, lazy, start, tile)
            elif name in model.linears:
                for start, part in _transposed(lazy):
                    workers.do(_write_float, file, name, start, part, 0.0)
            else:
                offset = 1.0 if decoder.family.adds_one(name) else 0.0
                for start, tile in lazy.float_tiles():
                    workers.do(_write_float, file, name, start, tile, offset)
            progress(name, nbytes[name])
        for name, table in rotary_tables(decoder, model.path) if share.frame else ():
            file.write(name, table)


def _data_files(weights: Weights, first: Path, share: Share) -> DataFiles:
    files = {}
    for n, (name, size) in enumerate(weights.files(first.name).items()):
        items = {item.name: item for item in weights.data.values() if item.file == n}
        files[first.with_name(name)] = (items, size)
    return DataFiles(files, share)


def _write_small_files(plan: OnnxPlan, model: Checkpoint, folder: Path) -> None:
    write_tokenizer(model, folder)
    for name, data in plan.tokenizer.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    if GENERATION in model.files:
        write_generation(model, folder)
    for graph in plan.graphs:
        place = folder / graph.folder
        place.mkdir(exist_ok=True)
        write_json(place / "config.json", plan.config)
        write_json(place / "genai_config.json", graph.genai)
        (place / GRAPH).write_bytes(graph.proto.SerializeToString(deterministic=True))


def _write_quantized(file: DataFiles, lazy: LazyTensor, row: int, tile: Tensor | GroupQuantTensor) -> None:
    if lazy.spec is None or isinstance(tile, Tensor):
        raise TypeError(f"{lazy.name} has no spec")
    module = module_of(lazy.name)
    for name, data in encode(module, tile, lazy.spec).items():
        file.write(name, data, row)
    if row == 0 and file.has(f"{module}{ORDER}"):
        file.write(f"{module}{ORDER}", order_of(f"onnx: {module}", tile))


def _transposed(lazy: LazyTensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of the transpose of a float weight."""
    whole = lazy.load_float()
    step = max(1, JOB_BYTES // (4 * whole.shape[0]))
    for start in range(0, whole.shape[1], step):
        yield start, whole[:, start : start + step].T


def _write_float(file: DataFiles, name: str, row: int, tile: Tensor, offset: float) -> None:
    wide = tile.float().contiguous()
    file.write(name, wide + offset if offset else wide, row)
