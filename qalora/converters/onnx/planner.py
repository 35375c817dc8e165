"""Decide how a model goes into the graphs: initializers and offsets of their data file, metadata, refusals.

Quantized linear weights are held as `carriers` says. Everything else is float32: the embedding as it is, [vocabulary,
hidden], which a tied output shares (or as codes, where the base has them: `embedding`); float linear weights
transposed, as MatMul wants them; rotary tables by position.

No values are read for a plan, but for a row of an act-order weight, for the order of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.column_order import shared_orders
from qalora.converters.decoder import check_tensors, decoder_of
from qalora.converters.ends import GENERATION, config_with_ends, end_notes, generation_bytes
from qalora.converters.families import family_of
from qalora.converters.onnx.carriers import as_blocks, as_rows, block_size, is_part, parts
from qalora.converters.onnx.decoder import check_decoder, rotary_parts
from qalora.converters.onnx.embedding import EMBEDDING, check_table, tables
from qalora.converters.onnx.fast import fast_graph
from qalora.converters.onnx.files import VERSION, VERSION_KEY
from qalora.converters.onnx.genai import genai_config
from qalora.converters.onnx.graph import DATA
from qalora.converters.onnx.order import ORDER, order_part
from qalora.converters.onnx.portable import portable_graph
from qalora.converters.onnx.slots import add_slots
from qalora.converters.onnx.tokenizer import genai_files
from qalora.converters.plan import ExportOptions, Loss, Plan, PlannedTensor
from qalora.converters.specs import TENSORS, specs_text
from qalora.converters.tokenizer import converted_files
from qalora.formats.onnx import Initializer, lay_out

__all__ = ["GRAPH", "PORTABLE", "GraphPlan", "OnnxPlan", "plan"]

GRAPH = "model.onnx"
PORTABLE = "portable"
FOLDERS = {"both": {"fast": "", "portable": PORTABLE}, "fast": {"fast": ""}, "portable": {"portable": ""}}
"""Where each graph lies, for each word of ExportOptions.onnx_graphs. Data are beside the graph that lies deepest, since
a graph may name files of its own folder and those below it only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPlan:
    """One graph. folder: where it lies, "" or PORTABLE; proto: the ModelProto; genai: its config."""

    folder: str
    proto: Any
    genai: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class OnnxPlan(Plan):
    """A plan with the graphs, their data, config.json, and the tokenizer's files that are not the model's own.

    file: the data's; data: its initializers by name; size: its bytes; coded: the tensors that it holds as codes
    """

    graphs: tuple[GraphPlan, ...]
    file: str
    data: Mapping[str, Initializer]
    size: int
    coded: frozenset[str]
    config: Mapping[str, Any]
    tokenizer: Mapping[str, bytes]


def plan(model: Checkpoint, options: ExportOptions) -> OnnxPlan:
    """Decide everything. InputError for a decoder that the graphs do not do, ExactnessError for groups without blocks.

    A float model is written too, with float32 MatMuls.
    """
    decoder = decoder_of(model.config, model.path)
    check_decoder(decoder, model.path)
    check_tensors(model)
    coded = _coded(model, options)
    computed = dict.fromkeys([*model.linears, *model.tensors])  # the first to use an order gives it its name
    orders = shared_orders("onnx", (model.tensors[name] for name in computed if name in coded))
    data, size = lay_out(_initializers(model, orders, coded))
    metadata = _metadata(model, coded, options)
    file = f"{PORTABLE}/{DATA}" if options.onnx_graphs == "both" else DATA
    graphs = []
    for kind, folder in FOLDERS[options.onnx_graphs].items():
        location = file.removeprefix(f"{folder}/")
        if kind == "fast":
            proto = fast_graph(model, _as_blocks(model, data), location, orders, metadata, options.accuracy_level)
        else:
            proto = portable_graph(model, _as_rows(data), location, orders, metadata)
        proto = add_slots(proto, model, options.lora_slots)
        graphs.append(
            GraphPlan(folder=folder, proto=proto, genai=genai_config(model, decoder, portable=kind == "portable"))
        )
    adapted, adapted_notes = genai_files(model)
    return OnnxPlan(
        target="onnx",
        tensors=tuple(_row(lazy, data, coded, file) for lazy in model.tensors.values()),
        files=_files(model, graphs, {file: size}, adapted),
        notes=(
            *model.notes,
            *end_notes(model),
            *adapted_notes,
            *_table_notes(model, coded),
        ),
        graphs=tuple(graphs),
        file=file,
        data=data,
        size=size,
        coded=coded,
        config=_config(model),
        tokenizer=adapted,
    )


