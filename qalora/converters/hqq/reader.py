"""Read an HQQ folder, ours or one that transformers 4 saved: codes as they are, minima from zero points; lazily.

    min = -scale * zero        in float64, rounded once to float32

which is exact where both are of 16 bits. A folder of ours says that minima are float16: then they are rounded to that,
which gives back what they were, and held against the zero points.

Not read: axis 0 (groups that run down the columns), quantized scales and zero points, view_as_float, 1-bit codes, and
qmodel.pt, which is a pickle. Layers describe themselves; what config.json says of them is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.huggingface import float_tensor, model_of, read_config, stored_tensors
from qalora.converters.real_zeros import joined
from qalora.converters.specs import TENSORS, check_values, stored_specs
from qalora.errors import FormatError, shown
from qalora.formats.hqq import BITS, packed_shape, unpack_groups
from qalora.formats.safetensors import Entry, load_tensor
from qalora.tensor import GroupQuantTensor, QuantSpec, pack_codes

__all__ = ["read"]

SMALL = 64
"""Elements of the largest tensor that describes a layer."""

_Stored = Mapping[str, tuple[Path, Entry]]


def read(folder: Path) -> Checkpoint:
    """Open an HQQ folder; reads config, headers, and what describes each layer. FormatError for what is no such one."""
    config = read_config(folder)
    config.pop("quantization_config", None)
    if (folder / "qmodel.pt").exists() and not any(folder.glob("*.safetensors")):
        raise FormatError(
            f"{folder}/qmodel.pt: a pickle, which runs code when it is opened",
            todo="save the model with hqq's save_to_safetensors",
        )
    stored = stored_tensors(folder)
    modules = sorted(name.removesuffix(".W_q") for name in stored if name.endswith(".W_q"))
    if not modules:
        raise FormatError(f"{folder}", expected="tensors named <layer>.W_q", got="none")
    known = stored_specs(stored)
    prefixes = tuple(f"{module}." for module in modules)
    kept = {name for name in stored if not name.startswith(prefixes) or name.endswith(".bias")}
    tensors = {name: float_tensor(name, *where) for name, where in stored.items() if name in kept}
    for module in modules:
        tensors[f"{module}.weight"] = _layer(folder, module, stored, known.pop(module, None))
    if known:
        raise FormatError(f"{folder}: {TENSORS}", expected="layers of the file", got=shown(next(iter(known))))
    return model_of(folder, "hqq", config, tensors)


def _layer(folder: Path, module: str, stored: _Stored, known: QuantSpec | None) -> LazyTensor:
    where = f"{folder}: {module}"
    bits, group_size, (rows, columns) = _description(where, module, stored)
    groups = columns // group_size
    parts = {}
    for part in ("W_q", "scale", "zero"):
        if f"{module}.{part}" not in stored:
            raise FormatError(f"{where}: missing tensor {module}.{part}")
        parts[part] = stored[f"{module}.{part}"]
    _check_parts(where, {part: entry for part, (_, entry) in parts.items()}, bits, group_size, rows * groups)
    scales = parts["scale"][1].dtype
    spec = known or QuantSpec(
        bits=bits,
        group_size=group_size,
        zeros="real",
        scale_dtype=torch.float16 if scales is torch.float16 else torch.float32,
        min_dtype=torch.float32,
    )
    if (spec.bits, spec.group_size) != (bits, group_size):
        raise FormatError(
            f"{where}: {TENSORS}",
            expected=f"{bits} bits in groups of {group_size}",
            got=f"{spec.bits} in groups of {spec.group_size}",
        )

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        data = {part: load_tensor(*place) for part, place in parts.items()}
        codes = unpack_groups(data["W_q"], (rows, columns), bits)[start:stop]
        scale, zero = (data[part].float().view(rows, groups)[start:stop] for part in ("scale", "zero"))
        tensor = joined(pack_codes(codes, bits), scale, zero, spec)
        if known is not None:
            check_values(tensor, known)
        return tensor

    own = (name for name in stored if name.startswith(f"{module}.") and name != f"{module}.bias")
    size = sum(stored[name][1].nbytes for name in own)
    return LazyTensor(name=f"{module}.weight", shape=(rows, columns), spec=spec, nbytes=size, read=read_rows)


def _description(where: str, module: str, stored: _Stored) -> tuple[int, int, tuple[int, int]]:
    """Bits, group size and shape of a layer; FormatError for a kind that is not read."""

    def value(name: str, default: int | None = None) -> Any:
        if f"{module}.{name}" not in stored and default is not None:
            return default
        return _small(where, module, name, stored)

    for name, wanted in (("axis", 1), ("view_as_float", 0), ("quant_scale", 0), ("quant_zero", 0)):
        found = value(name, None if name == "axis" else 0)
        if found != wanted:
            raise FormatError(
                f"{where}.{name}", expected=str(wanted), got=str(found)[:80], todo="this kind of layer is not supported"
            )
    bits, group_size, shape = value("nbits"), value("group_size"), value("shape")
    sizes = shape if isinstance(shape, list) and len(shape) == 2 else [0, 0]
    if bits not in BITS or type(group_size) is not int or not group_size > 0 or min(sizes) < 1:
        got = f"{bits}, {group_size} and {shape}"[:120]
        raise FormatError(where, expected=f"nbits among {', '.join(map(str, BITS))}, a group_size and a shape", got=got)
    if max(sizes) >= 1 << 31 or sizes[1] % group_size or sizes[1] % 8:
        raise FormatError(f"{where}.group_size", expected=f"a divisor of {sizes[1]}", got=str(group_size))
    return bits, group_size, (sizes[0], sizes[1])


def _small(where: str, module: str, name: str, stored: _Stored) -> Any:
    """The whole numbers of a tensor that describes a layer."""
    if f"{module}.{name}" not in stored:
        raise FormatError(f"{where}: missing tensor {module}.{name}")
    path, entry = stored[f"{module}.{name}"]
    if entry.dtype not in (torch.uint8, torch.int32, torch.int64) or len(entry.shape) > 1 or entry.nbytes > 8 * SMALL:
        raise FormatError(f"{where}.{name}", expected="whole numbers", got=f"{entry.dtype} {list(entry.shape)}")
    return load_tensor(path, entry).tolist()


def _check_parts(where: str, entries: Mapping[str, Entry], bits: int, group_size: int, groups: int) -> None:
    floats = (torch.float16, torch.bfloat16, torch.float32)
    fields = 8 // bits if bits in (2, 4) else 1
    if groups % fields:
        raise FormatError(where, expected=f"a multiple of {fields} groups at {bits} bits", got=str(groups))
    packed = (torch.int32 if bits == 3 else torch.uint8,)
    expected = {"W_q": (packed, packed_shape(groups, group_size, bits)), "scale": (floats, (groups, 1))}
    expected["zero"] = expected["scale"]
    for part, (dtypes, shape) in expected.items():
        entry = entries[part]
        if entry.dtype not in dtypes or entry.shape != shape:
            raise FormatError(
                f"{where}.{part}", expected=f"{dtypes[0]} {list(shape)}", got=f"{entry.dtype} {list(entry.shape)}"
            )
