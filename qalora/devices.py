"""Where tensors are computed with: the device of a name, and float64 on a device that has none.

`auto` takes the GPU that torch has, else the CPU. Metal (mps) has no float64: what needs it is computed on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora.errors import InputError, first_line

__all__ = ["CPU", "double", "find_device"]

CPU = torch.device("cpu")


def find_device(name: str, *, float64: bool = True) -> torch.device:
    """The device of a name, or for "auto" the best there is; InputError for one that torch does not have here.

    float64  whether it must have float64 too
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        # "meta" is a device too, and holds no values
        torch.ones(1, device=device, dtype=torch.float64 if float64 else torch.float32).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        reason = first_line(error)
        expected = f"a device that torch has here{', with float64' if float64 else ''}"
        raise InputError(field="device", expected=expected, got=f"{name!r} ({reason})") from error
    return device


def double(values: Tensor, *, copy: bool = False) -> Tensor:
    """The values in float64, on their device, or on the CPU if that has no float64; copy: never the tensor itself."""
    device = CPU if values.device.type == "mps" else values.device
    return values.to(device).to(torch.float64, copy=copy)
