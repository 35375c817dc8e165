"""The LoRA that lies beside a GPTQ checkpoint, which one transformers call loads together with it.

Two kinds are written:

* the residual of integer zero points: y = Q(x) + C @ pool(x), with A the 0/1 pooling matrix [groups, in],
  B = C [out, groups], and rank = alpha = groups, so that the
  scaling is 1;
* an adapter over a base with integer zero points, exactly as a plain LoRA of its own rank.

A and B have one dtype, since GPTQModel 7.6 looks at A's to bring both to the input's. The first kind is float32:
C = min + scale * 2**(bits-1) has more bits than float16 wherever a zero point is below half or above twice the middle,
one group in a thousand of SmolLM2. With the nearest zero points, and for an adapter, it is the narrowest of float16,
bfloat16 and float32 that holds all of both in the file. Earlier versions wrote the first kind's A in float16.

transformers' call holds the LoRA in float16, the dtype of the words' scales, and so pool(x) too, which then must stay
below 65504; PEFT's own loader, called after it, puts the same LoRA in its place in float32.

The first kind is recognised on reading and belongs to the model; any other adapter found there does not.

    adapter_config.json          PEFT's LoraConfig; rank_pattern and alpha_pattern for layers that differ
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight, .lora_B.weight
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.adapter import AdapterLayer
from qalora.converters.huggingface import read_config
from qalora.errors import FormatError
from qalora.formats.files import InputFile, contained
from qalora.formats.safetensors import Entry, read_header, read_tensor

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "StoredResidual",
    "find_residual",
    "lora_names",
    "peft_config",
    "plain_lora",
    "pooling_matrix",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_VARIANTS = ("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "alora_invocation_tokens", "modules_to_save")
"""Keys of adapter_config.json that make of A and B something else than scaling * B @ A."""


def lora_names(module: str) -> tuple[str, str]:
    """The names of A and B in the adapter's file."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def pooling_matrix(
    columns: int, group_size: int, g_idx: Tensor | None, start: int = 0, stop: int | None = None
) -> Tensor:
    """A: float32 [in/group_size, in], 1 where the column belongs to the group, else 0; or its rows start..stop-1."""
    index = torch.arange(columns) // group_size if g_idx is None else g_idx.long()
    if index.shape[0] != columns or int(index.min()) < 0 or int(index.max()) >= columns // group_size:
        got = f"{index.shape[0]} values in {int(index.min())}..{int(index.max())}"
        raise FormatError("g_idx", expected=f"{columns} values in 0..{columns // group_size - 1}", got=got)
    start, stop, _ = slice(start, stop).indices(columns // group_size)
    return (index == torch.arange(start, stop)[:, None]).float()


def plain_lora(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] in float32 of the plain LoRA that adds the same, scaled by the layer's factor."""
    return layer.a.repeat_interleave(layer.pool_size, dim=1), layer.b


def peft_config(layers: Mapping[str, tuple[int, float]], *, by_suffix_alone: bool = True) -> dict[str, Any]:
    """PEFT's config for {module: (rank, alpha)}; the commonest pair is the default, the rest go into patterns.

    by_suffix_alone  whether a module is named by its last part, which no other module of the model has
    """
    common = Counter(layers.values()).most_common(1)[0][0]
    by_suffix: dict[str, set[tuple[int, float]]] = {}
    for module, pair in layers.items():
        by_suffix.setdefault(module.rpartition(".")[2], set()).add(pair)
    patterns: dict[str, tuple[int, float]] = {}
    for module, pair in layers.items():
        suffix = module.rpartition(".")[2]
        if len(by_suffix[suffix]) > 1:
            patterns[module] = pair
        elif pair != common:
            patterns[suffix] = pair
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": common[0],
        "lora_alpha": _number(common[1]),
        "rank_pattern": {key: rank for key, (rank, _) in patterns.items()},
        "alpha_pattern": {key: _number(alpha) for key, (_, alpha) in patterns.items()},
        "target_modules": sorted(by_suffix if by_suffix_alone else layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _number(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResidual:
    """One layer's A and B, where they are in the adapter's file."""

    path: Path
    a: Entry
    b: Entry

    def c(self, pooling: Tensor, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of C, float32; FormatError if A is not the pooling matrix."""
        with InputFile(self.path) as file:
            if not torch.equal(read_tensor(file, self.a).to(pooling.dtype), pooling):
                raise FormatError(
                    f"{self.path}: lora_A",
                    expected="the pooling matrix, as in the other layers",
                    got="different values",
                )
            return read_tensor(file, self.b, start, stop).float()


def find_residual(
    folder: Path,
    layers: Mapping[str, tuple[int, int, int, Tensor | None]],
    called: Callable[[str], str] = lambda module: module,
) -> tuple[dict[str, StoredResidual], bool]:
    """The residual beside a checkpoint, by module; and whether another adapter lies there, which is none.

    layers  module: (out, in, group_size, g_idx)
    called  where transformers has a module
    """
    if not (folder / ADAPTER_CONFIG).exists():
        return {}, False
    config = read_config(folder, ADAPTER_CONFIG)
    if not (folder / ADAPTER_WEIGHTS).exists():
        return {}, True
    path = contained(folder, ADAPTER_WEIGHTS)
    entries = read_header(path).entries
    found: dict[str, StoredResidual] = {}
    for module, (rows, columns, group_size, _) in layers.items():
        a, b = (entries.get(name) for name in lora_names(called(module)))
        groups = columns // group_size
        if a is None or b is None or not _is_residual(a, b, (groups, columns), (rows, groups)):
            return {}, True
        if not _is_plain(config, module, groups):
            return {}, True
        found[module] = StoredResidual(path=path, a=a, b=b)
    if len(entries) != 2 * len(found):
        return {}, True
    module, (rows, columns, group_size, g_idx) = next(iter(layers.items()))
    try:
        found[module].c(pooling_matrix(columns, group_size, g_idx), 0, 0)
    except FormatError:
        return {}, True
    return found, False


def _is_residual(a: Entry, b: Entry, a_shape: tuple[int, int], b_shape: tuple[int, int]) -> bool:
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return a.shape == a_shape and b.shape == b_shape and a.dtype in floats and b.dtype in floats


def _is_plain(config: Mapping[str, Any], module: str, rank: int) -> bool:
    """Whether the config is that of a plain LoRA whose rank and alpha at this module are both `rank`.

    Keys of the patterns are regular expressions in PEFT; here only plain module names are understood, which is what is
    written here.
    """
    if config.get("peft_type") != "LORA" or any(config.get(key) for key in _VARIANTS):
        return False
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            return False
        special = [value for name, value in patterns.items() if module == name or module.endswith(f".{name}")]
        if (special[0] if special else config.get(key)) != rank:
            return False
    return True
