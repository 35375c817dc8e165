"""A second device where there is none: tensors that say they lie on it, with their values on the CPU.

    with Elsewhere("mps") as there:
        y = f(x.to("mps"))

Every operation is looked at. One whose operands do not all lie on one device is refused, as a GPU refuses it (a CPU
tensor of no dimension is a number, and may meet any), and so is float64 on mps. The arithmetic is the CPU's, so that
results are those of the CPU to the bit; what this shows is where each operand lies, and nothing of a real device.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["Elsewhere"]

CPU = torch.device("cpu")
MOVES = ("aten._to_copy.default", "aten.copy_.default")
"""Operations that may read one device and write another."""


def _in_a_device_block() -> bool:
    """Whether the caller is inside of `with torch.device(...)`, as a module is that is built on meta."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not DeviceContext.__torch_function__.__code__:
        frame = frame.f_back
    return frame is not None


class _There(Tensor):
    """A tensor that says it lies on `place`; `held` has its values."""

    held: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> _There:
        made: _There = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",  # to torch's own code, which here has no guard for another; as torch's FakeTensor does
        )
        made.held, made.place = held, place
        return made

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def is_meta(self) -> bool:
        return False

    def __repr__(self, **options: Any) -> str:
        return f"_There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function}: outside of its device")


class Elsewhere(TorchDispatchMode):
    """The device; there, here: how often each operation ran on it, and on the CPU."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.place = torch.device(name)
        self.there: Counter[str] = Counter()
        self.here: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode it comes whole, and is looked at in its parts
                return function.decompose(*args, **kwargs)
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        apart = [one for one in tensors if isinstance(one, _There)]
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted).type
        name = str(function).split(".")[1]
        if wanted == "meta" and not _in_a_device_block():
            wanted = self.place.type  # what torch's own code takes the tensors' device for
        if apart and str(function) not in MOVES:
            strangers = [one for one in tensors if not isinstance(one, _There) and one.ndim]
            assert not strangers, f"{function} of a tensor on {self.place} and one on the CPU, {strangers[0].shape}"
        if wanted == self.place.type:
            kwargs["device"] = CPU
        there = wanted == self.place.type if wanted is not None else bool(apart) and isinstance(tensors[0], _There)
        (self.there if there else self.here)[name] += 1
        held = {id(one.held): one for one in apart}
        args, kwargs = tree_map(lambda one: one.held if isinstance(one, _There) else one, (args, kwargs))
        result = function(*args, **kwargs)
        if not there:
            return result

        def put(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            assert one.dtype != torch.float64 or self.place.type != "mps", f"{function}: mps has no float64"
            return held[id(one)] if id(one) in held else _There(one, self.place)

        return tree_map(put, result)
