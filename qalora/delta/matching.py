"""Which file of the base's folder a file of the new one is rebuilt from: names only, no file is opened.

The same path; else, for a file of weights, the one in the same folder with the same ending whose name is most alike:
a fine-tune's GGUF is called ...-QALoRA-Q4_1.gguf where the base's is ...-Q4_1.gguf; else none.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile
from pathlib import PurePosixPath

from qalora.converters import weight_suffixes

__all__ = ["match_files"]


def match_files(base: Collection[str], new: Collection[str]) -> dict[str, str | None]:
    """The base's path for each path of the new folder, None where it has none."""
    return {path: path if path in base else _alike(path, base) for path in new}


def _alike(path: str, base: Collection[str]) -> str | None:
    target = PurePosixPath(path)
    if target.suffix not in weight_suffixes():
        return None
    candidates = [
        other
        for other in sorted(base)
        if PurePosixPath(other).parent == target.parent and PurePosixPath(other).suffix == target.suffix
    ]
    return max(candidates, key=lambda other: _likeness(PurePosixPath(other).name, target.name), default=None)


def _likeness(one: str, other: str) -> int:
    """Characters that two names begin and end alike."""
    return _common(one, other) + _common(one[::-1], other[::-1])


def _common(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
