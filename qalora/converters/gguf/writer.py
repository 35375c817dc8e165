"""Plan and write a GGUF file, or several: for each tensor the type that holds its codes, then the blocks, by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.added_tokens import OtherSpace
from qalora.converters.decoder import decoder_of
from qalora.converters.ends import end_notes, ends_of, in_words, token_texts
from qalora.converters.families import Family
from qalora.converters.gguf.hyperparameters import factor_tensors
from qalora.converters.gguf.loaders import check_tensors, clipped_window, context_notes, reads_bias
from qalora.converters.gguf.metadata import file_metadata, file_name
from qalora.converters.gguf.modelfile import MODELFILE, modelfile, turns_in
from qalora.converters.gguf.names import gguf_names, head_count, rows_to
from qalora.converters.gguf.reader import take_rows
from qalora.converters.plan import ExportOptions, Loss, Plan, PlannedTensor, Progress
from qalora.converters.settings import norm_names
from qalora.converters.specs import TENSORS, refuse_act_order, specs_text
from qalora.errors import ExactnessError, InputError
from qalora.formats.files import OutputFile
from qalora.formats.gguf import GgufLayout, Metadata, Value, create
from qalora.formats.gguf_blocks import BLOCK, BLOCK_TYPES, encode
from qalora.formats.gguf_ends import eog_of
from qalora.formats.gguf_split import plan_split
from qalora.formats.share import Share
from qalora.formats.workers import JOB_BYTES, Workers
from qalora.tensor import GroupQuantTensor, QuantSpec, all_finite, holds_float16, integer_zeros

__all__ = ["GgufPlan", "plan", "write"]

FLOAT_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F32"}
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

ENCODED = 1 << 22
"""Weights that are encoded before they are written, so that their blocks are still in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class GgufPlan(Plan):
    """A plan with the layout of the file, and GGUF's name of each tensor by transformers'; `factors` are the tensors
    that GGUF alone has, of rotary frequencies; `where` is the file of each tensor by GGUF's name; `modelfile` is the
    text of Ollama's."""

    layouts: Mapping[str, GgufLayout]
    names: Mapping[str, str]
    factors: Mapping[str, Tensor]
    where: Mapping[str, str]
    modelfile: str


def plan(model: Checkpoint, options: ExportOptions) -> GgufPlan:
    """Choose each tensor's type; InputError for what GGUF cannot hold, Losses for what it holds inexactly."""
    decoder = decoder_of(model.config, model.path)
    family = decoder.family
    model = _without_zero_biases(model, family)
    known = gguf_names(family, len(decoder.layers))
    unknown = sorted(set(model.tensors) - set(known))
    if unknown:
        raise InputError(f"{model.path}: tensor {unknown[0]!r} has no place in a {family.gguf.architecture} file")
    check_tensors(model.tensors, family, f"gguf: {model.path}")
    for name in (*norm_names(model.config, model.path), "model.embed_tokens.weight"):
        if name not in model.tensors:
            raise InputError(f"{model.path}: missing tensor {name}, which config.json requires")
    carriers = {name: _carrier(lazy, model, options) for name, lazy in model.tensors.items()}
    kinds = Counter(kind for name, (kind, _) in carriers.items() if name in model.linears)
    common = kinds.most_common(1)[0][0]
    notes = [*model.notes, *end_notes(model), *context_notes(decoder)]

    def kept(space: OtherSpace, entries: Metadata) -> None:
        _check_chats(space, entries)
        notes.append(space.note())

    metadata = file_metadata(model, decoder, options.name, common, kept)
    specs = {name: spec for name, carrier in carriers.items() if (spec := _kept(model.tensors[name], *carrier))}
    if specs:
        text = specs_text({name.removesuffix(".weight"): spec for name, spec in specs.items()})
        metadata = metadata.with_entries({TENSORS: Value.text(text)})
    told = {key: Value.text(value) for key, value in options.provenance.items()}
    metadata = metadata.with_entries(told)
    names = {name: known[name] for name in model.tensors}
    factors = factor_tensors(decoder)
    weights = [(names[name], model.tensors[name].shape, carriers[name][0]) for name in names]
    sizes = [*((name, tuple(data.shape), "F32") for name, data in factors.items()), *weights]
    file = file_name(model, metadata, options.name, common)
    layouts = plan_split(metadata, sizes, file, options.split_max_size)
    where = {name: part for part, layout in layouts.items() for name in layout.tensors}
    recipe = modelfile(metadata, list(layouts))
    places = {name: layouts[where[gguf]].tensors[gguf] for name, gguf in names.items()}
    tensors = tuple(
        PlannedTensor(
            name=name,
            carrier=carriers[name][0],
            file=where[names[name]],
            offset=place.offset,
            nbytes=place.nbytes,
            loss=carriers[name][1],
        )
        for name, place in places.items()
    )
    return GgufPlan(
        target="gguf",
        tensors=tensors,
        files={**{part: layout.size for part, layout in layouts.items()}, MODELFILE: len(recipe.encode())},
        notes=(*notes, *_end_notes(model, metadata)),
        longest=clipped_window(decoder),
        layouts=layouts,
        names=names,
        factors=factors,
        where=where,
        modelfile=recipe,
    )


