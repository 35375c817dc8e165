"""A weight made of packed codes in one pass, where a GPU and Triton are there; to the bits of `qalora.tensor`.

    weight[o, i] = scale[o, g] * codes[o, i] + min[o, g]        rounded to the dtype that is asked for, once

Plain torch unpacks, multiplies, adds and rounds in passes of their own, each through the GPU's memory; `kernel` reads
the packed bytes and writes the weight. What computes with a weight it does not keep takes it from here: layers that are
trained, layers in transformers. Folding, exporting and proving do not: theirs is `qalora.tensor.dequantize`.

The bits are the same because product and sum are each rounded once in both. A fused multiply-add would round once for
both together. The kernel is compiled without them (`enable_fp_fusion=False`); torch.compile would contract them, unless
a setting of the whole process forbids it. With scales that float16 holds there is nothing to tell apart: the product
with a code of 8 bits has 19 and is exact.

Nothing is taken on trust: before the kernel is used, with these bits and this dtype on this device, it has to give the
plain path's bits for a small tensor. Where it does not, or does not compile (Triton needs a C compiler), there is one
warning, and the plain path.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from qalora import tensor
from qalora.errors import first_line

__all__ = ["dequantize"]


def dequantize(packed: Tensor, scale: Tensor, minimum: Tensor, bits: int, *, out: Tensor | None = None) -> Tensor:
    """scale * codes + min [out, in], as `qalora.tensor.dequantize`, from groups that are runs of columns.

    packed          uint8 [out, in*bits/8]
    scale, minimum  float32 [out, groups]
    out             what to fill and give: float32, bfloat16 or float16 [out, in], columns side by side; a new float32
                    tensor without it

    Runs on the tensors' device. Checks nothing.
    """
    if packed.is_cuda:
        kernel = _proven(packed.device, bits, torch.float32 if out is None else out.dtype)
        if kernel is not None:
            filled = _empty(packed, bits) if out is None else out
            kernel.fill(filled, packed, scale, minimum, bits)
            return filled
    weight = tensor.dequantize(packed, scale, minimum, bits)
    return weight if out is None else out.copy_(weight)


def _empty(packed: Tensor, bits: int) -> Tensor:
    return torch.empty(packed.shape[0], packed.shape[1] * 8 // bits, dtype=torch.float32, device=packed.device)


@cache
def _proven(device: torch.device, bits: int, dtype: torch.dtype) -> ModuleType | None:
    """The kernel, if there is Triton and it gives the plain path's bits; asked once."""
    try:
        from qalora.fused import kernel
    except ImportError:
        return None
    try:
        wrong = _differing(kernel, device, bits, dtype)
        why = f"gives {wrong} other weights at {bits} bits" if wrong else ""
    except Exception as error:  # whatever a compiler, a driver or an old GPU may say
        why = f"does not run ({first_line(error)})"
    if not why:
        return kernel
    warnings.warn(f"the kernel on {device} {why}: weights are made by plain torch, more slowly", stacklevel=3)
    return None


def _differing(kernel: ModuleType, device: torch.device, bits: int, dtype: torch.dtype) -> int:
    """Weights that differ from the plain path's, of 16 rows of random codes with random float32 scales and minima."""
    rng = torch.Generator().manual_seed(bits)
    packed = torch.randint(0, 256, (16, 192 * bits), generator=rng, dtype=torch.uint8).to(device)
    scale, minimum = (torch.randn(16, 48, generator=rng).to(device) for _ in range(2))
    expected = tensor.dequantize(packed, scale, minimum, bits).to(dtype)
    actual = torch.empty_like(expected)
    kernel.fill(actual, packed, scale, minimum, bits)
    return int((actual != expected).sum())
