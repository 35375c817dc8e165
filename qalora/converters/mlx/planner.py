"""Decide how a model goes into an MLX folder: groups, types, offsets, config; refusals.

Every real zero point has its place in `biases`, so that nothing is lost: scale and min are stored in the narrowest of
float16 and float32 that their spec guarantees, and larger groups are repeated. MLX computes in the widest type that
takes part. The lookup of a quantized embedding is where the activations begin, and it has no input that could be wider
than scales and biases; so those of the embedding are float32, as the model's computation is to be. Both: MLX 0.32
looks up in the type of the scales, and a GPU's kernel reads the biases as that type too.

mlx-lm reads config.json in its own way: see `qalora.converters.mlx.config`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.ends import Ends, config_with_ends, end_notes, ends_of, mark_text
from qalora.converters.families import family_of
from qalora.converters.folder import FolderPlan, folder_files, lay_out
from qalora.converters.mlx.around import module_path, whole_mlx_config, wrapped_for_mlx
from qalora.converters.mlx.config import mlx_config
from qalora.converters.plan import ExportOptions
from qalora.converters.specs import TENSORS, refuse_act_order, specs_text
from qalora.errors import ExactnessError, InputError
from qalora.formats.mlx import GROUP_SIZES, group_size_for
from qalora.formats.safetensors import Part
from qalora.tensor import QuantSpec

__all__ = ["EMBEDDING", "mlx_group_size", "plan"]

EMBEDDING = "model.embed_tokens.weight"
MODE = "affine"


def plan(model: Checkpoint, options: ExportOptions) -> FolderPlan:
    """Decide everything. ExactnessError for groups that MLX does not have; nothing is lost in those it has."""
    model = wrapped_for_mlx(model)
    family = family_of(model.config, model.path)
    ends = ends_of(model)
    config, notes, longest = mlx_config(config_with_ends(model), tied=model.tied)
    parts = {name: _parts(lazy) for name, lazy in model.tensors.items()}
    specs = {module_of(name): lazy.spec for name, lazy in model.tensors.items() if lazy.spec is not None}
    metadata = {"format": "mlx", **mark_text(model, ends), **({TENSORS: specs_text(specs)} if specs else {})}
    carriers = {name: (_carrier(lazy), None) for name, lazy in model.tensors.items()}
    layout, tensors = lay_out(model, parts, carriers, metadata, options)
    return FolderPlan(
        target="mlx",
        tensors=tensors,
        files=folder_files(model, layout),
        notes=(*model.notes, *end_notes(model), *notes, *_notes(model), *_end_note(model, ends)),
        longest=longest,
        layout=layout,
        config=_config(model, config, family.architecture),
    )


def mlx_group_size(lazy: LazyTensor) -> int:
    """The groups that a tensor is stored in; ExactnessError where MLX has none that fit."""
    if lazy.spec is None:
        raise TypeError(f"{lazy.name} is not quantized")
    refuse_act_order(lazy, "mlx")
    size = group_size_for(lazy.spec.group_size)
    if size is None:
        raise ExactnessError(
            f"mlx: {lazy.name}: group_size",
            expected=f"a multiple of {GROUP_SIZES[0]}, as MLX's kernels know groups of 32, 64 and 128 only",
            got=str(lazy.spec.group_size),
            todo="use onnx or gptq, or quantize in groups of 32",
        )
    return size


def _dtypes(lazy: LazyTensor, spec: QuantSpec) -> tuple[torch.dtype, torch.dtype]:
    """The types of scales and biases."""
    return (torch.float32, torch.float32) if lazy.name == EMBEDDING else (spec.scale_dtype, spec.narrowest_min)


def _parts(lazy: LazyTensor) -> list[Part]:
    """What a tensor becomes in the file."""
    if lazy.spec is None:
        if lazy.dtype is None:
            raise TypeError(f"{lazy.name}: neither dtype nor spec")
        return [(lazy.name, _float_type(lazy), lazy.shape)]
    (rows, columns), size, module = lazy.shape, mlx_group_size(lazy), module_of(lazy.name)
    scale, minimum = _dtypes(lazy, lazy.spec)
    return [
        (f"{module}.weight", torch.uint32, (rows, columns * lazy.spec.bits // 32)),
        (f"{module}.scales", scale, (rows, columns // size)),
        (f"{module}.biases", minimum, (rows, columns // size)),
    ]


def _float_type(lazy: LazyTensor) -> torch.dtype:
    if lazy.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"mlx: {lazy.name}", expected="float16, bfloat16 or float32", got=str(lazy.dtype))
    return lazy.dtype


def _carrier(lazy: LazyTensor) -> str:
    if lazy.spec is None:
        return str(lazy.dtype).removeprefix("torch.")
    kinds = [str(dtype).removeprefix("torch.") for dtype in _dtypes(lazy, lazy.spec)]
    return f"{lazy.spec.bits}-bit words in groups of {mlx_group_size(lazy)}, {kinds[0]} scales, {kinds[1]} biases"


def _notes(model: Checkpoint) -> list[str]:
    floats = {lazy.dtype for lazy in model.tensors.values()} & {torch.float16, torch.bfloat16}
    if not floats:
        return []
    kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in floats if dtype is not None))
    return [
        f"the tensors that are not quantized are {kinds}, and MLX computes in the types it finds; "
        "model.set_dtype(mlx.core.float32) after loading computes in float32"
    ]


def _end_note(model: Checkpoint, ends: Ends) -> list[str]:
    if not mark_text(model, ends):
        return []
    return ["mlx-lm ends at the tokenizer's own end token too, whatever the configs say"]


def _config(model: Checkpoint, config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    quantization = _quantization(model)
    sizes = {} if quantization is None else {"quantization": quantization, "quantization_config": quantization}
    return {**whole_mlx_config(model, {"architectures": [architecture], **config}), **sizes}


def _quantization(model: Checkpoint) -> dict[str, Any] | None:
    sizes = {
        module_of(name): (lazy.spec.bits, mlx_group_size(lazy))
        for name, lazy in model.tensors.items()
        if lazy.spec is not None
    }
    if not sizes:
        return None
    common = Counter(sizes.values()).most_common(1)[0][0]
    others = {module_path(model, module): _entry(*size) for module, size in sizes.items() if size != common}
    return {**_entry(*common), **others}


def _entry(bits: int, group_size: int) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "mode": MODE}
