"""Records as JSON and back: which keys a file of ours has, of which types and within which limits, its records say.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class File:
        path: Annotated[str, like("[a-z]+", "a name")]
        nbytes: Annotated[int, Key("bytes"), Only(lambda n: n >= 0, "a size")]

A field's type is a record, str, int, bool, float, `Any`, words (`Literal`), one of these or None, a tuple of them, a
frozenset of text (a sorted list), a Mapping of text to them, or one of several records; a path is only written. Of
several records it is the one whose word is there, a field of one word that all of them have (`op: Literal["copy"] =
"copy"`); without words, the first whose keys are all there. A field that has a default may be absent, but for a word,
and in a class whose `WHOLE` is true; a class whose `SPARSE` is true leaves out what is as by default. What is not
finite may be null where a number is wanted, as JSON has no name for it; `Finite` takes neither. A record's own check
(`__post_init__`) raises InputError, which is told with the record's place.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from qalora.errors import FormatError, InputError, shown

__all__ = ["Finite", "Key", "Only", "decode", "encode", "like"]

T = TypeVar("T")
Reader = Callable[[Any], Any]

_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
LARGEST = 1 << 1023
"""Whole numbers below it are floats too."""

_LATER = "update qalora"
"""What to do about what a later version of a file's schema may have."""


@dataclass(frozen=True, slots=True)
class Key:
    """The key of a field in JSON, where it is not the field's name."""

    name: str


@dataclass(frozen=True, slots=True)
class Only:
    """What a value has to fulfil beside its type, and that in words."""

    fits: Callable[[Any], bool]
    expected: str


def like(pattern: str, expected: str) -> Only:
    """Text that matches a pattern as a whole."""
    form = re.compile(pattern)
    return Only(lambda text: form.fullmatch(text) is not None, expected)


Finite = Annotated[float, Only(math.isfinite, "a finite number")]


def decode(kind: type[T], content: Any, where: str) -> T:
    """The record of JSON content; FormatError with the place, `where: key.key[n]`, for what is not as it has to be."""
    try:
        return cast(T, _reader(cast(Any, kind))(content))
    except _Wrong as wrong:
        what = ": ".join(part for part in (where, wrong.place.removeprefix("."), wrong.what) if part)
        raise FormatError(what, expected=wrong.expected, got=wrong.got, todo=wrong.todo) from wrong


