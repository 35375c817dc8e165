"""A model as transformers lays it out: config.json, safetensors in shards, and what stands beside them.

A format of such a folder says what each tensor becomes (`lay_out`), and writes its parts (`write_folder`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.ends import GENERATION, generation_bytes, write_generation
from qalora.converters.plan import ExportOptions, Loss, Plan, PlannedTensor, Progress
from qalora.converters.tokenizer import converted_files, write_tokenizer
from qalora.converters.wrapping import CARRIED, carried_parts, names_on_disk
from qalora.formats.output import write_json
from qalora.formats.safetensors import Part, ShardedLayout, ShardedWriter, plan_shards
from qalora.formats.share import Share
from qalora.formats.workers import JOB_BYTES, Workers
from qalora.tensor import GroupQuantTensor

__all__ = ["FolderPlan", "carried_rows", "companions", "folder_files", "lay_out", "write_beside", "write_folder"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class FolderPlan(Plan):
    """A plan with the layout of the weights' files and the config to write."""

    layout: ShardedLayout
    config: Mapping[str, Any]


def lay_out(
    model: Checkpoint,
    parts: Mapping[str, Sequence[Part]],
    carriers: Mapping[str, tuple[str, Loss | None]],
    metadata: Mapping[str, str],
    options: ExportOptions,
    *,
    indexed: bool = False,
) -> tuple[ShardedLayout, tuple[PlannedTensor, ...]]:
    """The layout of the weights' files, and each tensor's place in it; what is carried along is the last in it.

    parts     what each tensor of the model becomes
    carriers  the word for that, and what it loses
    metadata  of every file, beside the provenance
    indexed   as in `plan_shards`
    """
    carried = carried_parts(model)
    layout = plan_shards(
        [*parts.values(), *carried.values()],
        {**metadata, **options.provenance},
        max_size=options.max_shard_size,
        called=names_on_disk(model, parts),
        indexed=indexed,
    )
    tensors = []
    for name, (carrier, loss) in carriers.items():
        file, offset, size = layout.place(part for part, _, _ in parts[name])
        tensors.append(PlannedTensor(name=name, carrier=carrier, file=file, offset=offset, nbytes=size, loss=loss))
    return layout, (*tensors, *carried_rows(layout, carried))


def carried_rows(layout: ShardedLayout, carried: Mapping[str, Sequence[Part]]) -> list[PlannedTensor]:
    """The places of the tensors that are carried along."""
    rows = []
    for name, parts in carried.items():
        file, offset, size = layout.place([name])
        carrier = f"{str(parts[0][1]).removeprefix('torch.')}, {CARRIED}"
        rows.append(PlannedTensor(name=name, carrier=carrier, file=file, offset=offset, nbytes=size))
    return rows


def folder_files(model: Checkpoint, layout: ShardedLayout) -> dict[str, int | None]:
    """The files of the folder with their sizes, None where only writing tells."""
    return {
        **layout.sizes,
        "config.json": None,
        **dict.fromkeys(converted_files(model)),
        **{name: path.stat().st_size for name, path in companions(model).items()},
        GENERATION: len(generation_bytes(model)),
    }


def companions(model: Checkpoint) -> dict[str, Path]:
    """The companion files, those of the whole model too."""
    return {**model.files, **({} if model.wrapper is None else model.wrapper.files)}


def write_beside(config: Mapping[str, Any], model: Checkpoint, folder: Path) -> None:
    """Write tokenizer, generation_config.json, config.json, and what a model of text and images has beside."""
    write_tokenizer(model, folder)
    for name, path in ({} if model.wrapper is None else model.wrapper.files).items():
        shutil.copyfile(path, folder / name)
    write_generation(model, folder)
    write_json(folder / "config.json", config)


def write_folder(
    plan: Plan,
    model: Checkpoint,
    folder: Path,
    progress: Progress,
    write_rows: Callable[[ShardedWriter, LazyTensor, int, Tensor | GroupQuantTensor], None],
    whole: Callable[[LazyTensor], bool] = lambda lazy: False,
    *,
    share: Share,
) -> None:
    """Write a planned folder, some rows of a tensor at a time.

    write_rows  writes rows of a tensor, from the row that it is told; in a thread, while the next rows are read
    whole       whether a tensor comes in one piece; all others go by rows
    share       what of the folder is written here
    """
    if not isinstance(plan, FolderPlan):
        raise TypeError(f"expected FolderPlan, got {type(plan).__name__}")
    if share.frame:
        write_beside(plan.config, model, folder)
    everything = model.everything
    with ShardedWriter(folder, plan.layout, share) as weights, Workers() as workers:
        for tensor in plan.tensors:
            if not share.writes(tensor.name):
                continue
            lazy = everything[tensor.name]
            if whole(lazy):
                workers.wait(1)
                workers.do(write_rows, weights, lazy, 0, lazy.load())
            else:
                for row, tile in lazy.pieces(JOB_BYTES):
                    workers.do(write_rows, weights, lazy, row, tile)
            progress(tensor.name, tensor.nbytes)
