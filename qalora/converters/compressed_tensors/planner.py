"""Decide how a model goes into a compressed-tensors folder: one group of modules, sizes and offsets, refusals.

Zero points are whole numbers there, and scales float16, or float32 on request: the library computes in the scales'
type, so that with float32 the weights in transformers are the model's own. All layers have one width and group size,
since transformers 5.23 decodes every layer by the first group of a config.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qalora.adapter import Adapter
from qalora.adapter.rewriting import alpha_for
from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.decoded import decoded_carrier, decoded_note, decoded_part
from qalora.converters.ends import config_for_transformers, end_notes
from qalora.converters.folder import FolderPlan, folder_files, lay_out
from qalora.converters.gptq.beside import ADAPTER_CONFIG, ADAPTER_WEIGHTS, lora_names, peft_config
from qalora.converters.gptq.planner import check_adapter
from qalora.converters.huggingface import HEAD
from qalora.converters.plan import LOSSES, ExportOptions, Loss, PlannedTensor
from qalora.converters.specs import narrowest, refuse_act_order
from qalora.converters.vllm import vllm_note
from qalora.errors import InputError
from qalora.formats.compressed_tensors import row_words
from qalora.formats.safetensors import Layout, Part, plan_layout
from qalora.tensor import QuantSpec, holds_float16

__all__ = ["CompressedPlan", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CompressedPlan(FolderPlan):
    """A folder's plan, with what becomes words and what lies beside.

    words           the tensors that become words
    beside          layout of adapter_model.safetensors, or None
    adapter         the adapter that goes there
    adapter_config  adapter_config.json, or None
    """

    words: frozenset[str]
    beside: Layout | None
    adapter: Adapter | None
    adapter_config: Mapping[str, Any] | None


def plan(model: Checkpoint, options: ExportOptions) -> CompressedPlan:
    """Decide everything. InputError for a float model, mixed widths or groups; ExactnessError for act-order.

    With options.adapter, which needs a model of integer zero points, the adapter is shipped beside the base.
    """
    specs = _specs(model)
    if options.adapter is not None:
        check_adapter(model, options.adapter, "compressed-tensors")
    bits, size = _common(model, specs)
    words = frozenset({*specs, *([HEAD] if _head_fits(model, bits, size) else [])})
    middle = all(_zero(model.tensors[name]) == 1 << (bits - 1) for name in words)
    dtype = torch.float16 if options.compressed_scales == "float16" else torch.float32
    allowed = options.allow_loss
    ranks = _ranks(options.adapter)
    parts = {name: _parts(lazy, name in words, middle, dtype, allowed) for name, lazy in model.tensors.items()}
    carriers = {name: _carrier(lazy, name in words, dtype, allowed) for name, lazy in model.tensors.items()}
    layout, tensors = lay_out(model, parts, carriers, {"format": "pt"}, options, indexed=options.adapter is not None)
    files, beside = folder_files(model, layout), None
    if options.adapter is not None:
        beside = plan_layout(_lora_parts(options.adapter), {"format": "pt", **options.provenance})
        tensors = (*tensors, *_lora_rows(beside, ranks))
        files |= {ADAPTER_WEIGHTS: beside.size, ADAPTER_CONFIG: None}
    return CompressedPlan(
        target="compressed-tensors",
        tensors=tensors,
        files=files,
        notes=(
            *model.notes,
            *end_notes(model),
            *_notes(beside),
            vllm_note(
                "compressed-tensors",
                bits,
                group_size=-1 if size is None else size,
                middle=middle,
                ranks=[rank for rank, _ in ranks.values()],
            ),
            *decoded_note(model, words, "compressed-tensors", allowed),
        ),
        layout=layout,
        config=_config(model, bits, size, middle, HEAD in words),
        words=words,
        beside=beside,
        adapter=options.adapter,
        adapter_config=peft_config(ranks) if ranks else None,
    )


def _specs(model: Checkpoint) -> dict[str, QuantSpec]:
    specs = {name: spec for name in model.linears if (spec := model.tensors[name].spec) is not None}
    if len(specs) < len(model.linears) or not specs:
        missing = next((name for name in model.linears if name not in specs), "the model")
        raise InputError(
            f"compressed-tensors: {missing} holds floats", todo="quantize the model first: qalora quantize"
        )
    for name in specs:
        refuse_act_order(model.tensors[name], "compressed-tensors")
    return specs


def _common(model: Checkpoint, specs: Mapping[str, QuantSpec]) -> tuple[int, int | None]:
    """The width and group size of all layers; None where each has whole rows. InputError where they differ."""
    widths, sizes = ({getattr(spec, key) for spec in specs.values()} for key in ("bits", "group_size"))
    rows = all(spec.group_size == model.tensors[name].shape[1] for name, spec in specs.items())
    if len(widths) > 1 or (len(sizes) > 1 and not rows):
        got = f"{', '.join(map(str, sorted(widths)))} bits in groups of {', '.join(map(str, sorted(sizes)))}"
        expected = "one width and group size in all layers, as transformers reads"
        raise InputError("compressed-tensors", expected=expected, got=got, todo="export to gguf, mlx or onnx")
    return widths.pop(), None if rows else sizes.pop()


def _head_fits(model: Checkpoint, bits: int, size: int | None) -> bool:
    """Whether an output layer of its own has the codes of the other layers."""
    spec = None if model.tied else model.tensors[HEAD].spec
    if spec is None or spec.act_order or spec.bits != bits or spec.zeros != "integer":
        return False
    return spec.group_size == (model.tensors[HEAD].shape[1] if size is None else size)


def _zero(lazy: LazyTensor) -> int | None:
    """The zero point of every group, where its spec tells that."""
    return None if lazy.spec is None else lazy.spec.zero


def _parts(lazy: LazyTensor, words: bool, middle: bool, dtype: torch.dtype, allowed: Collection[str]) -> list[Part]:
    """What a tensor becomes: words, whose zero points are left out where all are the middle one, or floats."""
    spec = lazy.spec
    if spec is None or not words:
        return [decoded_part(lazy, allowed)]
    (rows, columns), module = lazy.shape, module_of(lazy.name)
    groups = columns // spec.group_size
    zeros: list[Part] = [(f"{module}.weight_zero_point", torch.int32, (row_words(rows, spec.bits), groups))]
    return [
        (f"{module}.weight_packed", torch.int32, (rows, row_words(columns, spec.bits))),
        (f"{module}.weight_scale", dtype, (rows, groups)),
        (f"{module}.weight_shape", torch.int64, (2,)),
        *([] if middle else zeros),
    ]


def _carrier(lazy: LazyTensor, words: bool, dtype: torch.dtype, allowed: Collection[str]) -> tuple[str, Loss | None]:
    spec = lazy.spec
    if spec is None or not words:
        return decoded_carrier(lazy, allowed)
    carrier = f"{spec.bits}-bit words, {str(dtype).removeprefix('torch.')} scales, integer zero points"
    if spec.zeros == "real":
        return carrier, Loss(name="zeros", size=LOSSES["zeros"])
    unsure = dtype is torch.float16 and spec.scale_dtype is not torch.float16
    if unsure and not holds_float16(lazy.load_quantized().scale):
        return carrier, Loss(name="scales", size=f"{LOSSES['scales']}; `compressed_scales` float32 keeps them")
    return carrier, None


def _ranks(adapter: Adapter | None) -> dict[str, tuple[int, float]]:
    layers = {} if adapter is None else adapter.layers
    return {module: (layer.rank, alpha_for(layer, "paper")) for module, layer in sorted(layers.items())}


def _lora_parts(adapter: Adapter) -> list[Part]:
    dtype = narrowest(part for layer in adapter.layers.values() for part in (layer.a, layer.b))
    parts: list[Part] = []
    for module, layer in sorted(adapter.layers.items()):
        rows, columns = layer.shape
        a, b = lora_names(module)
        parts += [(a, dtype, (layer.rank, columns)), (b, dtype, (rows, layer.rank))]
    return parts


def _lora_rows(beside: Layout, ranks: Mapping[str, tuple[int, float]]) -> list[PlannedTensor]:
    rows = []
    for module, (rank, _) in ranks.items():
        a, b = (beside.entries[name] for name in lora_names(module))
        carrier = f"LoRA of rank {rank} in {str(b.dtype).removeprefix('torch.')}"
        size = a.nbytes + b.nbytes
        rows.append(
            PlannedTensor(name=f"{module}.weight", carrier=carrier, file=ADAPTER_WEIGHTS, offset=a.offset, nbytes=size)
        )
    return rows


def _notes(beside: Layout | None) -> list[str]:
    notes = ["proven in transformers, which decodes it when it loads it"]
    if beside is not None:
        notes.append(
            f"the adapter lies beside the base as a plain LoRA ({beside.size:,} bytes); transformers loads both"
        )
    return notes


def _config(model: Checkpoint, bits: int, size: int | None, middle: bool, head: bool) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": middle,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [] if head else ["lm_head"],
        "kv_cache_scheme": None,
    }
    return {**config_for_transformers(model), "quantization_config": quantization}
