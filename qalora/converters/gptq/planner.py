"""Decide how a model goes into a GPTQ folder: the form of its zero points, the label, sizes and offsets, refusals.

Where every zero point is an integer, the layers keep their own. Elsewhere zero points become 2**(bits-1) and a LoRA
beside the checkpoint holds what is left over: every kernel reads symmetric zero points alike, and a forgotten LoRA is
then loud, where with the nearest zero points it would be plausible and wrong.

The label is "gptq" (v1) where all zero points are symmetric, which every loader reads alike, and "gptq_v2" elsewhere,
because GPTQModel refuses asymmetric v1.

Values are read for a plan only where specs do not tell: scales and minima beyond float16, whether a model's own
zero points are all symmetric, and, with the nearest zero points, whether float16 holds what they leave over, up to the
first layer for which it does not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qalora._version import __version__
from qalora.adapter import Adapter
from qalora.adapter.rewriting import alpha_for
from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.decoded import decoded_carrier, decoded_note, decoded_part
from qalora.converters.ends import config_for_transformers, end_notes
from qalora.converters.folder import FolderPlan, carried_rows, folder_files
from qalora.converters.gptq.beside import ADAPTER_CONFIG, ADAPTER_WEIGHTS, lora_names, peft_config
from qalora.converters.gptq.forms import Form, encode
from qalora.converters.gptq.head import HEAD, block_settings, head_fits, head_settings
from qalora.converters.gptq.reader import MAKER
from qalora.converters.plan import LOSSES, ExportOptions, Loss, PlannedTensor
from qalora.converters.specs import narrowest
from qalora.converters.vllm import vllm_note
from qalora.converters.wrapping import carried_parts, in_transformers, names_on_disk, whole_config
from qalora.errors import AdapterError, InputError, shown
from qalora.formats.gptq import BITS
from qalora.formats.safetensors import Layout, Part, ShardedLayout, plan_layout, plan_shards
from qalora.options.fields import readable
from qalora.tensor import QuantSpec, holds_float16

__all__ = ["GROUP_SIZES", "GptqPlan", "check_adapter", "plan", "ships_adapter"]

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""The groups that GPTQModel's kernels know, beside whole rows."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class GptqPlan(FolderPlan):
    """A folder's plan, with the form and what lies beside; quantize_config.json is the config's quantization_config.

    form            of every quantized layer of the blocks
    words           the tensors that become words, and their width there
    symmetric       whether all zero points are 2**(bits-1), so that the label is "gptq" (v1)
    beside          layout of adapter_model.safetensors, which PEFT reads whole, or None
    lora            the names of A and B in it, by module
    adapter         the adapter that goes there, or None where it is the residual
    rounds          whether a residual that float32 does not hold was allowed
    adapter_config  adapter_config.json, or None
    vllm            whether vLLM opens it, and how
    """

    form: Form
    words: Mapping[str, int]
    symmetric: bool
    beside: Layout | None
    lora: Mapping[str, tuple[str, str]]
    adapter: Adapter | None
    rounds: bool
    adapter_config: Mapping[str, Any] | None
    vllm: str


def ships_adapter(model: Checkpoint) -> bool:
    """Whether an adapter can travel beside this model, unfolded: every linear weight has integer zero points."""
    specs = [model.tensors[name].spec for name in model.linears]
    return bool(specs) and all(spec is not None and spec.zeros == "integer" for spec in specs)


def plan(model: Checkpoint, options: ExportOptions) -> GptqPlan:
    """Decide everything. Raises InputError for a float model, mixed widths or groups, sizes that GPTQ has no words for.

    With options.adapter, which needs a model of integer zero points, the adapter is shipped beside the base.
    """
    specs = _specs(model)
    form = _form(model, specs, options.gptq_form)
    bits = 8 if form == "eight-bit" else next(iter(specs.values())).bits
    size = _checked_group_size(model, specs, bits)
    if options.adapter is not None:
        check_adapter(model, options.adapter, "gptq")
    symmetric = form == "symmetric" or (form == "own" and all(_symmetric(model.tensors[name]) for name in specs))
    words = dict.fromkeys(specs, bits)
    if head_fits(model, bits, size) and (not symmetric or _symmetric(model.tensors[HEAD])):
        words[HEAD] = bits
    allowed = options.allow_loss
    parts = {name: _parts(lazy, words.get(name), allowed) for name, lazy in model.tensors.items()}
    metadata = {"format": "pt", **options.provenance}
    carried, called = carried_parts(model), names_on_disk(model, parts)
    groups = [*parts.values(), *carried.values()]
    ranks = _ranks(model, specs, form, options.adapter)
    main = plan_shards(groups, metadata, max_size=options.max_shard_size, called=called, indexed=bool(ranks))
    beside_ranks = [rank for rank, _ in ranks.values()]
    vllm = vllm_note("gptq", bits, group_size=size, middle=symmetric, ranks=beside_ranks)
    rounds = "residual" in allowed
    beside = plan_layout(_lora_parts(model, ranks, form, options.adapter), metadata) if ranks else None
    rows = _rows(model, words, form, main, beside, allowed)
    files = {**folder_files(model, main), "quantize_config.json": None, "README.md": None}
    if beside is not None:
        files |= {ADAPTER_WEIGHTS: beside.size, ADAPTER_CONFIG: None}
    return GptqPlan(
        target="gptq",
        tensors=(*rows, *carried_rows(main, carried)),
        files=files,
        notes=(
            *_cheaper(model, specs, beside, options.adapter),
            *model.notes,
            *end_notes(model),
            *_notes(ranks, beside, main, form, options.adapter),
            vllm,
            *decoded_note(model, words, "GPTQ", allowed),
        ),
        form=form,
        words=words,
        symmetric=symmetric,
        layout=main,
        beside=beside,
        lora={module: lora_names(in_transformers(model.wrapper, module)) for module in ranks},
        adapter=options.adapter,
        rounds=rounds,
        vllm=vllm,
        config=_config(model, words, symmetric, beside is not None, _minima(specs, form, rounds)),
        adapter_config=_peft_config(model, ranks) if ranks else None,
    )


def _specs(model: Checkpoint) -> dict[str, QuantSpec]:
    specs = {name: spec for name in model.linears if (spec := model.tensors[name].spec) is not None}
    if len(specs) < len(model.linears) or not specs:
        missing = next((name for name in model.linears if name not in specs), "the model")
        raise InputError(f"gptq: {missing} holds floats", todo="quantize the model first: qalora quantize")
    if len(widths := sorted({spec.bits for spec in specs.values()})) > 1:
        got = f"{', '.join(map(str, widths))} bits"
        raise InputError("gptq", expected="one width in all layers", got=got, todo="export to gguf, mlx or onnx")
    return specs


def _form(model: Checkpoint, specs: Mapping[str, QuantSpec], wanted: str) -> Form:
    forms: dict[str, Form] = {"auto": "symmetric", "nearest": "nearest", "round": "round", "eight-bit": "eight-bit"}
    if wanted not in forms:
        raise InputError(field="gptq_form", expected=f"one of {', '.join(forms)}", got=shown(wanted))
    bits = next(iter(specs.values())).bits
    if wanted == "eight-bit" and bits == 8 and not ships_adapter(model):
        raise InputError("gptq: form eight-bit", expected="fewer than 8 bits", got="8", todo="use `gptq_form` auto")
    if bits not in BITS and wanted != "eight-bit":
        raise InputError(
            f"gptq at {bits} bits",
            expected="2, 3, 4 or 8 bits",
            todo="export to gguf or onnx, or re-encode in 8 bits with `gptq_form` eight-bit",
        )
    if ships_adapter(model) and not (wanted == "eight-bit" and bits not in BITS):
        return "own"
    return forms[wanted]


def _checked_group_size(model: Checkpoint, specs: Mapping[str, QuantSpec], bits: int) -> int:
    """The group size of all layers, -1 for whole rows; InputError for sizes that GPTQ has not."""
    for name in specs:
        rows, columns = model.tensors[name].shape
        out = 32 if bits == 3 else 32 // bits
        if columns % 32 or rows % out:
            raise InputError(
                f"gptq: {name}",
                expected=f"in a multiple of 32 and out a multiple of {out} at {bits} bits",
                got=f"[{rows}, {columns}]",
                todo="leave GPTQ out for this model",
            )
    size = _group_size(model, specs)
    if size is None:
        sizes = sorted({spec.group_size for spec in specs.values()})
        raise InputError(
            "gptq: group_size",
            expected=f"one of {', '.join(map(str, GROUP_SIZES))}, or whole rows, in all layers",
            got=", ".join(map(str, sizes)),
            todo="quantize with one of these",
        )
    return size


def _group_size(model: Checkpoint, specs: Mapping[str, QuantSpec]) -> int | None:
    """What config.json says: the common group size, -1 for whole rows, or None where there is neither."""
    sizes = {spec.group_size for spec in specs.values()}
    if len(sizes) == 1 and sizes <= set(GROUP_SIZES):
        return next(iter(sizes))
    return -1 if all(spec.group_size == model.tensors[name].shape[1] for name, spec in specs.items()) else None


def check_adapter(model: Checkpoint, adapter: Adapter, target: str) -> None:
    """InputError for a base without integer zero points, AdapterError for a layer that it has not."""
    if not ships_adapter(model):
        raise InputError(
            f"{target}: an adapter beside the base",
            expected="a base with integer zero points",
            got="real zero points",
            todo="fold it",
        )
    for module, layer in adapter.layers.items():
        lazy = model.tensors.get(f"{module}.weight")
        if f"{module}.weight" not in model.linears or lazy is None or lazy.shape != layer.shape:
            got = "no such layer" if lazy is None else f"shape {list(lazy.shape)}"
            raise AdapterError(f"adapter layer {module}", expected=f"a linear layer {list(layer.shape)}", got=got)


def _symmetric(lazy: LazyTensor) -> bool:
    if lazy.spec is not None and lazy.spec.zero is not None:
        return lazy.spec.zero == 1 << (lazy.spec.bits - 1)
    tensor = lazy.load_quantized()
    return bool((encode(tensor, "own").zero == 1 << (tensor.bits - 1)).all())


def _parts(lazy: LazyTensor, bits: int | None, allowed: Collection[str]) -> list[Part]:
    """What a tensor becomes, beside its LoRA: words of `bits`, or floats."""
    if lazy.spec is None or bits is None:
        return [decoded_part(lazy, allowed)]
    (rows, columns), module = lazy.shape, module_of(lazy.name)
    groups = columns // lazy.spec.group_size
    return [
        (f"{module}.qweight", torch.int32, (columns * bits // 32, rows)),
        (f"{module}.qzeros", torch.int32, (groups, rows * bits // 32)),
        (f"{module}.scales", torch.float16, (groups, rows)),
        (f"{module}.g_idx", torch.int32, (columns,)),
    ]


def _ranks(
    model: Checkpoint, specs: Mapping[str, QuantSpec], form: Form, adapter: Adapter | None
) -> dict[str, tuple[int, float]]:
    """{module: (rank, alpha)} of the LoRA beside; empty if there is none."""
    if adapter is not None:
        return {module: (layer.rank, alpha_for(layer, "paper")) for module, layer in sorted(adapter.layers.items())}
    if form not in ("symmetric", "nearest"):
        return {}
    groups = {name: model.tensors[name].shape[1] // spec.group_size for name, spec in specs.items()}
    return {module_of(name): (rank, rank) for name, rank in groups.items()}


def _lora_parts(
    model: Checkpoint, ranks: Mapping[str, tuple[int, float]], form: Form, adapter: Adapter | None
) -> list[Part]:
    if adapter is None and form == "symmetric":  # a fold moves some zero point beyond what float16 holds
        dtype = torch.float32
    elif adapter is None:
        residuals = (encode(model.tensors[f"{module}.weight"].load_quantized(), form).c for module in ranks)
        dtype = narrowest(c for c in residuals if c is not None)
    else:
        dtype = narrowest(part for layer in adapter.layers.values() for part in (layer.a, layer.b))
    parts: list[Part] = []
    for module, (rank, _) in ranks.items():
        (rows, columns), (a, b) = (
            model.tensors[f"{module}.weight"].shape,
            lora_names(in_transformers(model.wrapper, module)),
        )
        parts.append((a, dtype, (rank, columns)))
        parts.append((b, dtype, (rows, rank)))
    return parts


def _peft_config(model: Checkpoint, ranks: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Of modules as transformers has them; around a decoder there are others whose names end alike."""
    modules = {in_transformers(model.wrapper, module): pair for module, pair in ranks.items()}
    return peft_config(modules, by_suffix_alone=model.wrapper is None)