def _check_chats(space: OtherSpace, metadata: Metadata) -> None:
    """InputError where a chat, as the file's template writes it, has white space that llama.cpp drops or keeps
    otherwise; or where that is not to be known.
    """
    turns = turns_in(metadata)
    if turns is None:
        raise space.refusal()
    said = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    chats = [said, *([[{"role": "system", "content": "x"}, *said]] if turns.system is not None else [])]
    for chat in chats:
        token = space.in_chat(turns.render(chat))
        if token:
            raise space.refusal(token)


def _end_notes(model: Checkpoint, metadata: Metadata) -> list[str]:
    """What llama.cpp ends at by name, and the model does not."""
    eog, ends = eog_of(metadata), ends_of(model).ids
    more = [n for n in ([] if eog is None else eog.ids) if n not in ends]
    names = in_words(more, token_texts(model))
    return [f"gguf: llama.cpp knows more end tokens by name, whatever a file says: {names}"] if more else []


def _without_zero_biases(model: Checkpoint, family: Family) -> Checkpoint:
    """The model without the biases of zeros that llama.cpp does not read, and that transformers wants to be there."""
    unread = [name for name in model.tensors if not reads_bias(name, family)]
    zeros = {name for name in unread if not bool(model.tensors[name].load_float().any())}
    return replace(model, tensors={name: lazy for name, lazy in model.tensors.items() if name not in zeros})


def _carrier(lazy: LazyTensor, model: Checkpoint, options: ExportOptions) -> tuple[str, Loss | None]:
    if lazy.spec is not None:
        return _quantized_carrier(lazy, lazy.spec, options)
    if lazy.dtype not in FLOAT_TYPES:
        raise InputError(f"{lazy.name}", expected="a float tensor", got=str(lazy.dtype))
    loss = Loss(name="narrowing", size="float64 rounded to float32") if lazy.dtype is torch.float64 else None
    return ("F32" if len(lazy.shape) == 1 else FLOAT_TYPES[lazy.dtype]), loss


def _quantized_carrier(lazy: LazyTensor, spec: QuantSpec, options: ExportOptions) -> tuple[str, Loss | None]:
    refuse_act_order(lazy, "gguf")
    if spec.group_size % BLOCK:
        raise ExactnessError(
            f"gguf: {lazy.name}: group_size",
            expected=f"a multiple of {BLOCK}",
            got=str(spec.group_size),
            todo="use onnx",
        )
    middle = _middle_zero(lazy, spec)
    if spec.bits in (6, 8):
        return _eight_bit_carrier(lazy, spec, middle)
    if options.gguf_form == "wide" and spec.zeros == "integer":
        return "Q8_0", _scale_loss(spec)
    if middle and spec.bits in (4, 5):
        return f"Q{spec.bits}_0", _scale_loss(spec)
    kind = "Q5_1" if spec.bits == 5 else "Q4_1"
    if spec.narrowest_min is not torch.float16:
        wide = ", or keep integer zeros exactly with `gguf_form` wide (Q8_0)" if spec.zeros == "integer" else ""
        return kind, Loss(name="minima", size=f"float32 minima rounded to float16, at most half an ULP{wide}")
    return kind, _scale_loss(spec)


def _eight_bit_carrier(lazy: LazyTensor, spec: QuantSpec, middle: bool) -> tuple[str, Loss | None]:
    if spec.zeros == "real" or (spec.bits == 8 and not middle):
        kind = "real" if spec.zeros == "real" else "integer, but not the middle one"
        raise ExactnessError(
            f"gguf: {lazy.name}: no type holds {spec.bits}-bit codes whose zero points are {kind}",
            todo="use onnx, or quantize to 4 or 5 bits",
        )
    return "Q8_0", _scale_loss(spec)


