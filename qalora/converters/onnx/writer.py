"""Write both graphs and their data, a layer at a time: each tensor is read once and goes into both data files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.decoder import decoder_of
from qalora.converters.ends import GENERATION, write_generation
from qalora.converters.onnx.carriers import encode_fast, encode_portable
from qalora.converters.onnx.decoder import rotary_tables
from qalora.converters.onnx.graph import DATA
from qalora.converters.onnx.order import order_of
from qalora.converters.onnx.planner import GRAPH, PORTABLE, GraphPlan, OnnxPlan
from qalora.converters.plan import Plan, Progress
from qalora.converters.tokenizer import write_tokenizer
from qalora.formats.files import OutputFile
from qalora.formats.onnx import Initializer
from qalora.formats.output import write_json

__all__ = ["write"]

Encode = Callable[..., dict[str, Tensor]]


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress) -> None:
    """Write the planned files. ExactnessError if a residual needs more than float32 and that was not planned."""
    if not isinstance(plan, OnnxPlan):
        raise TypeError(f"expected OnnxPlan, got {type(plan).__name__}")
    places = {folder: plan.fast, folder / PORTABLE: plan.portable}
    write_tokenizer(model, folder)
    for name, data in plan.tokenizer.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    if GENERATION in model.files:
        write_generation(model, folder)
    for place, graph in places.items():
        place.mkdir(exist_ok=True)
        write_json(place / "config.json", plan.config)
        write_json(place / "genai_config.json", graph.genai)
        (place / GRAPH).write_bytes(graph.proto.SerializeToString(deterministic=True))
    decoder = decoder_of(model.config, model.path)
    allowed = {row.name for row in plan.tensors if row.loss is not None}
    with ExitStack() as stack:
        fast, portable = (stack.enter_context(_Data(place / DATA, graph)) for place, graph in places.items())
        for name, lazy in model.tensors.items():
            before = fast.done + portable.done
            if name in plan.fast.coded:
                files = ((fast, encode_fast), (portable, encode_portable))
                _write_quantized(files[: 1 + (name in plan.portable.coded)], lazy, rounds=name in allowed)
            floats = [file for file, graph in ((fast, plan.fast), (portable, plan.portable)) if name not in graph.coded]
            if floats:
                offset = 1.0 if decoder.family.adds_one(name) else 0.0
                _write_float(floats, lazy, transposed=name in model.linears, offset=offset)
            progress(name, fast.done + portable.done - before)
        for name, table in rotary_tables(decoder, model.path):
            fast.write(name, table)
            portable.write(name, table)


class _Data:
    """A data file that is filled by the initializers' names."""

    def __init__(self, path: Path, graph: GraphPlan) -> None:
        self.done = 0
        self._items = graph.data
        self._file = OutputFile(path, graph.size)

    def has(self, name: str) -> bool:
        """Whether the file has an initializer of that name."""
        return name in self._items

    def write(self, name: str, data: Tensor, row: int = 0) -> None:
        """Write an initializer, or its rows from `row` on."""
        item = self._items[name]
        start = row * (item.nbytes // item.shape[0]) if row else 0
        self.done += self._file.write(item.offset + start, data)

    def __enter__(self) -> _Data:
        self._file.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            for offset, length in _gaps(self._items.values()):
                self._file.zeros(offset, length)
        self._file.__exit__(kind, error, at)


def _gaps(items: Iterable[Initializer]) -> list[tuple[int, int]]:
    """(offset, length) of what alignment leaves between the initializers."""
    found, at = [], 0
    for item in items:
        if item.offset > at:
            found.append((at, item.offset - at))
        at = item.offset + item.nbytes
    return found


def _write_quantized(files: Sequence[tuple[_Data, Encode]], lazy: LazyTensor, *, rounds: bool) -> None:
    if lazy.spec is None:
        raise TypeError(f"{lazy.name} has no spec")
    tensor, module = lazy.load_quantized(), module_of(lazy.name)
    for file, encode in files:
        for name, data in encode(module, tensor, lazy.spec, rounds=rounds).items():
            file.write(name, data)
        if file.has(f"{module}.order"):
            file.write(f"{module}.order", order_of(module, tensor))


def _write_float(files: Sequence[_Data], lazy: LazyTensor, *, transposed: bool, offset: float) -> None:
    tiles = [(0, lazy.load_float().T)] if transposed else lazy.float_tiles()
    for row, tile in tiles:
        wide = tile.float().contiguous() + offset if offset else tile.float().contiguous()
        for file in files:
            file.write(lazy.name, wide, row)
