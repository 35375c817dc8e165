"""What a tensor becomes in the file of weights, and what the graph says of where it lies.

    <module>.header, .codes, .alpha   a quantized weight: see `qalora.formats.mnn`
    <module>.weight                   a float weight, float32
    <module>.bias                     float32, right behind its weight; zeros behind a float weight that has none,
                                      which MNN does not compute without
    <module>.norm                     float32 [2, n]: the weight of a norm, and zeros, which MNN adds
    <module>.table                    the embedding where it is float, which MNN reads by itself: see below

A quantized embedding is held in bytes, or in 4 bits, with the middle in its alpha; where the output layer is tied, both
read the same bytes. MNN has three types for a float one:

    bfloat16   in a file of its own
    float16    as it is
    float32    no such type: as 8-bit codes that are all 0, in groups of one. MNN computes code * scale - 128 * scale
               then; the table holds the scales, -value / 128, of which every value comes back
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.mnn.decoder import EMBEDDING
from qalora.errors import ExactnessError
from qalora.formats.mnn import (
    WIDE,
    Item,
    from_alpha,
    from_stream,
    header_bytes,
    stream_shape,
    to_alpha,
    to_stream,
)
from qalora.formats.workers import JOB_BYTES
from qalora.tensor import GroupQuantTensor, QuantSpec, pack_codes, unpack_codes

__all__ = [
    "TABLE",
    "container",
    "decode",
    "encode",
    "float_table",
    "from_float_table",
    "has_bias",
    "holds_minima",
    "items",
    "middle",
    "place",
    "table_dtype",
    "table_of_codes",
    "table_place",
]

TABLE = f"{EMBEDDING}.table"
PARTS = ("header", "codes", "alpha")


def container(module: str, bits: int) -> int:
    """Bits that a code is stored in."""
    return bits if module != EMBEDDING or bits in (4, 8) else 8


def middle(module: str, bits: int) -> int:
    """What `to_alpha` takes: MNN's table of embeddings has the middle."""
    return 1 << (container(module, bits) - 1) if module == EMBEDDING else 0


def table_dtype(lazy: LazyTensor) -> torch.dtype:
    """The type of the table of a float embedding."""
    return lazy.dtype if lazy.dtype in (torch.bfloat16, torch.float16) else torch.float32


def items(model: Checkpoint) -> list[Item]:
    """All of the file, in its order, but for a float embedding's table."""
    made: list[Item] = []
    for lazy in model.tensors.values():
        module = module_of(lazy.name)
        if len(lazy.shape) == 2:
            made += _matrix(module, lazy, model)
        elif not lazy.name.endswith(".bias"):
            made.append(Item(name=f"{module}.norm", dtype=torch.float32, shape=(2, *lazy.shape)))
        if made and len(lazy.shape) == 2 and (has_bias(model, module) or made[-1].name == lazy.name):
            made.append(Item(name=f"{module}.bias", dtype=torch.float32, shape=lazy.shape[:1]))
    return made


def has_bias(model: Checkpoint, module: str) -> bool:
    """Whether the model has a bias there; else what is stored is zeros."""
    return f"{module}.bias" in model.tensors


def _matrix(module: str, lazy: LazyTensor, model: Checkpoint) -> Iterable[Item]:
    shape, spec = (lazy.shape[0], lazy.shape[1]), lazy.spec
    if spec is None:
        if module != EMBEDDING or model.tied:
            yield Item(name=f"{module}.weight", dtype=torch.float32, shape=shape)
        return
    bits = container(module, spec.bits)
    yield Item(name=f"{module}.header", dtype=torch.uint8, shape=(len(header_bytes(shape, bits)),))
    yield Item(name=f"{module}.codes", dtype=torch.uint8, shape=stream_shape(shape, bits))
    groups = shape[1] // spec.group_size
    yield Item(name=f"{module}.alpha", dtype=torch.float32, shape=(shape[0], groups, 2))


