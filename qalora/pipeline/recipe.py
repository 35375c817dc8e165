"""Recipes: a TOML file that says a whole pipeline, read with suspicion into the records of `qalora.options.recipe`.

    work = ".qalora"            keys of the recipe itself, before the first section
    [base]                      a section
    model = "base"              a key of it

A key is an option's name, with dashes or underscores. Whatever is wrong is one sentence that begins with file and line.
Relative paths are relative to the file. A recipe may name any path that its user may; nothing in it is run.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora.errors import FormatError, InputError, about, shown, with_options
from qalora.formats.files import may_be_of_the_hub
from qalora.formats.text import read_utf8
from qalora.options import Option, fields_of
from qalora.options.recipe import SECTIONS, Recipe, Section
from qalora.pipeline.toml_lines import key_lines

__all__ = ["Source", "keys_of", "read_recipe"]

LIMIT = 1 << 20
"""Bytes of a recipe that are read at most."""

_RECORDS = {section.name: section for section in SECTIONS}
_CALL = {"out": Path("-")}
"""What stands for options that belong to a call, and that a record cannot be without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A recipe: its file, what tomllib makes of it, the line of each key, the number of lines, and the records."""

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

    def written(self, section: str, key: str) -> str | None:
        """A key as it is written there, with dashes or underscores; None where it is absent."""
        held = self.content.get(section, {}) if section else self.content
        return next((name for name in held if _plain(name) == key), None)

    @contextmanager
    def lines_of(self, *sections: str) -> Iterator[None]:
        """Put file and line before an error about an option of one of these sections that is written there."""
        try:
            yield
        except InputError as error:
            if error.field is None or str(error).startswith(f"{self.path}:"):
                raise
            for section in sections:
                option = next((one for one in keys_of(_RECORDS[section]) if one.name == error.field), None)
                name = None if option is None else self.written(section, option.flag)
                if name is not None:
                    raise self._at(error, section, name) from error
            raise

    def _at(self, error: InputError, section: str, name: str) -> InputError:
        where = self.where(*([section] if section else []), name)
        keys = {option.name: option.flag for one in SECTIONS for option in keys_of(one)}
        said = error.spelled(lambda option: keys.get(option, f"`{option}`"))
        return type(error)(f"{where}: {f'[{section}] ' if section else ''}{said}")


def keys_of(section: Section) -> tuple[Option, ...]:
    """The keys of a section: all options of its record that do not belong to a call."""
    return tuple(option for option in fields_of(section.record) if not option.call)


def read_recipe(path: Path) -> tuple[Source, Recipe]:
    """Read and check a recipe; FormatError or InputError, with the line, for what is wrong. No weight is read."""
    source = _source(path)
    _check_names(source)
    made: dict[str, Any] = {}
    for section in SECTIONS:
        held = source.content.get(section.name) if section.name else _top(source)
        if held is not None:
            made[section.name or "top"] = _record(source, section, held)
        elif section.required:
            needed = next(option.flag for option in keys_of(section) if option.required)
            raise InputError(
                f"{source.where()}: [{section.name}]",
                expected=f"a section with {needed}",
                got="none",
                todo=_sentence(section.help),
            )
    if "train" in made and "adapter" in made:
        raise InputError(
            f"{source.where('adapter')}: [adapter]", expected="[train] or [adapter]", got="both", todo="leave one out"
        )
    recipe = Recipe(**made)
    _check_places(source, recipe)
    return source, recipe


def _source(path: Path) -> Source:
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
        got = "values nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
        raise FormatError(f"{path}:1", expected="TOML of a recipe's size", got=got) from error
    return Source(path=path, content=content, lines=key_lines(text), length=length)


def _top(source: Source) -> dict[str, Any]:
    return {key: value for key, value in source.content.items() if key not in _RECORDS}


def _check_names(source: Source) -> None:
    """Refuse what is no section, or not where it belongs, before any value is looked at."""
    own = {option.flag for option in keys_of(_RECORDS[""])}
    names = [name for name in _RECORDS if name]
    for name, held in source.content.items():
        if name in names and not isinstance(held, dict):
            raise InputError(f"{source.where(name)}: {name}", expected=f"a section, [{name}]", got=shown(held))
        if name not in names and (isinstance(held, dict | list) or _plain(name) not in own):
            what = f"[{name}]" if isinstance(held, dict) else name
            expected = f"one of the sections {', '.join(names)}" if isinstance(held, dict) else "a key of the recipe"
            at = f"{source.where(name)}: {_short(what)}"
            raise InputError(at, expected=expected, got="an unknown name", todo=_meant(name, [*names, *own]))


def _record(source: Source, section: Section, held: Mapping[str, Any]) -> Any:
    keys = {option.flag: option for option in keys_of(section)}
    at, label = ((section.name,), f"[{section.name}] ") if section.name else ((), "")
    found: dict[str, Any] = {}
    for name, value in held.items():
        place = f"{source.where(*at, name)}: {label}{_short(name)}"
        option = keys.get(_plain(name))
        if option is None:
            raise InputError(place, expected="a key of this section", got="an unknown name", todo=_meant(name, keys))
        if option.name in found:
            raise InputError(place, expected="the key once", got="it twice, with dashes and with underscores")
        found[option.name] = _value(source, option, value, place)
    for option in keys.values():
        if option.required and option.name not in found:
            place = f"{source.where(*at)}: {label}{option.flag}"
            raise InputError(place, expected=option.expected, got="none", todo=_sentence(option.help))
    with source.lines_of(section.name):
        call = {one.name: _CALL[one.name] for one in fields_of(section.record) if one.call and one.required}
        return section.record(**found, **call)


def _value(source: Source, option: Option, value: Any, place: str) -> Any:
    try:
        taken = option.take(value)
    except InputError as error:
        raise InputError(place, expected=error.expected, got=error.got, todo=_sentence(option.help)) from error
    if taken is None or not option.place:
        return taken
    path = source.folder / taken
    if option.place == "input" and not path.exists():
        raise InputError(place, expected="the path of a file or folder that exists", got=shown(value))
    if option.place == "hub":
        if "\0" in taken:
            raise InputError(place, expected="text without the character 0", got=shown(value))
        return str(path) if path.exists() else taken
    return path


def _check_places(source: Source, recipe: Recipe) -> None:
    """Refuse what may be of the Hub and is not: a model, or data."""
    from qalora.training.data import check_data

    model = recipe.base.model
    if not Path(model).exists() and not may_be_of_the_hub(model):
        where = source.where("base", "model")
        expected = "a folder or file that is there, or an id of the Hub"
        raise InputError(f"{where}: [base] model", expected=expected, got=shown(model))
    if recipe.train is not None:
        with source.lines_of("train"), about("data"):
            check_data(recipe.train.data)
    if recipe.quantize is not None and recipe.quantize.calibration is not None:
        with source.lines_of("quantize"), about("calibration"):
            check_data(recipe.quantize.calibration)


def _sentence(text: str) -> str:
    said = text[:1].lower() + text[1:].rstrip(".")
    return with_options(said, lambda name: name.replace("_", "-"))


def _meant(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(_plain(name), [_plain(other) for other in names], n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(names))}"


def _plain(name: str) -> str:
    return name.replace("_", "-")


def _short(name: str) -> str:
    return name if re.fullmatch(r"\[?[\w.-]{1,60}\]?", name) else f"{name!r:.60}"