def _kept(lazy: LazyTensor, kind: str, loss: Loss | None) -> QuantSpec | None:
    """What the reader is to make of the blocks, where they do not tell: see `qalora.converters.specs`.

    Integer zero points that differ are not to be had from Q8_0, whose codes are relative to them.
    """
    spec = lazy.spec
    if spec is None:
        return None
    block = BLOCK_TYPES[kind].spec
    kept = replace(block, bits=spec.bits, group_size=spec.group_size)
    if block.zero is None:
        kept = kept if loss is not None else replace(kept, zeros=spec.zeros, zero=spec.zero)
    elif spec.bits == block.bits or _middle_zero(lazy, spec):
        kept = replace(kept, zero=1 << (spec.bits - 1))
    else:
        kept = replace(block, group_size=spec.group_size)
    return None if kept == block else kept


def _scale_loss(spec: QuantSpec) -> Loss | None:
    if spec.scale_dtype is torch.float16:
        return None
    return Loss(name="scales", size="float32 scales rounded to float16, at most half an ULP")


def _middle_zero(lazy: LazyTensor, spec: QuantSpec) -> bool:
    """Whether every zero point is 2**(bits-1); reads the tensor where its spec does not say."""
    if spec.zeros == "real" or spec.bits < 4:
        return False
    middle = 1 << (spec.bits - 1)
    if spec.zero is not None:
        return spec.zero == middle
    zeros = (integer_zeros(tile) for _, tile in lazy.tiles() if isinstance(tile, GroupQuantTensor))
    return all(zero is not None and bool((zero == middle).all()) for zero in zeros)


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the planned file into `folder`, and a Modelfile for Ollama beside it."""
    if not isinstance(plan, GgufPlan):
        raise TypeError(f"expected GgufPlan, got {type(plan).__name__}")
    family = decoder_of(model.config, model.path).family
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(create(folder / part, layout, share)) for part, layout in plan.layouts.items()
        }
        for name, data in plan.factors.items() if share.frame else ():
            part = plan.where[name]
            files[part].write(plan.layouts[part].tensors[name].offset, data)
        workers = stack.enter_context(Workers())
        for tensor in plan.tensors:
            if not share.writes(tensor.name):
                continue
            lazy = model.tensors[tensor.name]
            heads = head_count(family, model.config, lazy.name)
            for row, tile in lazy.pieces(JOB_BYTES, multiple=1 if heads is None else lazy.shape[0] // heads):
                workers.do(_write_rows, files[tensor.file], tensor, plan, row, tile, heads=heads, family=family)
            progress(tensor.name, tensor.nbytes)
    if share.frame:
        (folder / MODELFILE).write_bytes(plan.modelfile.encode())


def _write_rows(
    file: OutputFile,
    planned: PlannedTensor,
    plan: GgufPlan,
    row: int,
    tile: Tensor | GroupQuantTensor,
    *,
    heads: int | None,
    family: Family,
) -> None:
    """Write rows of a tensor from `row` on; those of whole heads where their order is that of `heads`."""
    info = plan.layouts[planned.file].tensors[plan.names[planned.name]]
    ordered = tile if heads is None else take_rows(tile, rows_to(tile.shape[0], tile.shape[0] * heads // info.shape[0]))
    at = info.offset + row * info.row_bytes
    if isinstance(ordered, Tensor):
        values = ordered.float() + 1 if family.adds_one(planned.name) else ordered
        file.write(at, values.to(TORCH_TYPES[planned.carrier]))
        return
    step = max(1, ENCODED // ordered.shape[1])
    for start in range(0, ordered.shape[0], step):
        file.write(at + start * info.row_bytes, _blocks(ordered.rows(start, start + step), planned))


def _blocks(tile: GroupQuantTensor, planned: PlannedTensor) -> Tensor:
    blocks = tile.regrouped(BLOCK)
    for name, values in (("scale", blocks.scale), ("min", blocks.min)):
        if name == "min" and BLOCK_TYPES[planned.carrier].zero is not None:
            continue
        if not all_finite(values.half()):
            raise InputError(
                f"{planned.name}: {name}",
                expected="values within float16's 65504",
                got=f"{float(values.abs().max()):g}",
            )
        if planned.loss is None and not holds_float16(values):
            raise ValueError(f"{planned.name}: its spec promises {name} that float16 holds, and it has others")
    return encode(blocks, planned.carrier)
