"""Where rows come from: files, which are known by their content and not by how their names end, and the Hub.

JSON lines      the first line that is not empty is an object; then so has to be every other
a JSON list     of objects
JSON objects    one or more, each over several lines
plain text      anything else in UTF-8, one document. What begins as an object of JSON does, or is of objects for the
                most part, or is called .json or .jsonl, is refused where it is not JSON: it is not text to learn
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qalora.errors import FormatError, InputError, MissingLibraryError, json_kind, shown
from qalora.formats.files import InputFile, may_be_of_the_hub, read_limited
from qalora.formats.json_text import parse_json
from qalora.formats.text import decode_text

__all__ = ["Rows", "check_data", "may_be_a_dataset", "open_data"]

LINE_BYTES = 64 << 20
TEXT_BYTES = 1 << 30
HEAD_LINES = 50
"""Lines that are looked at to tell rows from text."""

FILES = (".txt", ".text", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".zip", ".zst")
"""Ends of names that are files'. A dataset of the Hub may have a point in its name, as in owner/name-2.5."""

JSON_ENDS = (".json", ".jsonl", ".ndjson")
TABLE_ENDS = (".csv", ".tsv")
BEGINS_AS_ROWS = re.compile(r"\s*(\[\s*)?\{\s*(\"[^\"\n]*\"|'[^'\n]*')\s*:")
"""An object with a quoted key, in a list or not; with single quotes it is Python's and not JSON's."""

COLUMNS = ({"text"}, {"prompt", "completion"}, {"instruction", "output"}, {"messages"}, {"conversations"})
"""Names in the first line of a table, each set of which makes rows."""

ROW = "a JSON object"

MAGIC = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a ZIP file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"ARROW1": "an Arrow file",
}
"""What files begin with that hold rows in another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """form: what the data was taken for; rows: (where, row) each; or text: one plain document.

    note  what makes that doubtful
    """

    form: str
    rows: Iterator[tuple[str, Any]] | None = None
    text: str = ""
    note: str = ""


def check_data(data: str) -> None:
    """InputError for a folder, and for what is neither a file nor looks like a dataset of the Hub."""
    path = Path(data)
    if path.is_dir():
        raise InputError(data, expected="a text or JSONL file", got="a folder")
    if not path.exists() and not may_be_a_dataset(data):
        raise InputError(f"{data}: no such file")


def may_be_a_dataset(data: str) -> bool:
    """Whether it has the form of a Hub id, with or without :configuration, and does not end as files do."""
    return may_be_of_the_hub(data) and not data.lower().endswith(FILES)


def open_data(data: str) -> Rows:
    """The rows or the text of a file or dataset; InputError for what is neither, with the line."""
    check_data(data)
    path = Path(data)
    if not path.exists():
        return Rows(form="a dataset of the Hub", rows=_hub_rows(data))
    first = _first_line(path)
    if isinstance(_value(first), dict):
        return Rows(form="JSON lines", rows=_lines(path))
    text = decode_text(read_limited(path, TEXT_BYTES), str(path))
    json_name = path.suffix.lower() in JSON_ENDS
    begin = text.lstrip()[:1]
    if begin in ("{", "[") and _is_json(text):
        form = "JSON objects" if begin == "{" else "a JSON list"
        return Rows(form=form, rows=_values(path, text, listed=begin == "["))
    if (json_name and begin) or BEGINS_AS_ROWS.match(text) or _mostly_rows(text) or isinstance(_value(text), list):
        if begin in ("{", "["):
            _refuse_json(path, text, listed=begin == "[")
        return Rows(form="JSON lines", rows=_lines(path))  # which names the first line that is none
    _refuse_table(path, text)
    return Rows(form="plain text", text=text, note=_doubt(path, begin))


def _doubt(path: Path, begin: str) -> str:
    """What speaks against plain text."""
    if begin in ("{", "["):
        return f"it begins with {begin} and is not JSON: taken for plain text"
    if path.suffix.lower() in TABLE_ENDS:
        return f"its name ends in {path.suffix}, and its first line names no columns known here: taken for plain text"
    return ""


def _first_line(path: Path) -> str:
    """The first line that is not empty, as far as one is read at once."""
    with InputFile(path), path.open("rb") as file:
        kind = next((name for magic, name in MAGIC.items() if file.peek(8).startswith(magic)), None)
        if kind is not None:
            todo = "write its rows as JSON lines"
            raise FormatError(str(path), expected="text, or rows in JSON", got=kind, todo=todo)
        for line in iter(lambda: file.readline(LINE_BYTES), b""):
            if line.strip():
                return line.decode("utf-8-sig", "replace")
    return ""


def _value(text: str) -> Any:
    """The object, or the list of something, that a text is as JSON; None for another text."""
    try:
        return (text.lstrip()[:1] in ("{", "[") and json.loads(text)) or None
    except (ValueError, RecursionError):
        return None


def _is_json(text: str) -> bool:
    """Whether a text begins with a whole value of JSON that is an object, or a list of something but links."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (not text[end:].strip() and all(isinstance(item, dict) for item in value))


