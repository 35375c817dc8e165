"""Read an auto-round folder: 2, 3, 4, 5, 6 and 8 bits in GPTQ's words, 4, 5 and 6 in AWQ's; lazily.

Zero points in GPTQ's words are stored as they are, or minus one, as packing_format says. Where those of the first
layers are all symmetric, their values tell it better, as in a GPTQ folder (`qalora.converters.gptq.reader`). Minus
one, each field is read by itself, as auto-round does; one of 2**bits - 1, which stands for a zero point of 2**bits
there, and of 0 elsewhere, is refused.

Not read: floats in few bits (MXFP, NVFP4, FP8), rotated weights, quantized activations, quantized scales.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.auto_round.scheme import GPTQ_WORDS, Settings, parse_settings
from qalora.converters.awq import words as awq
from qalora.converters.gptq import words as gptq
from qalora.converters.packed import Names, Stored, read_packed
from qalora.errors import FormatError, InputError
from qalora.formats.gptq import VERSIONS, Version, unpack_qzeros

__all__ = ["read"]


def read(folder: Path, *, checkpoint_format: str | None = None) -> Checkpoint:
    """Open an auto-round folder; reads config, headers and the zero points of a few layers.

    checkpoint_format overrides packing_format and values: "gptq" (zero points stored minus one) or "gptq_v2".
    Raises FormatError for what is no such folder, or is not understood, InputError for another checkpoint_format.
    """

    def layers(said: object, names: Names, stored: Stored) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
        floats = {name.removesuffix(".weight") for name in stored if name.endswith(".weight")}
        known = {*floats, *(name for called in names.values() for name in called)}
        settings = parse_settings(said, f"{folder}: quantization_config", known)
        settings.check([name for called in names.values() for name in called])
        sizes = {module: settings.sizes_of(module, called) for module, called in names.items()}
        if settings.packing in GPTQ_WORDS:
            words = {module: gptq.words_of(folder, module, stored, *size) for module, size in sizes.items()}
            return _of_gptq_words(folder, words, settings, checkpoint_format)
        if checkpoint_format is not None:
            raise InputError(f"`checkpoint_format` is for GPTQ's words, and {folder} has AWQ's", todo="leave it out")
        weights = {
            module: awq.lazy_words(folder, module, stored, *size, interleaved=True) for module, size in sizes.items()
        }
        return weights, ()

    return read_packed(folder, "auto-round", gptq.PARTS, layers)


def _of_gptq_words(
    folder: Path, words: dict[str, gptq.Words], settings: Settings, override: str | None
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    label = GPTQ_WORDS[settings.packing]
    found = gptq.symmetric_version(list(words.values())) if override is None else None
    version: Version = label if found is None else found
    notes: tuple[str, ...] = ()
    if override is not None:
        version = next(one for one in VERSIONS if one == override)
    elif found not in (None, label):
        wrong = f"{folder} is labelled {settings.packing}, but its zero points, all symmetric, are those of"
        notes = (f"{wrong} {'auto_round:auto_gptq' if found == 'gptq' else 'auto_round'}; read as these",)
    elif found is None and not settings.labelled:
        notes = (
            f"{folder} has asymmetric zero points, and no packing_format that says how they are stored: read as stored "
            "minus one, as transformers does; `checkpoint_format` gptq_v2 overrides it",
        )
    unpack = _minus_one if version == "gptq" else partial(unpack_qzeros, version="gptq_v2")
    return {
        module: gptq.lazy_words(layer, unpack, symmetric=found is not None) for module, layer in words.items()
    }, notes


def _minus_one(qzeros: Tensor, bits: int) -> Tensor:
    """Zero points uint8 [out, groups] that are stored minus one."""
    fields, top = unpack_qzeros(qzeros, bits, "gptq_v2"), (1 << bits) - 1
    if bool((fields == top).any()):
        raise FormatError(
            "qzeros",
            expected=f"values to {top - 1}, as stored minus one",
            got=f"{top}, over which loaders disagree",
            todo="quantize the model again",
        )
    return (fields + 1).to(torch.uint8)
