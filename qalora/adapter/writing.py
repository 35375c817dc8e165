"""Write an adapter as a PEFT folder with our own record beside it. The same adapter gives the same bytes,
in whatever order its layers come.

adapter_config.json         PEFT's LoraConfig: r and lora_alpha are the commonest, rank_pattern and alpha_pattern hold
                            the other layers by their full names; use_qalora and qalora_group_size in PEFT's convention
                            only, since PEFT refuses A's shape without them, which is better than another factor
adapter_model.safetensors   base_model.model.<module>.lora_A.weight   float32 [rank, in/pool_size]
                            base_model.model.<module>.lora_B.weight   float32 [out, rank]
                            and what it brings whole, see `qalora.adapter.saved`, with the tokenizer as files beside it
qalora_adapter.json         {"version": 1, "convention", "minima": "float16" | "float32" | null,
                             "layers": {module: {"pool_size", "factor"}}}

The record is a file of its own because PEFT warns of keys that it does not know. Its factor is the layer's, a float64
number in full; alpha gives the same number or a neighbour (see `qalora.adapter.rewriting`).

What PEFT 0.4 reads (the official repository's version) has no alpha_pattern: there an adapter whose layers differ in
alpha is not what it says.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from qalora.adapter.peft_config import CONFIG
from qalora.adapter.records import Adapter, Convention
from qalora.adapter.rewriting import alpha_for, convert
from qalora.checkpoint import LazyTensor, module_of
from qalora.errors import AdapterError
from qalora.formats.output import write_json
from qalora.formats.record_json import Finite, Only, encode
from qalora.formats.safetensors import Layout, SafetensorsWriter, plan_layout
from qalora.options.words import Minima

__all__ = ["ADAPTER_FILES", "RECORD", "WEIGHTS", "AdapterRecord", "adapter_sizes", "write_adapter"]

WEIGHTS = "adapter_model.safetensors"
RECORD = "qalora_adapter.json"
ADAPTER_FILES = (CONFIG, WEIGHTS, RECORD)

PoolSize = Annotated[int, Only(lambda size: 1 <= size < 1 << 31, "a whole number from 1")]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """What `qalora_adapter.json` says of a module."""

    pool_size: PoolSize
    factor: Finite


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """What `qalora_adapter.json` says."""

    version: Literal[1] = 1
    convention: Convention
    minima: Minima | None
    layers: Mapping[str, LayerRecord]


def write_adapter(adapter: Adapter, folder: Path | str, *, convention: Convention | None = None) -> None:
    """Write the adapter into a folder that holds none of ADAPTER_FILES, in its own convention or in another.

    Raises AdapterError for an adapter without layers, and where PEFT's convention cannot hold it (see `convert`).
    """
    adapter = _in_convention(adapter, convention)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with SafetensorsWriter(folder / WEIGHTS, _layout(adapter)) as weights:
        for module, layer in sorted(adapter.layers.items()):
            name_a, name_b = _names(module)
            weights.write(name_a, layer.a)
            weights.write(name_b, layer.b)
        for name, lazy in _saved_tensors(adapter).items():
            for row, tile in lazy.float_tiles():
                weights.write(name, tile, row)
    for name, path in ({} if adapter.saved is None else adapter.saved.files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    write_json(folder / CONFIG, peft_config(adapter))
    write_json(folder / RECORD, _record(adapter))


def adapter_sizes(adapter: Adapter, *, convention: Convention | None = None) -> dict[str, int]:
    """The files that `write_adapter` writes, and their bytes."""
    adapter = _in_convention(adapter, convention)
    texts = {CONFIG: peft_config(adapter), RECORD: _record(adapter)}
    sizes = {name: len(_text(content).encode("utf-8")) for name, content in texts.items()}
    files = {} if adapter.saved is None else adapter.saved.files
    return {**sizes, WEIGHTS: _layout(adapter).size, **{name: path.stat().st_size for name, path in files.items()}}


def _in_convention(adapter: Adapter, convention: Convention | None) -> Adapter:
    if not adapter.layers:
        raise AdapterError("adapter", expected="at least one layer", got="none")
    if convention in (None, adapter.convention) and (adapter.convention != "peft" or _qalora_in_peft(adapter)):
        return adapter
    return convert(adapter, convention or adapter.convention)


def _qalora_in_peft(adapter: Adapter) -> bool:
    """Whether all layers have the same pool size, above 1, as PEFT needs it."""
    pools = {layer.pool_size for layer in adapter.layers.values()}
    return len(pools) == 1 and pools != {1}


def _names(module: str) -> tuple[str, str]:
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def _saved_tensors(adapter: Adapter) -> dict[str, LazyTensor]:
    """The tensors of the base that the adapter brings, and rows of them, by PEFT's names."""
    if adapter.saved is None:
        return {}
    whole = {f"base_model.model.{_inside(adapter, name)}": lazy for name, lazy in sorted(adapter.saved.whole.items())}
    rows = {
        f"base_model.model.{module_of(name)}.token_adapter.trainable_tokens_delta": rows.values
        for name, rows in sorted(adapter.saved.rows.items())
    }
    return {**whole, **rows}


def _inside(adapter: Adapter, name: str) -> str:
    """A tensor's name in PEFT's model, where the module of a LoRA has the base's inside."""
    module, _, part = name.rpartition(".")
    return f"{module}.base_layer.{part}" if module in adapter.layers else name


def _layout(adapter: Adapter) -> Layout:
    parts: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for module, layer in sorted(adapter.layers.items()):
        name_a, name_b = _names(module)
        parts += [(name_a, torch.float32, tuple(layer.a.shape)), (name_b, torch.float32, tuple(layer.b.shape))]
    parts += [(name, lazy.dtype or torch.float32, lazy.shape) for name, lazy in _saved_tensors(adapter).items()]
    return plan_layout(parts, {"format": "pt"})


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """PEFT's adapter_config.json for the adapter, in its own convention."""
    ranks = {module: layer.rank for module, layer in sorted(adapter.layers.items())}
    alphas = {module: _plain(alpha_for(adapter.layers[module], adapter.convention)) for module in ranks}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config: dict[str, Any] = {
        "target_modules": sorted(adapter.layers),
        **adapter.metadata,
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
    }
    config = {"base_model_name_or_path": None, "task_type": "CAUSAL_LM", **config}
    if adapter.convention == "peft":
        pool = next(iter(adapter.layers.values())).pool_size
        config |= {"use_qalora": True, "qalora_group_size": pool}
    return config if adapter.saved is None else {**config, **adapter.saved.config}


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha.is_integer() and abs(alpha) < 1 << 53 else alpha


def _record(adapter: Adapter) -> dict[str, Any]:
    layers = {
        module: LayerRecord(pool_size=layer.pool_size, factor=layer.factor) for module, layer in adapter.layers.items()
    }
    content: dict[str, Any] = encode(AdapterRecord(convention=adapter.convention, minima=adapter.minima, layers=layers))
    return content


def _text(content: object) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
