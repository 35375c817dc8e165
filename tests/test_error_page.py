"""docs/errors.md, and every sentence of an error in the package: none ends in a word that says nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import qalora
from error_page import PAGE, SECTIONS, page
from qalora.errors import InputError, json_kind, shown

ROOT = Path(qalora.__file__).parent
EMPTY = re.compile(r"\b(another|others|something else|(?<!or )more|larger ones|one without|none or another)$")
"""What says nothing at the end of a sentence, or as what was found."""
REPR = re.compile(
    r"<\w[\w. ]* (object )?at 0x|\b(None|True|False|NoneType|PosixPath\(|dict_keys\()|(Error|Exception)\("
)
"""Python's own words for a value."""


def sentences() -> list[str]:
    lines = PAGE.read_text("utf-8").splitlines()
    return [re.sub(r"\\(.)", r"\1", line.removeprefix("* ")) for line in lines if line.startswith("* ")]


def test_the_page_has_every_section_and_no_path() -> None:
    text = PAGE.read_text("utf-8")
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == [*SECTIONS.values()]
    assert len(sentences()) == len(set(sentences())) > 150
    assert not re.search(r"/(tmp|root|home|work)/", text)


def test_every_sentence_on_the_page_reads_well() -> None:
    for sentence in sentences():
        assert not EMPTY.search(sentence), sentence
        assert not REPR.search(sentence), sentence
        assert sentence.count(": expected ") <= 1, sentence
        assert not re.search(r", got (an? )?(\w+ed|found|kept|held|given|told|said)$", sentence), sentence


def test_the_page_lists_each_sentence_once() -> None:
    first, second = list(SECTIONS.values())[:2]
    text = page([(first, "b"), (second, "a *"), (first, "a"), (second, "b"), (first, "a")])
    assert [line for line in text.splitlines() if line.startswith(("#", "*"))][:7] == [
        "# Errors",
        f"## {first}",
        "* a",
        "* b",
        f"## {second}",
        r"* a \*",
        f"## {list(SECTIONS.values())[2]}",
    ]


def errors() -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Where each error of ours is made, and its keywords."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
                place = f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"
                yield place, {str(one.arg): one.value for one in node.keywords}


def test_no_error_in_the_package_got_a_word_that_says_nothing() -> None:
    seen = 0
    for place, keywords in errors():
        for key, value in keywords.items():
            if key not in ("expected", "got", "todo"):
                continue
            text = ast.unparse(value)
            assert not re.search(r"\brepr\(|__name__", text), place
            if isinstance(value, ast.Constant):
                seen += 1
                assert not EMPTY.search(str(value.value)), place
    assert seen > 300


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "'a'"),
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        (float("nan"), "nan"),
        ([1, None, "é"], '[1, null, "é"]'),
        ({"a": (1, 2)}, '{"a": [1, 2]}'),
        (frozenset("ba"), '["a", "b"]'),
        (Path("a"), "'a'"),
        ("a\nb\x85", r"'a\nb\x85'"),
        ("x" * 100, f"'{'x' * 55}...'"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1...]"),
    ],
)
def test_values_are_shown_as_json_has_them(value: object, text: str) -> None:
    assert shown(value) == text
    assert len(text) <= 60
    assert str(InputError("a", got=shown(value))) == f"a: got {text}"


def test_a_value_that_json_has_not_is_shown_by_its_kind() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert shown(loop) == "a list"
    assert shown({(1, 2): 3}) == "an object"
    assert [json_kind(one) for one in ([], {}, "", 1, 1.0, True, None)] == [
        "a list",
        "an object",
        "text",
        "a number",
        "a number",
        "true or false",
        "null",
    ]
