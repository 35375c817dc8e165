"""Our own folder: the canonical tensors as they are, packed, in safetensors; read and written.

config.json         transformers' config, with the commonest dtype of the tensors that are not quantized where it had
                    none (transformers would take that of the first scale), and under quantization_config:
                    {"quant_method": "qalora", "version": 1, "bits", "group_size", "zero",
                     "modules": {module: [bits, group_size, zero]}}
                    `zero` is the zero point of every group where it is the same, else null; `modules` holds those that
                    differ from the first three
model.safetensors   (or several and their index, above --max-shard-size)
                    <module>.codes  uint8 [out, in*bits/8]       as qalora.tensor packs them
                    <module>.scale  float16 or float32 [out, groups]
                    <module>.min    float16 or float32 [out, groups], or, where every zero point is an integer,
                    <module>.zero   uint8 [out, groups]            min = -scale * zero; absent where the config has it
                    <module>.g_idx  int32 [in]                     act-order only
                    and every other tensor under its own name and dtype
A model of text and images has its whole config and its own names there, of modules too, and its other tensors as they
were.
metadata.gguf       the metadata of the GGUF file that the model came from, if it did
generation_config.json, tokenizer and other companion files
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.ends import config_with_ends, end_notes
from qalora.converters.folder import FolderPlan, folder_files, lay_out, write_folder
from qalora.converters.format import Format, Pushed, exact, for_the_whole, quantized_by
from qalora.converters.huggingface import float_tensor, model_of, read_config, stored_tensors
from qalora.converters.plan import ExportOptions, Plan, Progress
from qalora.converters.specs import narrowed
from qalora.converters.wrapping import opened, whole_config
from qalora.errors import FormatError, shown
from qalora.formats.files import contained
from qalora.formats.safetensors import Entry, Part, ShardedWriter, load_tensor
from qalora.formats.share import Share
from qalora.tensor import BITS, GroupQuantTensor, QuantSpec, integer_zeros, packed_row_bytes

__all__ = ["FORMAT", "StoredModule", "check_version", "plan", "read", "stored_modules", "write"]

VERSION = 1
PARTS = ("codes", "scale", "min", "zero", "g_idx")
GGUF_METADATA = "metadata.gguf"

_Stored = Mapping[str, tuple[Path, Entry]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModule:
    """One quantized module as config and headers tell it: its parts ("codes", "scale", ...) and where they are.

    zero  the zero point of every group where config.json has it, else None
    """

    bits: int
    group_size: int
    zero: int | None
    zeros: Literal["integer", "real"]
    parts: Mapping[str, tuple[Path, Entry]]
    shape: tuple[int, int]


def check_version(layout: Mapping[str, Any], where: object) -> None:
    """Refuse a quantization_config of another version; `where` names the model."""
    if layout.get("version") != VERSION:
        raise FormatError(
            f"{where}: quantization_config.version",
            expected=str(VERSION),
            got=shown(layout.get("version")),
            todo="update qalora",
        )


def stored_modules(where: object, stored: _Stored, layout: Mapping[str, Any]) -> dict[str, StoredModule]:
    """Every quantized module among stored tensors, shapes and dtypes checked; `layout` is quantization_config."""
    names = sorted(name.removesuffix(".codes") for name in stored if name.endswith(".codes"))
    return {module: _stored_module(f"{where}: {module}", module, stored, layout) for module in names}


def read(folder: Path) -> Checkpoint:
    """Open our own folder; reads config and headers only."""
    config = read_config(folder)
    layout = config.pop("quantization_config")
    check_version(layout, folder)
    found = opened(folder, config, stored_tensors(folder), end=".codes")
    stored, own = found.stored, layout.get("modules")
    if isinstance(own, dict):
        layout = {**layout, "modules": found.keyed(own)}
    modules = stored_modules(folder, stored, layout)
    parts = {f"{module}.{part}" for module in modules for part in PARTS}
    tensors = {name: float_tensor(name, *where) for name, where in stored.items() if name not in parts}
    for name, module in modules.items():
        tensors[f"{name}.weight"] = _quantized(name, module)
    model = model_of(folder, "qalora", found.config, tensors, notes=found.notes, wrapper=found.wrapper)
    return replace(model, gguf=_gguf_metadata(folder))


def _gguf_metadata(folder: Path) -> Any:
    path = contained(folder, GGUF_METADATA)
    if not path.exists():
        return None
    from qalora.formats.gguf import parse_metadata

    return parse_metadata(path)


def _stored_module(where: str, module: str, stored: _Stored, layout: Mapping[str, Any]) -> StoredModule:
    bits, group_size, zero = _sizes(where, module, layout)
    zeros: Literal["integer", "real"] = "real" if zero is None and f"{module}.zero" not in stored else "integer"
    last = "min" if zeros == "real" else "zero"
    entries = {}
    for part in ("codes", "scale", *((last,) if zero is None else ()), "g_idx"):
        if f"{module}.{part}" in stored:
            entries[part] = stored[f"{module}.{part}"]
        elif part != "g_idx":
            raise FormatError(f"{where}: missing tensor {module}.{part}")
    shape = _check_parts(where, entries, bits, group_size)
    return StoredModule(bits=bits, group_size=group_size, zero=zero, zeros=zeros, parts=entries, shape=shape)


def _quantized(name: str, module: StoredModule) -> LazyTensor:
    entries, zeros, zero = module.parts, module.zeros, module.zero
    spec = QuantSpec(
        bits=module.bits,
        group_size=module.group_size,
        zeros=zeros,
        scale_dtype=entries["scale"][1].dtype,
        min_dtype=entries["min"][1].dtype if zeros == "real" else torch.float32,
        act_order="g_idx" in entries,
        zero=zero,
    )
    spec = replace(spec, min_dtype=spec.narrowest_min)

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        part = {key: load_tensor(*place, start, stop) for key, place in entries.items() if key != "g_idx"}
        scale = part["scale"].float()
        return GroupQuantTensor(
            packed=part["codes"],
            scale=scale,
            min=part["min"].float() if zeros == "real" else -scale * (part["zero"] if zero is None else zero),
            bits=module.bits,
            group_size=module.group_size,
            g_idx=load_tensor(*entries["g_idx"]) if "g_idx" in entries else None,
        )

    size = sum(entry.nbytes for _, entry in entries.values())
    return LazyTensor(name=f"{name}.weight", shape=module.shape, spec=spec, nbytes=size, by_rows=True, read=read_rows)


def _sizes(where: str, module: str, layout: Mapping[str, Any]) -> tuple[int, int, int | None]:
    modules = layout.get("modules")
    sizes = modules.get(module) if isinstance(modules, dict) else None
    if sizes is None:
        sizes = [layout.get("bits"), layout.get("group_size"), layout.get("zero")]
    if isinstance(sizes, list) and len(sizes) == 3:
        bits, group_size, zero = sizes
        whole = type(bits) is int and type(group_size) is int and (zero is None or type(zero) is int)
        if whole and bits in BITS and group_size > 0 and (zero is None or 0 <= zero < 1 << bits):
            return bits, group_size, zero
    raise FormatError(where, expected="bits, group_size and zero in quantization_config", got=shown(sizes))


def _check_parts(where: str, entries: _Stored, bits: int, group_size: int) -> tuple[int, int]:
    """Shapes and dtypes against each other; gives (out, in)."""
    codes, scale = entries["codes"][1], entries["scale"][1]
    if len(scale.shape) != 2 or scale.dtype not in (torch.float16, torch.float32):
        raise FormatError(f"{where}.scale", expected="a float16 or float32 matrix", got=f"{scale.dtype} {scale.shape}")
    rows, groups = scale.shape
    columns = groups * group_size
    expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "codes": ((torch.uint8,), (rows, packed_row_bytes(columns, bits))),
        "min": ((torch.float16, torch.float32), (rows, groups)),
        "zero": ((torch.uint8,), (rows, groups)),
        "g_idx": ((torch.int32,), (columns,)),
    }
    for part, (_, entry) in entries.items():
        if part in expected and (entry.dtype not in expected[part][0] or entry.shape != expected[part][1]):
            raise FormatError(
                f"{where}.{part}",
                expected=f"{expected[part][0][0]} {list(expected[part][1])}",
                got=f"{entry.dtype} {list(entry.shape)}",
            )
    if rows == 0 or columns == 0 or codes.nbytes == 0:
        raise FormatError(where, expected="a matrix with rows and columns", got=f"{rows} x {columns}")
    return rows, columns


def plan(model: Checkpoint, options: ExportOptions) -> FolderPlan:
    """Everything is held exactly: scale and min in the narrowest of float16 and float32 that the spec guarantees."""
    parts = {name: _parts(lazy) for name, lazy in model.tensors.items()}
    carriers = {name: (_carrier(lazy), None) for name, lazy in model.tensors.items()}
    layout, tensors = lay_out(model, parts, carriers, {"format": "pt"}, options)
    return FolderPlan(
        target="qalora",
        tensors=tensors,
        files=folder_files(model, layout) | ({} if model.gguf is None else {GGUF_METADATA: None}),
        layout=layout,
        config=_config(model),
        notes=(*model.notes, *end_notes(model)),
    )


def _carrier(lazy: LazyTensor) -> str:
    spec = lazy.spec
    return str(lazy.dtype).removeprefix("torch.") if spec is None else f"{spec.bits}-bit, {spec.zeros} zeros"


def _parts(lazy: LazyTensor) -> list[Part]:
    """What a tensor becomes in the file."""
    if lazy.spec is None:
        if lazy.dtype is None:
            raise TypeError(f"{lazy.name}: neither dtype nor spec")
        return [(lazy.name, lazy.dtype, lazy.shape)]
    spec, (rows, columns), module = lazy.spec, lazy.shape, module_of(lazy.name)
    groups = (rows, columns // spec.group_size)
    parts: list[Part] = [
        (f"{module}.codes", torch.uint8, (rows, packed_row_bytes(columns, spec.bits))),
        (f"{module}.scale", spec.scale_dtype, groups),
    ]
    if spec.zeros == "real":
        parts.append((f"{module}.min", spec.min_dtype, groups))
    elif spec.zero is None:
        parts.append((f"{module}.zero", torch.uint8, groups))
    if spec.act_order:
        parts.append((f"{module}.g_idx", torch.int32, (columns,)))
    return parts


def _config(model: Checkpoint) -> dict[str, Any]:
    sizes = {
        module_of(name): (lazy.spec.bits, lazy.spec.group_size, lazy.spec.zero)
        for name, lazy in model.tensors.items()
        if lazy.spec is not None
    }
    common = Counter(sizes.values()).most_common(1)[0][0] if sizes else (4, 32, None)
    quantization = {
        "quant_method": "qalora",
        "version": VERSION,
        "bits": common[0],
        "group_size": common[1],
        "zero": common[2],
        "modules": {_on_disk(model, module): list(size) for module, size in sizes.items() if size != common},
    }
    config = config_with_ends(model)
    if not {"dtype", "torch_dtype"} & set(config):
        floats = Counter(str(lazy.dtype).removeprefix("torch.") for lazy in model.tensors.values() if lazy.spec is None)
        config["dtype"] = floats.most_common(1)[0][0] if floats else "float32"
    return {**whole_config(model, config), "quantization_config": quantization}


def _on_disk(model: Checkpoint, module: str) -> str:
    return module if model.wrapper is None else model.wrapper.on_disk(module)


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the folder, a layer at a time; embedding and output layer by rows."""
    if model.gguf is not None and share.frame:
        from qalora.formats.gguf import metadata_bytes

        (folder / GGUF_METADATA).write_bytes(metadata_bytes(model.gguf))
    write_folder(plan, model, folder, progress, _write_rows, share=share)


