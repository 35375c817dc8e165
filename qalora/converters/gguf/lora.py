"""A LoRA as llama.cpp applies it beside a GGUF model (`--lora FILE`): any adapter here, as an exact plain LoRA.

    general.type "adapter", general.architecture that of the model, adapter.type "lora", adapter.lora.alpha (float32)
    <GGUF name of the weight>.lora_a   F32 [rank, in]     shapes in torch's order
    <GGUF name of the weight>.lora_b   F32 [out, rank]

llama.cpp computes y = W x + (alpha / rank) * B (A x) in float32, with one alpha for the file and each layer's own rank.
A QA-LoRA layer's A repeats its columns over the pool, which rounds nothing. B's rows are in the order of the weight's:
llama.cpp's rotary order for q and k of Llamas. A layer whose factor is not alpha / rank has its A multiplied by the
quotient, which rounds to float32 once, unless the quotient is a power of two; the commonest alpha keeps that rare.

Reading takes anybody's file of F32, F16 or BF16 tensors, widened exactly, as a plain LoRA with factor alpha / rank (1
where alpha is 0 or absent, as llama.cpp has it).

Source: llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp; the model is needed for names and row order only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qalora.adapter import Adapter, AdapterLayer, check_plain
from qalora.checkpoint import Checkpoint
from qalora.converters.families import family_of
from qalora.converters.format import LoraContent
from qalora.converters.gguf.names import gguf_names, head_count, rows_from, rows_to
from qalora.errors import AdapterError, FormatError, shown
from qalora.formats.files import InputFile
from qalora.formats.gguf import (
    GgufFile,
    GgufLayout,
    Metadata,
    TensorInfo,
    Value,
    create,
    plan_layout,
    read_header,
)

__all__ = ["GgufLora", "content", "is_lora", "plan_lora", "read_lora", "write_lora"]

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The tensor types that are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufLora:
    """A file to be written.

    layout   of the file
    names    GGUF's name of each module's weight, in the model's order
    times    what each module's A is multiplied by; 1 where alpha / rank is its factor
    heads    by which its rows are reordered, or None
    rounded  the modules whose A is rounded by it
    """

    layout: GgufLayout
    names: Mapping[str, str]
    times: Mapping[str, float]
    heads: Mapping[str, int | None]
    rounded: tuple[str, ...]


def plan_lora(adapter: Adapter, model: Checkpoint, name: str | None = None) -> GgufLora:
    """Lay the file out. AdapterError for modules that the model, or a GGUF file of it, does not have."""
    check_plain(adapter, "a GGUF LoRA")
    family = family_of(model.config, model.path)
    known = gguf_names(family, int(model.config["num_hidden_layers"]))
    for module, layer in adapter.layers.items():
        weight = f"{module}.weight"
        if weight not in known or weight not in model.tensors or model.tensors[weight].shape != layer.shape:
            got = list(model.tensors[weight].shape) if weight in model.tensors else "none"
            raise AdapterError(
                f"gguf-lora: {weight}",
                expected=f"a weight {list(layer.shape)} of {model.path}",
                got=str(got),
                todo="the adapter belongs to a different model",
            )
    names = {weight.removesuffix(".weight"): gguf for weight, gguf in known.items()}
    names = {module: gguf for module, gguf in names.items() if module in adapter.layers}
    tensors: list[tuple[str, tuple[int, ...], str]] = []
    for module, gguf in names.items():
        layer = adapter.layers[module]
        tensors.append((f"{gguf}.lora_a", (layer.rank, layer.shape[1]), "F32"))
        tensors.append((f"{gguf}.lora_b", tuple(layer.b.shape), "F32"))
    alpha = _alpha(adapter)
    times = {module: layer.factor / (alpha / layer.rank) for module, layer in adapter.layers.items()}
    return GgufLora(
        layout=plan_layout(_metadata(family.gguf.architecture, alpha, name or model.path.name), tensors),
        names=names,
        times=times,
        heads={module: head_count(family, model.config, f"{module}.weight") for module in names},
        rounded=tuple(module for module, value in times.items() if not _is_power_of_two(value)),
    )


def _alpha(adapter: Adapter) -> float:
    """The alpha, as float32 holds it, that is right for most layers."""
    alphas = Counter(layer.factor * layer.rank for layer in adapter.layers.values() if layer.factor)
    if not alphas:
        return 1.0
    return float(torch.tensor(alphas.most_common(1)[0][0], dtype=torch.float32))


def _is_power_of_two(value: float) -> bool:
    return value == 0 or math.frexp(abs(value))[0] == 0.5


def _metadata(architecture: str, alpha: float, name: str) -> Metadata:
    return Metadata(
        entries={
            "general.architecture": Value.text(architecture),
            "general.type": Value.text("adapter"),
            "adapter.type": Value.text("lora"),
            "general.name": Value.text(name),
            "general.file_type": Value.uint32(0),
            "adapter.lora.alpha": Value.float32(alpha),
        }
    )


def write_lora(adapter: Adapter, model: Checkpoint, path: Path) -> tuple[str, ...]:
    """Write an adapter of the model, a layer at a time; gives the modules whose A is rounded. Raises as `plan_lora`."""
    plan = plan_lora(adapter, model)
    with create(path, plan.layout) as file:
        for module, name in plan.names.items():
            layer = adapter.layers[module]
            times, heads = plan.times[module], plan.heads[module]
            a = layer.a if times == 1 else (layer.a.double() * times).float()
            b = layer.b if heads is None else layer.b[rows_to(layer.b.shape[0], heads)]
            file.write(plan.layout.tensors[f"{name}.lora_a"].offset, a.repeat_interleave(layer.pool_size, dim=1))
            file.write(plan.layout.tensors[f"{name}.lora_b"].offset, b)
    return plan.rounded


def is_lora(path: Path) -> bool:
    """Whether a file is a GGUF file that says it is an adapter; what is wrong with another is for its reader to say."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return False
    try:
        return bool(read_header(path).metadata.get("general.type") == "adapter")
    except FormatError:
        return False


