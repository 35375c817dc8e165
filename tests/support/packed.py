"""Folders of integers as other projects' own code writes them, and what the same code makes of each layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

__all__ = [
    "by_auto_round",
    "by_compressed_tensors",
    "by_gptqmodel_awq",
    "by_torchao",
    "change_config",
    "copied",
    "put",
    "say",
]


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


def grid(weight: Tensor, bits: int, group_size: int, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """float16 scales and whole zero points of each group of rows [out, in], from its least and greatest weight."""
    grouped = weight.float().view(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        scale = (grouped.abs().amax(2) / (1 << (bits - 1))).half().clamp(min=2**-14)
        return scale, torch.full_like(low, 1 << (bits - 1))
    scale = ((high - low) / ((1 << bits) - 1)).half().clamp(min=2**-14)
    return scale, (-low / scale.float()).round().clamp(0, (1 << bits) - 1)


def on_grid(linear: torch.nn.Linear, scale: Tensor, zero: Tensor, bits: int) -> torch.nn.Linear:
    """The layer with each weight on its grid, in float32, where packing rounds nothing."""
    grouped = linear.weight.data.float().view(*scale.shape, -1)
    codes = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, (1 << bits) - 1)
    made = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
    made.weight.data = ((codes - zero[..., None]) * scale.float()[..., None]).view(linear.weight.shape)
    return made


def save_layers(
    source: Path,
    folder: Path,
    settings: Mapping[str, Any],
    pack: Callable[[str, torch.nn.Linear], tuple[Any, Tensor] | None],
    *,
    moved: bool = True,
) -> dict[str, Tensor]:
    """A folder of a model's layers, packed by `pack`, which gives the packed module and its weight [out, in], or None.

    The output layer is packed too where it is one of its own.
    """
    model = float_model(source, torch.float16, moved=moved)
    tied, theirs = model.config.tie_word_embeddings, {}
    tensors = {name: value for name, value in model.state_dict().items() if not (tied and name.startswith("lm_head"))}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or (tied and name == "lm_head"):
            continue
        made = pack(name, module)
        if made is not None:
            packed, theirs[f"{name}.weight"] = made
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": value for part, value in packed.state_dict().items()}
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}), encoding="utf-8")
    with_companions(source, folder)
    return theirs


def by_gptqmodel_awq(
    source: Path, folder: Path, *, bits: int = 4, group_size: int = 32, moved: bool = True
) -> dict[str, Tensor]:
    """An AWQ folder by GPTQModel's layers, and its own dequantized weights in float16."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    def pack(name: str, linear: torch.nn.Linear) -> tuple[Any, Tensor]:
        scale, zero = grid(linear.weight.data, bits, group_size)
        module = AwqTorchLinear(
            bits=bits,
            group_size=group_size,
            sym=False,
            desc_act=False,
            in_features=linear.in_features,
            out_features=linear.out_features,
        )
        module.pack(on_grid(linear, scale, zero, bits), scale, zero)
        size = linear.in_features if group_size == -1 else group_size
        return module, dequantize_gemm(module.qweight, module.qzeros, module.scales, bits, size).t().contiguous()

    made = QuantizeConfig(
        bits=bits, group_size=group_size, method=METHOD.AWQ, format=FORMAT.GEMM, offload_to_disk=False
    )
    settings = json.loads(json.dumps({**made.to_dict(), "meta": {"quantizer": ["gptqmodel:7.6.0"]}}))
    return save_layers(source, folder, settings, pack, moved=moved)


