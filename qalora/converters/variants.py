"""Models that are ones of a family under other names: config.json and tensors as the family has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qalora.converters.families import FAMILIES, VARIANTS, Variant
from qalora.errors import FormatError, InputError, shown
from qalora.formats.safetensors import Entry

__all__ = ["as_family"]

Stored = dict[str, tuple[Path, Entry]]


def as_family(
    config: Mapping[str, Any], stored: Stored, folder: Path
) -> tuple[dict[str, Any], Stored, tuple[str, ...]]:
    """Config, tensors and a note of the model as one of its family; as they are where the model_type is no variant.

    Raises InputError for a model of a variant that is none of the family.
    """
    kind = config.get("model_type")
    variant = VARIANTS.get(kind) if isinstance(kind, str) else None
    if variant is None:
        return dict(config), stored, ()
    _check(config, variant, folder)
    family = FAMILIES[variant.family]
    renamed = {ours: config[theirs] for ours, theirs in variant.keys.items() if theirs in config}
    kept = {key: value for key, value in config.items() if not key.startswith(variant.dropped)}
    plain = {**kept, **renamed, "model_type": family.model_type, "architectures": [family.architecture]}
    tensors: Stored = {}
    for name, place in stored.items():
        for ours, where in _parts(name, *place, variant):
            if ours in tensors:
                raise FormatError(f"{folder}: tensor {name}: a second tensor with the name {ours}")
            tensors[ours] = where
    note = f"{folder.name}: a {kind} {variant.which} is a {family.model_type}: it is read as one"
    return plain, tensors, (note,)


def _check(config: Mapping[str, Any], variant: Variant, folder: Path) -> None:
    """Refuse what the family does not compute."""
    for key, value in variant.only.items():
        if key not in config or config[key] != value:
            expected = f"{json.dumps(value)}: of {variant.model_type}, what a {variant.family} computes is read here"
            raise InputError(f"{folder}: {key}", expected=expected, got=shown(config.get(key)))
    for key, words in variant.lists.items():
        kinds = config.get(key)
        others = [kind for kind in kinds if kind not in words] if isinstance(kinds, list) else [kinds]
        if others:
            expected = f"{' or '.join(words)} alone, as a {variant.family} has it"
            raise InputError(f"{folder}: {key}", expected=expected, got=shown(others[0]))


def _parts(name: str, path: Path, entry: Entry, variant: Variant) -> list[tuple[str, tuple[Path, Entry]]]:
    """What the family calls a tensor, or each of the blocks of rows that it consists of."""
    found = next((item for item in variant.modules.items() if f".{item[0]}." in name), None)
    if found is None:
        return [(name, (path, entry))]
    module, own = found
    count = len(own)
    if not entry.shape or entry.shape[0] % count:
        raise FormatError(f"{path}: {name}", expected=f"a multiple of {count} rows", got=str(list(entry.shape)))
    shape, nbytes = (entry.shape[0] // count, *entry.shape[1:]), entry.nbytes // count
    return [
        (
            name.replace(f".{module}.", f".{part}."),
            (path, replace(entry, shape=shape, offset=entry.offset + n * nbytes, nbytes=nbytes)),
        )
        for n, part in enumerate(own)
    ]