def _write_rows(weights: ShardedWriter, lazy: LazyTensor, row: int, tile: Tensor | GroupQuantTensor) -> None:
    if isinstance(tile, Tensor):
        weights.write(lazy.name, tile, row)
        return
    module, spec = module_of(lazy.name), lazy.spec
    if spec is None:
        raise TypeError(f"{lazy.name} has no spec")
    weights.write(f"{module}.codes", tile.packed, row)
    weights.write(f"{module}.scale", narrowed(lazy.name, tile.scale, spec.scale_dtype), row)
    if spec.zeros == "real":
        weights.write(f"{module}.min", narrowed(lazy.name, tile.min, spec.min_dtype), row)
    else:
        zero = integer_zeros(tile)
        if zero is None or (spec.zero is not None and not bool((zero == spec.zero)[tile.scale != 0].all())):
            raise ValueError(f"{lazy.name}: its spec promises other zero points than it has")
        if spec.zero is None:
            weights.write(f"{module}.zero", zero, row)
    if tile.g_idx is not None and row == 0:
        weights.write(f"{module}.g_idx", tile.g_idx, 0)


_USAGE = """```python
import qalora  # transformers opens the folder once qalora is imported; its layers stay packed
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("qalora", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("qalora")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

It can be exported again and fine-tuned further: `qalora.load("qalora")`."""


def _openings(pushed: Pushed) -> Sequence[str]:
    text = f'import qalora; AutoModelForCausalLM.from_pretrained("{pushed.repo}", subfolder="qalora")'
    return [for_the_whole(text, pushed.files)]


FORMAT = Format(
    name="qalora",
    kind="qalora",
    runs="transformers",
    plan=plan,
    write=write,
    read=read,
    by_config=quantized_by("qalora"),
    carries=lambda wrapper: True,
    end=".codes",
    runtimes=("torch",),
    rounding=exact,
    memory=lambda path: 8,  # dequantized, in float32: at least 8 times the bytes of 4-bit codes
    usage=lambda released: for_the_whole(_USAGE, released.carriers),
    openings=_openings,
)
