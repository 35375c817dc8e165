"""In what numbers a run computes.

`auto` takes bfloat16 where the device has instructions for it: AMX or AVX512-BF16 on a CPU, whatever CUDA says of a
GPU. A CPU without them multiplies bfloat16 more slowly than float32: on one with AVX2 alone, which has no fast way
around, 70 times.
"""

from __future__ import annotations

import torch

__all__ = ["dtype_of", "slowness"]


def dtype_of(compute: str, device: torch.device) -> torch.dtype:
    """What "auto", "float32" or "bfloat16" means on a device."""
    if compute == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    return torch.bfloat16 if compute == "bfloat16" else torch.float32


def slowness(compute: str, device: torch.device) -> str:
    """What to say of a choice that the device has no instructions for; empty where there is nothing to say."""
    if compute != "bfloat16" or _multiplies_bfloat16(device):
        return ""
    return f"this {device.type} has no instructions for bfloat16, and float32 may be many times faster: `dtype` auto"


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # questions that a build of torch may not know, because it has no such CPU
    known = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(ask() for ask in known if ask is not None)
