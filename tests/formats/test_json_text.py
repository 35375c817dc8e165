"""JSON that nobody vouches for is parsed, or refused with what is wrong and where."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qalora.errors import FormatError, InputError
from qalora.formats.json_text import parse_json, read_json, read_json_object
from qalora.releasing.consistency import read_report
from qalora.releasing.manifest import read_manifest

NONE: list[tuple[str | bytes, str]] = [
    ("", "x.json: expected JSON, got text that is no JSON (Expecting value at line 1, column 1)"),
    ('{"a": 1,\n  b}', "text that is no JSON (Expecting property name enclosed in double quotes at line 2, column 3)"),
    (b'{"a": "\xff"}', "x.json: expected JSON, got bytes that are not UTF-8"),
    ("[" * 100_000, "x.json: expected JSON, got lists or objects nested too deeply"),
    ("1" * 5000, "x.json: expected JSON, got an integer of too many digits"),
]


@pytest.mark.parametrize(("content", "sentence"), NONE)
def test_what_is_no_json(content: str | bytes, sentence: str) -> None:
    with pytest.raises(FormatError) as raised:
        parse_json(content, "x.json", todo="fetch it again")
    assert sentence in str(raised.value)
    assert str(raised.value).endswith("; fetch it again")


def test_a_key_that_stands_twice_is_refused_where_that_is_asked() -> None:
    twice = '{"a": {"b": 1, "b": 2}}'
    assert parse_json(twice, "x.json") == {"a": {"b": 2}}
    with pytest.raises(FormatError, match=r"^x\.json: a key appears twice$"):
        parse_json(twice, "x.json", strict=True)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf["\xc3\xa9"]')
    assert read_json(path, 20) == ["é"]
    with pytest.raises(FormatError, match="Unexpected UTF-8 BOM"):
        read_json(path, 20, strict=True)
    with pytest.raises(FormatError, match="expected a JSON object, got a list"):
        read_json_object(path, 20)
    with pytest.raises(FormatError, match="expected at most 8 bytes, got 9"):
        read_json(path, 8)
    with pytest.raises(InputError, match="No such file"):
        read_json(tmp_path / "y.json", 8)


@pytest.mark.parametrize(("name", "read"), [("manifest.json", read_manifest), ("report.json", read_report)])
def test_a_file_that_is_too_large_is_said_to_be_that(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 1 << 40)  # sparse: it takes no room
    with pytest.raises(FormatError, match=rf"{name}: expected at most \d+ bytes, got {1 << 40}$"):
        read(tmp_path)
