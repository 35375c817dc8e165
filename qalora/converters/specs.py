"""What travels with an artefact of ours: width, groups and kind of zero point of each quantized tensor.

A carrier may hold finer groups or wider codes than the tensor had: Q4_1 holds 2-bit codes in groups of 128 as 4-bit
codes in blocks of 32. The weights are the same; what they were is metadata of ours under the key `qalora.tensors`:

    JSON {module: [bits, group_size, zeros, scale dtype, min dtype, zero]}

as in `qalora.tensor.QuantSpec`; `zero` is null where zero points differ or are real, and may be left out. It is
believed no further than the values bear it out: `restored` checks them when they are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import LazyTensor
from qalora.errors import ExactnessError, FormatError, InputError, json_kind, shown
from qalora.formats.json_text import parse_json
from qalora.formats.safetensors import Entry, read_header
from qalora.tensor import BITS, GroupQuantTensor, QuantSpec, holds_float16, integer_zeros, pack_codes

__all__ = [
    "TENSORS",
    "check_values",
    "fits",
    "narrowed",
    "narrowest",
    "parse_specs",
    "refuse_act_order",
    "restored",
    "specs_text",
    "stored_specs",
]

TENSORS = "qalora.tensors"
"""Key of the metadata."""

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def specs_text(specs: Mapping[str, QuantSpec]) -> str:
    """The JSON of {module: spec}; inverse of `parse_specs` but for act-order, which ONNX's graphs tell by themselves
    and no other carrier of this metadata holds."""
    entries = {
        module: [
            spec.bits,
            spec.group_size,
            spec.zeros,
            str(spec.scale_dtype).removeprefix("torch."),
            str(spec.min_dtype).removeprefix("torch."),
            spec.zero,
        ]
        for module, spec in specs.items()
    }
    return json.dumps(entries, sort_keys=True, separators=(",", ":"))


def parse_specs(text: str, where: str) -> dict[str, QuantSpec]:
    """{module: spec} of the JSON; FormatError for anything else. Nothing is said of the values."""
    entries = parse_json(text, f"{where}: {TENSORS}")
    if not isinstance(entries, dict):
        raise FormatError(f"{where}: {TENSORS}", expected="a JSON object", got=json_kind(entries))
    return {module: _spec(f"{where}: {TENSORS}: {module}", entry) for module, entry in entries.items()}


def stored_specs(stored: Mapping[str, tuple[Path, Entry]]) -> dict[str, QuantSpec]:
    """{module: spec} of all the safetensors files that hold `stored`, {tensor: (file, entry)}."""
    specs: dict[str, QuantSpec] = {}
    for path in sorted({path for path, _ in stored.values()}):
        text = read_header(path).metadata.get(TENSORS)
        specs |= {} if text is None else parse_specs(text, str(path))
    return specs


def narrowed(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in the dtype that a spec promises for them; ValueError where it does not hold them, InputError for
    what lies beyond float16's range."""
    narrow = values.to(dtype)
    if dtype is torch.float16 and not bool(torch.isfinite(narrow).all()):
        raise InputError(name, expected="values within float16's 65504", got=f"{float(values.abs().max()):.6g}")
    if not torch.equal(narrow.float(), values):
        raise ValueError(f"{name}: its spec promises values that {dtype} holds, and it has others")
    return narrow


def narrowest(parts: Iterable[Tensor]) -> torch.dtype:
    """The narrowest of float16, bfloat16 and float32 that holds every value of float32 tensors; reads no further than
    to the first one that only float32 holds."""
    able = [torch.float16, torch.bfloat16]
    for part in parts:
        able = [dtype for dtype in able if torch.equal(part.to(dtype).float(), part)]
        if not able:
            return torch.float32
    return able[0]


def refuse_act_order(lazy: LazyTensor, target: str) -> None:
    """ExactnessError for an act-order tensor, in a format whose groups are runs of columns."""
    if lazy.spec is not None and lazy.spec.act_order:
        raise ExactnessError(
            f"{target}: {lazy.name}: an act-order tensor's groups mix columns, and those of {target} are runs of them",
            todo="export it to gptq or onnx, or quantize without act-order",
        )


