"""The canonical tensor: integer codes in groups, with a float scale and a float minimum for each group.

    weight[o, i] = scale[o, group(i)] * codes[o, i] + min[o, group(i)]

`group(i)` is `i // group_size`, or `g_idx[i]` in a checkpoint made with act-order. The zero point of the literature is
`-min / scale`; it may be a real number, and it does not exist where the scale is 0.

The codes stay packed, along `in`, lowest bits first, each row beginning at a byte: code `i` of a row holds the bits
`i*bits .. (i+1)*bits - 1` of the row read as a little-endian number. At every width these are the bytes of MLX; at 2, 4
and 8 bits those of ONNX Runtime's MatMulNBits; at 2, 3, 4 and 8 bits those of a GPTQ word column. So every bit pattern
is a valid tensor, and the common exports never unpack.

This module knows no file format, and does no rounding: see `qalora.quantization` and `qalora.folding`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qalora.errors import InputError, NotFiniteError
from qalora.options.words import BITS

__all__ = [
    "BITS",
    "GroupQuantTensor",
    "QuantSpec",
    "all_finite",
    "check_finite",
    "check_group_size",
    "dequantize",
    "holds_float16",
    "integer_zeros",
    "pack_codes",
    "packed_row_bytes",
    "same_bits",
    "unpack_codes",
]

TILE = 1 << 20
"""Codes that are unpacked, and bytes that are compared, at a time."""

# bits -> (bytes, codes): the smallest run of whole bytes that holds whole codes; as a number with a byte for each code
_RUN = {2: (1, 4), 3: (3, 8), 4: (1, 2), 5: (5, 8), 6: (3, 4), 8: (1, 1)}
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_row_bytes(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` codes takes. `columns` is a multiple of 8, so the last byte is full."""
    return columns * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [out, in], each below 2**bits, into uint8 [out, in*bits/8]; inverse of `unpack_codes`.

    Raises InputError for another dtype, an `in` that is no multiple of 8, or a code that needs more bits.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] % 8:
        raise InputError(
            "codes", expected="uint8 [out, in] with in a multiple of 8", got=f"{codes.dtype} {list(codes.shape)}"
        )
    if bits < 8 and codes.numel() and int(codes.max()) >= 1 << bits:
        raise InputError("codes", expected=f"values below {1 << bits} at {bits} bits", got=str(int(codes.max())))
    if bits == 8:
        return codes.contiguous()
    run_bytes, run_codes = _RUN[bits]
    out = torch.empty(codes.shape[0], packed_row_bytes(codes.shape[1], bits), dtype=torch.uint8, device=codes.device)
    for rows in _row_tiles(codes):
        wide = codes[rows].clone(memory_format=torch.contiguous_format).view(-1).view(_WIDE[run_codes])
        for shift, low, high in reversed(_halvings(bits)):
            upper = (wide & high).bitwise_right_shift_(shift)
            wide.bitwise_and_(low).bitwise_or_(upper)
        packed = wide.to(torch.uint8) if run_bytes == 1 else wide.view(torch.uint8).view(-1, run_codes)[:, :run_bytes]
        out[rows] = packed.reshape(out[rows].shape)
    return out


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Unpack uint8 [out, in*bits/8] into uint8 codes [out, in]; inverse of `pack_codes`."""
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % bits:
        raise InputError(
            "packed codes",
            expected=f"uint8 [out, bytes] with bytes a multiple of {bits}",
            got=f"{packed.dtype} {list(packed.shape)}",
        )
    if bits == 8:
        return packed
    run_bytes, run_codes = _RUN[bits]
    out = torch.empty(packed.shape[0], packed.shape[1] * 8 // bits, dtype=torch.uint8, device=packed.device)
    for rows in _row_tiles(out):
        runs = packed[rows].reshape(-1, run_bytes)
        wide = torch.empty(runs.shape[0], dtype=_WIDE[run_codes], device=packed.device).copy_(runs[:, 0])
        for b in range(1, run_bytes):
            wide |= runs[:, b].to(wide.dtype) << (8 * b)
        for shift, low, high in _halvings(bits):
            upper = (wide << shift).bitwise_and_(high)
            wide.bitwise_and_(low).bitwise_or_(upper)
        out[rows] = wide.view(torch.uint8).view(out[rows].shape)
    return out


@cache
def _halvings(bits: int) -> tuple[tuple[int, int, int], ...]:
    """How a run of codes comes to have a byte for each: (shift, low, high) of each step, all halves at once.

    A step cuts pieces of n codes, each in the lowest bits of n bytes, into halves: `low` are the bits of the lower one,
    which stays, and `high` those of the upper one after a shift to the left.
    """
    codes = _RUN[bits][1]
    steps, n = [], codes
    while n > 1:
        half = (1 << n // 2 * bits) - 1
        low = sum(half << 8 * first for first in range(0, codes, n))
        steps.append((n // 2 * (8 - bits), low, low << 4 * n))
        n //= 2
    return tuple(steps)


def dequantize(packed: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """scale * codes + min in float32 [out, in], from packed codes and groups that are runs of columns.

    Runs on the tensors' device. Checks nothing: see `GroupQuantTensor.dequantize`, which gives the same bits.
    """
    codes = unpack_codes(packed, bits)
    grouped = codes.view(codes.shape[0], scale.shape[1], -1)
    return torch.mul(scale[..., None], grouped).add_(minimum[..., None]).view(codes.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """What is known of a quantized tensor before its values are read; the plans of the writers rest on it.

    Each field is a guarantee of whoever made the tensor: `zeros="integer"` says that every group has
    min == -scale * z for a whole number z in 0..2**bits-1; `scale_dtype` and `min_dtype` name the narrowest of float16
    and float32 that holds every value; `zero` is the zero point of every group, where it is known to be the same.
    """

    bits: int
    group_size: int
    zeros: Literal["integer", "real"]
    scale_dtype: torch.dtype
    min_dtype: torch.dtype
    act_order: bool = False
    zero: int | None = None

    @property
    def narrowest_min(self) -> torch.dtype:
        """The narrowest type that holds every min: `min_dtype`, or float16 where min is a float16 scale times 0 or a
        power of two, which changes no significant bit."""
        plain = self.zero is not None and self.zero & (self.zero - 1) == 0
        return torch.float16 if plain and self.scale_dtype is torch.float16 else self.min_dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupQuantTensor:
    """A weight of shape [out, in], quantized in groups along `in`; see the module's docstring for the formula.

    packed      uint8   [out, in*bits/8]   the codes, 0..2**bits-1
    scale       float32 [out, in/group_size]   finite; may be negative or 0
    min         float32 [out, in/group_size]   finite
    bits        one of BITS
    group_size  columns that share a scale; divides `in`
    g_idx       int32 [in], or None for i // group_size

    Raises InputError where a field is not as above. Equality is identity: compare fields.
    """

    packed: Tensor
    scale: Tensor
    min: Tensor
    bits: int
    group_size: int
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.packed.dtype != torch.uint8 or self.packed.ndim != 2 or self.packed.shape[1] % self.bits:
            raise InputError(
                "packed codes",
                expected=f"uint8 [out, in*{self.bits}/8]",
                got=f"{self.packed.dtype} {list(self.packed.shape)}",
            )
        rows, columns = self.shape
        check_group_size(columns, self.group_size)
        groups = [rows, columns // self.group_size]
        for name, value in (("scale", self.scale), ("min", self.min)):
            if value.dtype != torch.float32 or list(value.shape) != groups:
                raise InputError(name, expected=f"float32 {groups}", got=f"{value.dtype} {list(value.shape)}")
            check_finite(name, value)
        if self.g_idx is not None:
            _check_g_idx(self.g_idx, columns, groups[1])

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, minimum: Tensor, bits: int, group_size: int) -> GroupQuantTensor:
        """Pack uint8 codes [out, in] and join them with float32 scale and min [out, in/group_size]."""
        return cls(packed=pack_codes(codes, bits), scale=scale, min=minimum, bits=bits, group_size=group_size)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.packed.shape[0], self.packed.shape[1] * 8 // self.bits

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return self.shape[1] // self.group_size

    def codes(self) -> Tensor:
        """The codes, unpacked: uint8 [out, in]."""
        return unpack_codes(self.packed, self.bits)

    def dequantize(self) -> Tensor:
        """The weight in float32 [out, in]: scale * codes + min, the product and the sum each rounded once.

        Where scale holds at most 16 significant bits (float16 has 11) the product is exact, so that a fused
        multiply-add gives the same bits.
        """
        if self.g_idx is not None:
            index = self.g_idx.long()
            return self.scale[:, index] * self.codes() + self.min[:, index]
        return dequantize(self.packed, self.scale, self.min, self.bits)

    def to(self, device: torch.device) -> GroupQuantTensor:
        """The same on a device; the tensor itself where it is there already."""
        if self.packed.device == device:
            return self
        index = None if self.g_idx is None else self.g_idx.to(device)
        packed, scale, minimum = (part.to(device) for part in (self.packed, self.scale, self.min))
        return replace(self, packed=packed, scale=scale, min=minimum, g_idx=index)

    def rows(self, start: int, stop: int) -> GroupQuantTensor:
        """Rows start..stop-1, sharing memory with this tensor."""
        return replace(self, packed=self.packed[start:stop], scale=self.scale[start:stop], min=self.min[start:stop])

    def regrouped(self, group_size: int) -> GroupQuantTensor:
        """The same weights in finer groups, of a size that divides this one; scale and min repeat."""
        if group_size == self.group_size:
            return self
        if self.g_idx is not None or self.group_size % group_size:
            kind = "act-order groups" if self.g_idx is not None else f"groups of {self.group_size}"
            raise InputError(f"{kind} cannot be split into groups of {group_size}")
        times = self.group_size // group_size
        return replace(
            self,
            scale=self.scale.repeat_interleave(times, dim=1),
            min=self.min.repeat_interleave(times, dim=1),
            group_size=group_size,
        )


def integer_zeros(tensor: GroupQuantTensor) -> Tensor | None:
    """The zero points, uint8 [out, groups], if every group has one that is whole, in 0..2**bits-1 and exact; else None.

    Exact means float32(scale * z) == -min. Where the scale is 0, any zero is right if min is 0: the middle one,
    2**(bits-1), is given.
    """
    middle = 1 << (tensor.bits - 1)
    safe = torch.where(tensor.scale == 0, 1.0, tensor.scale)
    zero = torch.where(tensor.scale == 0, float(middle), torch.round(-tensor.min / safe))
    whole = (zero >= 0) & (zero < 1 << tensor.bits) & (tensor.scale * zero == -tensor.min)
    return zero.to(torch.uint8) if bool(whole.all()) else None


def holds_float16(values: Tensor) -> bool:
    """Whether float16 holds every value of a float32 tensor exactly."""
    return bool((values.to(torch.float16).to(torch.float32) == values).all())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype and shape and the very same bits; bytes are compared faster than numbers."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    mine, theirs = (part.contiguous().reshape(-1).view(torch.uint8).numpy() for part in (a, b))
    return all(
        np.array_equal(mine[start : start + TILE], theirs[start : start + TILE]) for start in range(0, len(mine), TILE)
    )


def all_finite(values: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor Inf.

    Their sum tells at a fortieth of the time: NaN and Inf never leave a sum. One that overflows tells nothing.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def check_finite(name: str, values: Tensor) -> None:
    """Raise NotFiniteError, with how many there are, where a tensor holds NaN or Inf."""
    if not all_finite(values):
        bad = values.numel() - int(torch.isfinite(values).sum())
        raise NotFiniteError(name, expected="finite values", got=f"NaN or Inf in {bad:,} of {values.numel():,}")


def check_group_size(columns: int, group_size: int) -> None:
    """Refuse an `in` that is no multiple of 8, or a group size that does not divide it; the message says what fits."""
    if columns % 8:
        raise InputError("in", expected="a multiple of 8", got=str(columns), todo="such a model cannot be quantized")
    if group_size < 1 or columns % group_size:
        fitting = [size for size in (16, 32, 64, 128, 256) if columns % size == 0 and size < columns]
        sizes = ", ".join(str(size) for size in [*fitting, columns])
        raise InputError(
            "group_size", expected=f"a divisor of in = {columns}", got=str(group_size), todo=f"these fit: {sizes}"
        )


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise InputError("bits", expected=f"one of {', '.join(map(str, BITS))}", got=str(bits))


def _check_g_idx(g_idx: Tensor, columns: int, groups: int) -> None:
    if g_idx.dtype != torch.int32 or list(g_idx.shape) != [columns]:
        raise InputError("g_idx", expected=f"int32 [{columns}]", got=f"{g_idx.dtype} {list(g_idx.shape)}")
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise InputError("g_idx", expected=f"values in 0..{groups - 1}", got=f"{int(g_idx.min())}..{int(g_idx.max())}")


def _row_tiles(codes: Tensor) -> Iterator[slice]:
    step = max(1, TILE // max(1, codes.shape[1]))
    return (slice(start, start + step) for start in range(0, codes.shape[0], step))
