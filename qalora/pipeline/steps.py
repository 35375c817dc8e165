"""The work folder of recipes: results of steps, each under the digest of everything that it was made of.

    WORK/.gitignore             the mark of such a folder
         lock                   held while a recipe runs
         digests.json           SHA-256 of files by path, size, time of change and inode: spares reading them again
         runs/<recipe>.json     what the last run of a recipe used and released, and seconds of each step
         <step>/<key>/<name>    a result, a file or folder, which appears by a rename, whole
         <step>/<key>.json      {"schema", "files": {path: SHA-256}, "seconds"}, written when the result is there

A key is the SHA-256 of a step's name, its options, the digests of its inputs, and versions: of every package that holds
a library of the step, and of what those require. A result is only taken
again if its files have the digests that were written down; otherwise it is made again. What no recipe's last run used
is removed at the end of a run. Only folders that this module made are ever removed: WORK has to be empty, absent, or
bear the mark of an earlier run, and nothing is followed out of it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from typing import Any

from qalora._version import __version__
from qalora.converters import packages
from qalora.errors import InputError
from qalora.formats.json_text import read_json
from qalora.formats.output import json_bytes, lock, new_file, write_json
from qalora.releasing.digests import file_digest

__all__ = ["MAKERS", "Result", "Step", "Store", "versions"]

SCHEMA = "qalora.work/1"
LIMIT = 64 << 20
FILES = 100_000
"""Files of a folder that are digested at most."""

FRESH = 2.0
"""Seconds: a file that changed so recently may change again within the tick of its clock, and is not remembered."""

MAKERS = ("jinja2", "numpy", "safetensors", "tokenizers", "torch", "transformers", *sorted(packages()))
"""Libraries whose version may decide the bytes of a result."""


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Of Python, which brings texts of its own, of qalora, of the packages that hold these top-level modules, and of
    all that they require, as far as it is installed.
    """
    found = {"python": platform.python_version(), "qalora": __version__}
    left = [name for library in libraries for name in _packages().get(library, ())]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name not in found and (told := _version(name)) is not None:
            found[name] = told
            left += _required(name)
    return found


