"""Recipes as text: the line of every key, and one sentence with file and line for whatever is wrong."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora.errors import InputError
from qalora.release.recipe import LIMIT, Key, Section, check_recipe, read_recipe
from qalora.release.recipe_text import commented_recipe, schema_tables, toml_value
from qalora.release.toml_lines import key_lines

HARD = r'''
# [not.a.section]   key = 1
top = "a # no comment, a \" quote \\"  # a comment with = and [
lit = 'C:\' # "
many = """
[nor.this]
rank = 3 \""" still
""""
more = \'\'\'
x = 1
\'\'\'
[a]
list = [
  1,  # ]
  "two ]",
  [3, { y = 1 }],
]
b.c = 2026-01-02 03:04:05
"quoted # key" . 'd' = { e = 1, f.g = "}" }
[ "a b" . c ] # header
k = +1_000.5e-3
[[tables]]
one = 1
[[tables]]
two = 2
[a.h]
'''.replace("\\'", "'")


def test_every_key_has_its_line() -> None:
    tomllib.loads(HARD)
    assert key_lines(HARD) == {
        ("top",): 3,
        ("lit",): 4,
        ("many",): 5,
        ("more",): 9,
        ("a",): 12,
        ("a", "list"): 13,
        ("a", "list", "y"): 16,
        ("a", "b"): 18,
        ("a", "b", "c"): 18,
        ("a", "quoted # key"): 19,
        ("a", "quoted # key", "d"): 19,
        ("a", "quoted # key", "d", "e"): 19,
        ("a", "quoted # key", "d", "f"): 19,
        ("a", "quoted # key", "d", "f", "g"): 19,
        ("a b", "c"): 20,
        ("a b", "c", "k"): 21,
        ("tables",): 22,
        ("tables", "one"): 23,
        ("tables", "two"): 25,
        ("a", "h"): 26,
    }


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)
VALUES = st.one_of(st.integers(-9, 9), st.booleans(), TEXTS, st.lists(TEXTS, max_size=3))


@given(st.lists(st.tuples(TEXTS, VALUES, st.integers(0, 2), TEXTS), unique_by=lambda row: row[0], max_size=8))
def test_lines_of_any_document(rows: list[tuple[str, Any, int, str]]) -> None:
    text, expected = "", {}
    for name, value, blank, comment in rows:
        text += "\n" * blank
        expected[(name,)] = text.count("\n") + 1
        text += f"{toml_value(name)} = {toml_value(value)}  # {comment}\n"
    assert {(name,): value for name, value in tomllib.loads(text).items()} == {(n,): v for n, v, _, _ in rows}
    assert key_lines(text) == expected


def whole(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError
    return value


SECTIONS = [
    Section(
        name="",
        help="",
        keys=(Key(name="work", help="Where.", expected="text", check=lambda value: value, example="w", default="w"),),
    ),
    Section(
        name="train",
        help="Train it.",
        required=True,
        keys=(
            Key(name="rank", help="The rank.", expected="an integer", check=whole, example=1, required=True),
            Key(name="save-every", help="", expected="an integer", check=whole, example=1, default=3),
        ),
    ),
    Section(name="more", help="And more.", keys=(), acts=True),
]


def checked(folder: Path, text: str) -> dict[str, dict[str, Any]]:
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return check_recipe(read_recipe(folder / "recipe.toml"), SECTIONS)


def test_what_a_recipe_says(tmp_path: Path) -> None:
    said = checked(tmp_path, "work = 'here'\n[train]\nrank = 4\nsave_every = 5\n")
    assert said == {"": {"work": "here"}, "train": {"rank": 4, "save-every": 5}}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("\n\n[train]\nrank = 'many'", "4", '[train] rank: expected an integer, got "many"; the rank'),
        ("[train]\n\nrnak = 1", "3", "[train] rnak: expected a key of this section, got another name; did you mean ra"),
        ("[trian]\nrank = 1", "1", "[trian]: expected one of the sections train, more, got another name; did you mean"),
        ("wrok = 1\n[train]\nrank = 1", "1", "wrok: expected a key of the recipe, got another name; did you mean work"),
        ("# a\ntrain = 3", "2", "train: expected a section, [train], got 3"),
        ("# a\n[[train]]\nrank = 1", "2", "train: expected a section"),
        ("[more]\n\n[train]\nsave-every = 1", "3", "[train] rank: expected an integer, got none; the rank"),
        ("work = 'w'\n\n", "1", "[train]: expected a section with rank, got none; train it"),
        ("[train]\nrank = 1\nsave-every = 1\nsave_every = 2", "4", "save_every: expected it once, got it twice"),
        ("[train]\nrank = 1979-05-27", "2", "expected an integer, got 1979-05-27"),
        ("[train]\nrank = {a = 1}", "2", 'expected an integer, got {"a": 1}'),
        ("[train]\nrank = 1\nrank = 2\n", "3:9", "expected TOML, got a mistake (Cannot overwrite a value)"),
        ("[train]\nrank = \n", "2:8", "expected TOML, got a mistake (Invalid value)"),
        ('[train]\nrank = """\n', "2", "expected TOML"),
        ("x = " + "[" * 10_000, "1", "expected TOML of a recipe's size, got RecursionError"),
        ("x = " + "1" * 10_000, "1", "expected TOML of a recipe's size, got ValueError"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_its_line(tmp_path: Path, text: str, line: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        checked(tmp_path, text)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'recipe.toml'}:{line}: ")
    assert words in said
    assert "\n" not in said


def test_bytes_that_are_no_text_and_files_that_are_too_long(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"\n\n# \xff\n")
    with pytest.raises(InputError, match=r"recipe\.toml:3: expected UTF-8 text, got the byte 0xff"):
        read_recipe(tmp_path / "recipe.toml")
    (tmp_path / "recipe.toml").write_bytes(b"#" * (LIMIT + 1))
    with pytest.raises(InputError, match="expected at most"):
        read_recipe(tmp_path / "recipe.toml")


def test_lines_that_end_in_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"[train]\r\nrank = 2\r\n")
    source = read_recipe(tmp_path / "recipe.toml")
    assert source.lines[("train", "rank")] == 2
    assert check_recipe(source, SECTIONS)["train"] == {"rank": 2}


def test_the_commented_recipe_and_the_tables(tmp_path: Path) -> None:
    text = commented_recipe(SECTIONS)
    assert checked(tmp_path, text) == {"": {}, "train": {"rank": 1}}
    assert "# The rank. (an integer; required)\nrank = 1\n" in text
    assert "\n#save-every = 1\n" in text
    tables = schema_tables(SECTIONS)
    assert "| `rank` | an integer | required | The rank. |" in tables
    assert "| `save-every` | an integer | `3` |  |" in tables
