"""Read a GGUF file, or several of one model, as a lazy model: transformers' names and row order, the file's own codes.

Types that hold no integer groups of ours (K-quants and others) are read as the floats they stand for, with a note.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.gguf.configs import config_notes, config_of, family_of_metadata
from qalora.converters.gguf.hyperparameters import FREQS, LONGROPE
from qalora.converters.gguf.loaders import check_tensors
from qalora.converters.gguf.names import gguf_names, head_count, rows_from
from qalora.converters.huggingface import check_shapes, zero_biases
from qalora.converters.plan import PROVENANCE
from qalora.converters.settings import linear_names
from qalora.converters.specs import TENSORS, fits, parse_specs, restored
from qalora.errors import FormatError, InputError, json_kind
from qalora.formats.files import InputFile
from qalora.formats.gguf import GgufFile, Metadata, TensorInfo
from qalora.formats.gguf_blocks import BLOCK_TYPES, FLOAT_BLOCKS, decode, dequantize
from qalora.formats.gguf_split import read_parts
from qalora.tensor import GroupQuantTensor, check_finite

__all__ = ["read"]

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FACTORS = (FREQS, *LONGROPE.values())
"""Tensors that say how rotary frequencies are scaled; the config has it."""


def read(path: Path) -> Checkpoint:
    """Open a GGUF file, the first one of a split model; reads metadata and the tables of tensors only.

    Raises InputError for an architecture or a tensor type that is not known, FormatError for damage.
    """
    file = read_parts(path)
    if file.metadata.get("general.type") == "adapter":
        raise InputError(f"{path} is a LoRA, and no model", todo="give the model that it is applied to")
    family = family_of_metadata(file.metadata, path)
    for needed in ("token_embd.weight", "output_norm.weight"):
        if needed not in file.tensors:
            raise FormatError(f"{path}: missing tensor {needed}, which every model has")
    shapes = {name: info.shape for name, info in file.tensors.items()}
    config = config_of(file.metadata, family, path, shapes=shapes, factors=_factors(file))
    linears = linear_names(config, path)
    names = gguf_names(family, config["num_hidden_layers"])
    known = {gguf: name for name, gguf in names.items()}
    unknown = sorted(set(file.tensors) - set(known) - set(FACTORS))
    if unknown:
        raise InputError(f"{path}: tensor {unknown[0]!r} is not one of a {family.model_type} model")
    tensors = {}
    for gguf, info in file.tensors.items():
        if gguf in FACTORS:
            continue
        name = known[gguf]
        lazy = _lazy(file, info, name, head_count(family, config, name))
        tensors[name] = _without_one(lazy) if family.adds_one(name) else lazy
    check_tensors(tensors, family, path)
    zeros = zero_biases(path, config, tensors)
    check_shapes(path, config, tensors | zeros, "its metadata")
    notes = (*_restore(file, tensors), *_float_notes(file), *config_notes(file.metadata, family, path))
    tensors |= zeros
    kept = {key: value for key, value in file.metadata.entries.items() if not _of_this_file(key)}
    metadata = Metadata(entries=kept)
    return Checkpoint(
        path=path, layout="gguf", config=config, tensors=tensors, linears=linears, gguf=metadata, notes=notes
    )


def _restore(file: GgufFile, tensors: dict[str, LazyTensor]) -> tuple[str, ...]:
    """Put tensors back into the widths and groups that a file of ours says they had; notes.

    llama.cpp's tools carry metadata along when they requantize; what a tensor's new type cannot be is then passed over.
    """
    text = file.metadata.get(TENSORS)
    if text is None:
        return ()
    if not isinstance(text, str):
        raise FormatError(f"{file.path}: {TENSORS}", expected="a string", got=json_kind(text))
    stale = []
    for module, spec in parse_specs(text, str(file.path)).items():
        name = f"{module}.weight"
        if name in tensors and fits(tensors[name], spec):
            tensors[name] = restored(tensors[name], spec)
        else:
            stale.append(name)
    if not stale:
        return ()
    return (f"{file.path}: {TENSORS} does not describe {stale[0]!r:.120} ({len(stale)} such); it is passed over",)


def _of_this_file(key: str) -> bool:
    """Whether a key of ours tells of the file itself, so that a file made from it must not have it."""
    return key == TENSORS or key.startswith(PROVENANCE)


def _float_notes(file: GgufFile) -> tuple[str, ...]:
    kinds = Counter(info.type for info in file.tensors.values() if info.type in FLOAT_BLOCKS)
    if not kinds:
        return ()
    counts = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
    note = (
        f"{file.path}: tensors in types that hold no integer groups of ours ({counts}) are read as the floats they "
        "stand for: quantize it first (qalora quantize), which rounds what was rounded before; the float model is a "
        "better start"
    )
    return (note,)


def _factors(file: GgufFile) -> dict[str, Tensor]:
    """The factors of rotary frequencies, which are read at once; FormatError for what is no list of float32."""
    found = {}
    for name in FACTORS:
        info = file.tensors.get(name)
        if info is None:
            continue
        if info.type != "F32" or len(info.shape) != 1 or not 0 < info.shape[0] <= 1 << 16:
            raise FormatError(f"{file.path}: {name}", expected="a list of F32", got=f"{info.type} {list(info.shape)}")
        with InputFile(file.place(name)) as opened:
            found[name] = opened.tensor(info.offset, 4 * info.shape[0]).view(torch.float32)
        if not bool((found[name] > 0).all()):
            raise FormatError(f"{file.path}: {name}", expected="numbers above 0", got=f"{float(found[name].min()):g}")
    return found


def _lazy(file: GgufFile, info: TensorInfo, name: str, heads: int | None) -> LazyTensor:
    shape = info.shape
    while len(shape) > 1 and shape[0] == 1 and name.endswith("norm.weight"):
        shape = shape[1:]
    if info.type in BLOCK_TYPES:
        if len(shape) != 2:
            raise FormatError(f"{file.path}: {info.name}", expected="a matrix", got=f"shape {list(shape)}")
        kind = BLOCK_TYPES[info.type]

        def read_blocks(start: int, stop: int) -> Tensor | GroupQuantTensor:
            return decode(_rows(file, info, start, stop).view(stop - start, info.row_bytes), info.type)

        read, dtype, spec = read_blocks, None, kind.spec
    elif info.type in FLOATS:
        dtype, spec = FLOATS[info.type], None

        def read_floats(start: int, stop: int) -> Tensor | GroupQuantTensor:
            values = _rows(file, info, start, stop).view(FLOATS[info.type]).view(stop - start, *shape[1:])
            check_finite(f"{file.path}: {info.name}", values)
            return values

        read = read_floats
    elif info.type in FLOAT_BLOCKS and len(shape) == 2:
        dtype, spec = torch.float32, None

        def read_decoded(start: int, stop: int) -> Tensor | GroupQuantTensor:
            values = dequantize(_rows(file, info, start, stop).view(stop - start, info.row_bytes), info.type)
            check_finite(f"{file.path}: {info.name}", values)
            return values

        read = read_decoded
    else:
        raise InputError(
            f"{file.path}: {info.name}",
            expected=f"one of {', '.join([*BLOCK_TYPES, *FLOATS])}, or, for a matrix, {', '.join(FLOAT_BLOCKS)}",
            got=info.type,
            todo="start from another quantization of this model",
        )
    lazy = LazyTensor(name=name, shape=shape, dtype=dtype, spec=spec, nbytes=info.nbytes, by_rows=True, read=read)
    return lazy if heads is None else _reordered(lazy, heads)


def _rows(file: GgufFile, info: TensorInfo, start: int, stop: int) -> Tensor:
    with InputFile(file.place(info.name)) as opened:
        return opened.tensor(info.offset + start * info.row_bytes, (stop - start) * info.row_bytes)


def _reordered(lazy: LazyTensor, heads: int) -> LazyTensor:
    """Rows in transformers' order; those are read between which they all are, which is a head more at most."""

    def read(start: int, stop: int) -> Tensor | GroupQuantTensor:
        order = rows_from(lazy.shape[0], heads)[start:stop]
        first, last = int(order.min()), int(order.max())
        return take_rows(lazy.read(first, last + 1), order - first)

    return replace(lazy, read=read)


def _without_one(lazy: LazyTensor) -> LazyTensor:
    """A norm as transformers holds it, where the file holds 1 + weight."""

    def read(start: int, stop: int) -> Tensor:
        values = lazy.read(start, stop)
        if not isinstance(values, Tensor):
            raise FormatError(lazy.name, expected="floats", got="blocks of integers")
        return values.float() - 1

    return replace(lazy, dtype=torch.float32, read=read)


def take_rows(tensor: Tensor | GroupQuantTensor, order: Tensor) -> Tensor | GroupQuantTensor:
    """The rows of a tensor in the given order."""
    if isinstance(tensor, Tensor):
        return tensor[order]
    return replace(tensor, packed=tensor.packed[order], scale=tensor.scale[order], min=tensor.min[order])
