"""Decide how a model goes into the two graphs: initializers and offsets of both data files, metadata, refusals.

Quantized linear weights are held as `carriers` says. Everything else is float32: the embedding as it is, [vocabulary,
hidden], which a tied output shares; float linear weights transposed, as MatMul wants them; rotary tables by position.

Values are read for a plan only where specs do not tell whether float32 holds what integer zero points leave over; of
an act-order weight one row, for the order of its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.decoder import decoder_of
from qalora.converters.families import family_of, norm_names
from qalora.converters.onnx.carriers import fast_parts, portable_parts
from qalora.converters.onnx.decoder import check_decoder, rotary_parts
from qalora.converters.onnx.fast import fast_graph
from qalora.converters.onnx.genai import genai_config
from qalora.converters.onnx.graph import DATA
from qalora.converters.onnx.order import order_part, shared_orders
from qalora.converters.onnx.portable import portable_graph
from qalora.converters.onnx.slots import add_slots
from qalora.converters.plan import LOSSES, ExportOptions, Loss, Plan, PlannedTensor
from qalora.converters.specs import TENSORS, specs_text
from qalora.converters.tokenizer import has_tokenizer
from qalora.errors import InputError
from qalora.formats.onnx import Initializer, lay_out
from qalora.residual import to_residual
from qalora.tensor import QuantSpec

__all__ = ["GRAPH", "PORTABLE", "GraphPlan", "OnnxPlan", "module_of", "plan"]

GRAPH = "model.onnx"
PORTABLE = "portable"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPlan:
    """One graph. proto: the ModelProto; data: its initializers by name; size: of the data file; genai: its config."""

    proto: Any
    data: Mapping[str, Initializer]
    size: int
    genai: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxPlan(Plan):
    """A plan with both graphs, and config.json."""

    fast: GraphPlan
    portable: GraphPlan
    config: Mapping[str, Any]


def module_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj` of `model.layers.0.mlp.up_proj.weight`."""
    return name.removesuffix(".weight")


def plan(model: Checkpoint, options: ExportOptions) -> OnnxPlan:
    """Decide everything. InputError for a decoder that the graphs do not do, ExactnessError for groups without blocks.

    A float model is written too, with float32 MatMuls.
    """
    if not 0 <= options.accuracy_level <= 4:
        raise InputError("--accuracy-level", expected="0..4", got=str(options.accuracy_level))
    decoder = decoder_of(model.config, model.path)
    check_decoder(decoder, model.path)
    _check_tensors(model)
    metadata = {TENSORS: specs_text(_kinds(model))}
    computed = dict.fromkeys([*model.linears, *model.tensors])  # the first to use an order gives it its name
    orders = shared_orders(lazy for name in computed if is_quantized(lazy := model.tensors[name]))
    fast_data, fast_size = lay_out(_initializers(model, orders, portable=False))
    portable_data, portable_size = lay_out(_initializers(model, orders, portable=True))
    fast_proto = fast_graph(model, fast_data, orders, metadata, options.accuracy_level)
    fast = GraphPlan(
        proto=add_slots(fast_proto, model, options.lora_slots),
        data=fast_data,
        size=fast_size,
        genai=genai_config(model, decoder, portable=False),
    )
    portable = GraphPlan(
        proto=add_slots(portable_graph(model, portable_data, orders, metadata), model, options.lora_slots),
        data=portable_data,
        size=portable_size,
        genai=genai_config(model, decoder, portable=True),
    )
    losses = {name: _loss(lazy) for name, lazy in model.tensors.items()}
    rows = [_row(lazy, fast_data, DATA, losses) for lazy in model.tensors.values()]
    rows += [_row(lazy, portable_data, f"{PORTABLE}/{DATA}", losses) for lazy in model.tensors.values()]
    return OnnxPlan(
        target="onnx",
        tensors=tuple(rows),
        files=_files(model, fast, portable),
        notes=model.notes,
        fast=fast,
        portable=portable,
        config={"architectures": [family_of(model.config, model.path).architecture], **model.config},
    )


