"""Model-level decisions: families and tensor names, graphs, plans; one module or folder a target.

`load` recognises a model by what it finds, never by what it is told; `qalora.converters.exports` writes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.format import Format, Layout, LoraFile
from qalora.errors import FormatError, InputError, shown
from qalora.formats.files import InputFile
from qalora.formats.gptq import VERSIONS
from qalora.formats.remote import bring, is_url, knowing
from qalora.options.words import SOURCES, TARGETS

__all__ = [
    "TARGETS",
    "by_config",
    "layout",
    "layouts",
    "load",
    "loras",
    "packages",
    "recognise",
    "target",
    "weight_suffixes",
]


def target(name: str) -> Format:
    """The record of a format that can be written; InputError names those there are."""
    if name not in TARGETS:
        raise InputError(field="targets", expected=f"one of {', '.join(TARGETS)}", got=shown(name))
    form: Format = importlib.import_module(TARGETS[name]).FORMAT
    return form


def layouts() -> tuple[Layout, ...]:
    """Everything that can be read: the formats, what is read and not written, and last the folder of a float model."""
    from qalora.converters.huggingface import LAYOUT

    return (*map(target, TARGETS), *map(_source, SOURCES), LAYOUT)


def _source(name: str) -> Layout:
    form: Layout = importlib.import_module(SOURCES[name]).LAYOUT
    return form


def layout(name: str) -> Layout:
    """The record of a layout by its name."""
    return {one.name: one for one in layouts()}[name]


def loras() -> dict[str, LoraFile]:
    """The files of adapters that formats have, by their names."""
    return {one.lora.name: one.lora for one in layouts() if one.lora is not None}


def weight_suffixes() -> frozenset[str]:
    """What the names of files end with that a runtime would open as weights."""
    return frozenset(suffix for one in layouts() for suffix in one.suffixes)


def packages() -> frozenset[str]:
    """The top-level modules, of some formats alone, that decide the bytes that are written."""
    return frozenset(package for name in TARGETS for package in target(name).packages)


def recognise(path: Path) -> Layout:
    """What a file or folder is, by what is in it; FormatError for what is nothing that is read here."""
    match = next((one for one in layouts() if one.by_files is not None and one.by_files(path)), None)
    if match is None and path.is_file():
        raise _not_recognised(path)
    return match or by_config(path)


def by_config(folder: Path) -> Layout:
    """What a folder is by its config.json; FormatError for one that is missing, or names another method."""
    from qalora.converters.huggingface import read_config
    from qalora.converters.unread import unread

    config = read_config(folder)
    for one in layouts():
        if one.by_config is not None and one.by_config(folder, config):
            return one
    settings, known = config["quantization_config"], [one.name for one in layouts() if one.by_config is not None]
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str):
        raise FormatError(f"{folder}/config.json: quantization_config", expected="an object with a quant_method")
    raise unread(folder, settings) or FormatError(
        f"{folder}: quant_method",
        expected=f"{', '.join(known[:-1])}, or a float model",
        got=shown(method),
        todo="see the README",
    )


def _not_recognised(path: Path) -> FormatError:
    with InputFile(path) as file:
        magic = file.read(0, min(4, file.size))
    if magic[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        return FormatError(f"{path}: a pickle, which runs code when it is opened", todo="convert it to safetensors")
    got = f"a file that begins with {shown(magic.decode('latin-1'))}"
    return FormatError(str(path), expected="a GGUF or ONNX file or a model folder", got=got)


def load(
    model: str | Path, *, checkpoint_format: str | None = None, note: Callable[[str], None] = lambda text: None
) -> Checkpoint:
    """Open a model: a folder of any of the `layouts`, a GGUF file, an ONNX decoder, a Hub id, a URL.

    Reads headers only. A folder with model.onnx is an ONNX decoder where it has no safetensors. A URL is that of a
    folder of safetensors or of a GGUF file; what is asked for is read from there.

    checkpoint_format overrides what a GPTQ folder says of its zeros: "gptq" (stored minus one) or "gptq_v2".
    note is called with what the reader noted, such as a label that may be wrong.

    Raises InputError for what is not there or not recognised, and for a checkpoint_format of what is no GPTQ folder,
    FormatError for what is damaged.
    """
    if checkpoint_format not in (None, *VERSIONS):
        raise InputError("checkpoint_format", expected=" or ".join(VERSIONS), got=shown(checkpoint_format))
    path = bring(str(model)) if is_url(str(model)) else Path(model)
    if not path.is_file() and not path.is_dir():
        from qalora.converters.huggingface import download

        path = download(str(model))
    model_layout = recognise(path)
    if checkpoint_format is None:
        read = model_layout.read(path)
        read = replace(read, stored=read)
    elif model_layout.read_as is not None:
        read = model_layout.read_as(path, checkpoint_format)  # its own label says something else: it is not as stored
    else:
        raise InputError(
            f"`checkpoint_format` is for GPTQ folders, and {path} is {model_layout.name}", todo="leave it out"
        )
    for text in read.notes:
        note(text)
    return _of_url(read) if is_url(str(model)) else read


def _of_url(model: Checkpoint) -> Checkpoint:
    """A model whose tensors can be read in other processes too, and that no runtime can open where it is."""

    def known(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        return {name: replace(lazy, read=knowing(lazy.read)) for name, lazy in tensors.items()}

    around = model.wrapper
    if around is not None:
        around = replace(around, carried=known(around.carried))
    return replace(model, tensors=known(model.tensors), wrapper=around, stored=None)
