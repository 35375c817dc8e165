"""JSON of files that nobody vouches for: what it holds, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qalora.errors import FormatError
from qalora.formats.files import read_limited

__all__ = ["parse_json", "read_json", "read_json_object"]


def parse_json(
    content: str | bytes, where: str, *, expected: str = "JSON", unique: bool = False, todo: str = ""
) -> Any:
    """What a JSON text holds. FormatError for another text, and with `unique` for an object that has a key twice.

    `where`, `expected` and `todo` are for the sentence. Bytes are UTF-8, as RFC 8259 says; a byte order mark before
    them is passed over.
    """

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if unique and len(found) != len(pairs):
            raise FormatError(f"{where}: a key stands twice", todo=todo)
        return found

    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=object_of)
    except FormatError:
        raise
    except json.JSONDecodeError as error:
        got = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise FormatError(where, expected=expected, got=f"text that is none ({got})", todo=todo) from error
    except UnicodeDecodeError as error:
        raise FormatError(where, expected=expected, got="bytes that are not UTF-8", todo=todo) from error
    except RecursionError as error:
        raise FormatError(where, expected=expected, got="lists or objects nested too deeply", todo=todo) from error
    except ValueError as error:  # Python's limit of an integer's digits
        raise FormatError(where, expected=expected, got="an integer of too many digits", todo=todo) from error


def read_json(path: Path, limit: int, *, unique: bool = False) -> Any:
    """What a JSON file of at most `limit` bytes holds; `FormatError` and `InputError` as `parse_json` and a read do."""
    return parse_json(read_limited(path, limit), str(path), unique=unique)


def read_json_object(path: Path, limit: int, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object of a file, as `read_json`; FormatError for a list, a number and the like."""
    content = read_json(path, limit, unique=unique)
    if not isinstance(content, dict):
        raise FormatError(str(path), expected="a JSON object", got=type(content).__name__)
    return content
