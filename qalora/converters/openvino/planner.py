"""Decide how a model goes into the IR: constants and their offsets, the graph, rt_info; refusals.

Quantized weights are held as `carriers` says. Float weights keep their type; norms and biases are float32, a norm of a
family with `norm_offset` as 1 + weight. No values are read for a plan, but for a row of an act-order weight, for the
order of its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.column_order import shared_orders
from qalora.converters.decoder import check_tensors, decoder_of
from qalora.converters.ends import GENERATION, config_for_transformers, end_notes, generation_bytes
from qalora.converters.openvino.carriers import CONTAINERS, ORDER, constants, is_part, order_constant
from qalora.converters.openvino.decoder import build, check_decoder
from qalora.converters.openvino.files import EXACT_OPTIONS, MODEL, OPTIONS, VERSION, VERSION_KEY
from qalora.converters.openvino.tokenizer import tokenizer_files
from qalora.converters.plan import ExportOptions, Loss, Plan, PlannedTensor
from qalora.converters.specs import TENSORS, specs_text
from qalora.converters.tokenizer import converted_files
from qalora.formats.openvino import Constant, element_of, ir_bytes, lay_out

__all__ = ["DATA", "EMBEDDING", "OpenvinoPlan", "plan"]

DATA = "openvino_model.bin"
EMBEDDING = "model.embed_tokens.weight"

EXACT = (
    "openvino: the graph asks for a float32 cache and activations that are not rounded, and cannot ask for float32 "
    "arithmetic: on a processor with bfloat16 pass INFERENCE_PRECISION_HINT=f32"
)
FAST = (
    "openvino: `openvino_precision` fast leaves precision to the runtime, as most models do: it may compute in "
    "bfloat16, keep the cache in 8 bits and round activations to 8 bits; a proof asks it for float32, "
    "and measures beside that what its own choice loses"
)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class OpenvinoPlan(Plan):
    """A plan with the graph, its constants, and the folder's small files.

    graph   the bytes of the XML
    data    the constants by name; size: bytes of the .bin; coded: the tensors that it holds as codes
    small   the values of the constants that are no tensors of the model
    beside  the tokenizer's graphs, by the names of their files
    """

    graph: bytes
    data: Mapping[str, Constant]
    size: int
    coded: frozenset[str]
    small: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    beside: Mapping[str, bytes]


def plan(model: Checkpoint, options: ExportOptions) -> OpenvinoPlan:
    """Decide everything. InputError for a decoder that the graph does not do. A float model is written too."""
    decoder = decoder_of(model.config, model.path)
    check_decoder(decoder, model.path)
    check_tensors(model)
    coded = frozenset(name for name, lazy in model.tensors.items() if _coded(lazy))
    orders = shared_orders("openvino", model, coded)
    weights = _constants(model, orders, coded)
    graph = build(_as_coded(model, coded), {item.name: item for item in weights}, orders)
    data, size = lay_out([*weights, *(item for item, _ in graph.small.values())])
    info: dict[str, Any] = {**_metadata(model, coded, options)}
    if options.openvino_precision == "float32":
        info[OPTIONS] = EXACT_OPTIONS
    content = ir_bytes(decoder.family.model_type, graph.layers, data, info)
    beside, left_out = tokenizer_files(model)
    files: dict[str, int | None] = {MODEL: len(content), DATA: size, "config.json": None}
    files |= {name: path.stat().st_size for name, path in model.files.items()}
    files |= dict.fromkeys(converted_files(model))
    files |= {name: len(each) for name, each in beside.items()}
    files[GENERATION] = len(generation_bytes(model))
    return OpenvinoPlan(
        target="openvino",
        tensors=tuple(_row(lazy, data, coded) for lazy in model.tensors.values()),
        files=files,
        notes=(
            *model.notes,
            *end_notes(model),
            *left_out,
            FAST if options.openvino_precision == "fast" else EXACT,
        ),
        graph=content,
        data=data,
        size=size,
        coded=coded,
        small={name: values for name, (_, values) in graph.small.items()},
        config=config_for_transformers(model),
        beside=beside,
    )


def _coded(lazy: LazyTensor) -> bool:
    """Whether a tensor is held as codes: the embedding's rows are looked up by columns as they are."""
    return lazy.spec is not None and not (lazy.name == EMBEDDING and (lazy.spec.act_order or lazy.spec.zeros == "real"))


def _as_coded(model: Checkpoint, coded: frozenset[str]) -> Checkpoint:
    """The model as the graph sees it: what is not held as codes is float."""

    def seen(lazy: LazyTensor) -> LazyTensor:
        return lazy if lazy.name in coded else replace(lazy, spec=None, dtype=lazy.dtype or torch.float32)

    return replace(model, tensors={name: seen(lazy) for name, lazy in model.tensors.items()})


def _metadata(model: Checkpoint, coded: frozenset[str], options: ExportOptions) -> dict[str, str]:
    specs = {module_of(name): lazy.spec for name, lazy in model.tensors.items() if name in coded and lazy.spec}
    return {TENSORS: specs_text(specs), VERSION_KEY: VERSION, **options.provenance}


def _constants(model: Checkpoint, orders: Mapping[str, str], coded: frozenset[str]) -> list[Constant]:
    made = []
    for lazy in model.tensors.values():
        module = module_of(lazy.name)
        if lazy.spec is not None and lazy.name in coded:
            made += constants(module, (lazy.shape[0], lazy.shape[1]), lazy.spec)
        else:
            made.append(Constant(name=lazy.name, element=_element(lazy), shape=lazy.shape))
        if orders.get(module) == module:
            made.append(order_constant(module, lazy.shape[1]))
    return made


def _element(lazy: LazyTensor) -> str:
    """What a float tensor is stored as: a matrix in its own type, what is small in float32."""
    return "f32" if lazy.dtype is None or len(lazy.shape) < 2 else element_of(lazy.dtype)


def _row(lazy: LazyTensor, data: Mapping[str, Constant], coded: frozenset[str]) -> PlannedTensor:
    module = module_of(lazy.name)
    if lazy.name in coded:
        own = [item for name, item in data.items() if is_part(name, module)]
        own += [data[f"{module}{ORDER}"]] if f"{module}{ORDER}" in data else []
    else:
        own = [data[lazy.name]]
    narrowed = lazy.spec is None and lazy.dtype is torch.float64
    return PlannedTensor(
        name=lazy.name,
        carrier=_carrier(lazy, coded, own[0].element),
        file=DATA,
        offset=min(item.offset for item in own),
        nbytes=sum(item.nbytes for item in own),
        loss=Loss(name="narrowing", size="float64 rounded to float32") if narrowed else None,
    )


def _carrier(lazy: LazyTensor, coded: frozenset[str], element: str) -> str:
    spec = lazy.spec
    if spec is None or lazy.name not in coded:
        return element if spec is None else f"{element}, decoded from {spec.bits} bits"
    order = ", columns by groups" if spec.act_order else ""
    held = "min" if spec.zeros == "real" else "zero point"
    return f"{spec.bits} bits in u{CONTAINERS[spec.bits]}{order}, scale and {held}"