def _rows(
    model: Checkpoint,
    words: Mapping[str, int],
    form: Form,
    main: ShardedLayout,
    beside: Layout | None,
    allowed: Collection[str],
) -> list[PlannedTensor]:
    rows = []
    for lazy in model.tensors.values():
        bits = words.get(lazy.name)
        file, offset, size = main.place(part for part, _, _ in _parts(lazy, bits, allowed))
        own = form if lazy.name in model.linears else "own"
        carrier, loss, rounded = _carrier(lazy, bits, own, allowed)
        rows.append(PlannedTensor(name=lazy.name, carrier=carrier, file=file, offset=offset, nbytes=size, loss=loss))
        names = lora_names(in_transformers(model.wrapper, module_of(lazy.name)))
        if beside is None or names[0] not in beside.entries:
            continue
        a, b = (beside.entries[name] for name in names)
        rows.append(
            PlannedTensor(
                name=lazy.name,
                carrier=f"LoRA of rank {a.shape[0]} in {str(b.dtype).removeprefix('torch.')}",
                file=ADAPTER_WEIGHTS,
                offset=a.offset,
                nbytes=a.nbytes + b.nbytes,
                loss=rounded,
            )
        )
    return rows


def _carrier(
    lazy: LazyTensor, bits: int | None, form: Form, allowed: Collection[str]
) -> tuple[str, Loss | None, Loss | None]:
    """Carrier, loss of the words, and loss of the residual."""
    spec = lazy.spec
    if spec is None or bits is None:
        return *decoded_carrier(lazy, allowed), None
    carrier = f"{bits}-bit words, {form} zero points"
    if form == "round":
        return carrier, Loss(name="zeros", size=LOSSES["zeros"]), None
    if form == "eight-bit" and spec.zeros == "real":
        return carrier, Loss(name="eight-bit", size=LOSSES["eight-bit"]), None
    unsure_scale = spec.scale_dtype != torch.float16
    unsure_min = form in ("symmetric", "nearest") and (unsure_scale or spec.min_dtype != torch.float16)
    if not (unsure_scale or unsure_min):
        return carrier, None, None
    tensor = lazy.load_quantized()
    loss = Loss(name="scales", size=LOSSES["scales"]) if unsure_scale and not holds_float16(tensor.scale) else None
    rounded = unsure_min and not encode(tensor, form).exact
    return carrier, loss, Loss(name="residual", size=LOSSES["residual"]) if rounded else None


