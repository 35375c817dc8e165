"""Read a GPTQ folder: 2, 3, 4 and 8 bits, both versions of the zero points, act-order, sharded or not.

The label checkpoint_format is often wrong, so it is believed only where the values say nothing. Symmetric zero points
are all 2**(bits-1): stored as that they are gptq_v2, stored as one less they are gptq, whatever the label says. The
first layers' qzeros are looked at when the folder is opened, as many as are needed to find one that is not symmetric
and `SAMPLE` at most (some 100 KB each in a 7B model); where all of those are symmetric, every other layer is held
against that when it is read, and one that differs is refused rather than guessed. Asymmetric zero points are read as
the label says, with a note, or as the caller says.

Beside that, opening reads config, headers and g_idx. A layer is read whole, or by rows.

Not read: 5 to 7 bits (planar words), Marlin and BitBLAS words, other methods (AWQ, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.gptq.beside import ADAPTER_CONFIG, StoredResidual, find_residual, pooling_matrix
from qalora.converters.gptq.dynamic import Rule, check_rules, parse_rules, rule_of
from qalora.converters.huggingface import float_tensor, model_of, read_config, stored_tensors
from qalora.converters.settings import linear_names
from qalora.converters.wrapping import in_transformers, opened
from qalora.errors import FormatError, InputError, json_kind, shown
from qalora.formats.files import InputFile
from qalora.formats.gptq import BITS, Version, unpack_qweight, unpack_qzeros
from qalora.formats.safetensors import Entry, load_tensor
from qalora.residual import from_residual
from qalora.tensor import GroupQuantTensor, QuantSpec, holds_float16

__all__ = ["MAKER", "read"]

SAMPLE = 8
"""Layers whose zero points are looked at before a model is taken for symmetric."""

MAKER = "qalora"
"""Our name in meta.quantizer; a label of ours is right, and is believed."""

SETTINGS = "quantize_config.json"
"""Where older tools keep what config.json has as quantization_config."""

PARTS = ("qweight", "qzeros", "scales", "g_idx")

_Stored = Mapping[str, tuple[Path, Entry]]


def _same(module: str) -> str:
    return module


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What quantization_config says. group_size -1: whole rows. rules: of layers that differ; where: it was read;
    on_disk: what rules and files call a module.
    """

    bits: int
    group_size: int
    label: Version
    symmetric: bool
    ours: bool
    minima: torch.dtype
    rules: tuple[Rule, ...]
    where: str
    on_disk: Callable[[str], str] = _same


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One quantized layer as the headers tell it."""

    module: str
    stored: _Stored
    rows: int
    columns: int
    bits: int
    group_size: int
    g_idx: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(entry.nbytes for _, entry in self.stored.values())

    def part(self, part: str) -> Tensor:
        """A whole tensor of the layer."""
        return load_tensor(*self.stored[part])

    def columns_of(self, part: str, start: int, stop: int) -> Tensor:
        """Columns start..stop-1 of a matrix; they are the rows of the weight."""
        if stop - start == self.rows:
            return self.part(part)
        path, entry = self.stored[part]
        size = entry.dtype.itemsize
        with InputFile(path) as file:
            lines = [
                file.tensor(entry.offset + (row * self.rows + start) * size, (stop - start) * size)
                for row in range(entry.shape[0])
            ]
        return torch.stack(lines).view(entry.dtype)


def read(folder: Path, *, checkpoint_format: str | None = None) -> Checkpoint:
    """Open a GPTQ folder; reads config, headers, g_idx and the zero points of a few layers.

    checkpoint_format overrides label and values: "gptq" (zero points stored minus one) or "gptq_v2".
    A residual beside the checkpoint (`beside`) is folded into the minima; another adapter there is only noted.
    Raises FormatError for what is no such folder, InputError for another checkpoint_format.
    """
    config = read_config(folder)
    said = config.pop("quantization_config", None)
    found = opened(folder, config, stored_tensors(folder), end=".qweight")
    config, stored, wrapper = found.config, found.stored, found.wrapper
    settings = replace(_settings(folder, said), on_disk=_same if wrapper is None else wrapper.on_disk)
    modules = sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight"))
    if not modules:
        raise FormatError(f"{folder}", expected="tensors named <layer>.qweight", got="none")
    check_rules(settings.rules, list(map(settings.on_disk, modules)), settings.where)
    layers = {module: _layer(folder, module, stored, settings) for module in modules}
    version, symmetric, notes = _version(folder, settings, list(layers.values()), checkpoint_format)
    linears = linear_names(config, folder)
    decoder = [layers[name.removesuffix(".weight")] for name in linears if name.removesuffix(".weight") in layers]
    shapes = {layer.module: (layer.rows, layer.columns, layer.group_size, layer.g_idx) for layer in decoder}
    place = partial(in_transformers, wrapper)
    residuals, other = find_residual(folder, shapes, place) if shapes else ({}, False)
    taken = {f"{module}.{part}" for module in modules for part in PARTS}
    tensors = {name: float_tensor(name, *where) for name, where in stored.items() if name not in taken}
    for module, layer in layers.items():
        tensors[f"{module}.weight"] = _lazy(layer, settings, version, symmetric, residuals.get(module))
    if other:
        own = f"{folder / ADAPTER_CONFIG} is an adapter of its own; it is not part of the model as it is read here"
        notes = (*notes, own)
    notes = (*found.notes, *notes, *_said_twice(folder, said))
    silent = _zero_biases(tensors, modules)
    model = model_of(folder, "gptq", config, tensors, notes=notes, silent=silent, wrapper=wrapper)
    return replace(model, beside=folder if other else None)


def _settings(folder: Path, config: object) -> _Settings:
    where = f"{folder}: quantization_config"
    if config is None:
        config = read_config(folder, SETTINGS)
        where = f"{folder}/{SETTINGS}"
    if not isinstance(config, dict):
        raise FormatError(where, expected="an object", got=json_kind(config))
    method = config.get("quant_method", "gptq")
    if method != "gptq":
        raise FormatError(f"{where}: quant_method", expected="gptq", got=shown(method))
    bits, group_size = config.get("bits"), config.get("group_size", -1)
    if type(bits) is not int or bits not in BITS:
        raise FormatError(f"{where}: bits", expected=f"one of {', '.join(map(str, BITS))}", got=shown(bits))
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise FormatError(f"{where}: group_size", expected="-1 or a whole number from 1", got=shown(group_size))
    label: Any = config.get("checkpoint_format") or config.get("format") or "gptq"
    if label not in ("gptq", "gptq_v2"):
        raise FormatError(f"{where}: checkpoint_format", expected="gptq or gptq_v2", got=shown(label))
    meta = config.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    ours = MAKER in str(meta.get("quantizer"))
    return _Settings(
        bits=bits,
        group_size=group_size,
        label=label,
        symmetric=config.get("sym") is True,
        ours=ours,
        minima=torch.float16 if ours and meta.get("minima") == "float16" else torch.float32,
        rules=parse_rules(config.get("dynamic"), where),
        where=where,
    )


def _said_twice(folder: Path, counts: object) -> tuple[str, ...]:
    """A note of what quantize_config.json has otherwise than the config.json that counts, as in transformers."""
    if not isinstance(counts, dict) or not (folder / SETTINGS).exists():
        return ()
    try:
        other = read_config(folder, SETTINGS)
    except FormatError:
        return ()
    keys = ("bits", "group_size", "sym", "checkpoint_format", "dynamic")
    differ = [key for key in keys if key in counts and key in other and counts[key] != other[key]]
    if not differ:
        return ()
    listed = ", ".join(f"{key} {other[key]!r:.60}, not {counts[key]!r:.60}" for key in differ)
    return (f"{folder.name}: config.json counts beside {SETTINGS}, which has {listed}",)


def _layer(folder: Path, module: str, stored: _Stored, settings: _Settings) -> _Layer:
    where = f"{folder}: {module}"
    if module.endswith("embed_tokens"):
        raise FormatError(f"{where}: a GPTQ embedding has a layout of its own, which is not read here")
    parts = {part: stored[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in stored}
    for part in ("qweight", "qzeros", "scales"):
        if part not in parts:
            raise FormatError(f"{where}: missing tensor {part}")
    entries = {part: entry for part, (_, entry) in parts.items()}
    _check_dtypes(where, entries)
    words, rows = entries["qweight"].shape
    bits, group_size, why = _sizes(module, settings)
    columns, groups = words * 32 // bits, entries["scales"].shape[0]
    if rows == 0 or groups == 0 or words == 0 or words * 32 % bits or columns % groups:
        raise FormatError(
            where, expected=f"{bits}-bit rows in equal groups", got=f"{words} words in {groups} groups of {rows} rows"
        )
    if groups != _groups(columns, group_size):
        raise FormatError(
            f"{where}.scales",
            expected=f"{_groups(columns, group_size)} groups of {group_size} in {columns} columns{why}",
            got=f"{groups}",
        )
    shapes = {"qzeros": (groups, rows * bits // 32), "scales": (groups, rows), "g_idx": (columns,)}
    for part, shape in shapes.items():
        if part in entries and (entries[part].shape != shape or rows * bits % 32):
            raise FormatError(f"{where}.{part}", expected=f"shape {list(shape)}", got=f"{list(entries[part].shape)}")
    layer = _Layer(
        module=module,
        stored=parts,
        rows=rows,
        columns=columns,
        bits=bits,
        group_size=columns // groups,
        g_idx=None,
    )
    return _with_order(layer) if "g_idx" in parts else layer


def _check_dtypes(where: str, entries: Mapping[str, Entry]) -> None:
    floats = (torch.float16, torch.bfloat16, torch.float32)
    allowed = {"qweight": (torch.int32,), "qzeros": (torch.int32,), "scales": floats, "g_idx": (torch.int32,)}
    for part, entry in entries.items():
        dimensions = 1 if part == "g_idx" else 2
        if entry.dtype not in allowed[part] or len(entry.shape) != dimensions:
            raise FormatError(
                f"{where}.{part}",
                expected=f"{allowed[part][0]} with {dimensions} dimensions",
                got=f"{entry.dtype} {list(entry.shape)}",
                todo="float zero points in qzeros are no GPTQ format" if part == "qzeros" else "",
            )


def _sizes(module: str, settings: _Settings) -> tuple[int, int, str]:
    """Width and group size of one layer by the rules, and a word about the rule; FormatError if one leaves it out."""
    rule = rule_of(settings.rules, settings.on_disk(module))
    if rule is None:
        return settings.bits, settings.group_size, ""
    told = f"the rule {rule.text[:120]!r} of dynamic"
    if rule.out:
        raise FormatError(
            f"{settings.where}: {told} leaves out {module}", expected="floats there", got="tensors named qweight"
        )
    size = settings.group_size if rule.group_size is None else rule.group_size
    return rule.bits or settings.bits, size, f" at {rule.bits or settings.bits} bits, by {told}"


def _groups(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-columns // group_size)


def _with_order(layer: _Layer) -> _Layer:
    """The layer with its g_idx, where that is not i // group_size."""
    g_idx = layer.part("g_idx")
    if torch.equal(g_idx, (torch.arange(layer.columns) // layer.group_size).int()):
        return layer
    return replace(layer, g_idx=g_idx)


def _version(
    folder: Path, settings: _Settings, layers: list[_Layer], override: str | None
) -> tuple[Version, bool, tuple[str, ...]]:
    """How zero points are stored, whether every layer must be symmetric, and notes."""
    if override is not None:
        if override not in ("gptq", "gptq_v2"):
            raise InputError("checkpoint_format", expected="gptq or gptq_v2", got=shown(override))
        return ("gptq" if override == "gptq" else "gptq_v2"), False, ()
    if settings.ours:
        return settings.label, settings.symmetric, ()
    offsets = set()
    for layer in layers[:SAMPLE]:
        offsets.add(_offset(layer))
        if len(offsets) > 1 or None in offsets:
            break
    if offsets == {-1} or offsets == {0}:
        version: Version = "gptq" if offsets == {-1} else "gptq_v2"
        wrong = f"{folder} is labelled {settings.label}, but its zero points, all symmetric, are those of {version}"
        return version, True, () if version == settings.label else (f"{wrong}; read as {version}",)
    note = (
        f"{folder} has asymmetric zero points, stored as its label says: {settings.label}; labels are often wrong, and "
        "then every weight is off by one scale: `checkpoint_format` gptq or gptq_v2 overrides it"
    )
    return settings.label, False, (note,)


def _offset(layer: _Layer) -> int | None:
    """What all stored zero points of a layer are, less 2**(bits-1), if that is -1 or 0; else None."""
    stored = unpack_qzeros(layer.part("qzeros"), layer.bits, "gptq_v2")
    offset = int(stored[0, 0]) - (1 << (layer.bits - 1))
    return offset if offset in (-1, 0) and bool((stored == stored[0, 0]).all()) else None


def _lazy(
    layer: _Layer, settings: _Settings, version: Version, symmetric: bool, residual: StoredResidual | None
) -> LazyTensor:
    scales = layer.stored["scales"][1].dtype
    spec = QuantSpec(
        bits=layer.bits,
        group_size=layer.group_size,
        zeros="integer" if residual is None else "real",
        scale_dtype=torch.float16 if scales == torch.float16 else torch.float32,
        min_dtype=torch.float32 if residual is None else settings.minima,
        act_order=layer.g_idx is not None,
        zero=1 << (layer.bits - 1) if symmetric and residual is None else None,
    )

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        start, stop, _ = slice(start, stop).indices(layer.rows)
        scale = layer.columns_of("scales", start, stop).float().t().contiguous()
        zero = unpack_qzeros(layer.part("qzeros"), layer.bits, version)[start:stop]
        if symmetric and bool((zero != 1 << (layer.bits - 1)).any()):
            raise FormatError(
                f"{layer.module}.qzeros",
                expected="symmetric zero points, as in the first layers",
                got="asymmetric zero points",
                todo="say how they are stored with `checkpoint_format` gptq or gptq_v2",
            )
        minimum = -scale * zero
        if residual is not None:
            c = residual.c(pooling_matrix(layer.columns, layer.group_size, layer.g_idx), start, stop)
            minimum = from_residual(scale, zero, c)
            if spec.min_dtype == torch.float16 and not holds_float16(minimum):
                raise FormatError(
                    f"{layer.module}", expected="minima that float16 holds, as meta says", got="minima that it rounds"
                )
        return GroupQuantTensor(
            packed=unpack_qweight(layer.columns_of("qweight", start, stop)),
            scale=scale,
            min=minimum,
            bits=layer.bits,
            group_size=layer.group_size,
            g_idx=layer.g_idx,
        )

    size = layer.nbytes + (0 if residual is None else residual.a.nbytes + residual.b.nbytes)
    shape = (layer.rows, layer.columns)
    return LazyTensor(name=f"{layer.module}.weight", shape=shape, spec=spec, nbytes=size, read=read_rows)


def _zero_biases(tensors: Mapping[str, LazyTensor], modules: list[str]) -> set[str]:
    """The biases of zeros, which old AutoGPTQ writes for layers that have none."""
    names = [f"{module}.bias" for module in modules if f"{module}.bias" in tensors]
    return {name for name in names if not bool(tensors[name].load_float().any())}
