"""A quantized tensor in a format that has no codes for it, such as the embedding in GPTQ and HQQ: its values as floats.

Codes of 8 bits times a float16 scale have up to 19 significant bits. So float32 is what holds them, unless the loss
"embedding" was allowed: then they are float16, which has 11, and each value is off by at most half an ULP.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.plan import LOSSES, Loss
from qalora.errors import InputError
from qalora.formats.safetensors import Part
from qalora.options.fields import readable
from qalora.tensor import GroupQuantTensor, all_finite

__all__ = ["decoded", "decoded_carrier", "decoded_note", "decoded_part", "is_quantized"]


def is_quantized(lazy: LazyTensor, model: Checkpoint) -> bool:
    """Whether HQQ and torchao have codes for it: every quantized linear weight; embedding and output are decoded."""
    return lazy.spec is not None and lazy.name in model.linears


def decoded_part(lazy: LazyTensor, allowed: Collection[str]) -> Part:
    """What a tensor becomes in the file: a float one as it is, a quantized one decoded."""
    return lazy.name, lazy.dtype or _dtype(allowed), lazy.shape


def decoded_carrier(lazy: LazyTensor, allowed: Collection[str]) -> tuple[str, Loss | None]:
    """The word for that, and what is lost."""
    if lazy.spec is None:
        return str(lazy.dtype).removeprefix("torch."), None
    dtype = _dtype(allowed)
    loss = None if dtype is torch.float32 else Loss(name="embedding", size=LOSSES["embedding"])
    return f"{str(dtype).removeprefix('torch.')}, decoded from {lazy.spec.bits} bits", loss


def decoded(lazy: LazyTensor, tile: Tensor | GroupQuantTensor, dtype: torch.dtype) -> Tensor:
    """Rows of a tensor in the planned dtype; InputError for a value beyond float16's range."""
    if isinstance(tile, Tensor):
        return tile
    values = tile.dequantize()
    narrow = values.to(dtype)
    if dtype is torch.float16 and not all_finite(narrow):
        got = f"{float(values.abs().max()):.6g}"
        raise InputError(lazy.name, expected="values within float16's 65504", got=got, todo="keep it in float32")
    return narrow


def decoded_note(model: Checkpoint, coded: Collection[str], target: str, allowed: Collection[str]) -> list[str]:
    """What float32 costs, where there are codes among the tensors beside those that a target keeps as codes."""
    found = [lazy for name, lazy in model.tensors.items() if lazy.spec is not None and name not in coded]
    if not found or _dtype(allowed) is not torch.float32:
        return []
    size = 4 * sum(math.prod(lazy.shape) for lazy in found)
    widths = " and ".join(str(bits) for bits in sorted({lazy.spec.bits for lazy in found if lazy.spec is not None}))
    return [
        f"{', '.join(lazy.name for lazy in found)}: {target} has no codes for it, and its {widths}-bit ones become "
        f"float32, which holds them exactly ({readable(size)}); `allow_loss` embedding: float16, half of that"
    ]


def _dtype(allowed: Collection[str]) -> torch.dtype:
    return torch.float16 if "embedding" in allowed else torch.float32
