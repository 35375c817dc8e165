"""Decide how a model goes into an MNN folder: where its bytes lie, the graph, the configs; refusals.

Codes, scales and minima are kept as they are at every width, in float32 where they are float16. Float weights become
float32. No values are read for a plan, but those of a quantized embedding, whose minima are stored as sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.decoder import check_tensors, decoder_of
from qalora.converters.ends import GENERATION, config_for_transformers, end_notes, generation_bytes
from qalora.converters.mnn.carriers import TABLE as TABLE_ITEM
from qalora.converters.mnn.carriers import container, holds_minima, items, place, table_dtype, table_place
from qalora.converters.mnn.decoder import EMBEDDING, build, check_decoder, engine_config
from qalora.converters.mnn.files import CONFIG, MODEL, OPTIONS, TABLE, VERSION, VERSION_KEY, WEIGHTS
from qalora.converters.mnn.tokenizer import NAME, tokenizer_file
from qalora.converters.plan import ExportOptions, Loss, Plan, PlannedTensor
from qalora.converters.specs import TENSORS, refuse_act_order, specs_text
from qalora.converters.tokenizer import converted_files
from qalora.errors import InputError
from qalora.formats.mnn import Item, lay_out
from qalora.formats.output import json_bytes
from qalora.tensor import QuantSpec

__all__ = ["MnnPlan", "plan"]

START = 64
"""Where the first tensor begins: an offset of 0 would mean another file to MNN."""

MEMORY = (
    "mnn: config.json asks for `memory` normal, in which MNN computes in float32 with the weights decoded to float32; "
    "with low it keeps the codes, and rounds activations to 8 bits"
)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MnnPlan(Plan):
    """A plan with the graph, the places in the files of weights, and the folder's small files.

    data   what each file of weights holds, by its name: its items, and its bytes
    small  the folder's small files that are made here, by name
    """

    data: Mapping[str, tuple[Mapping[str, Item], int]]
    small: Mapping[str, bytes]


def plan(model: Checkpoint, options: ExportOptions) -> MnnPlan:
    """Decide everything. InputError for a decoder that the graph does not do; ExactnessError for act-order."""
    decoder = decoder_of(model.config, model.path)
    check_decoder(decoder, model.path)
    check_tensors(model)
    for lazy in model.tensors.values():
        refuse_act_order(lazy, "mnn")
    table = model.tensors[f"{EMBEDDING}.weight"]
    if table.shape[1] % 8:
        raise InputError(f"{model.path}: mnn: hidden size", expected="a multiple of 8", got=str(table.shape[1]))
    exact = table.spec is None or holds_minima(table)
    placed, data = _places(model, table)
    graph = build(model, lambda module: place(model, placed, module))
    config = {**engine_config(decoder), **_metadata(model, table, options, exact=exact)}
    where = table_place(model, placed)
    if where is not None:
        config["tie_embeddings"] = where
    words, left_out = tokenizer_file(model)
    small = {
        MODEL: graph,
        NAME: words,
        CONFIG: json_bytes(config),
        "config.json": json_bytes({**config_for_transformers(model), **OPTIONS}),
        GENERATION: generation_bytes(model),
    }
    files: dict[str, int | None] = {name: size for name, (_, size) in data.items()}
    files |= {name: path.stat().st_size for name, path in model.files.items()}
    files |= dict.fromkeys(converted_files(model))
    files |= {name: len(content) for name, content in small.items()}
    return MnnPlan(
        target="mnn",
        tensors=tuple(_row(lazy, data, exact=exact) for lazy in model.tensors.values()),
        files=files,
        notes=(*model.notes, *end_notes(model), *left_out, MEMORY),
        data=data,
        small=small,
    )


def _places(model: Checkpoint, table: LazyTensor) -> tuple[dict[str, Item], dict[str, tuple[Mapping[str, Item], int]]]:
    """All items by name, and those of each file with its bytes."""
    placed, size = lay_out(items(model), START)
    if table.spec is not None:
        return placed, {WEIGHTS: (placed, size)}
    dtype = table_dtype(table)
    item = Item(name=TABLE_ITEM, dtype=dtype, shape=table.shape)
    if dtype is torch.bfloat16:
        return {**placed, TABLE_ITEM: item}, {WEIGHTS: (placed, size), TABLE: ({TABLE_ITEM: item}, item.nbytes)}
    codes = item.nbytes // 4 if dtype is torch.float32 else 0
    placed = {**placed, TABLE_ITEM: replace(item, offset=size + codes)}
    return placed, {WEIGHTS: (placed, size + codes + item.nbytes)}


def _metadata(model: Checkpoint, table: LazyTensor, options: ExportOptions, *, exact: bool) -> dict[str, str]:
    specs = {module_of(name): lazy.spec for name, lazy in model.tensors.items() if lazy.spec is not None}
    if table.spec is not None and not exact:
        specs[EMBEDDING] = _kept(table.spec)
    return {TENSORS: specs_text(specs), VERSION_KEY: VERSION, **options.provenance}


def _kept(spec: QuantSpec) -> QuantSpec:
    """What is left of the spec of an embedding whose minima are rounded."""
    return replace(spec, zeros="real", zero=None, min_dtype=torch.float32)


def _row(lazy: LazyTensor, data: Mapping[str, tuple[Mapping[str, Item], int]], *, exact: bool) -> PlannedTensor:
    module = module_of(lazy.name)
    names = (
        [lazy.name]
        if lazy.name.endswith(".bias")
        else [f"{module}.{part}" for part in ("header", "codes", "alpha", "weight", "norm", "table")]
    )
    file, own = next(
        (file, found)
        for file, (placed, _) in data.items()
        if (found := [placed[name] for name in names if name in placed])
    )
    loss = None
    if lazy.spec is not None and module == EMBEDDING and not exact:
        loss = Loss(name="minima", size="minima of the embedding as float32 sums with 2^(bits-1) scales")
    elif lazy.spec is None and lazy.dtype is torch.float64:
        loss = Loss(name="narrowing", size="float64 rounded to float32")
    return PlannedTensor(
        name=lazy.name,
        carrier=_carrier(lazy, own),
        file=file,
        offset=min(item.offset for item in own),
        nbytes=sum(item.nbytes for item in own),
        loss=loss,
    )


def _carrier(lazy: LazyTensor, own: list[Item]) -> str:
    if lazy.spec is None:
        return str(own[-1].dtype).removeprefix("torch.")
    bits = container(module_of(lazy.name), lazy.spec.bits)
    held = "" if bits == lazy.spec.bits else f" in {bits}"
    return f"{lazy.spec.bits} bits{held}, float32 scale and min"
