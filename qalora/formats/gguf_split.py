"""GGUF models in several files, as llama.cpp's gguf-split makes them and its loader opens them, given the first.

    <stem>-00001-of-00003.gguf    all metadata, and split.no u16 = 0, split.count u16 = 3, split.tensors.count i32
    <stem>-00002-of-00003.gguf    split.* alone (and general.alignment where it is not 32), the next tensors

Source: ggml-org/llama.cpp, tools/gguf-split and src/llama-model-loader.cpp. No model family here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qalora.errors import FormatError, InputError, shown
from qalora.formats.files import contained
from qalora.formats.gguf import (
    GgufFile,
    GgufLayout,
    Metadata,
    Value,
    ValueType,
    plan_layout,
    read_header,
    tensor_bytes,
)

__all__ = ["SPLIT_KEYS", "part_number", "plan_split", "read_parts", "split_files"]

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")

MAX_PARTS = 200
"""Files of one model: those that are written are all reserved at once and open together."""

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def part_number(path: Path) -> int:
    """Which file of a split model it is by its name, from 1; 1 for any other name."""
    match = _NAME.fullmatch(path.name)
    return 1 if match is None else int(match["number"])


def split_files(path: Path) -> list[Path]:
    """The files that the name of a split model's first one stands for; the file itself for any other name."""
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match["count"]) <= MAX_PARTS:
        return [path]
    return [path.parent / _part(match["stem"], number, int(match["count"])) for number in range(int(match["count"]))]


def _part(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def read_parts(path: Path) -> GgufFile:
    """The header of a file, with the tensors of all files where it is the first of several; without split.* then.

    Raises InputError for a file that is not the first, or a part that is missing, FormatError for parts that do not
    belong together.
    """
    first = read_header(path)
    count = first.metadata.get("split.count", 0)
    if count in (0, 1) and isinstance(count, int):
        return first
    files = split_files(path)
    if len(files) != count or first.metadata.get("split.no") != part_number(path) - 1:
        got = f"{path.name}, with split.count {shown(count)} and split.no {shown(first.metadata.get('split.no'))}"
        raise FormatError(f"{path}: split", expected="a name that ends as in -00001-of-00003.gguf", got=got[:200])
    if first.metadata.get("split.no") != 0:
        raise InputError(f"{path} is a part of a split model", todo=f"give the first one, {files[0].name}")
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise InputError(
            f"{path}: split",
            expected=f"all {count} parts beside each other",
            got=f"{len(missing)} missing, the first is {missing[0]}",
            todo="fetch them too",
        )
    whole = _joined(first, files)
    entries = {key: value for key, value in whole.metadata.entries.items() if key not in SPLIT_KEYS}
    return replace(whole, metadata=Metadata(entries=entries))


def _joined(first: GgufFile, files: Sequence[Path]) -> GgufFile:
    tensors = dict(first.tensors)
    parts: dict[str, Path] = {}
    for number, file in enumerate(files[1:], 1):
        part = read_header(contained(file.parent, file.name))
        split = {key: part.metadata.get(key) for key in SPLIT_KEYS[:2]}
        if split != {"split.no": number, "split.count": len(files)}:
            raise FormatError(f"{file}: split", expected=f"no {number} of {len(files)}", got=str(split)[:100])
        twice = sorted(set(part.tensors) & set(tensors))
        if twice:
            raise FormatError(f"{file}: tensor {twice[0]!r} stands in two parts")
        tensors.update(part.tensors)
        parts.update(dict.fromkeys(part.tensors, file))
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise FormatError(f"{first.path}: split.tensors.count", expected=str(len(tensors)), got=shown(total))
    return replace(first, tensors=tensors, parts=parts)


def plan_split(
    metadata: Metadata, tensors: Sequence[tuple[str, tuple[int, ...], str]], name: str, max_size: int | None
) -> dict[str, GgufLayout]:
    """The layout of each file by its name: `name`, or parts of at most `max_size` bytes of tensors, in their order."""
    groups: list[list[tuple[str, tuple[int, ...], str]]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor_bytes(tensor[1], tensor[2])
        if max_size is not None and groups[-1] and filled + size > max_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    count = len(groups)
    if count == 1:
        return {name: plan_layout(metadata, tensors)}
    if count > MAX_PARTS:
        got = f"{max_size} bytes, which makes {count}"
        raise InputError(field="split_max_size", expected=f"a size that makes at most {MAX_PARTS} files", got=got)
    later = {key: value for key, value in metadata.entries.items() if key == "general.alignment"}
    layouts = {}
    for number, group in enumerate(groups):
        values = (number, count, len(tensors))
        types = (ValueType.UINT16, ValueType.UINT16, ValueType.INT32)
        keys = {k: Value(type=t, value=v) for k, t, v in zip(SPLIT_KEYS, types, values, strict=True)}
        held_here = metadata if number == 0 else Metadata(entries=later)
        layouts[_part(name.removesuffix(".gguf"), number, count)] = plan_layout(held_here.with_entries(keys), group)
    return layouts
