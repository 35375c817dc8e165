"""Recipes as text: the line of every key, and one sentence with file and line for whatever is wrong."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora.errors import InputError
from qalora.options.recipe import Recipe
from qalora.pipeline.recipe import LIMIT, read_recipe
from qalora.pipeline.recipe_text import commented_recipe, schema_tables, toml_value
from qalora.pipeline.toml_lines import key_lines

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


BARE = "[base]\nmodel = 'me/it'\n[export]\nto = ['gguf']\n[release]\noutput = 'dist'\n"
"""What no recipe can be without, on six lines."""


def checked(folder: Path, text: str) -> Recipe:
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return read_recipe(folder / "recipe.toml")[1]


def test_what_a_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    said = checked(tmp_path, f"work = 'here'\n{BARE}[train]\ndata = 'text.txt'\nrank = 4\nsave_every = 5\n")
    assert said.top.work == tmp_path / "here"
    assert said.base.model == "me/it"
    assert said.train is not None
    assert (said.train.rank, said.train.save_every, said.train.data) == (4, 5, str(tmp_path / "text.txt"))
    assert said.release.out == tmp_path / "dist"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("\n[train]\nrank = 'many'", "9", "[train] rank: expected an integer >= 1, or auto, got 'many'; rank of the"),
        (
            "[train]\n\nrnak = 1",
            "9",
            "[train] rnak: expected a key of this section, got an unknown name; did you mean ra",
        ),
        ("[trian]\nrank = 1", "7", "[trian]: expected one of the sections base, quantize, train, adapter, export, ver"),
        ("# a\n[[train]]\nrank = 1", "8", "train: expected a section"),
        ("[verify]\n\n[train]\nsave-every = 1", "9", "[train] data: expected text, got none; data to train on"),
        ("[train]\nrank = 1\nsave-every = 1\nsave_every = 2", "10", "save_every: expected the key once, got it twice"),
        ("[train]\nrank = 1979-05-27", "8", "expected an integer >= 1, or auto, got '1979-05-27'"),
        ("[train]\nrank = {a = 1}", "8", 'expected an integer >= 1, or auto, got {"a": 1}'),
        ("[train]\nrank = 1\nrank = 2\n", "9:9", "expected TOML, got a mistake (Cannot overwrite a value)"),
        ("[train]\nrank = \n", "8:8", "expected TOML, got a mistake (Invalid value)"),
        ('[train]\nrank = """\n', "8", "expected TOML"),
        ("x = " + "[" * 10_000, "1", "expected TOML of a recipe's size, got values nested too deeply"),
        ("x = " + "1" * 10_000, "1", "expected TOML of a recipe's size, got a number of too many digits"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_its_line(tmp_path: Path, text: str, line: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        checked(tmp_path, f"{BARE}{text}")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'recipe.toml'}:{line}: ")
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (f"wrok = 1\n{BARE}", "1", "wrok: expected a key of the recipe, got an unknown name; did you mean work"),
        (f"# a\ntrain = 3\n{BARE}", "2", "train: expected a section, [train], got 3"),
        (
            "work = 'w'\n\n",
            "1",
            "[base]: expected a section with model, got none; the model that everything starts from",
        ),
    ],
)
def test_what_is_wrong_before_the_first_section(tmp_path: Path, text: str, line: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        checked(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.toml'}:{line}: ")
    assert words in str(caught.value)


def test_bytes_that_are_no_text_and_files_that_are_too_long(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"\n\n# \xff\n")
    with pytest.raises(InputError, match=r"recipe\.toml:3: expected UTF-8 text, got the byte 0xff"):
        read_recipe(tmp_path / "recipe.toml")
    (tmp_path / "recipe.toml").write_bytes(b"#" * (LIMIT + 1))
    with pytest.raises(InputError, match="expected at most"):
        read_recipe(tmp_path / "recipe.toml")


def test_lines_that_end_in_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(BARE.replace("\n", "\r\n").encode())
    source, recipe = read_recipe(tmp_path / "recipe.toml")
    assert source.lines[("release", "output")] == 6
    assert recipe.export.targets == ("gguf",)


def test_the_tables_have_what_the_record_says() -> None:
    tables = schema_tables()
    assert (
        "| `rank` | an integer >= 1, or auto | `16` "
        "| Rank of the adapter. auto chooses a rank for each layer, within budget. |" in tables
    )
    assert "| `output` | a path | required |" in tables
    assert "\n#save-every = 100\n" in commented_recipe()