def _cheaper(
    model: Checkpoint, specs: Mapping[str, QuantSpec], beside: Layout | None, adapter: Adapter | None
) -> list[str]:
    """What a base with integer zero points would save: it leaves nothing over."""
    if beside is None or adapter is not None:
        return []
    shapes = [model.tensors[name].shape for name in specs]
    bits = 8 * beside.size / sum(map(math.prod, shapes))
    rank = 4 * sum(map(sum, shapes))
    return [
        f"smaller: a base made with `zeros` integer needs no residual, {readable(beside.size)} less here "
        f"({bits:.2f} bits per weight); an adapter then lies beside it, {readable(rank)} for each of its ranks"
    ]


def _notes(
    ranks: Mapping[str, tuple[int, float]],
    beside: Layout | None,
    main: ShardedLayout,
    form: Form,
    adapter: Adapter | None,
) -> list[str]:
    if beside is None:
        return []
    largest = max(rank for rank, _ in ranks.values())
    size = f"{beside.size:,} bytes, {beside.size / main.size:.0%} of the base"
    if adapter is not None:
        return [f"the adapter lies beside the base as a plain LoRA of rank {largest} ({size}); transformers loads both"]
    return [
        f"real zero points: what {form} integer ones leave over lies beside the base as a LoRA of rank {largest} "
        f"({size}); transformers with peft loads both, GPTQModel alone loads the bare base. Also smaller: larger "
        "groups, or `gptq_form` eight-bit"
    ]


def _minima(specs: Mapping[str, QuantSpec], form: Form, rounds: bool) -> bool:
    """Whether a reader may rely on minima that float16 holds."""
    held = all(spec.min_dtype == torch.float16 for spec in specs.values())
    return held and form in ("symmetric", "nearest") and not rounds


def _config(model: Checkpoint, words: Mapping[str, int], symmetric: bool, beside: bool, minima: bool) -> dict[str, Any]:
    specs = {name: spec for name in words if (spec := model.tensors[name].spec) is not None}
    meta: dict[str, Any] = {"quantizer": [f"{MAKER}:{__version__}"]}
    if minima:
        meta["minima"] = "float16"
    quantization = {
        "quant_method": "gptq",
        "bits": words[model.linears[0]],
        "group_size": _group_size(model, specs),
        "desc_act": any(spec.act_order for spec in specs.values()),
        "sym": symmetric,
        **head_settings(HEAD in words),
        **block_settings(model),
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "meta": meta,
    }
    config = whole_config(model, config_for_transformers(model))
    dtype = config.pop("torch_dtype", None)
    config["dtype"] = "float32" if beside else config.get("dtype") or dtype or "float32"
    return {**config, "quantization_config": quantization}
