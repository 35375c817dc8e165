"""QA-LoRA adapters: what they add to a weight, and the conventions they are written in.

    dW[o, i] = factor * (B @ A)[o, i // pool_size]        A [rank, in/pool_size], B [out, rank]

An adapter's file holds `alpha` and `rank`, so the scaling s = alpha/rank (alpha/sqrt(rank) with rsLoRA); what `factor`
is made of s depends on who wrote it:

| convention | pooling in the forward | factor |
|---|---|---|
| paper | sum over the pool | s |
| official (AvgPool1d) | mean | s / pool_size |
| peft (`use_qalora`) | mean, times in // pool_size | s * (in // pool_size) / pool_size |

Sources: arXiv 2309.14717; yuhuixu1993/qa-lora; PEFT 0.21.2, peft/tuners/lora.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from qalora.errors import AdapterError
from qalora.options.words import Convention, Minima

if TYPE_CHECKING:
    from qalora.adapter.saved import SavedTensors

__all__ = ["CONVENTIONS", "Adapter", "AdapterLayer", "Convention", "convention_factor"]

CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


def convention_factor(convention: Convention, scaling: float, in_features: int, pool_size: int) -> float:
    """The factor of the module's formula, from s = alpha/rank (or alpha/sqrt(rank))."""
    if convention == "paper":
        return scaling
    if convention == "official":
        return scaling / pool_size
    return scaling * (in_features // pool_size) / pool_size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterLayer:
    """What an adapter adds to one linear layer.

    a          float32 [rank, in/pool_size]
    b          float32 [out, rank]
    pool_size  columns whose inputs are pooled; 1 is an ordinary LoRA
    scaling    s as the file gives it
    factor     the factor of the module's formula

    Raises AdapterError where a shape or dtype is not as above, or a value is not finite.
    """

    a: Tensor
    b: Tensor
    pool_size: int
    scaling: float
    factor: float

    def __post_init__(self) -> None:
        for name, value in (("lora_A", self.a), ("lora_B", self.b)):
            if value.dtype != torch.float32 or value.ndim != 2:
                raise AdapterError(name, expected="float32 with two dimensions", got=f"{value.dtype} {value.ndim}")
            if not bool(torch.isfinite(value).all()):
                raise AdapterError(name, expected="finite values", got="NaN or Inf")
        if self.a.shape[0] != self.b.shape[1] or self.a.shape[0] == 0:
            raise AdapterError(
                "lora_A and lora_B", expected="the same rank", got=f"{list(self.a.shape)} and {list(self.b.shape)}"
            )

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight it belongs to."""
        return self.b.shape[0], self.a.shape[1] * self.pool_size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Adapter:
    """A whole adapter.

    layers      by module path (`model.layers.0.self_attn.q_proj`; the weight's name is this + ".weight")
    convention  what its file follows
    minima      "float16" or "float32": the minima it was trained with (fold in the loop); None if trained elsewhere
    metadata    what its file says beside: base model, target modules, and so on
    saved       tensors of the base that it brings whole, or rows of them; None where there are none
    """

    layers: Mapping[str, AdapterLayer]
    convention: Convention
    minima: Minima | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    saved: SavedTensors | None = None

    def __repr__(self) -> str:
        """In a line: how many layers of which ranks, and how they are scaled."""
        ranks = ", ".join(map(str, sorted({layer.rank for layer in self.layers.values()})))
        beside = "" if self.saved is None else f", {len(self.saved.names)} tensors whole"
        return f"Adapter({len(self.layers)} layers, rank {ranks}, {self.convention}{beside})"
