"""Fold an adapter into a quantized model: the minima take it up, scales and codes stay.

    min'[o, k] = round(min[o, k] + factor * (B @ A)[o, k])        round: to float16 values, or to float32; once

This is exact because the adapter adds the same number to every column of a pool. With a pool of k groups each column of
B @ A serves k groups; with a pool finer than the groups, the groups are split first, and scale and min repeat. An
act-order checkpoint, whose groups are not runs of columns, and an ordinary LoRA cannot be folded, and are refused.

The arithmetic of `folded_minima` is specified to the bit, so that training with the fold in the loop, folding, and
checking give the very same minima on any machine, with any number of threads:

    acc = 0;  for j = 0, 1, ..., rank-1:  acc = acc + B[:, j] * A[j, :]        float64
    min' = round(min + factor * acc)                                           float64: product, sum, one rounding

The product of two float32 numbers is exact in float64, so a fused multiply-add gives the same bits as a product and a
sum; a matrix product does not, because it may add in any order. Rounding float64 to float16 by way of float32, as
`Tensor.half()` does, would round twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qalora.adapter import Adapter, AdapterLayer, carry
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.errors import AdapterError, InputError, shown
from qalora.options.words import Minima
from qalora.tensor import GroupQuantTensor, QuantSpec, same_bits

__all__ = [
    "FoldProof",
    "Minima",
    "check_minima",
    "check_pool",
    "fold",
    "fold_tensor",
    "folded_group_size",
    "folded_minima",
    "prove_fold",
]

FLOAT16_MAX = 65504.0


def fold(model: Checkpoint, adapter: Adapter, *, minima: Minima | None = None) -> Checkpoint:
    """The model with the adapter in its minima; each layer is folded when it is read. Tensors that the adapter brings
    whole take the place of the model's, see `qalora.adapter.saved`.

    minima  what the new minima are rounded to: what the adapter was trained with, or float16, by default

    Layers without adapter are unchanged. Every module and shape is checked before anything is read: InputError for a
    model that holds floats, AdapterError for an adapter that does not fit or cannot be folded.
    """
    check_minima(minima)
    dtype = minima or adapter.minima or "float16"
    if not any(model.tensors[name].spec for name in model.linears):
        raise InputError(
            f"{model.path} holds no integers, and an adapter is folded into integer weights",
            todo=f"quantize it first: qalora quantize {model.path} -o DIR",
        )
    model = carry(model, adapter)
    tensors = dict(model.tensors)
    for module, layer in adapter.layers.items():
        name = f"{module}.weight"
        if name not in tensors:
            raise AdapterError(
                f"the adapter has {name}, and {model.path} does not", todo="the adapter belongs to a different model"
            )
        tensors[name] = _folded(tensors[name], layer, dtype)
    return replace(model, tensors=tensors)


def check_minima(minima: object) -> None:
    """InputError for what minima cannot be rounded to; None is what the adapter says."""
    if minima not in (None, "float16", "float32"):
        raise InputError(field="minima", expected="float16 or float32", got=shown(minima))


def _folded(source: LazyTensor, layer: AdapterLayer, minima: Minima) -> LazyTensor:
    spec = source.spec
    if spec is None:
        raise AdapterError(f"{source.name} holds floats in this model, and an adapter is folded into integers")
    if source.shape != layer.shape:
        raise AdapterError(
            f"the adapter of {source.name}", expected=f"[out, in] = {list(source.shape)}", got=str(list(layer.shape))
        )
    group_size = folded_group_size(spec.group_size, layer, source.name, act_order=spec.act_order)

    def read(start: int, stop: int) -> GroupQuantTensor:
        rows = source.rows(start, stop)
        if not isinstance(rows, GroupQuantTensor):
            raise TypeError(f"{source.name}: expected integers, got a float tensor")
        return fold_tensor(rows, replace(layer, b=layer.b[start:stop]), minima, name=source.name)

    folded = QuantSpec(
        bits=spec.bits,
        group_size=group_size,
        zeros="real",
        scale_dtype=spec.scale_dtype,
        min_dtype=torch.float16 if minima == "float16" else torch.float32,
    )
    return replace(source, spec=folded, read=read)


def folded_group_size(group_size: int, layer: AdapterLayer, name: str = "weight", *, act_order: bool = False) -> int:
    """The group size after the fold: the smaller of group and pool. AdapterError where the fold is not exact."""
    return check_pool(group_size, layer.pool_size, name, act_order=act_order)


def check_pool(group_size: int, pool_size: int, name: str = "weight", *, act_order: bool = False) -> int:
    """As `folded_group_size`, of an adapter that is known by its pool size alone."""
    if act_order:
        raise AdapterError(
            f"{name} was quantized with act-order: its groups are not the runs of columns that the adapter pools, so "
            "that no minimum holds what the adapter adds",
            todo="ship the adapter beside the model, exactly: qalora adapter convert ADAPTER --to plain",
        )
    if pool_size == 1:
        raise AdapterError(
            f"the adapter of {name} is an ordinary LoRA, a column of A for each column of the weight: it changes the "
            "weights within a group differently, which codes and minima cannot hold exactly",
            todo="ship it beside the model, or train a QA-LoRA adapter: qalora train",
        )
    if pool_size % group_size and group_size % pool_size:
        raise AdapterError(
            f"the adapter of {name}",
            expected=f"a pool size that divides the group size {group_size} or is a multiple of it",
            got=str(pool_size),
            todo="ship it beside the model: qalora adapter convert ADAPTER --to plain",
        )
    return min(group_size, pool_size)


def fold_tensor(
    tensor: GroupQuantTensor, layer: AdapterLayer, minima: Minima, *, name: str = "weight"
) -> GroupQuantTensor:
    """Fold one layer: a tensor with new minima, the very same `packed`, and scales that repeat where groups split.

    Raises AdapterError for another shape, for act-order, for an ordinary LoRA, for a pool that neither divides the
    group nor is a multiple of it, and for a minimum that float16 (or float32) does not reach.
    """
    if tensor.shape != layer.shape:
        raise AdapterError(
            f"the adapter of {name}", expected=f"[out, in] = {list(tensor.shape)}", got=str(list(layer.shape))
        )
    size = folded_group_size(tensor.group_size, layer, name, act_order=tensor.g_idx is not None)
    minimum = folded_minima(
        tensor.min,
        layer.a,
        layer.b,
        layer.factor,
        group_size=tensor.group_size,
        pool_size=layer.pool_size,
        minima=minima,
    )
    if not bool((minimum.abs() <= (FLOAT16_MAX if minima == "float16" else torch.finfo(torch.float32).max)).all()):
        raise AdapterError(
            f"the folded minima of {name}",
            expected=f"values that {minima} reaches",
            got=f"{float(minimum.abs().max()):g}",
            todo="fold with `minima` float32" if minima == "float16" else "the adapter is damaged",
        )
    return replace(tensor.regrouped(size), min=minimum)


@torch.no_grad()
def folded_minima(
    minimum: Tensor, a: Tensor, b: Tensor, factor: float, *, group_size: int, pool_size: int, minima: Minima
) -> Tensor:
    """round(min + factor * B @ A), in the steps of the docstring above; float32 [out, in / min(group_size, pool_size)].

    minimum    float32 [out, in/group_size]
    a, b       float32 [rank, in/pool_size], [out, rank]; all three may have a dimension before, for several layers
    pool_size  divides group_size, or is a multiple of it
    minima     "float16": float32 tensors of values that float16 holds. A value out of reach (65520 and more) comes out
               beyond 65504 or as NaN, and is for the caller to refuse: asking costs a synchronisation on a GPU.

    Runs on the tensors' device. No gradient: the rounding has none; training passes it through.
    """
    rows_a, columns_b = a.double().unsqueeze(-2).unbind(-3), b.double().mT.contiguous().unsqueeze(-1).unbind(-3)
    acc = torch.zeros(*b.shape[:-1], a.shape[-1], dtype=torch.float64, device=b.device)
    for column, row in zip(columns_b, rows_a, strict=True):
        acc.addcmul_(column, row)
    acc.mul_(factor)
    if pool_size > group_size:
        acc = acc.repeat_interleave(pool_size // group_size, dim=-1)
    elif pool_size < group_size:
        minimum = minimum.repeat_interleave(group_size // pool_size, dim=-1)
    acc.add_(minimum)
    return (_round_to_float16(acc) if minima == "float16" else acc).float()


def _round_to_float16(values: Tensor) -> Tensor:
    """Round float64 to the nearest float16 values, ties to even, in place. From 65520 on: 65536 and more, not Inf.

    Adding 1.5 * 2**42 * 2**e to a number of exponent e leaves the ten bits of a float16 fraction; below 2**-14 the
    spacing stays that of the subnormals, 2**-24.
    """
    exponent = (values.view(torch.int64) & (0x7FF << 52)).view(torch.float64)
    magic = exponent.clamp_(min=2.0**-14).mul_(1.5 * 2.0**42)
    return values.add_(magic).sub_(magic)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldProof:
    """What the fold of one layer did, by arithmetic of its own: numpy's matrix product in float64.

    codes_differ   codes that are not those of the base
    scales_differ  scales that are not those of the base (repeated where groups split)
    max_ulp        the largest |min' - (min + factor * B @ A)|, in units in the last place of `minima`
    beyond         minima that are further off than half a unit and float64's own rounding, in the fold and here,
                   twice (rank + 2) * 2^-53 * (|min| + |factor| * |B| @ |A|), or that `minima` does not hold
    """

    codes_differ: int
    scales_differ: int
    max_ulp: float
    beyond: int
    groups: int
    minima: Minima

    @property
    def exact(self) -> bool:
        """Whether codes and scales are the base's, and each minimum is the nearest there is."""
        return not (self.codes_differ or self.scales_differ or self.beyond)


