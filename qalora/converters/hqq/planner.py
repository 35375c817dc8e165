"""Decide how a model goes into an HQQ folder: packings, types, offsets, config; refusals.

Scales and zero points are float16 where zero points are whole (both are then exact in every loader), float32 elsewhere:
such a folder computes what it should where it is loaded in float32. Minima of float16 come back bit for bit; float32
ones are rounded once more, and that is a loss by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
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
from qalora.formats.hqq import PACKINGS, packed_shape
from qalora.formats.safetensors import Part
from qalora.tensor import QuantSpec

__all__ = ["FLAGS", "descriptors", "parameter_type", "plan"]

FLAGS = {
    "view_as_float": False,
    "quant_scale": False,
    "quant_zero": False,
    "offload_meta": False,
    "encoded_state_dict": True,
    "stores_quant_config": True,
    "channel_wise": True,
    "optimize": False,
    "round_zero": False,
}
"""The flags of every layer that is written here: uint8 tensors without dimensions."""


def plan(model: Checkpoint, options: ExportOptions) -> FolderPlan:
    """Decide everything. InputError for a float model; ExactnessError for act-order."""
    specs = {n: spec for n in model.linears if (spec := model.tensors[n].spec) is not None}
    if not specs:
        raise InputError(f"hqq: {model.path} holds floats", todo="quantize the model first: qalora quantize")
    allowed = options.allow_loss
    parts = {name: _parts(lazy, model, allowed) for name, lazy in model.tensors.items()}
    carriers = {name: _carrier(lazy, model, allowed) for name, lazy in model.tensors.items()}
    metadata = {"format": "pt", TENSORS: specs_text({module_of(name): spec for name, spec in specs.items()})}
    layout, tensors = lay_out(model, parts, carriers, metadata, options)
    return FolderPlan(
        target="hqq",
        tensors=tensors,
        files=folder_files(model, layout),
        notes=(
            *model.notes,
            *end_notes(model),
            *_notes(specs),
            *decoded_note(model, model.linears, "HQQ", allowed),
        ),
        layout=layout,
        config=_config(model, specs),
    )


def parameter_type(spec: QuantSpec) -> torch.dtype:
    """The type of scales and zero points: float16 where both are exact in it."""
    whole = spec.zeros == "integer" and spec.scale_dtype is torch.float16
    return torch.float16 if whole else torch.float32


def descriptors(spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The small tensors of a layer, by their last name."""
    dtype = str(parameter_type(spec))
    view = "torch.int32" if spec.bits == 3 else "torch.uint8"
    words = {"packing": PACKINGS[spec.bits], "unpack_view_dtype": view, "compute_dtype": dtype}
    numbers = {"nbits": spec.bits, "group_size": spec.group_size, "axis": 1}
    found = {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}
    found |= {name: torch.tensor(list(value.encode()), dtype=torch.uint8) for name, value in words.items()}
    found |= {name: torch.tensor(int(value), dtype=torch.uint8) for name, value in FLAGS.items()}
    return {**found, "shape": torch.tensor(shape, dtype=torch.int64)}


def _parts(lazy: LazyTensor, model: Checkpoint, allowed: Collection[str]) -> list[Part]:
    """What a tensor becomes in the file."""
    spec = lazy.spec
    if spec is None or not is_quantized(lazy, model):
        return [decoded_part(lazy, allowed)]
    refuse_act_order(lazy, "hqq")
    module, groups = module_of(lazy.name), lazy.shape[0] * lazy.shape[1] // spec.group_size
    try:
        packed = packed_shape(groups, spec.group_size, spec.bits)
    except InputError as error:
        raise InputError(f"hqq: {lazy.name}: {error}") from error
    kind = torch.int32 if spec.bits == 3 else torch.uint8
    small = [(f"{module}.{name}", t.dtype, tuple(t.shape)) for name, t in descriptors(spec, lazy.shape).items()]
    return [
        (f"{module}.W_q", kind, packed),
        (f"{module}.scale", parameter_type(spec), (groups, 1)),
        (f"{module}.zero", parameter_type(spec), (groups, 1)),
        *small,
    ]


def _carrier(lazy: LazyTensor, model: Checkpoint, allowed: Collection[str]) -> tuple[str, Loss | None]:
    spec = lazy.spec
    if spec is None or not is_quantized(lazy, model):
        return decoded_carrier(lazy, allowed)
    dtype = str(parameter_type(spec)).removeprefix("torch.")
    carrier = f"{spec.bits} bits as {PACKINGS[spec.bits]}, {dtype} scales and zero points"
    return carrier, minima_loss(spec)


def _notes(specs: Mapping[str, QuantSpec]) -> list[str]:
    notes = ["transformers 5.23 loads no HQQ model yet; hqq's own layers do"]
    if any(parameter_type(spec) is torch.float32 for spec in specs.values()):
        notes.append("real zero points: load it in float32; in 16 bits hqq rounds them")
    return notes


def _config(model: Checkpoint, specs: Mapping[str, QuantSpec]) -> dict[str, Any]:
    common = Counter((spec.bits, spec.group_size) for spec in specs.values()).most_common(1)[0][0]
    weights = {
        "nbits": common[0],
        "group_size": common[1],
        "axis": 1,
        **{name: FLAGS[name] for name in ("channel_wise", "optimize", "round_zero", "view_as_float")},
    }
    quantization = {
        "quant_method": "hqq",
        "quant_config": {
            "weight_quant_params": weights,
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "skip_modules": ["lm_head"],
    }
    return {**config_for_transformers(model), "quantization_config": quantization}
