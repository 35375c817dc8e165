"""An output appears whole or not at all: written under a temporary name beside its place, then renamed.

`--force` replaces an earlier output, and nothing else: a folder is only replaced if it holds at least one of the files
that are about to be written, so that a mistyped `-o ~` costs nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from qalora.errors import OutputError

__all__ = [
    "Progress",
    "check_apart",
    "check_output",
    "check_writable",
    "json_bytes",
    "new_file",
    "new_folder",
    "text_bytes",
    "write_json",
]

Progress = Callable[[str, int], None]
"""Called with the name of what was written, a tensor's or a file's, and its bytes."""


def check_output(path: Path, *, force: bool, names: Collection[str] = ()) -> None:
    """Refuse an output that exists, unless `force` is set and it is an earlier output holding one of `names`; and what
    cannot be replaced: the folder that the process works in, a link, a mount point.
    """
    if path.resolve() == Path.cwd():
        raise OutputError(f"{path}", expected="a name", got="the folder you are in", todo="name a folder to make")
    if path.is_symlink():
        raise OutputError(f"{path}", expected="a name", got="a link", todo="choose another place")
    if os.path.ismount(path):
        raise OutputError(f"{path}", expected="a name", got="a mount point", todo="name a folder inside it")
    if not path.exists():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not force:
        raise OutputError(f"{path} exists already; choose another place or give `force`")
    if path.is_dir() and not any((path / name).exists() for name in names):
        raise OutputError(f"{path} exists and does not look like an earlier output; `force` does not replace it")


def check_apart(path: Path, *sources: str | Path) -> None:
    """Refuse an output that is, or holds, something that is read: replacing it would delete that.

    sources  what lies here; one that does not, such as a Hub id that is to be fetched, is passed over
    """
    for source in map(Path, sources):
        if source.exists() and source.resolve().is_relative_to(path.resolve()):
            raise OutputError(
                f"{path}",
                expected="a place apart from what is read",
                got=f"one that holds {source}",
                todo="choose another place",
            )


def check_writable(path: Path) -> None:
    """OutputError where `new_folder` could not make a folder `path`: to know it before long work. Nothing stays."""
    made = _make_parents(path)
    try:
        Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)).rmdir()
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error
    finally:
        for folder in made:
            _remove_if_empty(folder)


@contextmanager
def new_folder(path: Path, *, force: bool = False, names: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not."""
    check_output(path, force=force, names=names)
    made = _make_parents(path)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        work.chmod(0o777 & ~_umask())
        try:
            yield work
            _replace_folder(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except BaseException as error:
        for folder in made:
            _remove_if_empty(folder)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: {error.strerror or error}") from error
        raise


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary file name that becomes `path` when the block ends well, and vanishes when it does not."""
    check_output(path, force=force)
    if path.is_dir():
        raise OutputError(f"{path}", expected="a file name", got="a folder")
    made = _make_parents(path)
    work = path.parent / f".{path.name}.{os.getpid()}"
    try:
        yield work
        work.replace(path)
    except BaseException as error:
        work.unlink(missing_ok=True)
        for folder in made:
            _remove_if_empty(folder)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: {error.strerror or error}") from error
        raise


def _make_parents(path: Path) -> list[Path]:
    """Make the missing folders above `path`; gives them, innermost first."""
    missing = []
    for folder in path.absolute().parents:
        if folder.exists():
            break
        missing.append(folder)
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: {error.strerror or error}") from error
    return missing


def _replace_folder(work: Path, path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        path.rename(old / path.name)
        try:
            work.rename(path)
        except OSError:
            (old / path.name).rename(path)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        if path.is_dir():
            path.rmdir()
        work.rename(path)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def text_bytes(text: str) -> bytes:
    """UTF-8; what it cannot hold, a byte of a path that is none, becomes an escape as JSON has it, such as \\udcff."""
    return text.encode("utf-8", "backslashreplace")


def json_bytes(content: object) -> bytes:
    """JSON with sorted keys, so that the same content gives the same bytes; `text_bytes` of it is JSON too."""
    return text_bytes(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_json(path: Path, content: object) -> None:
    """Write `json_bytes` to a file."""
    path.write_bytes(json_bytes(content))
