"""Read an MLX folder, ours or mlx-lm's: affine codes as they are, in their own groups; lazily.

A folder of ours says what each tensor was before it was cut into MLX's groups; that is read back, and held against the
values. Not read: modes mxfp4, mxfp8 and nvfp4, whose groups are floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.families import family_of
from qalora.converters.huggingface import HEAD, float_tensor, model_of, read_config, stored_tensors
from qalora.converters.mlx.around import modules_here
from qalora.converters.mlx.foreign import as_it_was, as_mlx_reads, ties
from qalora.converters.specs import TENSORS, restored, stored_specs
from qalora.converters.wrapping import opened
from qalora.errors import FormatError, json_kind, shown
from qalora.formats.mlx import GROUP_SIZES, unpack_words
from qalora.formats.safetensors import Entry, load_tensor
from qalora.tensor import BITS, GroupQuantTensor, QuantSpec

__all__ = ["read"]

PARTS = ("weight", "scales", "biases")

_Stored = Mapping[str, tuple[Path, Entry]]


def read(folder: Path) -> Checkpoint:
    """Open an MLX folder; reads config and headers only. FormatError for what is no such folder."""
    config = read_config(folder)
    settings = config.pop("quantization", None)
    copy = config.pop("quantization_config", None)
    if not isinstance(settings, dict):
        raise FormatError(f"{folder}: quantization", expected="an object", got=json_kind(settings))
    found = opened(folder, config, stored_tensors(folder), end=".scales")
    config, stored = found.config, found.stored
    said, settings = settings, modules_here(settings, found.wrapper)
    modules = sorted(name.removesuffix(".scales") for name in stored if name.endswith(".scales"))
    taken = {f"{module}.{part}" for module in modules for part in PARTS}
    tensors = {name: float_tensor(name, *where) for name, where in stored.items() if name not in taken}
    for module in modules:
        tensors[f"{module}.weight"] = _quantized(folder, module, stored, settings)
    ours = stored_specs(stored)
    for module, spec in ours.items():
        name = f"{module}.weight"
        if name not in tensors:
            raise FormatError(f"{folder}: {TENSORS}", expected="tensors of the file", got=shown(name))
        tensors[name] = restored(tensors[name], spec)
    notes = found.notes
    if not ours:
        config, tensors, more = _as_mlx_reads(folder, config, tensors)
        notes = (*notes, *more)
    elif "rope_parameters" in config:  # what it was; the keys beside it are as mlx-lm wants them
        config, more = as_it_was(config, folder.name, tied=HEAD not in tensors)
        notes = (*notes, *more)
    if copy not in (None, said):
        notes = (*notes, f"{folder.name}: quantization counts, as in mlx-lm, not quantization_config beside it")
    config["tie_word_embeddings"] = HEAD not in tensors  # mlx-lm has another default than transformers
    return model_of(folder, "mlx", config, tensors, others="refuse", notes=notes, wrapper=found.wrapper)


def _as_mlx_reads(
    folder: Path, config: dict[str, Any], tensors: dict[str, LazyTensor]
) -> tuple[dict[str, Any], dict[str, LazyTensor], tuple[str, ...]]:
    """Config and tensors of a folder that others made, as mlx-lm takes them, and notes."""
    family, stored = family_of(config, folder), HEAD in tensors
    tied = ties(config, family, stored=stored)
    if not stored and not tied:
        raise FormatError(f"{folder}: missing tensor {HEAD}, which config.json requires")
    read, notes = as_mlx_reads(config, folder.name)
    if stored and tied and (family.mlx.ties == "always" or tensors[HEAD].spec is not None):
        raise FormatError(
            f"{folder}: tensor {HEAD} beside an output that is tied to the embedding, which mlx-lm refuses"
        )
    if stored and tied:
        tensors = {name: lazy for name, lazy in tensors.items() if name != HEAD}
        notes = (*notes, f"{folder.name}: mlx-lm ties the output to the embedding, and passes {HEAD} over")
    return read, tensors, notes


def _quantized(folder: Path, module: str, stored: _Stored, settings: Mapping[str, Any]) -> LazyTensor:
    where = f"{folder}: {module}"
    bits, group_size = _sizes(where, module, settings)
    parts = {}
    for part in PARTS:
        if f"{module}.{part}" not in stored:
            raise FormatError(f"{where}: missing tensor {module}.{part}")
        parts[part] = stored[f"{module}.{part}"]
    rows, columns = _check_parts(where, {part: entry for part, (_, entry) in parts.items()}, bits, group_size)
    spec = QuantSpec(
        bits=bits,
        group_size=group_size,
        zeros="real",
        scale_dtype=_narrowest(parts["scales"][1].dtype),
        min_dtype=_narrowest(parts["biases"][1].dtype),
    )

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        part = {key: load_tensor(*place, start, stop) for key, place in parts.items()}
        return GroupQuantTensor(
            packed=unpack_words(part["weight"]),
            scale=part["scales"].float(),
            min=part["biases"].float(),
            bits=bits,
            group_size=group_size,
        )

    size = sum(entry.nbytes for _, entry in parts.values())
    return LazyTensor(
        name=f"{module}.weight", shape=(rows, columns), spec=spec, nbytes=size, by_rows=True, read=read_rows
    )


def _narrowest(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 reaches further than float16."""
    return torch.float16 if dtype is torch.float16 else torch.float32


def _sizes(where: str, module: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and group size of a module: its own entry, or the folder's."""
    own = settings.get(module)
    entry = own if isinstance(own, dict) else settings
    mode = entry.get("mode", "affine")
    if mode != "affine":
        raise FormatError(
            f"{where}: quantization.mode",
            expected="affine",
            got=shown(mode),
            todo="start from another quantization of this model",
        )
    bits, group_size = entry.get("bits"), entry.get("group_size")
    if type(bits) is int and bits in BITS and type(group_size) is int and group_size in GROUP_SIZES:
        return bits, group_size
    raise FormatError(
        f"{where}: quantization",
        expected=f"bits among {', '.join(map(str, BITS))} and group_size among {', '.join(map(str, GROUP_SIZES))}",
        got=f"{shown(bits)} and {shown(group_size)}",
    )


def _check_parts(where: str, entries: Mapping[str, Entry], bits: int, group_size: int) -> tuple[int, int]:
    """Shapes and dtypes against each other; gives (out, in)."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    for part, entry in entries.items():
        allowed = (torch.uint32,) if part == "weight" else floats
        if entry.dtype not in allowed or len(entry.shape) != 2:
            raise FormatError(
                f"{where}.{part}",
                expected=f"a matrix of {' or '.join(str(dtype) for dtype in allowed)}",
                got=f"{entry.dtype} {list(entry.shape)}",
            )
    (rows, words), groups = entries["weight"].shape, entries["scales"].shape[1]
    columns = groups * group_size
    if rows == 0 or columns == 0 or words * 32 != columns * bits:
        raise FormatError(
            f"{where}.weight",
            expected=f"{columns * bits // 32} words a row for {groups} groups of {group_size} at {bits} bits",
            got=f"{[rows, words]}",
        )
    for part in ("scales", "biases"):
        if entries[part].shape != (rows, groups):
            raise FormatError(f"{where}.{part}", expected=f"{[rows, groups]}", got=f"{list(entries[part].shape)}")
    return rows, columns
