"""What graphs of a model hold, whichever they are: initializers and their places in one or several data files.

Quantized linear weights are held as `carriers` says. Everything else is float32: the embedding as it is, [vocabulary,
hidden], which a tied output shares (or as codes, where the base has them: `embedding`); float linear weights
transposed, as MatMul wants them; rotary tables by position.

No values are read, but for a row of an act-order weight, for the order of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.column_order import shared_orders
from qalora.converters.decoder import check_tensors, decoder_of
from qalora.converters.onnx.carriers import as_blocks, as_rows, block_size, is_part, parts
from qalora.converters.onnx.decoder import check_decoder, rotary_parts
from qalora.converters.onnx.embedding import EMBEDDING, check_table, tables
from qalora.converters.onnx.fast import fast_graph
from qalora.converters.onnx.files import VERSION, VERSION_KEY
from qalora.converters.onnx.order import ORDER, order_part
from qalora.converters.onnx.portable import portable_graph
from qalora.converters.plan import ExportOptions, Loss, PlannedTensor
from qalora.converters.specs import TENSORS, specs_text
from qalora.errors import InputError
from qalora.formats.onnx import Initializer, lay_out, part_name

__all__ = ["Weights", "weights_of"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Weights:
    """What the graphs of a model hold.

    target  the format that they are for
    coded   the tensors that are held as codes
    orders  what `column_order.shared_orders` gives
    data    the initializers by name, with their places
    sizes   the bytes of each data file
    """

    target: str
    coded: frozenset[str]
    orders: Mapping[str, str]
    data: Mapping[str, Initializer]
    sizes: tuple[int, ...]

    def files(self, first: str) -> dict[str, int]:
        """The data files and their sizes, where the first one is called so."""
        return {part_name(first, n): size for n, size in enumerate(self.sizes)}

    def fast(self, model: Checkpoint, location: str, options: ExportOptions, *, in_browsers: bool = False) -> Any:
        """The ModelProto for ONNX Runtime, in browsers too; location: the first data file, seen from the graph's
        folder.
        """
        data, metadata = _as_blocks(model, self.data, in_browsers), self._metadata(model, options)
        level = options.accuracy_level
        return fast_graph(model, data, location, self.orders, metadata, level, in_browsers=in_browsers)

    def portable(self, model: Checkpoint, location: str, options: ExportOptions) -> Any:
        """The ModelProto of standard operators."""
        return portable_graph(model, _as_rows(self.data), location, self.orders, self._metadata(model, options))

    def rows(self, model: Checkpoint, first: str) -> tuple[PlannedTensor, ...]:
        """The model's tensors as they are held."""
        return tuple(self._row(lazy, first) for lazy in model.tensors.values())

    def table_notes(self, model: Checkpoint) -> list[str]:
        """What the embedding's codes cost and save, where they are held; docs/formats.md has the measurement."""
        if f"{EMBEDDING}.weight" not in self.coded:
            return []
        wide = 4 * math.prod(model.tensors[f"{EMBEDDING}.weight"].shape)
        return [
            f"{self.target}: the embedding is held as codes; float32 (`onnx_embedding`) takes {wide / 1e6:,.1f} MB "
            "and reads prompts about a sixth faster"
        ]

    def _metadata(self, model: Checkpoint, options: ExportOptions) -> dict[str, str]:
        kinds = {module_of(name): lazy.spec for name, lazy in model.tensors.items() if name in self.coded and lazy.spec}
        return {TENSORS: specs_text(kinds), VERSION_KEY: VERSION, **options.provenance}

    def _row(self, lazy: LazyTensor, first: str) -> PlannedTensor:
        module, coded = module_of(lazy.name), lazy.name in self.coded
        own = [part for name, part in self.data.items() if name == lazy.name or (is_part(name, module) and coded)]
        own += [self.data[f"{module}{ORDER}"]] if coded and f"{module}{ORDER}" in self.data else []
        narrowed = not coded and lazy.dtype is torch.float64
        start = min(own, key=lambda part: (part.file, part.offset))
        return PlannedTensor(
            name=lazy.name,
            carrier=_carrier(lazy, self.coded),
            file=part_name(first, start.file),
            offset=start.offset,
            nbytes=sum(part.nbytes for part in own),
            loss=Loss(name="narrowing", size="float64 rounded to float32") if narrowed else None,
        )