def place(model: Checkpoint, placed: Mapping[str, Item], module: str) -> dict[str, Any]:
    """What the operator of a linear module, or of a norm, says of its bytes."""
    if f"{module}.norm" in placed:
        item = placed[f"{module}.norm"]
        return {"external": [item.offset, item.nbytes // 2, item.nbytes // 2]}
    lazy, bias = model.tensors[f"{module}.weight"], placed.get(f"{module}.bias")
    extra = bias.nbytes if bias is not None else 0
    if lazy.spec is None:
        item = placed[f"{module}.weight"]
        return {"external": [item.offset, item.nbytes, extra]}
    header, codes, alpha = (placed[f"{module}.{part}"] for part in PARTS)
    bits = container(module, lazy.spec.bits)
    quantization = {
        "type": 1,
        "useInt32": False,
        "quantScale": 1.0,
        "scaleIn": 0.0,
        "scaleOut": 0.0,
        "aMaxOrBits": bits,
        "aMin": 1 if middle(module, bits) else -(1 << (bits - 1)),
        "readType": alpha.shape[0] * alpha.shape[1],
        "has_scaleInt": False,
        "shapeInt32": max(lazy.shape) > WIDE,
        "scaleStorage": "FP32",
    }
    external = [header.offset, header.nbytes + codes.nbytes, alpha.nbytes, extra, 0]
    return {"quanParameter": quantization, "external": external}


def table_place(model: Checkpoint, placed: Mapping[str, Item]) -> list[int] | None:
    """`tie_embeddings` of llm_config.json: offset of codes and alpha, bytes of alpha, bits, group size. None for a file
    of bfloat16."""
    lazy = model.tensors[f"{EMBEDDING}.weight"]
    if lazy.spec is not None:
        return table_of_codes(placed[f"{EMBEDDING}.codes"], placed[f"{EMBEDDING}.alpha"], lazy.spec)
    if table_dtype(lazy) is torch.bfloat16:
        return None
    item = placed[TABLE]
    if item.dtype is torch.float16:
        return [item.offset, 0, 0, 16, 0]
    return [item.offset - item.nbytes // 4, item.offset, item.nbytes, 8, 1]


def table_of_codes(codes: Item, alpha: Item, spec: QuantSpec) -> list[int]:
    """`tie_embeddings` of a quantized embedding, from the places of its codes and its alpha."""
    return [codes.offset, alpha.offset, alpha.nbytes, container(EMBEDDING, spec.bits), spec.group_size]


def encode(module: str, tensor: GroupQuantTensor) -> dict[str, Tensor]:
    """The data of codes and alpha, by the names of their items, for rows of a weight."""
    bits = container(module, tensor.bits)
    packed = tensor.packed if bits == tensor.bits else tensor.codes()
    return {
        f"{module}.codes": to_stream(packed, bits),
        f"{module}.alpha": to_alpha(tensor.scale, tensor.min, middle=middle(module, bits)),
    }


def decode(module: str, stream: Tensor, alpha: Tensor, spec: QuantSpec) -> GroupQuantTensor:
    """Inverse of `encode`; FormatError for codes of more bits than the spec's."""
    bits = container(module, spec.bits)
    packed = from_stream(stream, bits)
    if bits != spec.bits:
        packed = pack_codes(unpack_codes(packed, bits), spec.bits)
    scale, minimum = from_alpha(alpha, middle=middle(module, bits))
    return GroupQuantTensor(packed=packed, scale=scale, min=minimum, bits=spec.bits, group_size=spec.group_size)


def holds_minima(lazy: LazyTensor) -> bool:
    """Whether every minimum of an embedding comes back of an alpha with the middle; reads the values."""
    for _, tile in lazy.pieces(JOB_BYTES):
        if isinstance(tile, GroupQuantTensor):
            step = middle(EMBEDDING, tile.bits)
            if not torch.equal(from_alpha(to_alpha(tile.scale, tile.min, middle=step), middle=step)[1], tile.min):
                return False
    return True


def float_table(name: str, values: Tensor) -> Tensor:
    """float32 scales whose -128 times are the values; ExactnessError where there are none, which is below 2^-119."""
    scales = values.float() / -128
    if not torch.equal(from_float_table(scales), values.float()):
        raise ExactnessError(
            f"mnn: {name}", expected="values that MNN's table holds", got="some below 2^-119", todo="use gguf"
        )
    return scales


def from_float_table(scales: Tensor) -> Tensor:
    """Inverse of `float_table`."""
    return scales * -128
