"""Quantize a whole model lazily: each linear weight is rounded when it is read."""

from __future__ import annotations

from dataclasses import replace

import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.errors import InputError
from qalora.quantization.rounding import ZEROS, Zeros, quantize_tensor, spec_of
from qalora.tensor import BITS, GroupQuantTensor, check_group_size

__all__ = ["quantize"]


def quantize(
    model: Checkpoint,
    *,
    bits: int = 4,
    group_size: int | None = 32,
    zeros: Zeros = "real",
    requantize: bool = False,
) -> Checkpoint:
    """The model with its linear weights quantized by rounding; embedding, norms and output layer stay as they are.

    group_size None makes one group of each row. Raises InputError, before anything is read, for bits outside BITS, for
    a layer that the group size does not divide, and for a model that holds integers already unless `requantize` is set
    (rounding what was rounded before loses more).
    """
    if bits not in BITS:
        raise InputError("bits", expected=f"one of {', '.join(map(str, BITS))}", got=str(bits))
    if zeros not in ZEROS:
        raise InputError("zeros", expected=f"one of {', '.join(ZEROS)}", got=repr(zeros))
    if any(model.tensors[name].spec for name in model.linears) and not requantize:
        raise InputError(
            f"{model.path} holds integers already, and rounding them again loses more",
            todo="use it as it is, or give --requantize",
        )
    tensors = dict(model.tensors)
    for name in model.linears:
        try:
            tensors[name] = _lazily(tensors[name], bits, group_size, zeros)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return replace(model, tensors=tensors)


def _lazily(source: LazyTensor, bits: int, group_size: int | None, zeros: Zeros) -> LazyTensor:
    columns = source.shape[1]
    size = columns if group_size is None else group_size
    check_group_size(columns, size)

    def read(start: int, stop: int) -> GroupQuantTensor:
        rows = source.rows(start, stop)
        weight = rows if isinstance(rows, torch.Tensor) else rows.dequantize()
        return quantize_tensor(weight, bits=bits, group_size=size, zeros=zeros)

    return LazyTensor(name=source.name, shape=source.shape, spec=spec_of(bits, size, zeros), read=read)
