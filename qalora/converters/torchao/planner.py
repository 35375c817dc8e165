"""Decide how a model goes into a torchao folder: types, metadata, sizes and offsets, config; refusals.

Whole zero points are int8, and scales are kept as they are. Real zero points and their scales are float32, in which
minima of float16 come back bit for bit at 2 to 6 bits. Every layer has its own width and groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.decoded import decoded_carrier, decoded_note, decoded_part, is_quantized
from qalora.converters.ends import config_for_transformers, end_notes
from qalora.converters.folder import FolderPlan, folder_files, lay_out
from qalora.converters.plan import ExportOptions, Loss
from qalora.converters.real_zeros import minima_loss
from qalora.converters.specs import TENSORS, refuse_act_order, specs_text
from qalora.errors import InputError
from qalora.formats.safetensors import Part
from qalora.formats.torchao import PARTS, described, is_lower, names_text
from qalora.tensor import QuantSpec

__all__ = ["plan"]


def plan(model: Checkpoint, options: ExportOptions) -> FolderPlan:
    """Decide everything. InputError for a float model; ExactnessError for act-order."""
    specs = {name: spec for name in model.linears if (spec := model.tensors[name].spec) is not None}
    if not specs:
        raise InputError(f"torchao: {model.path} holds floats", todo="quantize the model first: qalora quantize")
    allowed = options.allow_loss
    parts = {name: _parts(lazy, model, allowed) for name, lazy in model.tensors.items()}
    carriers = {name: _carrier(lazy, model, allowed) for name, lazy in model.tensors.items()}
    layout, tensors = lay_out(model, parts, carriers, _metadata(specs, parts), options)
    return FolderPlan(
        target="torchao",
        tensors=tensors,
        files=folder_files(model, layout),
        notes=(
            *model.notes,
            *end_notes(model),
            *_notes(specs),
            *decoded_note(model, model.linears, "torchao", allowed),
        ),
        layout=layout,
        config=_config(model, specs),
    )


def _metadata(specs: Mapping[str, QuantSpec], parts: Mapping[str, Collection[Part]]) -> dict[str, str]:
    weights = {name: described(spec) for name, spec in specs.items()}
    others = [part for name, held in parts.items() if name not in specs for part, _, _ in held]
    kept = {module_of(name): _kept(spec) for name, spec in specs.items()}
    return {"format": "pt", TENSORS: specs_text(kept), **names_text(weights, others)}


def _kept(spec: QuantSpec) -> QuantSpec:
    """What of a spec the folder holds: real zero points of 8 bits are rounded, and minima are no float16 any more."""
    return replace(spec, min_dtype=torch.float32) if spec.zeros == "real" and is_lower(spec) else spec


def _parts(lazy: LazyTensor, model: Checkpoint, allowed: Collection[str]) -> list[Part]:
    """What a tensor becomes in the file."""
    spec = lazy.spec
    if spec is None or not is_quantized(lazy, model):
        return [decoded_part(lazy, allowed)]
    refuse_act_order(lazy, "torchao")
    (rows, columns), module = lazy.shape, module_of(lazy.name)
    types = (torch.int8, torch.float32, torch.float32)
    if spec.zeros == "integer":
        types = (torch.int8, spec.scale_dtype, torch.int8)
    shapes = ((rows, columns), *[(rows, columns // spec.group_size)] * 2)
    return [(f"{module}.{part}", kind, shape) for part, kind, shape in zip(PARTS, types, shapes, strict=True)]


def _carrier(lazy: LazyTensor, model: Checkpoint, allowed: Collection[str]) -> tuple[str, Loss | None]:
    spec = lazy.spec
    if spec is None or not is_quantized(lazy, model):
        return decoded_carrier(lazy, allowed)
    zeros = "int8" if spec.zeros == "integer" else "float32"
    carrier = f"{spec.bits} bits as int8, {zeros} zero points"
    if spec.zeros == "real" and is_lower(spec):
        return carrier, Loss(name="minima", size="zero points less 128, rounded to float32: up to 2^-17 of a scale")
    return carrier, minima_loss(spec)


def _notes(specs: Mapping[str, QuantSpec]) -> list[str]:
    notes = ["a code takes a byte, and torchao decodes a layer whenever it is computed"]
    if any(spec.zeros == "real" for spec in specs.values()):
        notes.append("real zero points: load it in float32; 16 bits round them")
    return notes


def _config(model: Checkpoint, specs: Mapping[str, QuantSpec]) -> dict[str, Any]:
    """With a TorchAoConfig of the first layer: weights describe themselves, and no loader reads more of it."""
    spec = next(iter(specs.values()))
    data = {
        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{spec.bits}"},
        "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": spec.group_size}},
        "mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"},
        "scale_dtype": None,
        "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
    }
    quantization = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}},
        "modules_to_not_convert": None,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
    return {**config_for_transformers(model), "quantization_config": quantization}
