"""The lazy model: config, companion files, and tensors by name, none of them read before it is asked for.

Names are those of transformers (`model.layers.0.self_attn.q_proj.weight`), whatever file the tensor comes from; the
readers in `qalora.converters` translate. Quantizing and folding give a new Checkpoint whose tensors do the work when
they are read, so that a model larger than memory passes through a layer at a time.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qalora.errors import FormatError, InputError, NotFiniteError
from qalora.options.words import SHARD_SIZE
from qalora.tensor import GroupQuantTensor, QuantSpec

if TYPE_CHECKING:
    from qalora.formats.gguf import Metadata

__all__ = ["Checkpoint", "LazyTensor", "Wrapper", "cache_bytes", "module_of", "with_cached_weights", "with_last_weight"]

TILE_BYTES = 32 << 20
"""Float32 bytes of a tile where a tensor is streamed by rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """A tensor that is read when asked for: a float one, or a GroupQuantTensor.

    shape   (out, in), or whatever the float tensor has
    dtype   the float dtype it is stored in; None if quantized
    spec    what is known of it if quantized; None if float
    nbytes  bytes that hold it in the files it was read from; None where its reader does not tell
    by_rows   whether a part of its rows is read without the others; else a part takes as long as all of them
    read    rows start..stop-1, a torch tensor of `dtype` or a GroupQuantTensor of `spec`
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    spec: QuantSpec | None = None
    nbytes: int | None = None
    by_rows: bool = False
    read: Callable[[int, int], Tensor | GroupQuantTensor] = field(repr=False)

    def load(self) -> Tensor | GroupQuantTensor:
        """The whole tensor. An InputError names the tensor."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    def rows(self, start: int, stop: int) -> Tensor | GroupQuantTensor:
        """Rows start..stop-1. An InputError names the tensor."""
        try:
            return self.read(start, stop)
        except InputError as error:
            if self.name in str(error):
                raise
            kind = NotFiniteError if isinstance(error, NotFiniteError) else FormatError
            raise kind(f"{self.name}: {error}") from error

    def load_quantized(self) -> GroupQuantTensor:
        """The whole tensor; TypeError if it is not quantized."""
        tensor = self.load()
        if not isinstance(tensor, GroupQuantTensor):
            raise TypeError(f"{self.name} is not quantized")
        return tensor

    def load_float(self) -> Tensor:
        """The whole tensor in its own dtype; dequantized to float32 if it is quantized."""
        return _as_float(self.load())

    def tiles(self, tile_bytes: int = TILE_BYTES) -> Iterator[tuple[int, Tensor | GroupQuantTensor]]:
        """(first row, rows) from top to bottom, each tile at most `tile_bytes` in float32, and at least one row."""
        if not self.shape:
            yield 0, self.load()
            return
        step = self.tile_rows(tile_bytes)
        for start in range(0, self.shape[0], step):
            yield start, self.rows(start, min(start + step, self.shape[0]))

    def pieces(
        self, tile_bytes: int = TILE_BYTES, *, multiple: int = 1
    ) -> Iterator[tuple[int, Tensor | GroupQuantTensor]]:
        """As `tiles`, and read once: rows of the whole where no part is read without the others.

        multiple  rows of a tile are a multiple of it; but for it they are at most `tile_bytes`
        """
        count, whole = self.shape[0] if self.shape else 1, None if self.by_rows and self.shape else self.load()
        step = max(1, self.tile_rows(tile_bytes) // multiple) * multiple
        for start in range(0, count, step):
            stop = min(start + step, count)
            if whole is None:
                yield start, self.rows(start, stop)
            elif step >= count:
                yield start, whole
            else:
                yield start, whole.rows(start, stop) if isinstance(whole, GroupQuantTensor) else whole[start:stop]

    def tile_rows(self, tile_bytes: int = TILE_BYTES) -> int:
        """Rows of a tile of at most `tile_bytes` in float32; at least one."""
        return max(1, tile_bytes // max(1, 4 * math.prod(self.shape[1:])))

    def float_tiles(self, tile_bytes: int = TILE_BYTES) -> Iterator[tuple[int, Tensor]]:
        """As `tiles`, dequantized to float32 where the tensor is quantized."""
        for start, tile in self.tiles(tile_bytes):
            yield start, _as_float(tile)


def _as_float(tensor: Tensor | GroupQuantTensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, GroupQuantTensor) else tensor


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Wrapper:
    """What a model of text and images has around its decoder: carried along as it is, and never computed with.

    model_type  transformers' config.model_type of the whole
    config      config.json of the whole, without quantization_config
    text        the decoder's config as it was made of that; what a model's config has otherwise goes back into it
    names       (beginning on disk, beginning here) of the decoder's tensors
    carried     every other tensor by its name on disk, in any dtype
    files       companion files of the whole by name, such as those of the processor of images
    """

    model_type: str
    config: Mapping[str, Any]
    text: Mapping[str, Any]
    names: tuple[tuple[str, str], ...]
    carried: Mapping[str, LazyTensor]
    files: Mapping[str, Path] = field(default_factory=dict)

    def on_disk(self, name: str) -> str:
        """What a tensor of the decoder, or a part or module of one, is called in the files of the whole."""
        whole = f"{name}."
        found = (disk + whole.removeprefix(here) for disk, here in self.names if whole.startswith(here))
        return next(found, whole).removesuffix(".")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Checkpoint:
    """A model as its files tell it.

    path      the folder or file it came from
    layout    the name of what it was read as: "huggingface", "gptq", "gguf", ... (`qalora.converters.format.Layout`)
    config    transformers' config.json, without quantization_config
    tensors   every tensor by transformers' name
    linears   the names of the decoder's linear weights, in the order of computation; quantize, train and fold
              act on these
    files     companion files by name (tokenizer, chat template, generation config, licence), carried along unchanged
    gguf      the metadata of the GGUF file that the tokenizer comes from, if it does
    notes     what a reader saw that the user should know
    stored    the model as its reader gave it, None where there is no such file
    beside    the folder of an adapter that lies beside the weights and is no part of them, or None
    wrapper   what is around this decoder in a model of text and images, or None
    """

    path: Path
    layout: str
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    linears: tuple[str, ...]
    files: Mapping[str, Path] = field(default_factory=dict)
    gguf: Metadata | None = None
    notes: tuple[str, ...] = ()
    beside: Path | None = None
    wrapper: Wrapper | None = None
    stored: Checkpoint | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """In a line: where it is, and what."""
        return f"Checkpoint({str(self.path)!r}, {self.layout}, {self.config.get('model_type')}, {self._widths()})"

    def _widths(self) -> str:
        specs = [self.tensors[name].spec for name in self.linears]
        kinds = Counter(
            "floats" if spec is None else f"{spec.bits} bits in groups of {spec.group_size}" for spec in specs
        )
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(3)) or "no linear weights"

    def save(self, out: str | Path, *, max_shard_size: int = SHARD_SIZE, force: bool = False) -> None:
        """Write it as a folder of ours, which `qalora.load` opens again; OutputError as `qalora.save`."""
        writer = importlib.import_module("qalora.converters.exports")  # of a room above
        writer.save(self, Path(out), max_shard_size=max_shard_size, force=force)

    @property
    def as_stored(self) -> bool:
        """Whether `path` holds this very model: neither tensors nor config nor files have been replaced since it was
        read.
        """
        read = self.stored
        parts = ("tensors", "config", "files", "gguf", "wrapper")
        return read is not None and all(getattr(self, part) is getattr(read, part) for part in parts)

    @property
    def everything(self) -> Mapping[str, LazyTensor]:
        """Every tensor, those that are carried along too."""
        return self.tensors if self.wrapper is None else {**self.tensors, **self.wrapper.carried}

    @property
    def quantized(self) -> bool:
        """Whether every linear weight holds integers."""
        return bool(self.linears) and all(self.tensors[name].spec is not None for name in self.linears)

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return "lm_head.weight" not in self.tensors


def module_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj` of `model.layers.0.mlp.up_proj.weight`."""
    return name.removesuffix(".weight")


def cache_bytes(model: Checkpoint) -> int:
    """Bytes of the linear weights as they are kept in memory: packed codes with float32 scale and min, or float32."""
    total = 0
    for name in model.linears:
        lazy = model.tensors[name]
        count = math.prod(lazy.shape)
        spec = lazy.spec
        total += 4 * count if spec is None else count * spec.bits // 8 + 8 * count // spec.group_size
    return total


def with_cached_weights(model: Checkpoint, budget: int) -> Checkpoint:
    """The model with each quantized linear weight kept once it has been read; the model itself where all of them take
    more than `budget` bytes.
    """
    if cache_bytes(model) > budget:
        return model
    linears = {name: _cache(model.tensors[name]) for name in model.linears if model.tensors[name].spec is not None}
    return replace(model, tensors={**model.tensors, **linears})


def with_last_weight(model: Checkpoint) -> Checkpoint:
    """The model with the quantized linear weight that was read last kept, for those who ask for it several times."""
    last: dict[str, GroupQuantTensor] = {}
    linears = {
        name: _cache(model.tensors[name], last) for name in model.linears if model.tensors[name].spec is not None
    }
    return replace(model, tensors={**model.tensors, **linears})


def _cache(lazy: LazyTensor, last: dict[str, GroupQuantTensor] | None = None) -> LazyTensor:
    """The tensor, read once. last: where it is kept instead, until another is."""
    kept = {} if last is None else last

    def read(start: int, stop: int) -> GroupQuantTensor:
        whole = kept.get(lazy.name)
        if whole is None:
            kept.clear()  # before the next one is read, not after
            whole = kept[lazy.name] = lazy.load_quantized()
        return whole if (start, stop) == (0, lazy.shape[0]) else whole.rows(start, stop)

    return replace(lazy, read=read)
