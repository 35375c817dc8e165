"""What lies in a folder where something else was looked for: for a sentence that names it and says what to do.

Names of files as transformers, PEFT, GPTQModel, llama.cpp and trainers give them; no file is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["instead_of_adapter", "instead_of_config", "instead_of_model", "instead_of_weights"]

CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "config.json", "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PART = re.compile(r"(?P<stem>.+)-\d+-of-\d+\.safetensors")

_PARTS = re.compile(r"(\d{1,15})")

LOOKED_AT = 10_000
"""Entries of a folder, and folders in it, that are looked at."""

SHOWN = 4
"""Names that a sentence holds."""


def instead_of_config(folder: Path) -> tuple[str, str]:
    """(what was got, what to do) for a folder without config.json."""
    here = _names(folder)
    if ADAPTER_CONFIG in here or ADAPTER_WEIGHTS in here:
        return "an adapter", f"give its base as the model, and this with `adapter` {folder}"
    names = _ending(here, (".gguf",))
    if names:
        return _list_names(names), f"give the file: {folder / names[0]}"
    inner = _folders(folder, CONFIG)
    if inner:
        return f"models in {_list_names(inner)}", f"give one of them, such as {folder / inner[-1]}"
    inner = _folders(folder, ADAPTER_CONFIG)
    if inner:
        todo = f"give their base as the model, and one of them with `adapter` {folder / inner[-1]}"
        return f"adapters in {_list_names(inner)}", todo
    names = _ending(here, (".safetensors", *PICKLES))
    if names:
        return f"{_list_names(names)} alone", "put the model's config.json and tokenizer beside it"
    return "none", ""


def instead_of_weights(folder: Path, stem: str = "model") -> tuple[str, str]:
    """(what was got, what to do) for a model's folder without <stem>.safetensors or its index."""
    here, expected = _names(folder), f"{stem}.safetensors"
    names = [name for name in _ending(here, (".safetensors",)) if not name.startswith("adapter_")]
    parts = [name for name in names if PART.fullmatch(name)]
    if parts:
        return (
            f"{_list_names(parts)} without the index that says which tensor is where",
            f"put {expected}.index.json there",
        )
    if len(names) == 1:
        return names[0], f"rename it to {expected}, if it holds the whole model"
    if names:
        return _list_names(names), f"leave the one that holds the whole model, as {expected}"
    if ADAPTER_WEIGHTS in here:
        return f"{ADAPTER_WEIGHTS}, an adapter", "give its base as the model, and this folder with `adapter`"
    ggufs = _ending(here, (".gguf",))
    if ggufs:
        return _list_names(ggufs), f"give the file: {folder / ggufs[0]}"
    inner = _folders(folder, expected, f"{expected}.index.json")
    if inner:
        return f"one in {_list_names(inner)}", f"give the folder that is meant, such as {folder / inner[-1]}"
    return "neither", ""


def instead_of_adapter(folder: Path, name: str) -> tuple[str, str]:
    """(what was got, what to do) for an adapter's folder without a file; `folder` may be a file itself, or nothing."""
    if not folder.is_dir():
        return _instead_of_folder(folder)
    here = _names(folder)
    if {ADAPTER_CONFIG, ADAPTER_WEIGHTS} & here:
        return _half_an_adapter(folder, here, name)
    inner = _folders(folder, ADAPTER_CONFIG)
    if inner:
        return f"adapters in {_list_names(inner)}", f"give the one that is meant, such as {folder / inner[-1]}"
    ggufs = _ending(here, (".gguf",))
    if ggufs:
        return _list_names(ggufs), f"if it is a GGUF LoRA: qalora adapter convert {folder / ggufs[0]} --base MODEL"
    if CONFIG in here:
        return "a model", "give the folder of the adapter, which has adapter_config.json"
    names = _ending(here, (".safetensors", *PICKLES))
    return (f"{_list_names(names)} alone", "put adapter_config.json beside it") if names else ("none", "")


def instead_of_model(path: Path) -> str:
    """What was got where an artefact, or a folder of artefacts, was looked for."""
    if not path.exists():
        return "nothing there"
    if not path.is_dir():
        return "a file of a different kind"
    got, _ = instead_of_config(path)
    return "a folder without one" if got == "none" else got


def _instead_of_folder(path: Path) -> tuple[str, str]:
    if not path.exists():
        return "nothing", ""
    if (path.parent / ADAPTER_CONFIG).is_file():
        return "a file", f"give its folder, {path.parent}"
    return "a file", "give a folder with both files in it"


def _half_an_adapter(folder: Path, here: set[str], name: str) -> tuple[str, str]:
    """Of a folder that has one of the two files."""
    if name == ADAPTER_CONFIG:
        return f"{ADAPTER_WEIGHTS} alone", f"fetch {ADAPTER_CONFIG} too: rank and alpha are in it"
    names = [one for one in _ending(here, (".safetensors",)) if one != name]
    adapters = [one for one in names if "adapter" in one or "lora" in one.lower()]
    if len(names) == 1 or len(adapters) == 1:
        one = (adapters or names)[0]
        return one, f"rename it to {name}, if it is the adapter"
    if names:
        return _list_names(names), f"rename the one that is the adapter to {name}"
    inner = _folders(folder, ADAPTER_WEIGHTS)
    if inner:
        return f"one in {_list_names(inner)}", f"give the one that is meant, such as {folder / inner[-1]}"
    return "none", ""


def _names(folder: Path) -> set[str]:
    """The files of a folder, none where it is not to be read."""
    try:
        return {path.name for _, path in zip(range(LOOKED_AT), folder.iterdir(), strict=False) if path.is_file()}
    except OSError:
        return set()


def _folders(folder: Path, *names: str) -> list[str]:
    """The folders in a folder that hold a file of one of the names; checkpoint-10 behind checkpoint-9."""
    try:
        inner = [path for _, path in zip(range(LOOKED_AT), folder.iterdir(), strict=False) if path.is_dir()]
        folders = [path.name for path in inner if any((path / name).is_file() for name in names)]
    except OSError:
        return []
    return _sorted(name for name in folders if name[:1] != ".")


def _ending(names: Iterable[str], ends: tuple[str, ...]) -> list[str]:
    return _sorted(name for name in names if name.endswith(ends))


def _sorted(names: Iterable[str]) -> list[str]:
    """By their text, and numbers in them by their size."""

    def key(name: str) -> list[str]:
        return [part.zfill(15) if part.isdecimal() else part for part in _PARTS.split(name)]

    return sorted(names, key=key)


def _list_names(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
