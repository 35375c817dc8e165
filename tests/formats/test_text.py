"""Text of files and arguments: what UTF-8 holds, or a sentence with the line."""

from pathlib import Path

import pytest

from qalora.errors import FormatError
from qalora.formats.text import check_text, decode_text, read_utf8

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (b"\xff", 1, 0xFF),
        (b"a\nb\n\xe9 c\n", 3, 0xE9),
        (b"a\r\nb \xc3", 2, 0xC3),
        (b"\xed\xa0\xbd", 1, 0xED),
        (b"a\n\n\n\xf0\x9f\x98", 4, 0xF0),
        (b"\xc0\x80", 1, 0xC0),
    ],
)
def test_the_line_of_the_first_byte_that_is_not(mark: bytes, content: bytes, line: int, byte: int) -> None:
    with pytest.raises(FormatError, match=rf"^a\.txt:{line}: expected UTF-8 text, got the byte {byte:#04x}; save it"):
        decode_text(mark + content, "a.txt")
    with pytest.raises(FormatError, match=rf"^a\.txt:{line + 7}: "):
        decode_text(mark + content, "a.txt", line=8)


def test_a_mark_is_passed_over_unless_it_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(MARK + "é\n".encode())
    assert read_utf8(tmp_path / "a", 10) == "é\n"
    assert read_utf8(tmp_path / "a", 10, mark=True) == "\ufeffé\n"
    with pytest.raises(FormatError, match="at most 3 bytes"):
        read_utf8(tmp_path / "a", 3)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("a\ud83d", "half of a character (\\ud83d)"),
        (["x", {"y": "\ude00"}], "half of a character (\\ude00)"),
        ({"k": 1, "\ud83d": 2}, "half of a character (\\ud83d)"),
        (("a\udcff",), "a byte that is not UTF-8 (\\udcff)"),
    ],
)
def test_what_utf_8_cannot_hold_is_named_where_it_is(value: object, what: str) -> None:
    with pytest.raises(FormatError) as caught:
        check_text(value, "here")
    assert str(caught.value) == f"here: expected text that UTF-8 can hold, got {what}; mend the text"


def test_what_utf_8_can_hold_passes_however_deep_it_lies() -> None:
    deep: object = "\U0001f600 é \x00"
    for _ in range(5000):
        deep = [deep]
    for value in (deep, None, 3, {"a": [True, None, 1.5]}, "", b"\xff"):
        check_text(value, "here")