def _table_notes(model: Checkpoint, coded: frozenset[str]) -> list[str]:
    """What the embedding's codes cost and save, where they are held; docs/formats.md has the measurement."""
    if f"{EMBEDDING}.weight" not in coded:
        return []
    wide = 4 * math.prod(model.tensors[f"{EMBEDDING}.weight"].shape)
    return [
        f"onnx: the embedding is held as codes; float32 (`onnx_embedding`) takes {wide / 1e6:,.1f} MB "
        "and reads prompts about a sixth faster"
    ]


def _as_blocks(model: Checkpoint, data: Mapping[str, Initializer]) -> dict[str, Initializer]:
    """The weights as the graph for ONNX Runtime reads them."""
    blocks = {module_of(name): block_size(name, lazy.spec) for name, lazy in model.tensors.items() if lazy.spec}
    seen = [as_blocks(part, blocks.get(name.rpartition(".")[0], 0)) for name, part in data.items()]
    return {part.name: part for part in [*seen, *tables(data.values(), ["codes"])]}


def _as_rows(data: Mapping[str, Initializer]) -> dict[str, Initializer]:
    """The weights as the portable graph reads them."""
    seen = [as_rows(part) for part in data.values()]
    return {part.name: part for part in [*seen, *tables(data.values(), ["codes", "zero"])]}


def _config(model: Checkpoint) -> dict[str, Any]:
    architecture = family_of(model.config, model.path).architecture
    return {"architectures": [architecture], **config_with_ends(model)}


def _coded(model: Checkpoint, options: ExportOptions) -> frozenset[str]:
    """The tensors that are held as codes: every quantized one, the embedding where it can be looked up from them."""
    embedding = f"{EMBEDDING}.weight"
    looked_up = check_table(model, options.onnx_embedding)
    return frozenset(
        name for name, lazy in model.tensors.items() if lazy.spec is not None and (looked_up or name != embedding)
    )


def _metadata(model: Checkpoint, coded: frozenset[str], options: ExportOptions) -> dict[str, str]:
    specs = {module_of(name): lazy.spec for name, lazy in model.tensors.items() if name in coded and lazy.spec}
    return {TENSORS: specs_text(specs), VERSION_KEY: VERSION, **options.provenance}


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


def _row(lazy: LazyTensor, data: Mapping[str, Initializer], coded: frozenset[str], file: str) -> PlannedTensor:
    module = module_of(lazy.name)
    own = [part for name, part in data.items() if name == lazy.name or (is_part(name, module) and lazy.name in coded)]
    own += [data[f"{module}{ORDER}"]] if lazy.name in coded and f"{module}{ORDER}" in data else []
    narrowed = lazy.name not in coded and lazy.dtype is torch.float64
    return PlannedTensor(
        name=lazy.name,
        carrier=_carrier(lazy, coded),
        file=file,
        offset=min(part.offset for part in own),
        nbytes=sum(part.nbytes for part in own),
        loss=Loss(name="narrowing", size="float64 rounded to float32") if narrowed else None,
    )


def _carrier(lazy: LazyTensor, coded: frozenset[str]) -> str:
    spec = lazy.spec
    if spec is None or lazy.name not in coded:
        return "float32" if spec is None else f"float32, decoded from {spec.bits} bits"
    kind = "4-bit container" if spec.bits <= 4 else "two 4-bit halves"
    order = ", columns by groups" if spec.act_order else ""
    return f"{spec.bits} bits in {kind}{order}" + (" + min" if spec.zeros == "real" else "")


def _files(
    model: Checkpoint, graphs: Sequence[GraphPlan], data: Mapping[str, int], adapted: Mapping[str, bytes]
) -> dict[str, int | None]:
    files: dict[str, int | None] = {name: path.stat().st_size for name, path in model.files.items()}
    files |= {name: len(content) for name, content in adapted.items()}
    files |= dict.fromkeys(converted_files(model))
    files |= {GENERATION: len(generation_bytes(model))} if GENERATION in model.files else {}
    for graph in graphs:
        own = {GRAPH: graph.proto.ByteSize(), "config.json": None, "genai_config.json": None}
        files |= {f"{graph.folder}/{name}".lstrip("/"): size for name, size in own.items()}
    return {**files, **data}
