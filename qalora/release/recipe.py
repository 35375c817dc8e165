"""Recipes: a TOML file that says a whole pipeline, read with suspicion and checked against a schema given as records.

    work = ".qalora"            keys of the recipe itself, before the first section
    [base]                      a section
    model = "base"              a key of it

Which sections and keys there are is not known here: `qalora.cli.release.schema` derives them from the options of the
command line. A key may be written with dashes or underscores. Whatever is wrong is one sentence that begins with file
and line. A recipe may name any path that its user may; nothing in it is run.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora.errors import FormatError, InputError
from qalora.formats.text import read_utf8
from qalora.release.toml_lines import key_lines

__all__ = ["Key", "Section", "Source", "check_recipe", "read_recipe"]

LIMIT = 1 << 20
"""Bytes of a recipe that are read at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key.

    expected  what its value is, in words, such as "an integer >= 1"
    default   what holds where it is absent, as TOML writes it; None where nothing does
    check     gives the value as the pipeline takes it; ValueError with what is expected, or a whole sentence of
              "expected ..., got ..."
    example   what a commented recipe shows, as TOML writes it
    """

    name: str
    help: str
    expected: str
    check: Callable[[Any], Any]
    example: Any
    default: Any = None
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section; the name "" is that of the keys before the first.

    acts     whether its being there, even empty, asks for something to be done
    command  whose options its keys are
    """

    name: str
    help: str
    keys: tuple[Key, ...]
    required: bool = False
    acts: bool = False
    command: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A recipe as it was read: what tomllib makes of it, the line of each key, and the number of lines."""

    path: Path
    content: Mapping[str, Any]
    lines: Mapping[tuple[str, ...], int] = field(repr=False)
    length: int

    @property
    def folder(self) -> Path:
        """What relative paths in it are relative to."""
        return self.path.parent

    def where(self, *path: str) -> str:
        """`recipe.toml:12` of a key as it is written there; of its section, or of the end, where it is absent."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.path}:{self.lines[path[:length]]}"
        return f"{self.path}:{self.length}"

    def written(self, section: str, key: str) -> tuple[str, ...] | None:
        """The path of a key as it is written there, with dashes or underscores; None where it is absent."""
        held = self.content.get(section, {}) if section else self.content
        found = [name for name in held if _plain(name) == _plain(key)]
        return None if not found else (*([section] if section else []), found[0])


def read_recipe(path: Path) -> Source:
    """Read a recipe; FormatError, with the line, for what is no TOML."""
    text = read_utf8(path, LIMIT).replace("\r\n", "\n")
    length = max(1, text.rstrip("\n").count("\n") + 1)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
        what, at, column = (str(error), None, None) if said is None else said.groups()
        place = f"{path}:{at or length}" + (f":{column}" if column else "")
        raise FormatError(place, expected="TOML", got=f"a mistake ({what})") from error
    except (RecursionError, ValueError) as error:  # what is nested too deep; a number of thousands of digits
        raise FormatError(f"{path}:1", expected="TOML of a recipe's size", got=type(error).__name__) from error
    return Source(path=path, content=content, lines=key_lines(text), length=length)


def check_recipe(source: Source, sections: Sequence[Section]) -> dict[str, dict[str, Any]]:
    """What each section that is there says, by the keys' own names, each value as its check gives it.

    InputError, with the line, for the first section or key that is unknown, missing, or not as it should be.
    """
    known = {section.name: section for section in sections}
    _check_names(source, known)
    found: dict[str, dict[str, Any]] = {}
    for section in sections:
        if not section.name:
            found[""] = _check_keys(source, section, {k: v for k, v in source.content.items() if k not in known})
            continue
        held = source.content.get(section.name)
        if held is None and not section.required:
            continue
        if held is None:
            needed = next(key.name for key in section.keys if key.required)
            raise InputError(
                f"{source.where()}: [{section.name}]",
                expected=f"a section with {needed}",
                got="none",
                todo=section.help[:1].lower() + section.help[1:].rstrip("."),
            )
        found[section.name] = _check_keys(source, section, held)
    return found


def _check_names(source: Source, known: Mapping[str, Section]) -> None:
    """Refuse what is no section, or not where it belongs, before any value is looked at."""
    own = {_plain(key.name) for key in known[""].keys} if "" in known else set()
    names = [name for name in known if name]
    for name, held in source.content.items():
        if name in known and not isinstance(held, dict):
            raise InputError(f"{source.where(name)}: {name}", expected=f"a section, [{name}]", got=_shown(held))
        if name not in known and (isinstance(held, dict | list) or _plain(name) not in own):
            what = f"[{name}]" if isinstance(held, dict) else name
            expected = f"one of the sections {', '.join(names)}" if isinstance(held, dict) else "a key of the recipe"
            at = f"{source.where(name)}: {_short(what)}"
            raise InputError(at, expected=expected, got="another name", todo=_meant(name, [*names, *own]))


def _check_keys(source: Source, section: Section, held: Mapping[str, Any]) -> dict[str, Any]:
    keys = {_plain(key.name): key for key in section.keys}
    at = (section.name,) if section.name else ()
    label = f"[{section.name}] " if section.name else ""
    found: dict[str, Any] = {}
    for name, value in held.items():
        place = f"{source.where(*at, name)}: {label}{_short(name)}"
        key = keys.get(_plain(name))
        if key is None:
            todo = _meant(name, [key.name for key in section.keys])
            raise InputError(place, expected="a key of this section", got="another name", todo=todo)
        if key.name in found:
            raise InputError(place, expected="it once", got="it twice, with dashes and with underscores")
        found[key.name] = _checked(place, key, value, section)
    for key in section.keys:
        if key.required and key.name not in found:
            place = f"{source.where(*at)}: {label}{key.name}"
            raise InputError(place, expected=key.expected, got="none", todo=_todo(key, section))
    return found


def _checked(place: str, key: Key, value: Any, section: Section) -> Any:
    try:
        return key.check(value)
    except InputError as error:  # a ValueError too, and a sentence already
        raise InputError(f"{place}: {error}") from error
    except ValueError as error:
        said = str(error)
        if said.startswith("expected "):
            raise InputError(f"{place}: {said}", todo=_todo(key, section)) from error
        raise InputError(place, expected=said or key.expected, got=_shown(value), todo=_todo(key, section)) from error


def _todo(key: Key, section: Section) -> str:
    said = key.help[:1].lower() + key.help[1:].rstrip(".") if key.help else ""
    return said or (f"see `{section.command} --help`" if section.command else "")


def _meant(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(_plain(name), [_plain(other) for other in names], n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(names))}"


def _plain(name: str) -> str:
    return name.replace("_", "-")


def _short(name: str) -> str:
    return name if re.fullmatch(r"\[?[\w.-]{1,60}\]?", name) else f"{name!r:.60}"


def _shown(value: object) -> str:
    """A value as TOML writes it, short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = str(value)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= 60 else f"{text[:57]}..."