def _spec(where: str, entry: Any) -> QuantSpec:
    expected = "[bits, group_size, zeros, scale dtype, min dtype, zero]"
    if not isinstance(entry, list) or len(entry) not in (5, 6):
        raise FormatError(where, expected=expected, got=shown(entry))
    bits, group_size, zeros, scale, minimum, zero = [*entry, None][:6]
    whole = type(bits) is int and type(group_size) is int and (zero is None or type(zero) is int)
    words = all(isinstance(part, str) for part in (zeros, scale, minimum))
    known = whole and words and bits in BITS and zeros in ("integer", "real") and scale in DTYPES and minimum in DTYPES
    if (
        not known
        or not 0 < group_size < 1 << 32
        or not (zero is None or (zeros == "integer" and 0 <= zero < 1 << bits))
    ):
        raise FormatError(where, expected=expected, got=shown(entry))
    return QuantSpec(
        bits=bits,
        group_size=group_size,
        zeros=zeros,
        scale_dtype=DTYPES[scale],
        min_dtype=DTYPES[minimum],
        zero=zero,
    )


def fits(lazy: LazyTensor, spec: QuantSpec) -> bool:
    """Whether a stored tensor can be what `spec` says, as far as its own spec tells.

    Narrower codes are the same codes, unless they were moved onto another zero point: then both have to be known.
    """
    stored = lazy.spec
    if stored is None or len(lazy.shape) != 2 or lazy.shape[1] % spec.group_size or spec.group_size % stored.group_size:
        return False
    if stored.zero is None:
        return spec.bits <= stored.bits
    if spec.zeros == "real":
        return False  # whoever stored it had no choice of a minimum
    if spec.bits == stored.bits:
        return spec.zero in (None, stored.zero)
    return spec.bits < stored.bits and spec.zero is not None and spec.zero <= stored.zero


def restored(lazy: LazyTensor, spec: QuantSpec) -> LazyTensor:
    """The stored tensor in the width and groups of `spec`, which it `fits`.

    Reading raises FormatError where the values are not as `spec` says: codes that need more bits, groups that do not
    repeat, zero points that are not whole or not `zero`, a scale or min that float16 does not hold.
    """
    if not fits(lazy, spec):
        raise FormatError(f"{lazy.name}: {TENSORS}", expected="what the tensor can hold", got=_words(spec))

    def read(start: int, stop: int) -> Tensor | GroupQuantTensor:
        stored = lazy.read(start, stop)
        if not isinstance(stored, GroupQuantTensor):
            raise TypeError(f"{lazy.name} is not quantized")
        tensor = _coarser(_narrower(stored, lazy, spec), spec.group_size)
        check_values(tensor, spec)
        return tensor

    return replace(lazy, spec=spec, read=read)


def _words(spec: QuantSpec) -> str:
    return f"{spec.bits} bits in groups of {spec.group_size}, {spec.zeros} zero points"


def _narrower(tensor: GroupQuantTensor, lazy: LazyTensor, spec: QuantSpec) -> GroupQuantTensor:
    if tensor.bits == spec.bits:
        return tensor
    codes, minimum = tensor.codes(), tensor.min
    if lazy.spec is not None and lazy.spec.zero is not None and spec.zero is not None:
        codes = codes - (lazy.spec.zero - spec.zero)  # below 0 wraps to 255, which no narrower width has
        minimum = -tensor.scale * spec.zero
    if codes.numel() and int(codes.max()) >= 1 << spec.bits:
        raise FormatError("codes", expected=f"{spec.bits} bits, as {TENSORS} says", got=str(int(codes.max())))
    return replace(tensor, packed=pack_codes(codes, spec.bits), min=minimum, bits=spec.bits)


def _coarser(tensor: GroupQuantTensor, group_size: int) -> GroupQuantTensor:
    times = group_size // tensor.group_size
    if times == 1:
        return tensor
    for name, part in (("scale", tensor.scale), ("min", tensor.min)):
        if not torch.equal(part, part[:, ::times].repeat_interleave(times, dim=1)):
            raise FormatError(
                name,
                expected=f"one value for {group_size} columns, as {TENSORS} says",
                got="different values within a group",
                todo=f"the file was changed by another tool: remove {TENSORS} from its metadata",
            )
    scale, minimum = tensor.scale[:, ::times].contiguous(), tensor.min[:, ::times].contiguous()
    return replace(tensor, scale=scale, min=minimum, group_size=group_size)


def check_values(tensor: GroupQuantTensor, spec: QuantSpec) -> None:
    """FormatError where the values are not as `spec` promises."""
    if spec.zeros == "integer":
        zero = integer_zeros(tensor)
        if zero is None or (spec.zero is not None and not bool((zero == spec.zero)[tensor.scale != 0].all())):
            expected = "integers" if spec.zero is None else f"{spec.zero}"
            raise FormatError("zero points", expected=f"{expected}, as {TENSORS} says", got="different values")
    for name, values, dtype in (("scale", tensor.scale, spec.scale_dtype), ("min", tensor.min, spec.min_dtype)):
        if dtype is torch.float16 and not holds_float16(values):
            raise FormatError(name, expected=f"float16 values, as {TENSORS} says", got="values that float16 rounds")
