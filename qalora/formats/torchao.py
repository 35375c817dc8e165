"""torchao's `IntxUnpackedToInt8Tensor`: a byte for each code, here and back, and what describes a weight in a file.

For a weight [out, in] of b bits in G = in/group_size groups, in the tensors <module>.<part>:

    _weight_qdata       int8 [out, in]         -2**(b-1) .. 2**(b-1) - 1
    _weight_scale       float [out, G]         weight = scale * (qdata - zero_point)
    _weight_zero_point  int8 or float [out, G]

and a JSON object for each weight in the metadata of the file. Codes of `qalora.tensor` are 2**(b-1) more than qdata.

A float zero point that stands 2**(b-1) lower would lose digits of a minimum near 0. So codes of up to 6 bits with real
zero points are stored as they are, 0..2**b-1, in a type of one bit more: qdata is the code, and zero_point -min/scale
(`qalora.formats.real_zeros`). Codes of 8 bits have no wider type, and are moved.

Source: torchao 0.18.0, prototype/safetensors and
quantization/quantize_/workflows/intx/intx_unpacked_to_int8_tensor.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qalora.errors import FormatError
from qalora.tensor import QuantSpec, pack_codes, unpack_codes

__all__ = [
    "NAMES",
    "PARTS",
    "TYPE",
    "described",
    "from_qdata",
    "is_lower",
    "names_text",
    "to_qdata",
    "type_bits",
    "whole",
]

PARTS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")

TYPE = "IntxUnpackedToInt8Tensor"

NAMES = "tensor_names"
"""Key of the metadata that lists all tensors of a file."""


def is_lower(spec: QuantSpec) -> bool:
    """Whether codes and zero points of ours are stored 2**(b-1) lower than they are, as torchao's own are."""
    return spec.zeros == "integer" or spec.bits == 8


def type_bits(spec: QuantSpec) -> int:
    """The width of the type that a weight of ours says."""
    return spec.bits if is_lower(spec) else spec.bits + 1


def described(spec: QuantSpec) -> str:
    """What describes a weight of ours in the metadata."""
    data = {
        "target_dtype": {"_type": "torch.dtype", "_data": f"int{type_bits(spec)}"},
        "block_size": [1, spec.group_size],
        "dtype": {"_type": "torch.dtype", "_data": "float32"},
        "activation_quantization": None,
    }
    names = [part.removeprefix("_weight_") for part in PARTS]
    return json.dumps({"_type": TYPE, "_data": data, "_tensor_data_names": names})


def names_text(weights: Mapping[str, str], others: Iterable[str]) -> dict[str, str]:
    """The metadata of a file: what describes each weight, and its other tensors by their names."""
    plain = dict.fromkeys(others, json.dumps({"_type": "Tensor"}))
    return {**weights, **plain, NAMES: json.dumps([*weights, *plain])}


def to_qdata(packed: Tensor, bits: int, *, lower: bool) -> Tensor:
    """qdata int8 [out, in] of packed codes; `lower`: 2**(b-1) less than the codes. Inverse of `from_qdata`."""
    codes = unpack_codes(packed, bits)
    if not lower:
        return codes.view(torch.int8)
    return (codes - (1 << (bits - 1))).view(torch.int8)  # modulo 256, which is what int8 reads


def from_qdata(qdata: Tensor, bits: int, *, lower: bool) -> Tensor:
    """Packed codes of qdata int8 [out, in]; FormatError for values beyond 0..2**b-1."""
    return pack_codes(whole(PARTS[0], qdata, bits, lower=lower), bits)


def whole(name: str, stored: Tensor, bits: int, *, lower: bool) -> Tensor:
    """Signed whole numbers as codes 0..2**b-1, uint8."""
    values = stored.to(torch.int16) + ((1 << (bits - 1)) if lower else 0)
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 1 << bits:
        raise FormatError(name, expected=f"values of {bits} bits", got="values beyond them")
    return values.to(torch.uint8)
