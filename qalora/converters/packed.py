"""Folders whose linear layers other tools have packed into words: what is alike in reading them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qalora.adapter.peft_config import CONFIG as ADAPTER_CONFIG
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.huggingface import float_tensor, model_of, read_config, stored_tensors
from qalora.converters.wrapping import in_transformers, opened
from qalora.errors import FormatError, shown
from qalora.formats.safetensors import Entry

__all__ = ["FLOATS", "Layers", "Names", "Stored", "check_known", "not_read", "parts_of", "read_packed"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What scales are stored in."""

Stored = Mapping[str, tuple[Path, Entry]]

Names = Mapping[str, frozenset[str]]
"""What the config may call a module: as the files have it, and transformers; by what it is called here."""

Layers = Callable[[object, Names, Stored], tuple[Mapping[str, LazyTensor], tuple[str, ...]]]
"""Of quantization_config, the modules with words, and all tensors: the weight of each module, and notes."""


def read_packed(folder: Path, layout: str, parts: Sequence[str], layers: Layers) -> Checkpoint:
    """Open a folder whose words are tensors of the name `<module>.<part>`, with the first of the parts in each.

    Raises FormatError for a folder without words, for a tensor of another part beside them, and what `layers` raises.
    """
    config = read_config(folder)
    said = config.pop("quantization_config", None)
    end = f".{parts[0]}"
    found = opened(folder, config, stored_tensors(folder), end=end)
    stored, wrapper = found.stored, found.wrapper
    modules = sorted(name.removesuffix(end) for name in stored if name.endswith(end))
    if not modules:
        raise FormatError(f"{folder}", expected=f"tensors named <layer>{end}", got="none")
    disk = {module: module if wrapper is None else wrapper.on_disk(module) for module in modules}
    names = {module: frozenset({disk[module], in_transformers(wrapper, module)}) for module in modules}
    weights, notes = layers(said, names, stored)
    tensors = {f"{module}.weight": weight for module, weight in weights.items()}
    for name, where in stored.items():
        module, _, part = name.rpartition(".")
        if module not in names or part == "bias":
            tensors[name] = float_tensor(name, *where)
        elif part not in parts:
            raise FormatError(f"{folder}: {name}: a tensor that is not known here beside {parts[0]}")
    adapter = folder / ADAPTER_CONFIG
    if adapter.exists():
        notes = (*notes, f"{adapter} is an adapter of its own; it is not part of the model as it is read here")
    model = model_of(folder, layout, found.config, tensors, notes=(*found.notes, *notes), wrapper=wrapper)
    return replace(model, beside=folder if adapter.exists() else None)


def parts_of(
    where: str, module: str, stored: Stored, parts: Sequence[str], *, needed: Collection[str]
) -> dict[str, tuple[Path, Entry]]:
    """The tensors of a module by their parts; FormatError where one that is needed is missing."""
    found = {part: stored[f"{module}.{part}"] for part in parts if f"{module}.{part}" in stored}
    for part in needed:
        if part not in found:
            raise FormatError(f"{where}: missing tensor {part}")
    return found


def check_known(content: Mapping[str, Any], known: Set[str], where: str) -> None:
    """FormatError for a key of a config that is not known: it may change what the words mean."""
    unknown = sorted(set(content) - known)
    if unknown:
        raise FormatError(f"{where} says {unknown[0][:60]!r}, which is not known here", got=shown(content[unknown[0]]))


def not_read(what: str) -> FormatError:
    """The error for words, or something beside them, of a kind that is known and not read."""
    return FormatError(f"{what}, which is not read here", todo="start from the float model")
