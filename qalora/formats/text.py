"""Text of files and arguments that nobody vouches for: characters that UTF-8 can hold, or one sentence with the line.

Python holds half of a character that UTF-16 writes as two, which JSON's escape for one alone is (\\ud83d), and a byte
of an argument or path that is not UTF-8 (\\udcff). Tokenizers raise on both, and no file of ours can hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qalora.errors import FormatError
from qalora.formats.files import read_limited

__all__ = ["check_text", "decode_text", "read_utf8"]


def decode_text(data: bytes, where: str, *, line: int = 1, mark: bool = False) -> str:
    """UTF-8 text; FormatError, with the line, for a byte that is not UTF-8, and for one of 0, which no text has.

    line  the number of the first line of `data` in what `where` names
    mark  whether a byte order mark in front is a character of the text; it is passed over otherwise
    """
    at = data.find(b"\0")
    try:
        text = data.decode("utf-8" if mark else "utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.start + len(data) - len(error.object)  # the codec counts from behind the mark
        at = wrong if at < 0 else min(at, wrong)
    else:
        if at < 0:
            return text
    line += data.count(b"\n", 0, at)
    got = f"the byte {data[at]:#04x}"
    raise FormatError(f"{where}:{line}", expected="UTF-8 text", got=got, todo="save it as UTF-8")


def read_utf8(path: Path, limit: int, *, mark: bool = False) -> str:
    """The text of a file of at most `limit` bytes; FormatError as `decode_text`."""
    return decode_text(read_limited(path, limit), str(path), mark=mark)


def check_text(value: object, where: str) -> None:
    """FormatError for a text that UTF-8 cannot hold, also where it is in a list, or is a value or key of an object."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            _check(part, where)
        elif isinstance(part, Mapping):
            left += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            left += part


def _check(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = text[error.start]
        what = "a byte that is not UTF-8" if "\udc80" <= at <= "\udcff" else "half of a character"
        raise FormatError(
            where, expected="text that UTF-8 can hold", got=f"{what} (\\u{ord(at):04x})", todo="mend the text"
        ) from None
