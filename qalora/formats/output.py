"""An output appears whole or not at all: written under a temporary name beside its place, then renamed.

    .<name>.partial    what is being written; the next run removes what a killed one left
    .<name>.lock       held by the run that writes it
    .<name>.layers     what a long run has done, see `left_beside`

It is on the disk before it is renamed, so that a power cut leaves no file with a hole under its own name.

`--force` replaces an earlier output, and nothing else: a folder is only replaced if it holds at least one of the files
that are about to be written, so that a mistyped `-o ~` costs nothing.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qalora.errors import OutputError

if sys.platform != "win32":
    import fcntl

__all__ = [
    "Progress",
    "check_apart",
    "check_output",
    "check_writable",
    "json_bytes",
    "left_beside",
    "lock",
    "new_file",
    "new_folder",
    "ordered_json_bytes",
    "remove_left",
    "text_bytes",
    "write_json",
]

PARTIAL = ".partial"
"""What the temporary name of an output ends with; it begins with a point."""

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
    parents = _make_parents(path)
    try:
        Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)).rmdir()
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error
    finally:
        for folder in parents:
            _remove_if_empty(folder)


@contextmanager
def new_folder(path: Path, *, force: bool = False, names: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    OutputError while another run writes the same output. What a killed run left is removed.
    """
    check_output(path, force=force, names=names)
    parents = _make_parents(path)
    work = _work(path)
    try:
        with _claimed(path, wait=False):
            _remove(work)
            work.mkdir()
            try:
                yield work
                _put_on_disk(work)
                _replace_folder(work, path)
                _sync(path.absolute().parent)
            finally:
                _remove(work)
    except BaseException as error:
        for folder in parents:
            _remove_if_empty(folder)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: {error.strerror or error}") from error
        raise


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary file name that becomes `path` when the block ends well, and vanishes when it does not.

    Another run that writes the same file is waited for. What a killed run left is removed.
    """
    check_output(path, force=force)
    if path.is_dir():
        raise OutputError(f"{path}", expected="a file name", got="a folder")
    parents = _make_parents(path)
    work = _work(path)
    try:
        with _claimed(path, wait=True):
            check_output(path, force=force)
            _remove(work)
            try:
                yield work
                _put_on_disk(work)
                work.replace(path)
                _sync(path.absolute().parent)
            finally:
                _remove(work)
    except BaseException as error:
        for folder in parents:
            _remove_if_empty(folder)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: {error.strerror or error}") from error
        raise


@contextmanager
def left_beside(path: Path, suffix: str) -> Iterator[Path]:
    """A file beside an output, for work that a later run goes on from: it stays where the process is killed or
    interrupted, and goes when the block ends or fails.

    OutputError while another run has it.
    """
    parents = _make_parents(path)
    file = path.parent / f".{path.name}{suffix}"
    try:
        with _claimed(file, wait=False):
            try:
                yield file
            except Exception:
                file.unlink(missing_ok=True)
                raise
            file.unlink(missing_ok=True)
    finally:
        for folder in parents:
            _remove_if_empty(folder)


@contextmanager
def _claimed(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold `.<name>.lock` beside an output. The system lets go of it when the process dies, however that happens.

    OutputError where another run holds it, unless `wait`. Where files cannot be locked, nothing is.
    """
    place = _lock_file(path)
    file = _locked(place, path, wait=wait)
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        file.close()


def _work(path: Path) -> Path:
    """What an output is called while it is written."""
    return path.parent / f".{path.name}{PARTIAL}"


def _lock_file(path: Path) -> Path:
    return path.parent / f".{path.name.lstrip('.')}.lock"


def _locked(place: Path, path: Path, *, wait: bool) -> IO[bytes]:
    while True:
        file = place.open("ab")
        try:
            _lock(file, path, wait=wait)
            if place.exists() and os.path.samestat(os.fstat(file.fileno()), place.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the run that held it has removed it


def _lock(file: IO[bytes], path: Path, *, wait: bool) -> None:
    try:
        lock(file, wait=wait)
    except BlockingIOError:
        raise OutputError(
            f"{path}: another run is writing it", todo="wait for that run, or choose another place"
        ) from None
    except OSError:
        return  # a file system without locks


def lock(file: IO[bytes], *, wait: bool = False) -> None:
    """Lock an open file until it is closed; nothing on a system without such locks.

    BlockingIOError where another run has it, unless `wait`; another OSError on a file system without locks.
    """
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


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


def _put_on_disk(work: Path) -> None:
    """Wait until a file, or all that is below a folder, is on the disk."""
    for place in [*work.rglob("*"), work]:
        if not place.is_symlink():
            _sync(place)


def _sync(place: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; where the system can do that."""
    try:
        number = os.open(place, os.O_RDONLY)
    except PermissionError:  # a folder on Windows, or a file that is not to be read
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # of a file system that has no such thing
            raise
    finally:
        os.close(number)


def _replace_folder(work: Path, path: Path) -> None:
    """Put a folder in its place, in one step: whoever looks sees the old one or the new one, whole."""
    if not path.is_dir():
        work.rename(path)
    elif not any(path.iterdir()):
        path.rmdir()
        work.rename(path)
    elif not _exchange(work, path):
        _replace_in_steps(work, path)


def _exchange(work: Path, path: Path) -> bool:
    """Let two folders change their places in one step; False where the system cannot. Source: renameat2(2)."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(work), here, os.fsencode(path), ctypes.c_uint(exchange)) == 0)


def _replace_in_steps(work: Path, path: Path) -> None:
    old = path.parent / f".{path.name}.old"
    _remove(old)
    path.rename(old)
    try:
        work.rename(path)
    except OSError:
        old.rename(path)
        raise
    _remove(old)


def _remove(work: Path) -> None:
    if work.is_dir():
        shutil.rmtree(work, ignore_errors=True)
    else:
        work.unlink(missing_ok=True)


def remove_left(path: Path) -> None:
    """Remove what a killed run left of an output that is not made again; nothing where another run is writing it."""
    work = _work(path)
    place = _lock_file(path)
    if not os.path.lexists(work) and not place.exists():
        return
    with suppress(OutputError, OSError), _claimed(path, wait=False):
        _remove(work)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def text_bytes(text: str) -> bytes:
    """UTF-8; what it cannot hold, a byte of a path that is none, becomes an escape as JSON has it, such as \\udcff."""
    return text.encode("utf-8", "backslashreplace")


def json_bytes(content: object) -> bytes:
    """JSON with sorted keys, so that the same content gives the same bytes; `text_bytes` of it is JSON too."""
    return text_bytes(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def ordered_json_bytes(content: object) -> bytes:
    """The same with the keys in their order, for a file of another's that is written again."""
    return text_bytes(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_json(path: Path, content: object) -> None:
    """Write `json_bytes` to a file."""
    path.write_bytes(json_bytes(content))