def by_auto_round(
    source: Path,
    folder: Path,
    form: str,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    layers: Mapping[str, tuple[int, int]] | None = None,
    moved: bool = True,
) -> dict[str, Tensor]:
    """A folder by auto-round's own exporters, and what its layers make of each weight in float16.

    form    a packing_format, or "auto_awq" or "llm_compressor", which are other methods' folders
    layers  bits and group size of layers that have others; 16 bits leave one in floats
    """
    from auto_round.compressors.base import SerializedCompressorConfig
    from auto_round.export.export_to_autoround.export import save_quantized_as_autoround
    from auto_round.export.export_to_awq.export import pack_layer, save_quantized_as_autoawq
    from auto_round.export.export_to_llmcompressor.export import save_quantized_as_llmcompressor

    model = float_model(source, torch.float16, moved=moved)
    configs: dict[str, Any] = {}
    same = {"sym": symmetric, "data_type": "int", "act_bits": 16, "act_data_type": None}
    for name, module in model.named_modules():
        inside = name.startswith("model.")
        width, size = (layers or {}).get(name, (bits, group_size) if inside else (16, group_size))
        if not isinstance(module, torch.nn.Linear):
            continue
        config = {"bits": width, "group_size": size, **same}
        for key, value in config.items():
            setattr(module, key, value)
        configs[name] = {**config, "in_blocks": inside}
        if width <= 8:
            module.scale, zero = grid(module.weight.data, width, size, symmetric=symmetric)
            zero = zero.clamp(min=1) if form == "auto_round:auto_gptq" else zero  # it has no place for 0
            module.zp = 1 << (width - 1) if symmetric and form != "llm_compressor" else zero
    said = asdict(SerializedCompressorConfig(bits=bits, group_size=group_size, sym=symmetric, data_type="int"))
    said |= {"act_bits": 16, "to_quant_block_names": "model.layers", "autoround_version": "0.16.1", "iters": 200}
    said["supported_types"] = None
    options: dict[str, Any] = {"model": model, "layer_config": configs, "serialization_dict": said}
    if form == "llm_compressor":
        save_quantized_as_llmcompressor(str(folder), **options)
    elif form == "auto_awq":
        save_quantized_as_autoawq(str(folder), **{**options, "serialization_dict": {**said, "regex_config": {}}})
    else:
        for name in configs if form == "auto_round:auto_awq" else ():
            pack_layer(name, model, form)
        save_quantized_as_autoround(str(folder), backend=form, **options)
    with_companions(source, folder)
    theirs = {}
    for name, config in configs.items():
        if config["bits"] <= 8:
            theirs[f"{name}.weight"] = _weight_of(model.get_submodule(name))
    return theirs


def _weight_of(module: Any) -> Tensor:
    """What a packed module makes of its weight [out, in], in float16: what it gives for the columns of an identity."""
    if hasattr(module, "weight_packed"):
        from compressed_tensors.compressors import decompress_module

        decompress_module(module)
        return module.weight.data
    if hasattr(module, "w_bit"):
        from auto_round.export.export_to_awq.utils import dequantize_gemm

        made = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.w_bit, module.group_size)
        return made.t().contiguous()
    if hasattr(module, "g_idx"):  # of columns in their order; its forward knows square layers only
        del module.g_idx
    return module(torch.eye(module.infeatures, dtype=torch.float16)).t().contiguous()


def by_torchao(
    source: Path,
    folder: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    dtype: torch.dtype = torch.float16,
    symmetric: bool = False,
    moved: bool = True,
) -> dict[str, Tensor]:
    """A folder that transformers saves of torchao's tensors, and what torchao makes of each weight; -1: of rows."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import TorchAoConfig

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerAxis(0) if group_size == -1 else PerGroup(group_size),
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
    )
    floats = folder.with_name(f"{folder.name}-float")
    float_model(source, dtype, moved=moved).save_pretrained(floats)
    quantized = AutoModelForCausalLM.from_pretrained(floats, dtype=dtype, quantization_config=TorchAoConfig(config))
    quantized.save_pretrained(folder)
    with_companions(source, folder)
    names = {name: module for name, module in quantized.named_modules() if hasattr(module, "weight")}
    return {
        f"{name}.weight": module.weight.dequantize()
        for name, module in names.items()
        if type(module.weight).__name__ == "IntxUnpackedToInt8Tensor"
    }


def with_companions(source: Path, folder: Path) -> None:
    """The tokenizer's files beside the weights."""
    for path in source.iterdir():
        if "token" in path.name:
            shutil.copy(path, folder)


def copied(packed: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy with other tensors."""
    folder.mkdir()
    for path in packed.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def change_config(folder: Path, change: Any) -> None:
    """Change quantization_config in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config["quantization_config"])
    path.write_text(json.dumps(config), encoding="utf-8")


def say(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of quantization_config to other values."""
    return lambda said: said.update(changes)


def put(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], object]:
    """A change of a folder's tensors to another one of a name; None takes it away."""
    return lambda tensors: tensors.pop(name) if tensor is None else tensors.__setitem__(name, tensor)
