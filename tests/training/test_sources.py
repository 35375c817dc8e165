"""What a file is taken for: by its content, whatever its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from qalora.errors import InputError
from qalora.testing import byte_tokenizer
from qalora.training.data import read_documents
from qalora.training.documents import Account

ROWS = [{"prompt": "What is 2+2?", "completion": "4"}, {"prompt": "And 3+3?", "completion": "6"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path: Path, content: str | bytes) -> tuple[list[str], Account]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    account = Account()
    return [document.text for document in read_documents(str(path), byte_tokenizer(), account)], account


@pytest.mark.parametrize("name", ["DATA.JSONL", "data.txt", "data.json", "data", "data.ndjson", "data.csv", "data.log"])
@pytest.mark.parametrize(
    ("content", "form"),
    [
        (LINES, "JSON lines"),
        ("\n\n" + LINES.replace("\n", "\r\n"), "JSON lines"),
        (b"\xef\xbb\xbf" + LINES.encode(), "JSON lines"),
        (json.dumps(ROWS), "a JSON list"),
        (json.dumps(ROWS, indent=2), "a JSON list"),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), "JSON objects"),
    ],
    ids=["lines", "lines of Windows", "a mark", "a list", "a list over lines", "objects over lines"],
)
def test_rows_are_rows_whatever_the_file_is_called(name: str, content: str | bytes, form: str, tmp_path: Path) -> None:
    texts, account = read(tmp_path / name, content)
    assert texts == ["What is 2+2?4", "And 3+3?6"]
    assert account.form == form
    assert account.rows == {"prompt and completion": 2}
    assert not account.note_lines()


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.txt", "Words.\nMore words.", ""),
        ("a", "[A link](there) begins this one.", "begins with [ and is not JSON"),
        ("a.md", "{{ a template }} begins this one.", "begins with { and is not JSON"),
        ("a.txt", "{\n  int x = 3;\n}\n", "begins with { and is not JSON"),
        ("a.csv", "some, words, with commas\n", "its name ends in .csv"),
        ("a.txt", 'Text about JSON.\n{"text": "a row"}\nand more\nand more\n', ""),
    ],
)
def test_text_is_text_and_doubts_are_said(name: str, content: str, note: str, tmp_path: Path) -> None:
    texts, account = read(tmp_path / name, content)
    assert texts == [content]
    assert account.form == "plain text"
    assert len(account.note_lines()) == bool(note)
    assert all(note in said and str(tmp_path / name) in said for said in account.note_lines())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", '{"text": "a"}\n{"text": \n', r"a.txt:2: expected a JSON object"),
        ("a.txt", '{"text": "a",}\n{"text": "b",}\n', r"a.txt:1: expected a JSON object"),
        ("a.txt", '{"text": "a"},\n{"text": "b"},\n', r"a.txt:1: expected a JSON object"),
        ("a.txt", "{'text': 'Python writes it so'}\n", r"a.txt:1: expected a JSON object"),
        ("a.txt", "# rows\n" + LINES, r"a.txt:1: expected a JSON object"),
        ("a.txt", '[{"text": "a"},\n {"text": "b"}\n {"text": "c"}]', r"a.txt:3: expected a JSON object"),
        ("a.jsonl", "just words\n", r"a.jsonl:1: expected a JSON object"),
        ("a.JSON", '"a string"', r"a.JSON:1: expected a JSON object, got text"),
        ("a.json", '["a", "b"]', r"a.json:1: expected a JSON object, got a list with text in it"),
        ("a.json", '[{"text": "a"}, 3]', r"a.json:1: expected a JSON object, got a list with a number in it"),
        ("a.txt", '["a", "b"]', r"a.txt:1: expected a JSON object, got a list with text in it"),
        ("a", '[[{"role": "user", "content": "a"}]]', r"a:1: expected a JSON object, got a list with a list in it"),
        (
            "a.jsonl",
            '[{"text": "a"}]\n[{"text": "b"}]\n',
            r"a.jsonl:1: expected a JSON object, got a list on each line",
        ),
        ("a.txt", '["a", "b"]\n["c", "d"]\n', r"a.txt:1: expected a JSON object, got a list on each line"),
        ("a.jsonl", f'{{"text": "a", "n": {"9" * 5000}}}', r"a.jsonl:1: .* got an integer of too many digits"),
        ("a.jsonl", '{"instruction": "a", "output": null}\n', r"a.jsonl:1: .* got instruction, output \(null\)"),
        ("a.json", '{"data": [{"text": "a"}]}', r"a.json:1: expected the key text, .* got data"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', r"a.jsonl:1: a key appears twice"),
        ("a.jsonl", '[\n{"text": "a"},\n\n{"body": "b"}]', r"a.jsonl:4: expected the key text"),
        ("a.csv", 'prompt,completion\n"What?","4"\n', r"a.csv:1: .* a table with the columns completion, prompt"),
        ("a", "instruction\tinput\toutput\na\tb\tc\n", r"a:1: .* a table with the columns input, instruction, output"),
        ("a.tsv", "text\nwords\n", r"a.tsv:1: .* a table with the columns text"),
    ],
)
def test_what_is_neither_is_refused_with_its_line(name: str, content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        read(tmp_path / name, content)


@pytest.mark.parametrize("half", ["\\ud83d", "a\\ude00b", "\\uDBFF\\u0041"])
@pytest.mark.parametrize(
    "row",
    [
        '{"text": "%s"}',
        '{"prompt": "a", "completion": "%s"}',
        '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "b"}]}',
        '{"text": "a", "id": ["%s"]}',
        '{"text": "a", "%s": 3}',
    ],
)
def test_half_of_a_character_is_named_by_its_line(row: str, half: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.jsonl:2: expected text that UTF-8 can hold, got half of a character"):
        read(tmp_path / "a.jsonl", '{"text": "whole: \\ud83d\\ude00"}\n' + row.replace("%s", half) + "\n")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.txt", b"one\ntwo\nth\xffree\n", 3),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 2),
        ("a.json", b'[\n{"text": "a"},\n{"text": "\xe9"}]', 3),
        ("a.txt", "UTF-16, as Windows writes it".encode("utf-16"), 1),
        ("a.txt", b"\xef\xbb\xbfa\n\n\x80", 3),
        ("a.txt", b"half a letter \xc3", 1),
        ("a.txt", "UTF-16 without a mark".encode("utf-16-le"), 1),
        ("a.txt", b"one\ntwo\0\n", 2),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\0"}\n', 2),
    ],
)
def test_what_is_not_utf_8_is_named_by_its_line(name: str, content: bytes, line: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{name}:{line}: expected UTF-8 text, got the byte 0x"):
        read(tmp_path / name, content)


@pytest.mark.parametrize(
    ("begin", "kind"),
    [
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"\x1f\x8b\x08", "a gzip file"),
        (b"PK\x03\x04", "a ZIP file"),
        (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
        (b"ARROW1\0\0", "an Arrow file"),
    ],
)
def test_other_files_are_named(begin: bytes, kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"a.bin: expected text, or rows in JSON, got {kind}; write its rows as JSON"):
        read(tmp_path / "a.bin", begin + b"words\n" * 9)


def test_an_escape_of_a_whole_character_is_text(tmp_path: Path) -> None:
    texts, _ = read(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00 \\u00e9"}\n')
    assert texts == ["\U0001f600 \u00e9"]


@pytest.mark.parametrize("name", ["NONE.TXT", "none.JSONL"])
def test_a_file_that_is_not_there_is_no_dataset(name: str) -> None:
    with pytest.raises(InputError, match=r"no such file$"):
        list(read_documents(name, Any))
