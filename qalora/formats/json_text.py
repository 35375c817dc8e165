"""JSON of files that nobody vouches for: what it holds, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qalora.errors import FormatError, json_kind
from qalora.formats.files import read_limited

__all__ = ["parse_json", "read_json", "read_json_object"]


def parse_json(
    content: str | bytes, where: str, *, expected: str = "JSON", strict: bool = False, todo: str = ""
) -> Any:
    """What a JSON text holds, or FormatError; `where`, `expected` and `todo` are for the sentence.

    Bytes are UTF-8, as RFC 8259 says. With `strict` an object that has a key twice is refused, and a byte order mark,
    which is passed over without.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise FormatError(f"{where}: a key appears twice", todo=todo)
        return content

    try:
        text = content if isinstance(content, str) else content.decode("utf-8" if strict else "utf-8-sig")
        return json.loads(text, object_pairs_hook=unique if strict else None)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(where, expected=expected, got=_fault(error), todo=todo) from error


def _fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"text that is no JSON ({error.msg} at line {error.lineno}, column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return "bytes that are not UTF-8"
    if isinstance(error, RecursionError):
        return "lists or objects nested too deeply"
    return "an integer of too many digits"


def read_json(path: Path, limit: int, *, strict: bool = False) -> Any:
    """What a JSON file of at most `limit` bytes holds; `FormatError` and `InputError` as `parse_json` and a read do."""
    return parse_json(read_limited(path, limit), str(path), strict=strict)


def read_json_object(path: Path, limit: int, *, strict: bool = False) -> dict[str, Any]:
    """The JSON object of a file, as `read_json`; FormatError for a list, a number and the like."""
    content = read_json(path, limit, strict=strict)
    if not isinstance(content, dict):
        raise FormatError(str(path), expected="a JSON object", got=json_kind(content))
    return content