@cache
def _packages() -> Mapping[str, list[str]]:
    """The installed packages by the top-level modules that they hold."""
    return packages_distributions()


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _required(name: str) -> list[str]:
    """The packages that an installed one requires on any system, without its extras."""
    lines = [line.partition(";") for line in requires(name) or ()]
    kept = [need for need, _, marker in lines if not re.search(r"\bextra\b", marker)]
    return [match[0] for need in kept if (match := re.match(r"[\w.-]+", need))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step before it is done.

    kind     what it does, a plain word: the folder of its results
    name     what its result is called
    options  what was chosen, as JSON
    inputs   the digest of each thing that it reads; None where that is not there yet
    """

    kind: str
    name: str
    options: Mapping[str, Any]
    inputs: Mapping[str, str | None]
    libraries: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str | None:
        """32 hexadecimal digits; None as long as an input is not there."""
        if None in self.inputs.values():
            return None
        made_of = [SCHEMA, self.kind, self.name, self.options, self.inputs, self.libraries]
        return hashlib.sha256(json_bytes(made_of)).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a step made: where it is, its digest, its bytes, and the seconds that it took when it was made."""

    path: Path
    digest: str
    nbytes: int
    seconds: float


class Store:
    """A work folder, for one recipe. Reading changes nothing; `run` and `finish` write, and want `opened`."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder = folder
        self._recipe = recipe.absolute()
        mark = hashlib.sha256(str(self._recipe).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self._record = folder / "runs" / f"{recipe.stem}-{mark}.json"
        self._used: dict[str, str] = {}
        self._refuse_foreign()
        self._memo: dict[str, list[Any]] = self._read(folder / "digests.json").get("files", {})
        self.last = self._read(self._record)

    def _refuse_foreign(self) -> None:
        ignore = self.folder / ".gitignore"
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise InputError(f"{self.folder}", expected="a folder for work, or none yet", got="a file or a link")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self._own(ignore)):
            raise InputError(f"{self.folder} holds files that no recipe made", todo="choose another place for `work`")

    def _own(self, ignore: Path) -> bool:
        return ignore.is_file() and not ignore.is_symlink() and ignore.read_bytes()[:200] == _MARK

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        """A record of ours; an empty one where it is absent or damaged."""
        if not path.is_file() or path.is_symlink():
            return {}
        try:
            content = read_json(path, LIMIT)
        except InputError:
            return {}
        return content if isinstance(content, dict) and content.get("schema") == SCHEMA else {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder where it is absent, and keep other runs out. InputError where another one is in."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / ".gitignore").exists():
            (self.folder / ".gitignore").write_bytes(_MARK)
        with (self.folder / "lock").open("ab") as file:
            try:
                lock(file)
            except OSError as error:
                raise InputError(f"{self.folder} is in use by another run", todo="wait until it ends") from error
            try:
                yield
            finally:
                self._write(self.folder / "digests.json", {"files": self._memo})

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        with new_file(path, force=True) as place:
            write_json(place, {"schema": SCHEMA, **content})

    def digest(self, path: Path, skip: Collection[Path] = ()) -> str:
        """The digest of a file, or of every file below a folder; see `files`."""
        return _combined(self.files(path, skip))

    def files(self, path: Path, skip: Collection[Path] = ()) -> dict[str, str]:
        """SHA-256 of each file by its path below `path`; "" is a file's own.

        In a folder, what begins with a dot and what is in `skip` is left out; links to folders are not followed.
        """
        root = path.resolve()
        if root.is_file():
            return {"": self._file(root)}
        left_out = {self.folder.resolve(), *(one.resolve() for one in skip)}
        found: dict[str, str] = {}
        for place, folders, names in os.walk(root):
            here = Path(place)
            folders[:] = sorted(name for name in folders if name[0] != "." and here / name not in left_out)
            for name in sorted(names):
                if name[0] != "." and (here / name).is_file() and here / name not in left_out:
                    found[(here / name).relative_to(root).as_posix()] = self._file(here / name)
                if len(found) > FILES:
                    raise InputError(f"{path} holds more than {FILES} files", todo="give the folder of the model alone")
        return found

    def _file(self, path: Path) -> str:
        status = path.stat()
        known = [status.st_size, status.st_mtime_ns, status.st_ino]
        memo = self._memo.get(str(path))
        if isinstance(memo, list) and memo[:3] == known and isinstance(memo[-1], str):
            return memo[-1]
        digest = file_digest(path)
        if time.time() - status.st_mtime > FRESH:
            self._memo[str(path)] = [*known, digest]
        return digest

    def _place(self, step: Step) -> tuple[Path, Path]:
        """Where the result of a step lies, and its record."""
        root = self.folder / step.kind
        return root / str(step.key) / step.name, root / f"{step.key}.json"

    def found(self, step: Step) -> Result | None:
        """The result of a step, if it is there and as it was when it was made."""
        if step.key is None:
            return None
        place, record = self._place(step)
        told = self._read(record)
        if not place.exists() or place.is_symlink() or not told:
            return None
        files = self.files(place)
        if files != told.get("files"):
            return None
        return Result(path=place, digest=_combined(files), nbytes=_nbytes(place), seconds=_number(told.get("seconds")))

    def begun(self, step: Step) -> Path | None:
        """Where a step that can go on puts its result, if there is a checkpoint of it beside."""
        if step.key is None:
            return None
        place, _ = self._place(step)
        return place if place.with_name(f"{place.name}.checkpoint").is_dir() else None

    def run(self, step: Step, action: Callable[[Path], object]) -> Result:
        """Do a step: `action` puts the result at the path that it is given, by a rename. A damaged one is replaced."""
        place, record = self._place(step)
        started = time.monotonic()
        if record.exists() or not place.exists():  # without a record, a whole result of a run that was then interrupted
            record.unlink(missing_ok=True)
            _remove(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            for left in place.parent.glob(".*"):  # by a run that was killed
                _remove(left)
            action(place)
        files = self.files(place)
        self._write(record, {"files": files, "seconds": round(time.monotonic() - started, 3)})
        found = self.found(step)
        if found is None:
            raise InputError(f"{place} changed while it was written", todo="run it again")
        return found

    def use(self, label: str, step: Step) -> None:
        """Note that this run uses a step, before it is done: what an interrupted run has made stays."""
        self._used[label] = f"{step.kind}/{step.key}"
        self._note({"using": dict(self._used)})

    def took(self, label: str, seconds: float) -> None:
        """Note how long a step took that was done now."""
        self._note({"times": {**self.last.get("times", {}), label: round(seconds, 3)}})

    def seconds(self, label: str) -> float | None:
        """How long a step took when it was last done; None where it never was."""
        times = self.last.get("times")
        found = times.get(label) if isinstance(times, dict) else None
        return _number(found) if isinstance(found, int | float) else None

    def finish(self, released: Mapping[str, Any], *, keep: bool = False) -> None:
        """Write down what the run used and released; remove what no recipe's last run used, unless `keep`."""
        self._note({"used": self._used, "using": {}, "released": dict(released)})
        self._used = {}
        if not keep:
            self._prune()

    def _note(self, content: Mapping[str, Any]) -> None:
        self.last = {**self.last, "recipe": str(self._recipe), **content}
        self._write(self._record, {key: value for key, value in self.last.items() if key != "schema"})

    def _prune(self) -> None:
        used: set[str] = set()
        for path in (self.folder / "runs").glob("*.json"):
            told = self._read(path)
            if not Path(str(told.get("recipe", ""))).is_file():
                path.unlink()
            for part in (told.get("used"), told.get("using")):
                used |= set(part.values()) if path.exists() and isinstance(part, dict) else set()
        for kind in self.folder.iterdir():
            if kind.is_symlink() or not kind.is_dir() or kind.name == "runs":
                continue
            for entry in kind.iterdir():
                made = re.fullmatch(r"([0-9a-f]{32})(\.json)?", entry.name)
                if made is not None and f"{kind.name}/{made[1]}" not in used:
                    _remove(entry)
        self._memo = {path: held for path, held in self._memo.items() if Path(path).exists()}


_MARK = b"# results of qalora's recipes; may be removed, and is made again\n*\n"


def _combined(files: Mapping[str, str]) -> str:
    return f"sha256:{hashlib.sha256(json_bytes(dict(files))).hexdigest()}"


def _nbytes(path: Path) -> int:
    below = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in below)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
