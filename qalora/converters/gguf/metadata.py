"""The metadata of a GGUF file that we write: general.*, the architecture's numbers, the tokenizer.

A model that came from GGUF keeps its metadata, in its order and with its types; only what has changed is replaced.
Keys: ggml-org/ggml, docs/gguf.md. Nothing here depends on time or place, so that the bytes are the same at every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qalora.checkpoint import Checkpoint
from qalora.converters.added_tokens import OtherSpace, name_in_gguf, strips
from qalora.converters.decoder import Decoder, decoder_of
from qalora.converters.ends import ends_of, tokenizer_end
from qalora.converters.gguf.configs import config_of, family_of_metadata
from qalora.converters.gguf.hyperparameters import CONFIG, MODEL_TYPE, factor_tensors, hyperparameters
from qalora.converters.gguf.names import gguf_names
from qalora.converters.gguf.tokenizer import gguf_tokenizer
from qalora.converters.settings import settings_of
from qalora.errors import InputError
from qalora.formats.gguf import Metadata, Value
from qalora.formats.gguf_ends import with_ends

__all__ = ["file_metadata", "file_name"]

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
"""llama.cpp's general.file_type: the type that most tensors have."""


def file_metadata(
    model: Checkpoint,
    decoder: Decoder,
    name: str | None,
    carrier: str,
    on_other_space: Callable[[OtherSpace, Metadata], None] | None = None,
) -> Metadata:
    """All metadata of the file.

    carrier         the type that most linear weights have
    on_other_space  see `gguf_tokenizer`
    """
    numbers = hyperparameters(decoder, settings_of(model.config, model.path), model.path)
    changes = {"general.file_type": Value.uint32(FILE_TYPES[carrier])}
    ends = ends_of(model).ids
    if model.gguf is not None:
        if name is not None:
            called = name_in_gguf(name, stripping=strips(model.gguf.get("general.name")))
            changes["general.name"] = Value.text(called)
        same_numbers = _says(model.gguf, model, decoder, numbers)
        carried = model.gguf if same_numbers else _renumbered(model.gguf, decoder, numbers)
        return with_ends(carried.with_entries(changes), ends, tokenizer_end(model), model.path)
    tokenizer = gguf_tokenizer(model, name or model.path.name, on_other_space=on_other_space)
    general = {
        "general.architecture": Value.text(decoder.family.gguf.architecture),
        "general.type": Value.text("model"),
        "general.name": tokenizer.pop("general.name"),
        "general.size_label": Value.text(_size_label(model)),
        **changes,
        "general.quantization_version": Value.uint32(2),
    }
    metadata = Metadata(entries={**general, **numbers, **tokenizer})
    return with_ends(metadata, ends, tokenizer_end(model), model.path)


def _renumbered(metadata: Metadata, decoder: Decoder, numbers: Mapping[str, Value]) -> Metadata:
    """Metadata with other numbers of the architecture, and none of those that it had."""
    name = decoder.family.gguf.architecture
    own = (f"{metadata.get('general.architecture')}.", f"{name}.", MODEL_TYPE, CONFIG)
    others = {key: value for key, value in metadata.entries.items() if not key.startswith(own)}
    return Metadata(entries={**others, "general.architecture": Value.text(name), **numbers})


def _says(metadata: Metadata, model: Checkpoint, decoder: Decoder, numbers: Mapping[str, Value]) -> bool:
    """Whether the metadata that a model came with still say the numbers of its config, which may have been edited."""
    shapes = {gguf: model.tensors[name].shape for name, gguf in decoder.family.outer if name in model.tensors}
    names = gguf_names(decoder.family, len(decoder.layers))
    shapes |= {names[name]: lazy.shape for name, lazy in model.tensors.items() if name.endswith(".bias")}
    try:
        family = family_of_metadata(metadata, model.path)
        config = config_of(metadata, family, model.path, shapes=shapes, factors=factor_tensors(decoder))
        own_numbers = hyperparameters(decoder_of(config, model.path), settings_of(config, model.path), model.path)
    except InputError:
        return False
    return _rounded(own_numbers) == _rounded(numbers)


def _rounded(numbers: Mapping[str, Value]) -> dict[str, Any]:
    """The values as a file holds them: reals as float32."""
    return {
        key: torch.tensor(value.value, dtype=torch.float32).item() if isinstance(value.value, float) else value.value
        for key, value in numbers.items()
    }


def file_name(model: Checkpoint, metadata: Metadata, name: str | None, carrier: str) -> str:
    """BaseName-SizeLabel-FineTune-Version-Encoding.gguf, by gguf's own naming convention."""
    from gguf.utility import naming_convention

    def known(key: str) -> Any:
        return metadata.get(f"general.{key}")

    base = name or (None if known("basename") else known("name") or model.path.stem)
    label = naming_convention(
        _plain(base),
        None if name else _plain(known("basename")),
        None if name else _plain(known("finetune")),
        _plain(known("version")),
        _plain(known("size_label")) if not name else None,
        carrier,
    )
    return f"{label}.gguf"


def _plain(value: object) -> str | None:
    """A part of a file name: letters, digits and a few signs, whatever the metadata says."""
    if not isinstance(value, str):
        return None
    return "".join(char if char.isalnum() or char in "-_.+" else "-" for char in value)[:80].strip("-.") or None


def _size_label(model: Checkpoint) -> str:
    from gguf.utility import size_label

    return str(size_label(sum(math.prod(lazy.shape) for lazy in model.tensors.values()), 0, 0, 0))
