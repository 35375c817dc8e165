"""Every error that qalora raises on purpose.

    QaloraError
    ├── InputError(ValueError)     bad usage or bad input; exit status 2
    │   ├── FormatError            a file is not what its format says it is
    │   │   └── NotFiniteError     a tensor holds NaN or Inf
    │   ├── AdapterError           an adapter does not fit, or cannot be folded
    │   ├── DivergedError          a training whose numbers left what its dtypes reach
    │   ├── ExactnessError         a target cannot hold a weight exactly, and no loss was asked for by name
    │   ├── OutputError            the output exists, or there is no room for it
    │   ├── EngineError            the processes that share the work cannot be had, or die
    │   └── MissingLibraryError    an optional library is absent; the sentence holds the command that installs it
    └── ProofError                 a parity gate failed, or a named artefact is not proven; exit status 1

A message is one sentence with four parts: what, expected, got, and what to do. `InputError` keeps them, and the option
that it is about, and puts them together, so that every message has the same form:

    >>> str(InputError("model.safetensors", expected="at least 8 bytes", got="3 bytes", todo="download it again"))
    'model.safetensors: expected at least 8 bytes, got 3 bytes; download it again'

Options are named as in Python, and in backquotes: `fit_minima`. The command line shows its flag for each, a recipe its
key; see `QaloraError.spelled`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

__all__ = [
    "AdapterError",
    "DivergedError",
    "EngineError",
    "ExactnessError",
    "FormatError",
    "InputError",
    "MissingLibraryError",
    "NotFiniteError",
    "OutputError",
    "ProofError",
    "QaloraError",
    "about",
    "first_line",
    "json_kind",
    "shown",
    "with_options",
]

_OPTION = re.compile(r"`([a-z][a-z0-9_]*)`")


def with_options(text: str, spell: Callable[[str], str]) -> str:
    """A text with each `option` in backquotes as `spell` writes it."""
    return _OPTION.sub(lambda match: spell(match[1]), text)


def shown(value: object, most: int = 60) -> str:
    """A value for "got", as JSON has it, with text in single quotes: at most about `most` characters, in one line."""
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, Mapping):
        value = dict(value)
    if isinstance(value, dict | list | tuple):
        try:
            text = json.dumps(value, default=str, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):  # keys that JSON has not, a loop, or a nest too deep
            text = "an object" if isinstance(value, dict) else "a list"
    elif value is None or isinstance(value, bool):
        text = json.dumps(value)
    else:
        text = str(value) if isinstance(value, int | float) else repr(str(value))
    text = "".join(char if char.isprintable() else "?" for char in text)
    if len(text) <= most:
        return text
    return f"{text[: most - 4]}...{text[-1] if text[0] in '{[' or text[0] == text[-1] else ''}"


def first_line(error: BaseException) -> str:
    """What a foreign error says, in a line; the name of its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


_KINDS = {type(None): "null", bool: "true or false", str: "text", list: "a list", tuple: "a list", dict: "an object"}


def json_kind(value: object) -> str:
    """What JSON calls a value: an object, a list, text, a number, true or false, null; Python's name for others."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "a number" if number else _KINDS.get(type(value), type(value).__name__)


class QaloraError(Exception):
    """Base of every error raised on purpose. Anything else that escapes is a bug."""

    field: str | None = None

    def spelled(self, spell: Callable[[str], str]) -> str:
        """The message with each `option` in backquotes as `spell` writes it, and so the one that it begins with."""
        text = str(self)
        if self.field is not None and text.startswith(f"{self.field}: "):
            text = spell(self.field) + text.removeprefix(self.field)
        return with_options(text, spell)


class InputError(QaloraError, ValueError):
    """Bad usage or bad input.

    what   the thing that is wrong; alone it may be the whole sentence. The option by itself where it is empty
    field  the option that it is about, by its name in Python; None where it is about no option
    """

    def __init__(
        self, what: str = "", *, expected: str = "", got: str = "", todo: str = "", field: str | None = None
    ) -> None:
        self.what = what or str(field)
        self.expected, self.got, self.todo, self.field = expected, got, todo, field
        parts = [f"expected {expected}"] if expected else []
        parts += [f"got {got}"] if got else []
        sentence = f"{self.what}: {', '.join(parts)}" if parts else self.what
        super().__init__(f"{sentence}; {todo}" if todo else sentence)


@contextmanager
def about(field: str) -> Iterator[None]:
    """What is wrong in here is about an option, such as a file that it names, unless the error says another."""
    try:
        yield
    except InputError as error:
        error.field = error.field or field
        raise


class FormatError(InputError):
    """A file is not what its format says it is."""


class NotFiniteError(FormatError):
    """A tensor holds NaN or Inf."""


class AdapterError(InputError):
    """An adapter does not fit the model, or cannot be folded into it."""


class DivergedError(InputError):
    """A training's loss is no number, or what it learned is beyond its dtype."""


class ExactnessError(InputError):
    """A target cannot hold a weight exactly, and no loss was asked for by name."""


class OutputError(InputError):
    """The output exists, or there is no room for it."""


class EngineError(InputError):
    """The processes that share the work cannot be had, or die."""


class MissingLibraryError(InputError):
    """An optional library is absent; extra: which of ours brings it, or todo: what else does."""

    def __init__(self, library: str, purpose: str, extra: str, todo: str = "") -> None:
        todo = todo or f"pip install 'qalora[{extra}]'"
        super().__init__(f"{purpose} needs {library}, which is not installed", todo=todo)


class ProofError(QaloraError):
    """A parity gate failed, or a named artefact is not proven."""
