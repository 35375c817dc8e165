"""Where each key of a TOML document stands: tomllib gives values, and no lines.

Source of the grammar: https://toml.io/en/v1.0.0. The text must be one that tomllib has read; this module then only has
to know where strings, comments, arrays and inline tables begin and end.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_right

__all__ = ["key_lines"]

_BARE_ENDS = set(" \t\r\n=.,]}#")


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line, from 1, of each table header and each key, by its whole path; of several, the first.

    Elements of an array have no path of their own: keys in them stand under the array's. RecursionError for what is
    nested too deep.
    """
    scanner = _Scanner(text)
    scanner.document()
    return scanner.lines


class _Scanner:
    def __init__(self, text: str) -> None:
        self.lines: dict[tuple[str, ...], int] = {}
        self._text = text
        self._at = 0
        self._starts = [0, *(n + 1 for n, char in enumerate(text) if char == "\n")]

    def document(self) -> None:
        table: tuple[str, ...] = ()
        while self._next():
            if self._text[self._at] == "[":
                start = self._at
                while self._text[self._at] == "[":
                    self._at += 1
                table = self._path()
                self._note(table, start)
                while self._peek() == "]":
                    self._at += 1
            else:
                self._pair(table)

    def _peek(self) -> str:
        return self._text[self._at] if self._at < len(self._text) else ""

    def _next(self) -> bool:
        """Go to the next thing that is neither space nor comment; False at the end."""
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif char in " \t\r\n":
                self._at += 1
            else:
                return True
        return False

    def _note(self, path: tuple[str, ...], at: int) -> None:
        self.lines.setdefault(path, bisect_right(self._starts, at))

    def _path(self) -> tuple[str, ...]:
        """A dotted key."""
        parts = []
        while True:
            self._next()
            start = self._at
            if self._peek() in ("'", '"'):
                self._string()
                parts.append(tomllib.loads(f"key = {self._text[start : self._at]}")["key"])
            else:
                while self._peek() and self._peek() not in _BARE_ENDS:
                    self._at += 1
                parts.append(self._text[start : self._at])
            self._next()
            if self._peek() != ".":
                return tuple(parts)
            self._at += 1

    def _pair(self, table: tuple[str, ...]) -> None:
        """key = value; every table on the way has a line too."""
        start = self._at
        path = self._path()
        for length in range(1, len(path) + 1):
            self._note((*table, *path[:length]), start)
        self._at += 1  # the equals sign
        self._value((*table, *path))

    def _value(self, path: tuple[str, ...]) -> None:
        self._next()
        opened = self._peek()
        if opened in ("'", '"'):
            self._string()
        elif opened in ("[", "{"):
            self._at += 1
            closes = {"[": "]", "{": "}"}[opened]
            while self._next() and self._peek() != closes:
                if self._peek() == ",":
                    self._at += 1
                elif opened == "[":
                    self._value(path)
                else:
                    self._pair(path)
            self._at += 1
        else:
            while self._peek() and self._peek() not in ",]}#\n":
                self._at += 1

    def _string(self) -> None:
        """Go behind a string of any of the four kinds."""
        quote = self._peek()
        several = self._text.startswith(quote * 3, self._at)
        end = quote * 3 if several else quote
        self._at += len(end)
        while not self._text.startswith(end, self._at):
            self._at += 2 if quote == '"' and self._peek() == "\\" else 1
        self._at += len(end)
        while several and self._peek() == quote:  # up to two quotes before the closing three belong to the string
            self._at += 1
