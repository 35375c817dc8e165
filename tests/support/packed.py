"""Folders of integers as other projects' own code writes them, and what the same code makes of each layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

__all__ = ["by_compressed_tensors"]


def float_model(source: Path, dtype: torch.dtype, *, moved: bool = True) -> Any:
    """The model of a folder as transformers opens it, its rows moved off zero, so that zero points differ much."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            by = (torch.rand(module.weight.shape[0], 1) - 0.5) * float(moved)
            module.weight.data += (by * module.weight.abs().max()).to(dtype)
    return model


def by_compressed_tensors(
    source: Path,
    folder: Path,
    groups: Mapping[str, Any],
    *,
    ignore: Sequence[str] = ("lm_head",),
    dtype: torch.dtype = torch.float16,
    moved: bool = True,
    **saving: Any,
) -> dict[str, Tensor]:
    """A folder by ModelCompressor, as llm-compressor calls it; gives each packed weight as it decompresses it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = float_model(source, dtype, moved=moved)
    apply_quantization_config(model, QuantizationConfig(config_groups=dict(groups), ignore=list(ignore)))
    packed = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        packed[f"{name}.weight"] = module
        rows, columns = module.weight.shape
        size = scheme.weights.group_size if scheme.weights.strategy == "group" else columns
        grouped = module.weight.data.view(rows, columns // size, size)
        scale, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), scheme.weights)
        module.weight_scale.data = scale.to(dtype)
        module.weight_zero_point.data = zero.to(torch.int8)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder, **saving)
    compressor.update_config(folder)
    with_companions(source, folder)
    compressor.decompress_model(model)
    return {name: module.weight.data for name, module in packed.items()}


def with_companions(source: Path, folder: Path) -> None:
    """The tokenizer's files beside the weights."""
    for path in source.iterdir():
        if "token" in path.name:
            shutil.copy(path, folder)


def change_config(folder: Path, change: Any) -> None:
    """Change quantization_config in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config["quantization_config"])
    path.write_text(json.dumps(config), encoding="utf-8")
