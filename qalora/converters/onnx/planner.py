"""Decide how a model goes into the graphs: what they hold (`weights`), the files beside them, refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.decoder import decoder_of
from qalora.converters.ends import GENERATION, config_for_transformers, end_notes, generation_bytes
from qalora.converters.onnx.genai import genai_config
from qalora.converters.onnx.graph import DATA
from qalora.converters.onnx.slots import add_slots
from qalora.converters.onnx.tokenizer import genai_files
from qalora.converters.onnx.weights import Weights, weights_of
from qalora.converters.plan import ExportOptions, Plan
from qalora.converters.tokenizer import converted_files

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

    file: the data's; weights: what it holds
    """

    graphs: tuple[GraphPlan, ...]
    file: str
    weights: Weights
    config: Mapping[str, Any]
    tokenizer: Mapping[str, bytes]


def plan(model: Checkpoint, options: ExportOptions) -> OnnxPlan:
    """Decide everything. InputError for a decoder that the graphs do not do, ExactnessError for groups without blocks.

    A float model is written too, with float32 MatMuls.
    """
    decoder = decoder_of(model.config, model.path)
    weights = weights_of(model, "onnx", options)
    file = f"{PORTABLE}/{DATA}" if options.onnx_graphs == "both" else DATA
    graphs = []
    for kind, folder in FOLDERS[options.onnx_graphs].items():
        location = file.removeprefix(f"{folder}/")
        proto = (weights.fast if kind == "fast" else weights.portable)(model, location, options)
        proto = add_slots(proto, model, options.lora_slots)
        graphs.append(
            GraphPlan(folder=folder, proto=proto, genai=genai_config(model, decoder, portable=kind == "portable"))
        )
    adapted, adapted_notes = genai_files(model)
    return OnnxPlan(
        target="onnx",
        tensors=weights.rows(model, file),
        files=_files(model, graphs, weights.files(file), adapted),
        notes=(
            *model.notes,
            *end_notes(model),
            *adapted_notes,
            *weights.table_notes(model),
        ),
        graphs=tuple(graphs),
        file=file,
        weights=weights,
        config=config_for_transformers(model),
        tokenizer=adapted,
    )


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
