"""Float models as transformers saves them: config.json, safetensors (sharded or not), tokenizer; a folder or Hub id.

Pickled weights (pytorch_model.bin) are refused: opening them runs code. This module reads only; the quantized folders
that look alike are read by `native` and `gptq`, which share the helpers here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qalora.adapter.saved import TOKENIZER
from qalora.checkpoint import Checkpoint, LazyTensor, Wrapper
from qalora.converters.config_places import tidied
from qalora.converters.decoder import decoder_of, tensor_shape
from qalora.converters.format import Layout, exact
from qalora.converters.settings import bias_names, linear_names, norm_names, settings_of
from qalora.converters.unread import TENSORS
from qalora.converters.variants import as_family
from qalora.converters.wrapping import opened
from qalora.errors import FormatError, InputError
from qalora.formats.around import instead_of_config
from qalora.formats.files import check_content, contained, may_be_of_the_hub
from qalora.formats.json_text import read_json_object
from qalora.formats.safetensors import Entry, load_tensor, read_header, shards
from qalora.tensor import check_finite

__all__ = [
    "HEAD",
    "LAYOUT",
    "LICENCES",
    "TEMPLATES",
    "TWO_FILES",
    "announced",
    "check_shapes",
    "companion_files",
    "download",
    "float_tensor",
    "has_tokenizer_files",
    "model_of",
    "read",
    "read_config",
    "stored_tensors",
    "zero_biases",
]

CONFIG_LIMIT = 16 << 20

LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
COMPANIONS = (
    "generation_config.json",
    *TOKENIZER,
    *LICENCES,
)
"""Files that travel with a model unchanged."""

TEMPLATES = "additional_chat_templates"
"""The folder of the chat templates that are not the default one, NAME.jinja, in transformers 5; they travel too."""

TWO_FILES = ("vocab.json", "merges.txt")
"""A byte-level BPE as transformers' own classes kept it before tokenizer.json."""

BUFFERS = (".rotary_emb.inv_freq",)
"""Tensors of early Llama checkpoints that config.json determines, and no model of today has."""


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of `folder`; FormatError if it is missing or not one."""
    path = contained(folder, name)
    if not path.exists():
        got, todo = instead_of_config(folder) if name == "config.json" else ("none", "")
        raise FormatError(f"{folder}", expected=f"a model folder with {name}", got=got, todo=todo)
    return read_json_object(path, CONFIG_LIMIT)


def companion_files(folder: Path) -> dict[str, Path]:
    """The tokenizer and other small files that travel along, by name; FormatError for a Git LFS pointer among them."""
    templates = [f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*.jinja"))]
    files = {name: contained(folder, name) for name in (*COMPANIONS, *templates) if (folder / name).exists()}
    for path in files.values():
        check_content(path)
    return files


def has_tokenizer_files(names: Collection[str]) -> bool:
    """Whether files of these names are a tokenizer that is read here."""
    return bool({"tokenizer.json", "tokenizer.model"} & set(names)) or set(names) >= {*TWO_FILES}


def stored_tensors(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Every tensor in the folder's safetensors files: its file, and where it is there; but for BUFFERS."""
    if not any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        pickles = sorted(folder.glob("pytorch_model*.bin")) + sorted(folder.glob("*.pt"))
        if pickles:
            raise FormatError(
                f"{pickles[0]}: pickled weights run code when they are opened",
                todo="save the model again with save_pretrained, which writes safetensors",
            )
    files = shards(folder)
    headers = {path: read_header(path) for path in set(files.values())}
    return {name: (path, headers[path].entries[name]) for name, path in files.items() if not name.endswith(BUFFERS)}


def float_tensor(name: str, path: Path, entry: Entry) -> LazyTensor:
    """A lazy tensor of a safetensors file, in its own dtype; FormatError for one that is not float."""
    if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
        raise FormatError(f"{path}: {name}", expected="float16, bfloat16, float32 or float64", got=str(entry.dtype))

    def read_rows(start: int, stop: int) -> Tensor:
        tensor = load_tensor(path, entry, start, stop)
        check_finite(name, tensor)
        return tensor

    return LazyTensor(
        name=name, shape=entry.shape, dtype=entry.dtype, nbytes=entry.nbytes, by_rows=True, read=read_rows
    )


def read(folder: Path) -> Checkpoint:
    """Open a float model folder; reads config and headers only."""
    config, stored, notes = as_family(read_config(folder), stored_tensors(folder), folder)
    _check_floats(folder, stored)
    found = opened(folder, config, stored)
    tensors = {name: float_tensor(name, *where) for name, where in found.stored.items()}
    return model_of(folder, "huggingface", found.config, tensors, notes=(*notes, *found.notes), wrapper=found.wrapper)


Stored = dict[str, tuple[Path, Entry]]


def _check_floats(folder: Path, stored: Stored) -> None:
    """FormatError for a model whose config says nothing of the integers that it holds, or of floats in few bits."""
    from qalora.converters import layout, layouts

    ours = {one.end: (f"{one.kind} integers", one.unannounced) for one in layouts() if one.end}
    theirs = {end: (held, "it is not read here: start from the float model") for end, held in TENSORS.items()}
    for end, (held, todo) in {**ours, **theirs}.items():
        names = sorted(name for name in stored if name.endswith(end))
        if not names:
            continue
        if end == ".qweight" and _is_awq(names[0], stored):
            awq = layout("awq")
            held, todo = f"{awq.kind} integers", awq.unannounced
        raise FormatError(
            f"{folder} holds {held}, {len(names)} tensors such as {names[0]}, and config.json has no "
            "quantization_config",
            todo=todo,
        )


