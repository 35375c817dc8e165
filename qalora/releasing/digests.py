"""Digests of what a release is made of: SHA-256, written "sha256:" and 64 hexadecimal digits.

A model's digests are of its canonical tensors, so that the same integers have the same digests in every format:

    quantized  bits, group_size and shape, and a digest each of the packed codes (see `qalora.tensor`), of scale and of
               min, float32 little-endian [out, groups], and of g_idx, int32 [in], where there is one
    float      dtype and shape, and a digest of the values, little-endian, in their own dtype

so that a fold shows: codes and scale have the base's digests, min has not. A digest of many things is that of their
lines "<name> <JSON with sorted keys>\\n", sorted by name. Tensors are read a tile of rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.adapter import Adapter, AdapterLayer
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.formats.record_json import encode
from qalora.releasing.records import FloatDigest, LayerDigest, QuantizedDigest, TensorDigest
from qalora.tensor import GroupQuantTensor

__all__ = [
    "adapter_digests",
    "combined_digest",
    "content_digest",
    "file_digest",
    "model_digests",
    "range_digest",
    "saved_digests",
    "tensor_digest",
]

PIECE = 4 << 20
"""Bytes that are read at a time."""


def _sha256_text(hashed: Any) -> str:
    return f"sha256:{hashed.hexdigest()}"


def _update(hashed: Any, tensor: Tensor) -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("digests are of little-endian bytes, and this machine has others")
    flat = tensor.detach().contiguous().reshape(-1)
    hashed.update(flat.view(torch.uint8).numpy().data)


def tensor_digest(lazy: LazyTensor) -> TensorDigest:
    """What the module's docstring says of one tensor."""
    spec = lazy.spec
    if spec is None:
        values = hashlib.sha256()
        for _, tile in lazy.tiles():
            _update(values, tile if isinstance(tile, Tensor) else tile.dequantize())
        dtype = str(lazy.dtype).removeprefix("torch.")
        return FloatDigest(dtype=dtype, shape=tuple(lazy.shape), values=_sha256_text(values))
    hashed = {name: hashlib.sha256() for name in ("codes", "scale", "min")}
    for row, tile in lazy.tiles():
        if not isinstance(tile, GroupQuantTensor):
            raise TypeError(f"{lazy.name} has a spec and no codes")
        for name, part in (("codes", tile.packed), ("scale", tile.scale), ("min", tile.min)):
            _update(hashed[name], part)
        if row == 0 and tile.g_idx is not None:
            hashed["g_idx"] = hashlib.sha256()
            _update(hashed["g_idx"], tile.g_idx)
    digests = {name: _sha256_text(value) for name, value in hashed.items()}
    return QuantizedDigest(bits=spec.bits, group_size=spec.group_size, shape=tuple(lazy.shape), **digests)


def model_digests(model: Checkpoint) -> dict[str, TensorDigest]:
    """`tensor_digest` of every tensor, by name. Reads the whole model, a tile at a time."""
    return {name: tensor_digest(lazy) for name, lazy in model.everything.items()}


def adapter_digests(adapter: Adapter) -> dict[str, LayerDigest]:
    """For each layer rank, pool_size and factor, and the digests of A and B, float32 little-endian."""
    return {module: _layer_digest(layer) for module, layer in adapter.layers.items()}


def saved_digests(adapter: Adapter) -> dict[str, str]:
    """Of each tensor that the adapter brings whole, of rows that it brings, with their numbers, and of the files of its
    tokenizer, by name.
    """
    saved = adapter.saved
    if saved is None:
        return {}
    digests = {name: combined_digest({name: tensor_digest(lazy)}) for name, lazy in saved.whole.items()}
    for name, rows in saved.rows.items():
        digests[name] = combined_digest({"values": tensor_digest(rows.values), "rows": list(rows.indices)})
    return {**digests, **{name: file_digest(path) for name, path in saved.files.items()}}


def _layer_digest(layer: AdapterLayer) -> LayerDigest:
    a, b = hashlib.sha256(), hashlib.sha256()
    _update(a, layer.a)
    _update(b, layer.b)
    factor = float(layer.factor)
    return LayerDigest(rank=layer.rank, pool_size=layer.pool_size, factor=factor, a=_sha256_text(a), b=_sha256_text(b))


def combined_digest(parts: Mapping[str, Any]) -> str:
    """One digest of many, as the module's docstring says."""
    lines = (f"{name} {json.dumps(encode(parts[name]), sort_keys=True)}\n" for name in sorted(parts))
    return content_digest("".join(lines).encode())


def content_digest(content: bytes) -> str:
    """The digest of bytes."""
    return _sha256_text(hashlib.sha256(content))


def file_digest(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return _sha256_text(hashlib.file_digest(file, "sha256"))


def range_digest(path: Path, offset: int, nbytes: int) -> str:
    """The digest of `nbytes` bytes of a file from `offset` on, or of as many as there are."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while nbytes > 0 and (piece := file.read(min(nbytes, PIECE))):
            hashed.update(piece)
            nbytes -= len(piece)
    return _sha256_text(hashed)