def encode(value: Any, real: Callable[[float], Any] = lambda number: number) -> Any:
    """What JSON has for a record, or for what its fields hold; `real` gives what is written for a float."""
    if is_dataclass(value):
        kind: Any = type(value)
        pairs, sparse = [(part, getattr(value, part.name)) for part in _parts(kind)], getattr(kind, "SPARSE", False)
        return {part.key: encode(item, real) for part, item in pairs if not sparse or item != part.default}
    if isinstance(value, Mapping):
        return {key: encode(item, real) for key, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple | list):
        return [encode(item, real) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    return real(value) if isinstance(value, float) else value


class _Wrong(Exception):
    """What is not as it has to be; each record and list around it puts its own place before."""

    def __init__(self, expected: str, got: str, place: str = "", *, what: str = "", todo: str = "") -> None:
        super().__init__(expected, got)
        self.expected, self.got, self.place, self.what, self.todo = expected, got, place, what, todo


class _Part(NamedTuple):
    """A field of a record. word: the one that it always is, or None."""

    name: str
    key: str
    kind: Any
    default: Any
    needed: bool
    word: Any


@cache
def _parts(kind: Any) -> tuple[_Part, ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_part(field, hints[field.name], getattr(kind, "WHOLE", False)) for field in fields(kind))


def _part(field: Field[Any], hint: Any, whole: bool) -> _Part:
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    words = get_args(hint) if get_origin(hint) is Literal else ()
    word = words[0] if len(words) == 1 else None
    default = field.default if field.default_factory is MISSING else field.default_factory()
    key = next((mark.name for mark in marks if isinstance(mark, Key)), field.name)
    return _Part(field.name, key, hint, default, whole or default is MISSING or word is not None, word)


@cache
def _reader(kind: Any) -> Reader:
    """What gives a value of a type from JSON, or raises _Wrong."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _limited(_reader(inner[0]), [mark for mark in inner[1:] if isinstance(mark, Only)])
    if origin in (Union, types.UnionType):
        kinds = [one for one in inner if one is not types.NoneType]
        read = _reader(kinds[0]) if len(kinds) == 1 else _one_of(kinds)
        return read if kinds == [*inner] else lambda content: None if content is None else read(content)
    if origin is Literal:
        return _limited(lambda content: content, [Only(inner.__contains__, " or ".join(map(str, inner)))])
    if origin in (tuple, frozenset):
        readers = [_reader(one) for one in inner if one is not Ellipsis]
        return _many(origin, readers, same=origin is frozenset or Ellipsis in inner)
    if origin is not None and issubclass(origin, Mapping):
        read = _reader(inner[1])
        return lambda content: {key: _inside(key, read, item) for key, item in _object(content).items()}
    if kind is Any:
        return lambda content: content
    return _record(kind) if is_dataclass(kind) else _plain(kind)


def _limited(read: Reader, limits: list[Only]) -> Reader:
    def limited(content: Any) -> Any:
        value = read(content)
        for limit in limits:
            if not limit.fits(value):
                raise _Wrong(limit.expected, shown(content))
        return value

    return limited


def _plain(kind: type) -> Reader:
    """A value of a type of JSON's own."""

    def plain(content: Any) -> Any:
        whole = isinstance(content, int) and not isinstance(content, bool)
        if isinstance(content, kind) and (whole or kind is not int):
            return content
        if kind is float and (content is None or (whole and abs(content) < LARGEST)):
            return math.nan if content is None else float(content)
        raise _Wrong(_NAMES[kind], shown(content))

    return plain


_object, _list = _plain(dict), _plain(list)


def _many(make: Any, readers: list[Reader], same: bool) -> Reader:
    """A list of things of the same type, or of as many as there are types."""

    def many(content: Any) -> Any:
        items = _list(content)
        each = readers * len(items) if same else readers
        if len(each) != len(items):
            raise _Wrong(f"{len(each)} values", f"{len(items)}")
        return make(_inside(n, *pair) for n, pair in enumerate(zip(each, items, strict=True)))

    return many


def _record(kind: Any) -> Reader:
    parts = {part.key: part for part in _parts(kind)}
    readers = {key: (part.name, _reader(part.kind)) for key, part in parts.items()}

    def record(content: Any) -> Any:
        for key, part in parts.items():  # a word before all else: it says what the rest means
            if part.word is not None and _object(content).get(key) != part.word:
                raise _Wrong(str(part.word), shown(content.get(key)), _step(key), todo=_LATER)
        for key in sorted(_object(content).keys() - readers):
            raise _Wrong("", "", _step(key), what="unknown key", todo=_LATER)
        for key, part in parts.items():
            if part.needed and key not in content:
                raise _Wrong("", "", _step(key), what="this key is missing")
        values = {readers[key][0]: _inside(key, readers[key][1], item) for key, item in content.items()}
        try:
            return kind(**values)
        except InputError as error:
            raise _Wrong(error.expected, error.got, what=error.what, todo=error.todo) from error

    return record


def _one_of(kinds: list[Any]) -> Reader:
    """Of several records the one whose words are there; of these the first whose keys are, or else the first."""

    def one_of(content: Any) -> Any:
        there = _object(content)
        matches = [kind for kind in kinds if all(there.get(part.key) == part.word for part in words[kind])]
        if not matches:
            key = words[kinds[0]][0].key
            choices = " or ".join(str(part.word) for kind in kinds for part in words[kind])
            raise _Wrong(choices, shown(there.get(key)), _step(key), todo=_LATER)
        whole = (kind for kind in matches if all(part.key in there for part in _parts(kind) if part.needed))
        return _reader(next(whole, matches[0]))(content)

    words = {kind: [part for part in _parts(kind) if part.word is not None] for kind in kinds}
    return one_of


def _inside(at: str | int, read: Reader, content: Any) -> Any:
    """A part of a record or list, whose place is told where it is wrong."""
    try:
        return read(content)
    except _Wrong as wrong:
        wrong.place = _step(at) + wrong.place
        raise


def _step(at: str | int) -> str:
    return f"[{at}]" if isinstance(at, int) else "." + "".join(c if c.isprintable() else "?" for c in at[:80])