def _check_tensors(model: Checkpoint) -> None:
    family = family_of(model.config, model.path)
    known = {name for name, _ in family.outer} | set(model.linears) | {f"{module_of(n)}.bias" for n in model.linears}
    norms = norm_names(model.config, model.path)
    for name in sorted({*norms, "model.embed_tokens.weight"}):
        if name not in model.tensors:
            raise InputError(f"{model.path}: tensor {name}", expected="it, as config.json says", got="no such tensor")
    unknown = sorted(set(model.tensors) - known - set(norms))
    if unknown:
        raise InputError(f"{model.path}: tensor {unknown[0]!r} has no place in the graph of a {family.model_type}")
    decoder, table = decoder_of(model.config, model.path), model.tensors["model.embed_tokens.weight"].shape
    if table != (decoder.vocabulary, decoder.hidden):
        raise InputError(
            f"{model.path}: model.embed_tokens.weight",
            expected=f"shape {[decoder.vocabulary, decoder.hidden]}, as config.json says",
            got=str(list(table)),
        )


def is_quantized(lazy: LazyTensor) -> bool:
    """Whether the graphs multiply with its codes: every quantized tensor but the embedding, which is looked up."""
    return lazy.spec is not None and lazy.name != "model.embed_tokens.weight"


def _kinds(model: Checkpoint) -> dict[str, QuantSpec]:
    return {
        module_of(name): lazy.spec
        for name, lazy in model.tensors.items()
        if is_quantized(lazy) and lazy.spec is not None
    }


def _initializers(model: Checkpoint, orders: Mapping[str, str], *, portable: bool) -> list[Initializer]:
    found = []
    for lazy in model.tensors.values():
        found += _parts(lazy, model, portable=portable)
        module = module_of(lazy.name)
        if orders.get(module) == module:
            found.append(order_part(module, lazy.shape[1]))
    return found + rotary_parts(decoder_of(model.config, model.path))


def _parts(lazy: LazyTensor, model: Checkpoint, *, portable: bool) -> list[Initializer]:
    """The initializers that a tensor becomes."""
    if lazy.spec is not None and is_quantized(lazy):
        rows, columns = lazy.shape
        make = portable_parts if portable else fast_parts
        return make(module_of(lazy.name), (rows, columns), lazy.spec)
    shape = tuple(reversed(lazy.shape)) if lazy.name in model.linears else lazy.shape
    return [Initializer(name=lazy.name, dtype="FLOAT", shape=shape)]


def _loss(lazy: LazyTensor) -> Loss | None:
    if not is_quantized(lazy):
        return Loss(name="narrowing", size="float64 rounded to float32") if lazy.dtype is torch.float64 else None
    spec = lazy.spec
    if spec is None or spec.zeros == "integer" or _sure(spec) or to_residual(lazy.load_quantized(), "nearest").exact:
        return None
    return Loss(name="residual", size=LOSSES["residual"])


def _sure(spec: QuantSpec) -> bool:
    """Whether the writer may expect that float32 holds the residual: float16 scale and minimum; it still checks."""
    return spec.scale_dtype is torch.float16 and spec.min_dtype is torch.float16


def _row(
    lazy: LazyTensor, data: Mapping[str, Initializer], file: str, losses: Mapping[str, Loss | None]
) -> PlannedTensor:
    names = [name for name in data if name == lazy.name or name.startswith(f"{module_of(lazy.name)}.")]
    parts = [data[name] for name in names]
    return PlannedTensor(
        name=lazy.name,
        carrier=_carrier(lazy, portable=file != DATA),
        file=file,
        offset=min(part.offset for part in parts),
        nbytes=sum(part.nbytes for part in parts),
        loss=losses[lazy.name],
    )


def _carrier(lazy: LazyTensor, *, portable: bool) -> str:
    spec = lazy.spec
    if spec is None or not is_quantized(lazy):
        return "float32" if spec is None else f"float32, decoded from {spec.bits} bits"
    if portable:
        kind = "uint4" if spec.bits <= 4 else "uint8"
    else:
        kind = "4-bit container" if spec.bits <= 4 else "two 4-bit halves"
    order = ", columns by groups" if spec.act_order else ""
    return f"{spec.bits} bits in {kind}{order}" + (" + residual" if spec.zeros == "real" else "")


def _files(model: Checkpoint, fast: GraphPlan, portable: GraphPlan) -> dict[str, int | None]:
    files: dict[str, int | None] = {name: path.stat().st_size for name, path in model.files.items()}
    if has_tokenizer(model) and not {"tokenizer.json", "tokenizer.model"} & set(model.files):
        files |= {"tokenizer.json": None, "tokenizer_config.json": None}
    for folder, graph in (("", fast), (f"{PORTABLE}/", portable)):
        files |= {f"{folder}{GRAPH}": graph.proto.ByteSize(), f"{folder}{DATA}": graph.size}
        files |= {f"{folder}{name}": None for name in ("config.json", "genai_config.json")}
    return files