def _mostly_rows(text: str) -> bool:
    lines = list(islice((line for line in re.finditer(r"[^\n]*\S[^\n]*", text)), HEAD_LINES))
    return sum(_value(line[0].strip()) is not None for line in lines) * 2 > len(lines) > 0


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with InputFile(path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, parse_json(decode_text(line, str(path), line=number), where, expected=ROW, strict=True)


def _values(path: Path, text: str, *, listed: bool) -> Iterator[tuple[str, Any]]:
    """The objects of a list, or those that follow one another, each with the line where it begins."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = space.match(text).end() + listed, 1, 0  # type: ignore[union-attr]
    while True:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        if at == len(text) or (listed and text[at] == "]"):
            return
        where, start = f"{path}:{line}", at
        try:
            _, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise FormatError(where, expected=ROW, got=shown(text[start : start + 40])) from error
        yield where, parse_json(text[start:at], where, expected=ROW, strict=True)
        if listed:
            at = space.match(text, at).end()  # type: ignore[union-attr]
            at += text[at : at + 1] == ","


def _refuse_json(path: Path, text: str, *, listed: bool) -> None:
    """FormatError for a text that should be JSON and is not."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if listed and error.msg == "Extra data":
            raise FormatError(f"{path}:1", expected=ROW, got="a list on each line") from error
        line = 1 + text.count("\n", 0, error.pos)
        raise FormatError(f"{path}:{line}", expected=ROW, got=f"a line that is no JSON ({error.msg})") from error
    except (ValueError, RecursionError):
        value = parse_json(text, f"{path}:1", expected=ROW)  # which says why it is none
    item = next((item for item in value if not isinstance(item, dict)), value) if listed else value
    raise FormatError(f"{path}:1", expected=ROW, got=f"a list with {json_kind(item)} in it")


def _refuse_table(path: Path, text: str) -> None:
    """InputError for the first line of a table of rows."""
    head = text.lstrip().partition("\n")[0].strip()
    for mark in (",", "\t", ";"):
        names = {name.strip().strip('"').lower() for name in head.split(mark)}
        if any(columns <= names for columns in COLUMNS) and (len(names) > 1 or path.suffix.lower() in TABLE_ENDS):
            raise InputError(
                f"{path}:1",
                expected="plain text, or rows in JSON",
                got=f"a table with the columns {', '.join(sorted(names))}",
                todo="write its rows as JSON lines",
            )


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingLibraryError("datasets", f"{name}: no such file, and reading it from the Hub", "train") from error
    repo, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, configuration or None, split="train")
    except Exception as error:  # the library raises what it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name}: no such file, and not to be had from the Hub ({reason})") from error
    for number, row in enumerate(rows):
        yield f"{name}[{number}]", row