def prove_fold(
    base: GroupQuantTensor, layer: AdapterLayer, folded: GroupQuantTensor, minima: Minima = "float16"
) -> FoldProof:
    """Compare a folded tensor with base + factor * B @ A. Shares no arithmetic with the fold."""
    size = folded.group_size
    middle = np.arange(0, base.shape[1], size)  # the first column of each group
    pooled = middle // layer.pool_size
    a, b = layer.a.numpy().astype(np.float64), layer.b.numpy().astype(np.float64)
    minimum = base.min.numpy().astype(np.float64)[:, middle // base.group_size]
    exact = minimum + layer.factor * (b @ a)[:, pooled]
    slack = (layer.rank + 2) * 2.0**-52 * (np.abs(minimum) + abs(layer.factor) * (np.abs(b) @ np.abs(a))[:, pooled])
    actual = folded.min.numpy()
    stored = actual.astype(np.float16) if minima == "float16" else actual
    ulp = np.spacing(np.minimum(np.abs(stored), np.nextafter(np.finfo(stored.dtype).max, 0))).astype(np.float64)
    error = np.abs(actual.astype(np.float64) - exact)
    beyond = ~(error <= ulp / 2 + slack) | (stored.astype(np.float32) != actual)
    scale = base.scale.numpy()[:, middle // base.group_size]
    return FoldProof(
        codes_differ=_differing_codes(base, folded),
        scales_differ=int((scale != folded.scale.numpy()).sum()),
        max_ulp=float((error / ulp).max()),
        beyond=int(beyond.sum()),
        groups=actual.size,
        minima=minima,
    )


def _differing_codes(base: GroupQuantTensor, folded: GroupQuantTensor) -> int:
    if base.bits != folded.bits or base.shape != folded.shape:
        return base.shape[0] * base.shape[1]
    if same_bits(base.packed, folded.packed):
        return 0
    return int((base.codes() != folded.codes()).sum())
