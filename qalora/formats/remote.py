"""Models that lie at a URL, read by ranges. fsspec opens the URL: s3, gs, hf, https and what else it knows.

The folder at the URL becomes a folder here. Its small files are fetched. Each file of weights is a placeholder, and
`qalora.formats.files.InputFile` takes the bytes that are asked for from the URL.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from qalora.errors import FormatError, InputError, first_line, shown

__all__ = ["Ranges", "bring", "is_url", "knowing", "ranges_of", "size_of"]

WEIGHTS = (".safetensors", ".gguf")
"""What the names of files end with that are read by ranges."""

SMALL = (".json", ".jinja", ".model", ".txt", ".md", "LICENSE", "NOTICE")
"""What the names of files end with that are fetched; no others are looked at."""

LIMIT = 64 << 20
"""Bytes of a file that is fetched."""

FOLDERS = ("additional_chat_templates",)
"""Folders that are fetched too."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """A file of `size` bytes at a URL."""

    url: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; InputError where they cannot be had."""
        if length == 0:
            return b""
        system, path = _opened(self.url)
        try:
            data: bytes = system.cat_file(path, start=offset, end=offset + length)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.url}: {_reason(error)}") from error
        if len(data) != length:
            raise FormatError(self.url, expected=f"{length} bytes from {offset} on", got=f"{len(data)} bytes")
        return data


_known: dict[Path, Ranges] = {}
"""The placeholders of this process, by their absolute paths."""


def is_url(name: str) -> bool:
    """Whether a name is a URL rather than a path or a Hub id."""
    return "://" in name


def ranges_of(path: Path) -> Ranges | None:
    """Where a placeholder's bytes are; None for a file that is here."""
    return _known.get(path.absolute()) if _known else None


def knowing(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A call that takes what is known of placeholders with it into other processes."""
    known = dict(_known)

    def knows(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        _learn(known)
        return call(*args, **options)

    return knows


def _learn(known: Mapping[Path, Ranges]) -> None:
    """By its name in this module: in another process a closure's globals are copies."""
    _known.update(known)


def size_of(path: Path) -> int:
    """Bytes of a file, here or at its URL."""
    ranges = ranges_of(path)
    return path.stat().st_size if ranges is None else ranges.size


def bring(url: str) -> Path:
    """The folder, or the GGUF file, of placeholders and small files for a URL; it goes when this process ends."""
    system, root = _opened(url)
    place = Path(tempfile.mkdtemp(prefix="qalora-url-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    try:
        info = system.info(root)
        name = _plain(url, info["name"])
        if info["type"] != "directory":
            return _file(url, system, info, place)
        folder = place / name
        folder.mkdir()
        for one in system.ls(root, detail=True):
            inner = _plain(url, one["name"])
            if one["type"] != "directory":
                _file(f"{url.rstrip('/')}/{inner}", system, one, folder)
            elif inner in FOLDERS:
                (folder / inner).mkdir()
                for template in system.ls(one["name"], detail=True):
                    _file(f"{url}/{inner}/{_plain(url, template['name'])}", system, template, folder / inner)
    except OSError as error:
        raise InputError(f"{url}: {_reason(error)}") from error
    return folder


def _file(url: str, system: Any, info: dict[str, Any], folder: Path) -> Path:
    """Fetch a small file, or make a placeholder; nothing for others."""
    path, size = folder / _plain(url, info["name"]), info.get("size")
    if path.name.endswith(WEIGHTS):
        if type(size) is not int:
            raise InputError(f"{url}: its size is not known, and it is to be read by ranges")
        path.write_text(f"This file lies at {url}\n", encoding="utf-8")
        _known[path.absolute()] = Ranges(url=url, size=size)
    elif path.name.endswith(SMALL) and type(size) is int and size <= LIMIT:
        path.write_bytes(system.cat_file(info["name"]))
    return path


def _plain(url: str, name: str) -> str:
    """The last part of a name in a listing."""
    last = name.rstrip("/").rpartition("/")[2]
    if not last or last in (".", "..") or "\\" in last or "\0" in last:
        raise FormatError(f"{url}: a name in its listing", expected="a plain name", got=shown(name))
    return last


def _opened(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"{url}: it cannot be opened ({_reason(error)})") from error
    return system, path


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    return first_line(error) or type(error).__name__
