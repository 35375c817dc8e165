"""A model of a family that is not read: what is missing, the nearest family, and what the tracker wants to hear."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from qalora.converters.families import FAMILIES, SOME, VARIANTS, Family
from qalora.converters.families.mechanisms import missing_in
from qalora.converters.families.wrappers import WRAPPERS
from qalora.converters.huggingface import read_config, stored_tensors
from qalora.errors import InputError, shown

__all__ = ["unknown_family"]

OTHER = re.compile(r"vis(?:ion|ual)|audio")
"""In names of tensors that are none of the decoder of text."""

FIRST = re.compile(r"(?:^|\.)layers\.0\.(.+)$")
NUMBER = re.compile(r"\.\d+\.")
LISTED = 24
"""Tensors of a layer that are listed; those of experts count as one."""


def unknown_family(folder: Path, error: InputError) -> InputError:
    """The error of a model that was not opened; with what is above, where its family is not known here."""
    try:
        config = read_config(folder)
        kind = config.get("model_type")
        if isinstance(kind, str) and (kind in FAMILIES or kind in VARIANTS):
            return error
        shapes = _first_layer(folder)
    except InputError:
        return error
    if not isinstance(kind, str) or kind in WRAPPERS:
        return error
    what = [f"{words} ({said})" for words, said in missing_in(config)] or ["no architecture that is known here"]
    near = _nearest(config, {name.rpartition(".")[0] for name in shapes})
    version = shown(config.get("transformers_version"))
    listed = ", ".join(f"{name[:80]} {list(shape)}" for name, shape in list(shapes.items())[:LISTED]) or "none here"
    todo = (
        f"it is {'; '.join(what)}; the nearest family that is read is {near.model_type}; if you miss it, tell the "
        f"issue tracker: model_type {shown(kind)}, transformers {version}, its config.json, and the tensors of layer "
        f"0: {listed}"
    )
    return InputError(error.what, expected=error.expected, got=error.got, todo=todo)


def _first_layer(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the first layer's tensors, by what follows the layer's number; experts are one."""
    found: dict[str, tuple[int, ...]] = {}
    for name, (_, entry) in sorted(stored_tensors(folder).items()):
        match = FIRST.search(name)
        if match is not None and not OTHER.search(name):
            plain = "".join(char if char.isprintable() else "?" for char in match[1])
            found.setdefault(NUMBER.sub(".N.", plain), entry.shape)
    return found


def _nearest(config: Mapping[str, Any], modules: Collection[str]) -> Family:
    """The family whose layers and own keys have the most names in common with these."""
    own = {key for key in SOME if config.get(key) is not None}

    def alike(family: Family) -> tuple[float, float]:
        names = {name for name, _ in (*family.linears, *family.norms)}
        keys = set(family.defaults) & set(SOME)
        named = SequenceMatcher(None, str(config.get("model_type")), family.model_type).ratio()
        return 2 * _share(names, set(modules)) + _share(keys, own), named

    return max(FAMILIES.values(), key=alike)


def _share(a: set[str], b: set[str]) -> float:
    """How much of two sets is in both; 0 where there is nothing."""
    return len(a & b) / len(a | b) if a | b else 0.0