def content(path: Path) -> LoraContent:
    """What a LoRA's file holds; FormatError for what is none."""
    file = _opened(path)
    base = file.metadata.get("general.base_model.0.name")
    unread = sorted({info.type for info in file.tensors.values()} - set(FLOATS))
    return LoraContent(
        ranks=tuple(a.shape[0] for a, _ in _pairs(file).values()),
        parameters=sum(math.prod(info.shape) for info in file.tensors.values()),
        matrices=_values(file),
        base=base if isinstance(base, str) else None,
        notes=(
            f"for models of architecture {file.metadata.get('general.architecture')}",
            f"alpha {file.metadata.get('adapter.lora.alpha')}",
            *(f"values of {kind} tensors are not read" for kind in unread),
        ),
    )


def _values(file: GgufFile) -> Iterator[tuple[str, Tensor]]:
    with InputFile(file.path) as opened:
        for name, info in file.tensors.items():
            if info.type in FLOATS:
                yield name, opened.tensor(info.offset, info.nbytes).view(FLOATS[info.type])


def _opened(path: Path) -> GgufFile:
    """Read a LoRA's header; FormatError for a file that holds something else."""
    file = read_header(path)
    for key, word in (("general.type", "adapter"), ("adapter.type", "lora")):
        if file.metadata.get(key) != word:
            raise FormatError(f"{path}: {key}", expected=word, got=shown(file.metadata.get(key)))
    return file


def _pairs(file: GgufFile) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """A and B by the GGUF name of the weight; FormatError for a tensor that is neither, or has no partner."""
    names = {name[: -len(".lora_a")] for name in file.tensors if name.endswith((".lora_a", ".lora_b"))}
    pairs = {}
    for name in sorted(names):
        a, b = (file.tensors.get(f"{name}.lora_{part}") for part in "ab")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            shapes = [None if info is None else list(info.shape) for info in (a, b)]
            raise FormatError(
                f"{file.path}: {name}",
                expected="lora_a [rank, in] and lora_b [out, rank]",
                got=f"{shapes[0]} and {shapes[1]}",
            )
        pairs[name] = (a, b)
    if not pairs or len(file.tensors) != 2 * len(pairs):
        others = sorted(set(file.tensors) - {info.name for pair in pairs.values() for info in pair})
        raise FormatError(f"{file.path}", expected="pairs of lora_a and lora_b", got=(others or ["none"])[0])
    return pairs


def read_lora(path: Path, model: Checkpoint) -> Adapter:
    """Read a LoRA of the model; inverse of `write_lora`, as a plain LoRA. AdapterError for another model's."""
    file, family = _opened(path), family_of(model.config, model.path)
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise FormatError(f"{path}: adapter.lora.alpha", expected="a finite float", got=shown(alpha))
    known = gguf_names(family, int(model.config["num_hidden_layers"]))
    weights = {gguf: weight for weight, gguf in known.items() if weight in model.tensors}
    pairs, layers = _pairs(file), {}
    for name, (a, b) in pairs.items():
        weight = weights.get(name)
        shape = None if weight is None else model.tensors[weight].shape
        if weight is None or shape != (b.shape[0], a.shape[1]):
            raise AdapterError(
                f"{path}: {name}",
                expected=f"a weight of {model.path}",
                got=f"one of shape {[b.shape[0], a.shape[1]]}",
                todo="the adapter belongs to a different model",
            )
        rows, heads = _matrix(file, b), head_count(family, model.config, weight)
        factor = alpha / a.shape[0] if alpha else 1.0
        layers[weight.removesuffix(".weight")] = AdapterLayer(
            a=_matrix(file, a),
            b=rows if heads is None else rows[rows_from(rows.shape[0], heads)],
            pool_size=1,
            scaling=factor,
            factor=factor,
        )
    return Adapter(layers=layers, convention="paper")


def _matrix(file: GgufFile, info: TensorInfo) -> Tensor:
    if info.type not in FLOATS:
        raise FormatError(f"{file.path}: {info.name}", expected=f"one of {', '.join(FLOATS)}", got=info.type)
    with InputFile(file.path) as opened:
        return opened.tensor(info.offset, info.nbytes).view(FLOATS[info.type]).view(info.shape).float()
