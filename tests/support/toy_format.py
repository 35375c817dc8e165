"""A format that qalora does not know: one file of codes, float32 scales and minima, `model.toy`, beside a config.

The whole of it is here, as that of a new format would be in its folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.ends import GENERATION, config_with_ends, generation_bytes, write_generation
from qalora.converters.format import Format, Released, exact, quantized_by
from qalora.converters.huggingface import float_tensor, model_of, read_config
from qalora.converters.plan import ExportOptions, Plan, PlannedTensor, Progress
from qalora.converters.specs import TENSORS, parse_specs, specs_text
from qalora.converters.tokenizer import write_tokenizer
from qalora.formats.files import InputFile
from qalora.formats.output import write_json
from qalora.formats.safetensors import Entry, Layout, Part, SafetensorsWriter, plan_layout, read_header, read_tensor
from qalora.formats.share import Share
from qalora.tensor import GroupQuantTensor, QuantSpec, packed_row_bytes

FILE = "model.toy"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyPlan(Plan):
    layout: Layout


def plan(model: Checkpoint, options: ExportOptions) -> ToyPlan:
    parts = {name: _parts(lazy) for name, lazy in model.tensors.items()}
    specs = {name: lazy.spec for name, lazy in model.tensors.items() if lazy.spec is not None}
    metadata = {**options.provenance, TENSORS: specs_text(specs)}
    layout = plan_layout([part for those in parts.values() for part in those], metadata)
    tensors = []
    for name, those in parts.items():
        entries = [layout.entries[part] for part, _, _ in those]
        carrier = "toy float" if name not in specs else f"toy {specs[name].bits}-bit"
        nbytes = sum(entry.nbytes for entry in entries)
        tensors.append(PlannedTensor(name=name, carrier=carrier, file=FILE, offset=entries[0].offset, nbytes=nbytes))
    files: dict[str, int | None] = {FILE: layout.size, "config.json": None}
    files |= {name: path.stat().st_size for name, path in model.files.items()}
    files[GENERATION] = len(generation_bytes(model))
    return ToyPlan(target="toy", tensors=tuple(tensors), files=files, layout=layout)


def _parts(lazy: LazyTensor) -> list[Part]:
    if lazy.spec is None:
        assert lazy.dtype is not None
        return [(lazy.name, lazy.dtype, lazy.shape)]
    (rows, columns), spec = lazy.shape, lazy.spec
    groups = (rows, columns // spec.group_size)
    codes: Part = (f"{lazy.name}.codes", torch.uint8, (rows, packed_row_bytes(columns, spec.bits)))
    return [codes, (f"{lazy.name}.scale", torch.float32, groups), (f"{lazy.name}.min", torch.float32, groups)]


def write(plan: ToyPlan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    if share.frame:
        write_tokenizer(model, folder)
        write_generation(model, folder)
        write_json(folder / "config.json", {**config_with_ends(model), "quantization_config": {"quant_method": "toy"}})
    with SafetensorsWriter(folder / FILE, plan.layout, share) as file:
        for tensor in plan.tensors:
            if not share.writes(tensor.name):
                continue
            found = model.tensors[tensor.name].load()
            if isinstance(found, GroupQuantTensor):
                for end, values in (("codes", found.packed), ("scale", found.scale), ("min", found.min)):
                    file.write(f"{tensor.name}.{end}", values)
            else:
                file.write(tensor.name, found)
            progress(tensor.name, tensor.nbytes)


def read(folder: Path) -> Checkpoint:
    config = read_config(folder)
    del config["quantization_config"]
    header = read_header(folder / FILE)
    specs = parse_specs(header.metadata[TENSORS], str(folder))
    tensors = {name: _quantized(name, folder / FILE, header.entries, spec) for name, spec in specs.items()}
    for name, entry in header.entries.items():
        if name.rpartition(".")[0] not in specs:
            tensors[name] = float_tensor(name, folder / FILE, entry)
    return model_of(folder, "toy", config, tensors)


def _quantized(name: str, path: Path, entries: Mapping[str, Entry], spec: QuantSpec) -> LazyTensor:
    rows, groups = entries[f"{name}.scale"].shape

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        with InputFile(path) as file:
            packed, scale, least = (
                read_tensor(file, entries[f"{name}.{end}"], start, stop) for end in ("codes", "scale", "min")
            )
        return GroupQuantTensor(packed=packed, scale=scale, min=least, bits=spec.bits, group_size=spec.group_size)

    return LazyTensor(name=name, shape=(rows, groups * spec.group_size), spec=spec, read=read_rows)


def _metadata(path: Path) -> Mapping[str, Any] | None:
    return read_header(path).metadata if path.suffix == ".toy" else None


def _usage(released: Released) -> str:
    return f'```python\nimport qalora\n\nprint(qalora.load("toy").path, {len(released.carriers)})\n```'


FORMAT = Format(
    name="toy",
    kind="Toy",
    runs="a format of the tests",
    plan=plan,
    write=write,
    read=read,
    by_config=quantized_by("toy"),
    end=".codes_of_toy",
    weights=lambda folder: [folder / FILE],
    suffixes=(".toy",),
    metadata_of=_metadata,
    runtimes=("torch",),
    rounding=exact,
    memory=lambda path: 8,
    usage=_usage,
    openings=lambda pushed: [f'{pushed.fetch}, then qalora.load("{pushed.local}/toy")'],
    library="toybox",
)
