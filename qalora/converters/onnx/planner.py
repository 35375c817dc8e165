"""Decide how a model goes into the two graphs: initializers and offsets of both data files, metadata, refusals.

Quantized linear weights are held as `carriers` says. Everything else is float32: the embedding as it is, [vocabulary,
hidden], which a tied output shares (or as codes, where that is asked for: `embedding`); float linear weights
transposed, as MatMul wants them; rotary tables by position.

Values are read for a plan only where specs do not tell whether float32 holds what integer zero points leave over; of
an act-order weight one row, for the order of its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.decoder import decoder_of
from qalora.converters.ends import GENERATION, config_with_ends, end_notes, generation_bytes
from qalora.converters.families import family_of
from qalora.converters.onnx.carriers import fast_parts, portable_parts
from qalora.converters.onnx.decoder import check_decoder, rotary_parts
from qalora.converters.onnx.embedding import EMBEDDING, check_table, tables
from qalora.converters.onnx.fast import fast_graph
from qalora.converters.onnx.genai import genai_config
from qalora.converters.onnx.graph import DATA
from qalora.converters.onnx.order import order_part, shared_orders
from qalora.converters.onnx.portable import portable_graph
from qalora.converters.onnx.slots import add_slots
from qalora.converters.onnx.tokenizer import NOTE, genai_files
from qalora.converters.plan import LOSSES, ExportOptions, Loss, Plan, PlannedTensor
from qalora.converters.settings import norm_names
from qalora.converters.specs import TENSORS, specs_text
from qalora.converters.tokenizer import converted_files
from qalora.errors import InputError
from qalora.formats.onnx import Initializer, lay_out
from qalora.residual import to_residual
from qalora.tensor import QuantSpec

__all__ = ["GRAPH", "PORTABLE", "GraphPlan", "OnnxPlan", "plan"]

GRAPH = "model.onnx"
PORTABLE = "portable"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPlan:
    """One graph. proto: the ModelProto; data: its initializers by name; size: of the data file; genai: its config;
    coded: the tensors that it holds as codes."""

    proto: Any
    data: Mapping[str, Initializer]
    size: int
    genai: Mapping[str, Any]
    coded: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class OnnxPlan(Plan):
    """A plan with both graphs, config.json, and the tokenizer's files that are not the model's own."""

    fast: GraphPlan
    portable: GraphPlan
    config: Mapping[str, Any]
    tokenizer: Mapping[str, bytes]


def plan(model: Checkpoint, options: ExportOptions) -> OnnxPlan:
    """Decide everything. InputError for a decoder that the graphs do not do, ExactnessError for groups without blocks.

    A float model is written too, with float32 MatMuls.
    """
    decoder = decoder_of(model.config, model.path)
    check_decoder(decoder, model.path)
    _check_tensors(model)
    coded = _coded(model)
    fast_coded = coded | ({f"{EMBEDDING}.weight"} if check_table(model, options.onnx_embedding) else set())
    computed = dict.fromkeys([*model.linears, *model.tensors])  # the first to use an order gives it its name
    orders = shared_orders(model.tensors[name] for name in computed if name in coded)
    fast_data, fast_size = lay_out(_initializers(model, orders, fast_coded, portable=False))
    portable_data, portable_size = lay_out(_initializers(model, orders, coded, portable=True))
    stubs = {**fast_data, **tables(fast_data)}
    fast_proto = fast_graph(model, stubs, orders, _metadata(model, fast_coded, options), options.accuracy_level)
    fast = GraphPlan(
        proto=add_slots(fast_proto, model, options.lora_slots),
        data=fast_data,
        size=fast_size,
        genai=genai_config(model, decoder, portable=False),
        coded=fast_coded,
    )
    portable = GraphPlan(
        proto=add_slots(
            portable_graph(model, portable_data, orders, _metadata(model, coded, options)), model, options.lora_slots
        ),
        data=portable_data,
        size=portable_size,
        genai=genai_config(model, decoder, portable=True),
        coded=coded,
    )
    losses = {name: _loss(lazy, coded) for name, lazy in model.tensors.items()}
    rows = [_row(lazy, fast, DATA, losses) for lazy in model.tensors.values()]
    rows += [_row(lazy, portable, f"{PORTABLE}/{DATA}", losses) for lazy in model.tensors.values()]
    adapted = genai_files(model)
    return OnnxPlan(
        target="onnx",
        tensors=tuple(rows),
        files=_files(model, fast, portable, adapted),
        notes=(*model.notes, *end_notes(model), *([NOTE] if "tokenizer.json" in adapted else [])),
        fast=fast,
        portable=portable,
        config=_config(model),
        tokenizer=adapted,
    )


def _config(model: Checkpoint) -> dict[str, Any]:
    architecture = family_of(model.config, model.path).architecture
    return {"architectures": [architecture], **config_with_ends(model)}


def _check_tensors(model: Checkpoint) -> None:
    family = family_of(model.config, model.path)
    known = {name for name, _ in family.outer} | set(model.linears) | {f"{module_of(n)}.bias" for n in model.linears}
    norms = norm_names(model.config, model.path)
    for name in sorted({*norms, "model.embed_tokens.weight"}):
        if name not in model.tensors:
            raise InputError(f"{model.path}: missing tensor {name}, which config.json requires")
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


def _coded(model: Checkpoint) -> frozenset[str]:
    """The tensors that both graphs hold as codes: every quantized one but the embedding, which is looked up."""
    embedding = f"{EMBEDDING}.weight"
    return frozenset(name for name, lazy in model.tensors.items() if lazy.spec is not None and name != embedding)


def _metadata(model: Checkpoint, coded: frozenset[str], options: ExportOptions) -> dict[str, str]:
    specs = {module_of(name): lazy.spec for name, lazy in model.tensors.items() if name in coded and lazy.spec}
    return {TENSORS: specs_text(specs), **options.provenance}


def _initializers(
    model: Checkpoint, orders: Mapping[str, str], coded: frozenset[str], *, portable: bool
) -> list[Initializer]:
    found = []
    for lazy in model.tensors.values():
        found += _parts(lazy, model, coded, portable=portable)
        module = module_of(lazy.name)
        if orders.get(module) == module:
            found.append(order_part(module, lazy.shape[1]))
    return found + rotary_parts(decoder_of(model.config, model.path))


def _parts(lazy: LazyTensor, model: Checkpoint, coded: frozenset[str], *, portable: bool) -> list[Initializer]:
    """The initializers that a tensor becomes."""
    if lazy.spec is not None and lazy.name in coded:
        rows, columns = lazy.shape
        make = portable_parts if portable else fast_parts
        return make(module_of(lazy.name), (rows, columns), lazy.spec)
    shape = tuple(reversed(lazy.shape)) if lazy.name in model.linears else lazy.shape
    return [Initializer(name=lazy.name, dtype="FLOAT", shape=shape)]


def _loss(lazy: LazyTensor, coded: frozenset[str]) -> Loss | None:
    if lazy.name not in coded:
        return Loss(name="narrowing", size="float64 rounded to float32") if lazy.dtype is torch.float64 else None
    spec = lazy.spec
    if spec is None or spec.zeros == "integer" or _sure(spec) or to_residual(lazy.load_quantized(), "nearest").exact:
        return None
    return Loss(name="residual", size=LOSSES["residual"])


def _sure(spec: QuantSpec) -> bool:
    """Whether the writer may expect that float32 holds the residual: float16 scale and minimum; it still checks."""
    return spec.scale_dtype is torch.float16 and spec.min_dtype is torch.float16


def _row(lazy: LazyTensor, graph: GraphPlan, file: str, losses: Mapping[str, Loss | None]) -> PlannedTensor:
    start = f"{module_of(lazy.name)}."
    parts = [part for name, part in graph.data.items() if name == lazy.name or name.startswith(start)]
    return PlannedTensor(
        name=lazy.name,
        carrier=_carrier(lazy, graph.coded, portable=file != DATA),
        file=file,
        offset=min(part.offset for part in parts),
        nbytes=sum(part.nbytes for part in parts),
        loss=losses[lazy.name],
    )


def _carrier(lazy: LazyTensor, coded: frozenset[str], *, portable: bool) -> str:
    spec = lazy.spec
    if spec is None or lazy.name not in coded:
        return "float32" if spec is None else f"float32, decoded from {spec.bits} bits"
    if portable:
        kind = "uint4" if spec.bits <= 4 else "uint8"
    else:
        kind = "4-bit container" if spec.bits <= 4 else "two 4-bit halves"
    order = ", columns by groups" if spec.act_order else ""
    return f"{spec.bits} bits in {kind}{order}" + (" + residual" if spec.zeros == "real" else "")


def _files(
    model: Checkpoint, fast: GraphPlan, portable: GraphPlan, adapted: Mapping[str, bytes]
) -> dict[str, int | None]:
    files: dict[str, int | None] = {name: path.stat().st_size for name, path in model.files.items()}
    files |= {name: len(data) for name, data in adapted.items()}
    files |= dict.fromkeys(converted_files(model))
    files |= {GENERATION: len(generation_bytes(model))} if GENERATION in model.files else {}
    for folder, graph in (("", fast), (f"{PORTABLE}/", portable)):
        files |= {f"{folder}{GRAPH}": graph.proto.ByteSize(), f"{folder}{DATA}": graph.size}
        files |= {f"{folder}{name}": None for name in ("config.json", "genai_config.json")}
    return files
