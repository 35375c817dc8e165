"""How a family's tensors are named and ordered in GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qalora.converters.families import Family

__all__ = ["gguf_names", "head_count", "rows_from", "rows_to"]


def gguf_names(family: Family, layers: int) -> dict[str, str]:
    """GGUF's name of every tensor that a model of this family may have, by transformers' name."""
    names = dict(family.outer)
    for n in range(layers):
        for module, gguf in (*family.linears, *family.norms):
            names[f"model.layers.{n}.{module}.weight"] = f"blk.{n}.{gguf}.weight"
            names[f"model.layers.{n}.{module}.bias"] = f"blk.{n}.{gguf}.bias"
    return names


def head_count(family: Family, config: Mapping[str, Any], name: str) -> int | None:
    """The heads by which GGUF reorders the rows of a tensor, or None where it does not."""
    if not any(name.endswith(f".{module}.weight") or name.endswith(f".{module}.bias") for module in family.permuted):
        return None
    heads = int(config["num_attention_heads"])
    of_keys = config.get("num_key_value_heads", family.defaults.get("num_key_value_heads")) or heads
    return int(of_keys) if ".k_proj." in name else heads


def rows_to(rows: int, heads: int) -> Tensor:
    """GGUF's row r is transformers' row rows_to[r]: within each head, [2, d/2] becomes [d/2, 2]."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def rows_from(rows: int, heads: int) -> Tensor:
    """Transformers' row r is GGUF's row rows_from[r]; the inverse of `rows_to`."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