def _is_awq(name: str, stored: Stored) -> bool:
    """AWQ packs along `out`, so that its words are fewer than its scales, and has no g_idx."""
    module = name.removesuffix(".qweight")
    scales, words = stored.get(f"{module}.scales"), stored[name][1].shape
    if scales is None or f"{module}.g_idx" in stored or len(words) != 2 or len(scales[1].shape) != 2:
        return False
    return words[1] != scales[1].shape[1] and words[1] * 32 % scales[1].shape[1] == 0


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def announced(config: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """The tensors that a config says a model has, without an output layer of its own; the config is checked first."""
    linears = linear_names(config, where)
    return (*linears, *bias_names(config, where), *norm_names(config, where), EMBEDDING)


def check_shapes(
    where: Path, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], source: str = "config.json"
) -> None:
    """Refuse a model that lacks a tensor that its config announces, or has one of another shape.

    source  what the config comes from, for the sentence

    transformers makes up what is missing, with a warning, and refuses other shapes.
    """
    decoder = decoder_of(config, where)
    for name in announced(config, where):
        if name not in tensors:
            raise FormatError(f"{where}: missing tensor {name}, which {source} requires")
    for name, lazy in tensors.items():
        shape = tensor_shape(decoder, name)
        if shape is not None and lazy.shape != shape:
            expected = f"shape {list(shape)}, as {source} says"
            raise FormatError(f"{where}: {name}", expected=expected, got=f"shape {list(lazy.shape)}")


def zero_biases(where: object, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The biases that the config announces and a file does not have, for owners that add those that are there."""
    decoder, biases = decoder_of(config, where), {}
    for name in bias_names(config, where):
        shape = tensor_shape(decoder, name)
        if name not in tensors and shape is not None:
            biases[name] = LazyTensor(
                name=name,
                shape=shape,
                dtype=torch.float32,
                nbytes=0,
                read=lambda start, stop: torch.zeros(stop - start),
            )
    return biases


def model_of(
    folder: Path,
    layout: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    *,
    notes: tuple[str, ...] = (),
    others: Literal["pass over", "refuse"] = "pass over",
    silent: Collection[str] = (),
    wrapper: Wrapper | None = None,
) -> Checkpoint:
    """The model that a reader of a folder has found, checked, with the folder's companion files.

    others  what becomes of tensors that the config does not announce. transformers passes them over with a warning,
            which is a note here; where the format's owner does not load such a file, or uses them, it is refused
    silent  those of them that need no note
    wrapper what is around the decoder, in a model of text and images

    tie_word_embeddings is what the tensors say: an output layer that is stored is used, as transformers does whatever
    the config says. Where the config says that there is one, and none is stored, transformers makes up a random one,
    and this raises FormatError, as `check_shapes` does.
    """
    config, more = tidied(config, folder)
    linears = linear_names(config, folder)
    known = {*announced(config, folder), HEAD}
    unknown = sorted(set(tensors) - known)
    if unknown and others == "refuse":
        raise FormatError(f"{folder}: unknown tensor {unknown[0]}, which config.json does not announce")
    tensors = {name: lazy for name, lazy in tensors.items() if name in known}
    check_shapes(folder, config, tensors)
    notes = (*notes, *more, *_others_note(folder, [name for name in unknown if name not in silent]))
    files = companion_files(folder)
    notes = (*notes, *_tokenizer_note(folder, files))
    model = Checkpoint(
        path=folder,
        layout=layout,
        config=config,
        tensors=tensors,
        linears=linears,
        files=files,
        notes=notes,
        wrapper=wrapper,
    )
    ties = bool(settings_of(config, folder).get("tie_word_embeddings"))
    if model.tied and not ties:
        raise FormatError(f"{folder}: missing tensor {HEAD}, which config.json requires")
    if model.tied == ties:
        return model
    note = "config.json ties the output to the embedding, and there is an output layer of its own: it is used"
    return replace(model, config={**config, "tie_word_embeddings": False}, notes=(*notes, f"{folder.name}: {note}"))


def _others_note(folder: Path, names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    listed = ", ".join(f"{name!r:.100}" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    counted = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
    return (f"{folder.name}: {counted} that config.json does not announce, {listed}{more}: passed over",)


def download(repo: str, *, here: bool = False) -> Path:
    """The local snapshot of a Hub id such as `HuggingFaceTB/SmolLM2-135M`; InputError if it is neither path nor id, or,
    where it has to be `here`, not yet.
    """
    if not may_be_of_the_hub(repo):
        raise InputError(f"{repo}: no such file or folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=here))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{repo}: no such file or folder, and not to be had from the Hub ({reason})") from error


LAYOUT = Layout(
    name="huggingface",
    kind="float",
    read=read,
    by_config=lambda folder, config: config.get("quantization_config") is None,
    runtimes=("transformers",),
    rounding=exact,
    memory=lambda path: 2,  # of 16-bit floats, in float32
)


def _tokenizer_note(folder: Path, files: Collection[str]) -> tuple[str, ...]:
    """Of a tokenizer that only code of its own makes, as Hunyuan 7B's, or in files that are not read here."""
    if "tokenizer_config.json" not in files or has_tokenizer_files(files):
        return ()
    said = "there is a tokenizer_config.json, and no tokenizer.json beside it: what is exported has no tokenizer"
    return (f"{folder.name}: {said}",)
