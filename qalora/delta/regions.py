"""Where the tensors of a file are: GGUF, safetensors, and the data of an ONNX or OpenVINO graph beside it.

What no reader of ours knows, or what it refuses, is a file without tensors: bytes like any others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qalora.errors import InputError
from qalora.formats import gguf, safetensors

__all__ = ["Region", "head_bytes", "tensor_regions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One tensor's bytes in a file. block: bytes of what repeats in it, a block of GGUF's or a value."""

    name: str
    offset: int
    nbytes: int
    block: int


def tensor_regions(path: Path) -> list[Region]:
    """The tensors of a file, by offset, none overlapping another; empty where it is no file of tensors."""
    try:
        kind = re.sub(r"_data(_\d+)?$", ".data", path.suffix.removeprefix(".onnx"))
        regions = _READERS[kind](path) if kind in _READERS else []
    except InputError:
        return []
    separate: list[Region] = []
    for region in sorted(regions, key=lambda region: (region.offset, region.nbytes, region.name)):
        at = separate[-1].offset + separate[-1].nbytes if separate else 0
        if region.nbytes and region.offset >= at and region.nbytes % region.block == 0:
            separate.append(region)
    return separate


def head_bytes(regions: list[Region], size: int) -> int:
    """Bytes before the first tensor; all of a file without tensors."""
    return regions[0].offset if regions else size


def _gguf(path: Path) -> list[Region]:
    return [
        Region(name=info.name, offset=info.offset, nbytes=info.nbytes, block=gguf.BLOCKS[info.type][2])
        for info in gguf.read_header(path).tensors.values()
    ]


def _safetensors(path: Path) -> list[Region]:
    entries: Mapping[str, safetensors.Entry] = safetensors.read_header(path).entries
    return [
        Region(name=name, offset=entry.offset, nbytes=entry.nbytes, block=entry.dtype.itemsize)
        for name, entry in entries.items()
    ]


def _onnx_data(path: Path) -> list[Region]:
    from qalora.formats.onnx import DTYPES, read_initializers

    regions = []
    for model in sorted(path.parent.glob("*.onnx")):
        _, stored = read_initializers(model)
        regions += [
            Region(name=name, offset=item.offset, nbytes=item.nbytes, block=max(1, DTYPES[item.dtype][1] // 8))
            for name, item in stored.items()
            if item.inline is None and item.path.name == path.name
        ]
    return regions


def _openvino_bin(path: Path) -> list[Region]:
    from qalora.formats.openvino import ELEMENTS, read_ir

    return [
        Region(name=item.name, offset=item.offset, nbytes=item.nbytes, block=max(1, ELEMENTS[item.element][1] // 8))
        for item in read_ir(path.with_suffix(".xml")).constants.values()
    ]


_READERS = {".gguf": _gguf, ".safetensors": _safetensors, ".data": _onnx_data, ".bin": _openvino_bin}
