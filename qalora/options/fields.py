"""Options as fields of dataclasses: what a field means, takes and is by default stands there once.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Verify(Options):
        max_tokens: int = option(256, "Tokens of the text to use.", low=1)

The type says what a value is: bool, int, float, str, Path, words (`Literal`) or one of these beside words, optional
(`| None`), or many of them (tuple, frozenset). Checks, the flags of the command line, the keys of recipes, their tables
in the documentation and JSON are all made from `fields_of`. A field without `option` is none of these.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qalora.errors import InputError, shown

__all__ = [
    "Option",
    "Options",
    "device_option",
    "fields_of",
    "option",
    "parse_size",
    "plain",
    "readable",
    "split",
]

Place = Literal["", "input", "output", "hub"]
_NAMES: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(?:([KMGT])(i?))?B?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option.

    name      as in Python; `spelled` where the command line and recipes have another word, such as a Python keyword
    kind      type of a value that is no word; str where there are only words
    words     what it takes beside, or instead of, a value of its kind (`free` says which)
    many      None, tuple or frozenset
    empty     the word that stands for None, where None means something
    known     gives the values there are, where they are not to be imported for a help page
    low, high, above   of a number: the least, the greatest, and what it has to be greater than
    size      a number of bytes, which text such as 5GB stands for
    place     of a path: something that is read, or that is made; "hub" is something that is read, here or on the Hub
    call      belongs to a call, not to what is made: it is in no recipe
    matters   whether it may change what is made
    target    the format alone that it concerns
    expert    not on a command's first help page
    """

    name: str
    help: str
    kind: type
    words: tuple[str, ...]
    free: bool
    optional: bool
    many: type | None
    default: Any
    spelled: str
    metavar: str
    example: Any
    empty: str
    known: Callable[[], Iterable[Any]] | None
    low: float | None
    high: float | None
    above: float | None
    size: bool
    place: Place
    call: bool
    matters: bool
    target: str
    expert: bool
    heading: str

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING

    @property
    def flag(self) -> str:
        """Its name on the command line and in recipes, without dashes before it."""
        return (self.spelled or self.name).replace("_", "-")

    @property
    def expected(self) -> str:
        """What one value is, in words."""
        words = [*self.words, *([self.empty] if self.empty else [])]
        if not self.free:
            return f"one of {', '.join(words)}" if len(words) > 2 else " or ".join(words)
        if self.size:
            return "a size such as 200MB, 5GB or 4GiB"
        if self.known is not None:
            return f"one of {', '.join([*map(str, self.known()), *words])}"
        return ", or ".join([f"{_NAMES[self.kind]}{self._range()}", *words])

    def _range(self) -> str:
        if self.low is not None and self.high is not None:
            return f" from {self.low} to {self.high}"
        low = f" >= {self.low}" if self.low is not None else f" > {self.above}" if self.above is not None else ""
        return f"{low}{' and' if low else ''} <= {self.high}" if self.high is not None else low

    def check(self, value: Any) -> Any:
        """The value in its own type: a path of text, a tuple of a list. InputError for one that it does not take."""
        if value is None and (self.optional or self.default is None):
            return None
        if self.many is None:
            return self._one(value)
        if isinstance(value, str) or not isinstance(value, Iterable) or isinstance(value, Mapping):
            value = [value]
        return self.many(self._one(one) for one in value)

    def _one(self, value: Any) -> Any:
        if isinstance(value, str) and value in self.words:
            return value
        if not self.free or (self.words and isinstance(value, str) and self.kind is not str):
            raise self.wrong(value)
        if self.kind is Path and isinstance(value, str | Path) and "\0" not in str(value):
            return Path(value)
        if self.kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return self._in_range(float(value))
        if self.kind is int and isinstance(value, int) and not isinstance(value, bool):
            return self._in_range(value)
        if self.kind not in (int, float, Path) and isinstance(value, self.kind):
            return self._in_range(value)
        raise self.wrong(value)

    def _in_range(self, value: Any) -> Any:
        if self.known is not None and value not in self.known():
            raise self.wrong(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            fits = math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 63
            fits &= self.low is None or value >= self.low
            fits &= self.high is None or value <= self.high
            fits &= self.above is None or value > self.above
            if not fits:
                raise self.wrong(value)
        return value

    def parse(self, text: str) -> Any:
        """One value as text has it, on a command line."""
        if self.empty and text == self.empty:
            return None
        if text in self.words or self.kind in (str, Path):
            return self._one(text)
        if self.size:
            return parse_size(text, self)
        return self._one(_number(self.kind, text))

    def take(self, value: Any) -> Any:
        """A value as TOML or JSON has it: sizes and None may be words."""
        if self.many is not None:
            if not isinstance(value, list):
                raise InputError(field=self.name, expected=f"a list, each {self.expected}", got=shown(value))
            return self.many(self._value_of(one) for one in value)
        return self._value_of(value)

    def _value_of(self, value: Any) -> Any:
        if self.empty and value == self.empty:
            return None
        if self.kind in (str, Path) and value == "":
            raise self.wrong(value)
        return parse_size(value, self) if self.size and isinstance(value, str) else self._one(value)

    def wrong(self, value: Any) -> InputError:
        """The error for a value that it does not take."""
        return InputError(field=self.name, expected=self.expected, got=shown(value))


class Options:
    """Base of a record of options: each is checked when it is made, and `check` looks at them together."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for one in fields_of(type(self)):
            object.__setattr__(self, one.name, one.check(getattr(self, one.name)))
        self.check()

    def check(self) -> None:
        """InputError for options that do not go together."""

    def to_json(self) -> dict[str, Any]:
        """Every option that may change what is made, by its name; text for paths, sorted lists for sets."""
        return {one.name: plain(getattr(self, one.name)) for one in fields_of(type(self)) if one.matters}


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    spelled: str = "",
    metavar: str = "",
    example: Any = None,
    empty: str = "",
    known: Callable[[], Iterable[Any]] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    size: bool = False,
    place: Place = "",
    call: bool = False,
    matters: bool = True,
    target: str = "",
    expert: bool = False,
    heading: str = "",
) -> Any:
    """A field with what `Option` says of it."""
    metadata = {key: value for key, value in locals().items() if key != "default"}
    return dataclasses.field(default=default, metadata={"option": metadata})


def device_option(what: str, default: str = "cpu", *, devices: str = "cpu, cuda or mps", **rest: Any) -> Any:
    """Where something is computed, as `qalora.devices.find_device` takes it."""
    return option(default, f"{what}: {devices}. auto: cuda if there is one.", **rest)


_KNOWN: dict[type, tuple[Option, ...]] = {}


def fields_of(cls: type) -> tuple[Option, ...]:
    """The options of a record, in their order."""
    if cls not in _KNOWN:
        _KNOWN[cls] = _fields(cls)
    return _KNOWN[cls]


def _fields(cls: type) -> tuple[Option, ...]:
    fields_with_options = [one for one in dataclasses.fields(cls) if "option" in one.metadata]
    return tuple(
        Option(name=one.name, default=one.default, **_form(_hint(cls, one.name)), **one.metadata["option"])
        for one in fields_with_options
    )


def _hint(cls: type, name: str) -> Any:
    """The type of a field, whose class may have other fields whose types are known to type checkers alone."""
    owner = next(base for base in cls.__mro__ if name in inspect.get_annotations(base))
    holder = types.SimpleNamespace(__annotations__={name: inspect.get_annotations(owner)[name]})
    return get_type_hints(holder, globalns=vars(sys.modules[owner.__module__]))[name]


def split(cls: type, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(those of the settings that are options of a record, the rest)."""
    names = {one.name for one in fields_of(cls)}
    own = {key: value for key, value in settings.items() if key in names}
    return own, {key: value for key, value in settings.items() if key not in names}


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _number(kind: type, text: str) -> Any:
    """The number that a text is; the text itself where it is none."""
    try:
        return kind(text) if kind is not int or text.lstrip("+-").isdecimal() else text
    except ValueError:
        return text


def parse_size(text: str, of: Option) -> int:
    """Bytes of 200MB, 5GB or 4GiB."""
    match = _SIZE.fullmatch(text.strip())
    power = 0 if match is None else " KMGT".index((match[2] or " ").upper())
    size = 0 if match is None else int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise of.wrong(text)
    return size


def readable(nbytes: int) -> str:
    """A size as people write it, such as 76.3 MB."""
    return next((f"{nbytes / size:.1f} {unit}" for size, unit in _UNITS if nbytes >= size), f"{nbytes} bytes")


def _form(hint: Any) -> dict[str, Any]:
    """The parts of a type."""
    many: type | None = None
    parts = _parts(hint)
    optional = type(None) in parts
    parts = [part for part in parts if part is not type(None)]
    if len(parts) == 1 and get_origin(parts[0]) in (tuple, frozenset):
        many = get_origin(parts[0])
        parts = _parts(get_args(parts[0])[0])
    words = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    kinds = [part for part in parts if get_origin(part) is not Literal]
    return {
        "kind": kinds[-1] if kinds else str,
        "words": words,
        "free": bool(kinds),
        "optional": optional,
        "many": many,
    }


def _parts(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