def weights_of(model: Checkpoint, target: str, options: ExportOptions, limit: int | None = None) -> Weights:
    """Decide how a model is held, in data files of at most `limit` bytes.

    InputError for a decoder that the graphs do not do, and for a tensor beyond the limit; ExactnessError for groups
    without blocks. A float model is written too, with float32 MatMuls.
    """
    check_decoder(decoder_of(model.config, model.path), model.path)
    check_tensors(model)
    coded = _coded(model, options)
    orders = shared_orders(target, model, coded)
    held = _initializers(model, orders, coded)
    for item in held:
        if limit is not None and item.nbytes > limit:
            expected, got = f"at most {limit:,} bytes, which is one file", f"{item.nbytes:,}"
            raise InputError(f"{target}: {item.name}", expected=expected, got=got, todo="export to onnx")
    data, sizes = lay_out(held, limit)
    return Weights(target=target, coded=coded, orders=orders, data=data, sizes=sizes)


def _as_blocks(model: Checkpoint, data: Mapping[str, Initializer], in_browsers: bool) -> dict[str, Initializer]:
    """The weights as the graph for ONNX Runtime reads them."""
    kinds = ["codes", *(["zero"] if in_browsers else [])]
    blocks = {module_of(name): block_size(name, lazy.spec) for name, lazy in model.tensors.items() if lazy.spec}
    seen = [as_blocks(part, blocks.get(name.rpartition(".")[0], 0)) for name, part in data.items()]
    return {part.name: part for part in [*seen, *tables(data.values(), kinds)]}


def _as_rows(data: Mapping[str, Initializer]) -> dict[str, Initializer]:
    """The weights as the portable graph reads them."""
    seen = [as_rows(part) for part in data.values()]
    return {part.name: part for part in [*seen, *tables(data.values(), ["codes", "zero"])]}


def _coded(model: Checkpoint, options: ExportOptions) -> frozenset[str]:
    """The tensors that are held as codes: every quantized one, the embedding where it can be looked up from them."""
    embedding = f"{EMBEDDING}.weight"
    looked_up = check_table(model, options.onnx_embedding)
    return frozenset(
        name for name, lazy in model.tensors.items() if lazy.spec is not None and (looked_up or name != embedding)
    )


def _initializers(model: Checkpoint, orders: Mapping[str, str], coded: frozenset[str]) -> list[Initializer]:
    made = []
    for lazy in model.tensors.values():
        module = module_of(lazy.name)
        if lazy.spec is not None and lazy.name in coded:
            made += parts(module, (lazy.shape[0], lazy.shape[1]), lazy.spec)
        else:
            shape = tuple(reversed(lazy.shape)) if lazy.name in model.linears else lazy.shape
            made.append(Initializer(name=lazy.name, dtype="FLOAT", shape=shape))
        if orders.get(module) == module:
            made.append(order_part(module, lazy.shape[1]))
    return made + rotary_parts(decoder_of(model.config, model.path))


def _carrier(lazy: LazyTensor, coded: frozenset[str]) -> str:
    spec = lazy.spec
    if spec is None or lazy.name not in coded:
        return "float32" if spec is None else f"float32, decoded from {spec.bits} bits"
    kind = "4-bit container" if spec.bits <= 4 else "two 4-bit halves"
    order = ", columns by groups" if spec.act_order else ""
    return f"{spec.bits} bits in {kind}{order}" + (" + min" if spec.zeros == "real" else "")
