"""Options as fields: what a type means, what is checked, how a value is written on a command line, in TOML, in JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora.errors import InputError, about
from qalora.options import Options, fields_of, option
from qalora.options.export import Export
from qalora.options.quantize import Quantize
from qalora.options.recipe import SECTIONS
from qalora.options.train import TrainOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Every(Options):
    """One field of each kind."""

    flag: bool = option(False, "A flag.")
    count: int = option(3, "A number.", low=1, high=9)
    share: float = option(0.5, "A share.", above=0, high=1)
    word: Literal["one", "two"] = option("one", "A word.")
    rank: int | Literal["auto"] = option(16, "A number or a word.", low=1)
    size: int | None = option(None, "Bytes.", size=True, low=1)
    group: int | None = option(32, "A number, or none.", low=1, empty="row")
    place: Path | None = option(None, "A path.", place="input")
    names: tuple[str, ...] = option((), "Many.")
    known: frozenset[str] = option(frozenset(), "Some of these.", known=lambda: ("a", "b"))
    beside: dict[str, int] | None = None


KEYS = {one.name: one for one in fields_of(Every)}


def test_what_is_no_option_is_none() -> None:
    assert "beside" not in KEYS
    assert Every(beside={"a": 1}).beside == {"a": 1}


@pytest.mark.parametrize(
    ("name", "value", "held"),
    [
        ("share", 1, 1.0),
        ("rank", "auto", "auto"),
        ("group", None, None),
        ("place", "a/b", Path("a/b")),
        ("names", "one", ("one",)),
        ("names", ["one", "two"], ("one", "two")),
        ("known", ["b", "a", "a"], frozenset({"a", "b"})),
        ("size", 5, 5),
    ],
)
def test_values_in_their_own_type(name: str, value: Any, held: Any) -> None:
    made = getattr(Every(**{name: value}), name)
    assert made == held
    assert type(made) is type(held)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("flag", 1, "true or false"),
        ("count", 0, "an integer from 1 to 9"),
        ("count", 10, "an integer from 1 to 9"),
        ("count", True, "an integer from 1 to 9"),
        ("count", 2.0, "an integer from 1 to 9"),
        ("count", None, "an integer from 1 to 9"),
        ("share", 0, "a number > 0 and <= 1"),
        ("share", float("nan"), "a number > 0 and <= 1"),
        ("share", float("inf"), "a number > 0 and <= 1"),
        ("share", "much", "a number > 0 and <= 1"),
        ("word", "three", "one or two"),
        ("word", 1, "one or two"),
        ("rank", "many", "an integer >= 1, or auto"),
        ("rank", 0, "an integer >= 1, or auto"),
        ("rank", 1 << 63, "an integer >= 1, or auto"),
        ("place", "a\0b", "a path"),
        ("place", 3, "a path"),
        ("names", [1], "text"),
        ("known", ["c"], "one of a, b"),
    ],
)
def test_what_it_does_not_take_is_one_sentence(name: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        Every(**{name: value})
    assert caught.value.field == name
    assert caught.value.expected == expected
    assert str(caught.value).startswith(f"{name}: expected {expected}, got ")


@pytest.mark.parametrize(
    ("name", "text", "held"),
    [
        ("count", "+7", 7),
        ("share", "1e-1", 0.1),
        ("rank", "auto", "auto"),
        ("rank", "8", 8),
        ("size", "2 KiB", 2048),
        ("size", "1.5MB", 1_500_000),
        ("group", "row", None),
        ("group", "64", 64),
        ("place", "x", Path("x")),
    ],
)
def test_text_of_a_command_line(name: str, text: str, held: Any) -> None:
    assert KEYS[name].parse(text) == held


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("count", "1.0"),
        ("count", "\N{SUPERSCRIPT TWO}"),
        ("count", ""),
        ("share", "x"),
        ("size", "-1MB"),
        ("size", "0"),
    ],
)
def test_text_that_is_none(name: str, text: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: expected "):
        KEYS[name].parse(text)


@pytest.mark.parametrize(
    ("name", "value"), [("names", "one"), ("names", [""]), ("count", "3"), ("flag", "true"), ("size", "a lot")]
)
def test_what_toml_does_not_say(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name}: expected "):
        KEYS[name].take(value)


def test_json_and_back() -> None:
    made = Every(count=4, rank="auto", group=None, place="a", names=("x", "y"), known=["b", "a"], size=12)
    told = made.to_json()
    assert told["known"] == ["a", "b"]
    assert told["place"] == "a"
    assert Every(**told) == made
    assert Every(**{**told, "count": 5}).count == 5


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text("ab1-.", max_size=3), st.floats())


@given(st.dictionaries(st.sampled_from(sorted(KEYS)), VALUES))
def test_anything_is_taken_or_refused_by_name(values: dict[str, Any]) -> None:
    try:
        made = Every(**values)
    except InputError as error:
        assert error.field in values
    else:
        assert Every(**made.to_json()) == made


def test_errors_are_spelled_as_whoever_shows_them_does() -> None:
    with pytest.raises(InputError) as caught:
        Quantize(fit_minima=True)
    assert str(caught.value) == "`fit_minima` needs the layers' inputs on a text; give one: `calibration`"
    shown = caught.value.spelled(lambda name: f"--{name.replace('_', '-')}")
    assert shown == "--fit-minima needs the layers' inputs on a text; give one: --calibration"
    with pytest.raises(InputError) as caught:
        TrainOptions(data="a", out="b", learning_rate=2)
    assert caught.value.spelled(lambda name: f"--{name.replace('_', '-')}").startswith("--learning-rate: expected ")


def test_an_error_is_about_an_option() -> None:
    with pytest.raises(InputError) as caught, about("text"):
        raise InputError("a.txt", expected="UTF-8 text")
    assert caught.value.field == "text"
    with pytest.raises(InputError) as caught, about("text"):
        raise InputError(field="data", expected="text")
    assert caught.value.field == "data"


def records() -> Iterable[type[Options]]:
    return [section.record for section in SECTIONS]


def test_no_two_options_of_a_command_have_one_flag() -> None:
    for record in records():
        flags = [one.flag for one in fields_of(record)]
        assert len(set(flags)) == len(flags), record


def test_options_named_by_a_help_text_are_options() -> None:
    every = {one.name for record in [*records(), Export] for one in fields_of(record)} | {"train"}
    for record in records():
        for one in fields_of(record):
            assert set(re.findall(r"`([a-z_]+)`", one.help)) <= every, one.name
