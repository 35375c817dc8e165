"""Records of every type that the codec knows, there and back; and what is not as it has to be, with its place."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qalora.errors import FormatError
from qalora.formats.record_json import Finite, Key, Only, decode, encode, like

Name = Annotated[str, like("[a-z]+", "a name")]
Size = Annotated[int, Only(lambda number: number >= 0, "a size"), Key("bytes")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    kind: Literal["round"] = "round"
    radius: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    kind: Literal["square"] = "square"
    sides: tuple[int, int]

    def __post_init__(self) -> None:
        if self.sides[0] != self.sides[1]:
            raise FormatError("sides", expected="two of one length", got=f"{self.sides}", todo="measure again")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    text: str
    lines: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    text: str
    colour: Literal["red", "green"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seldom:
    SPARSE: ClassVar[bool] = True

    name: str | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    name: Name
    nbytes: Size
    shapes: tuple[Round | Square, ...] = ()
    said: Written | Painted | None = None
    weight: float = 0.0
    exact: Finite = 0.0
    names: frozenset[str] = frozenset()
    sizes: Mapping[str, Size] | None = None
    seldom: Seldom | None = None
    right: bool = False
    open: Mapping[str, Any] | None = None


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=5)
SIZES = st.integers(0, 1 << 70)
WHOLES = st.builds(
    Whole,
    name=st.from_regex("[a-z]+", fullmatch=True),
    nbytes=SIZES,
    shapes=st.lists(
        st.builds(Round, radius=NUMBERS) | st.integers().map(lambda side: Square(sides=(side, side))), max_size=3
    ).map(tuple),
    said=st.none()
    | st.builds(Written, text=TEXTS, lines=SIZES)
    | st.builds(Painted, text=TEXTS, colour=st.sampled_from(["red", "green"])),
    weight=NUMBERS,
    exact=NUMBERS,
    names=st.frozensets(TEXTS, max_size=3),
    sizes=st.none() | st.dictionaries(TEXTS, SIZES, max_size=3),
    seldom=st.none() | st.builds(Seldom, name=st.none() | TEXTS, words=st.lists(TEXTS, max_size=2).map(tuple)),
    right=st.booleans(),
    open=st.none() | st.dictionaries(TEXTS, st.none() | TEXTS | st.lists(st.booleans(), max_size=2), max_size=2),
)


@given(WHOLES)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_there_and_back(whole: Whole) -> None:
    assert decode(Whole, json.loads(json.dumps(encode(whole))), "x.json") == whole


def test_what_it_looks_like() -> None:
    whole = Whole(
        name="a",
        nbytes=3,
        shapes=(Square(sides=(2, 2)), Round(radius=0.123)),
        names=frozenset("ba"),
        seldom=Seldom(words=("b",)),
    )
    assert encode(whole, lambda number: round(number, 1)) == {
        "name": "a",
        "bytes": 3,
        "shapes": [{"kind": "square", "sides": [2, 2]}, {"kind": "round", "radius": 0.1}],
        "said": None,
        "weight": 0.0,
        "exact": 0.0,
        "names": ["a", "b"],
        "sizes": None,
        "seldom": {"words": ["b"]},
        "right": False,
        "open": None,
    }


LEAST = {"name": "a", "bytes": 1}


def test_a_number_that_is_not_finite() -> None:
    assert math.isnan(decode(Whole, {**LEAST, "weight": None}, "x").weight)
    assert math.isinf(decode(Whole, {**LEAST, "weight": -math.inf}, "x").weight)
    assert decode(Whole, {**LEAST, "weight": 7, "exact": 10**300}, "x").weight == 7.0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "x.json: expected an object, got []"),
        ({**LEAST, "name": "A1"}, "x.json: name: expected a name, got 'A1'"),
        ({**LEAST, "name": "a\n"}, r"x.json: name: expected a name, got 'a\n'"),
        ({"name": "a"}, "x.json: bytes: this key is missing"),
        ({**LEAST, "nbytes": 1}, "x.json: nbytes: unknown key; update qalora"),
        ({**LEAST, "a\nb" + 100 * "c": 1}, f"x.json: a?b{77 * 'c'}: unknown key; update qalora"),
        ({**LEAST, "bytes": -1}, "x.json: bytes: expected a size, got -1"),
        ({**LEAST, "bytes": True}, "x.json: bytes: expected a whole number, got true"),
        ({**LEAST, "bytes": 1.0}, "x.json: bytes: expected a whole number, got 1.0"),
        ({**LEAST, "weight": "1"}, "x.json: weight: expected a number, got '1'"),
        ({**LEAST, "weight": True}, "x.json: weight: expected a number, got true"),
        ({**LEAST, "weight": 10**400}, f"x.json: weight: expected a number, got 1{55 * '0'}..."),
        ({**LEAST, "exact": None}, "x.json: exact: expected a finite number, got null"),
        ({**LEAST, "exact": math.nan}, "x.json: exact: expected a finite number, got nan"),
        ({**LEAST, "right": 1}, "x.json: right: expected true or false, got 1"),
        ({**LEAST, "names": "a"}, "x.json: names: expected a list, got 'a'"),
        ({**LEAST, "names": ["a", []]}, "x.json: names[1]: expected text, got []"),
        ({**LEAST, "sizes": {"b c": 1, "d": -1}}, "x.json: sizes.d: expected a size, got -1"),
        ({**LEAST, "shapes": [{}]}, "x.json: shapes[0].kind: expected round or square, got null; update qalora"),
        ({**LEAST, "shapes": [{"kind": []}]}, "shapes[0].kind: expected round or square, got []; update qalora"),
        ({**LEAST, "shapes": [{"kind": "round"}]}, "x.json: shapes[0].radius: this key is missing"),
        (
            {**LEAST, "shapes": [{"kind": "square", "sides": [1]}]},
            "x.json: shapes[0].sides: expected 2 values, got 1",
        ),
        (
            {**LEAST, "shapes": [{"kind": "square", "sides": [1, 2]}]},
            "x.json: shapes[0]: sides: expected two of one length, got (1, 2); measure again",
        ),
        ({**LEAST, "said": {"text": ""}}, "x.json: said.lines: this key is missing"),
        ({**LEAST, "said": {"text": "", "colour": "blue"}}, "x.json: said.colour: expected red or green, got 'blue'"),
        ({**LEAST, "open": []}, "x.json: open: expected an object, got []"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(content: Any, sentence: str) -> None:
    with pytest.raises(FormatError) as raised:
        decode(Whole, content, "x.json")
    assert str(raised.value) in (sentence, f"x.json: {sentence}")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "round", "x"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["name", "kind", "text", "sides", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def told(record: Whole) -> tuple[str, list[str]]:
    """Its text, and its names in order: of a set the text has those as they were put in."""
    return repr(replace(record, names=frozenset())), sorted(record.names)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(encode(Whole(name="a", nbytes=0)))), ANY)
def test_any_value_in_any_place(key: str, value: Any) -> None:
    """It is refused, with its place, or the record is that of its own JSON; a NaN is no other NaN."""
    try:
        found = decode(Whole, {**LEAST, key: value}, "x.json")
    except FormatError as error:
        assert str(error).startswith(f"x.json: {key}")
        return
    assert told(decode(Whole, encode(found), "x.json")) == told(found)
