"""A report that is read from its JSON gives the same JSON and the same page; what does not have its form is named."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from qalora.errors import FormatError
from qalora.parity import ParityReport, verify
from qalora.parity.html import to_html
from qalora.parity.reading import report_from_json


@pytest.fixture(scope="module")
def report(base, adapter, folded, write, tmp_path_factory: pytest.TempPathFactory) -> ParityReport:
    """The right model in our own folder, and one without the adapter; with generations and another runtime's row."""
    root = tmp_path_factory.mktemp("reading")
    places = [write("qalora", model, root / name) for name, model in (("right", folded), ("wrong", base))]
    paths = [place.parent for place in places]
    return verify(base, paths, adapter=adapter, max_tokens=40, generate=3, dynamic_int8=True)


def test_there_and_back(report: ParityReport) -> None:
    content = json.loads(json.dumps(report.to_json()))
    again = report_from_json(content, "report.json")
    assert again.to_json() == report.to_json()
    assert again.failure().partition(":")[0] == report.failure().partition(":")[0]
    assert to_html(again) == to_html(report_from_json(again.to_json(), "report.json"))


def test_of_weights_alone(base, folded, adapter, write, tmp_path: Path) -> None:
    place = write("qalora", folded, tmp_path / "right").parent
    found = verify(base, [place], adapter=adapter, level="weights")
    again = report_from_json(found.to_json(), "report.json")
    assert again.to_json() == found.to_json()
    assert to_html(again, speed=False) == to_html(found, speed=False)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema",), "qalora.parity/9", "schema"),
        (("text",), 3, "text: expected an object"),
        (("text", "tokens"), "many", "text: tokens: expected a whole number, got 'many'"),
        (("artifacts",), {}, "artifacts: expected a list"),
        (
            ("artifacts", 0, "weights", "codes_differ"),
            None,
            r"weights\.total\.codes_differ: expected a whole number, got null",
        ),
        (("artifacts", 0, "weights", "code_at"), [1], r"code_at: expected 2 values"),
        (("artifacts", 0, "gates", 0, "status"), "fine", r"gates\[0\]\.status: expected pass or fail"),
        (("artifacts", 0, "runs", 0, "lost"), "none", r"runs\[0\]\.lost: expected a number"),
        (("artifacts", 0, "runs", 0, "logits"), {"tokens": 1}, r"logits\.max: this key is missing"),
        (("artifacts", 0, "runs", 0, "lost"), 10**400, r"runs\[0\]\.lost: expected a number"),
        (("artifacts", 0, "weights", "error_max"), 10**400, r"weights\.total\.error_max: expected a number"),
        (("artifacts", 0, "weights"), [], r"artifacts\[0\]\.weights: expected an object, got \[\]"),
        (("noise",), 1, "noise: expected an object, got 1"),
        (("more",), 1, r"report\.json: more: unknown key"),
        (("artifacts", 0, "runs", 0, "more"), 1, r"runs\[0\]\.more: unknown key"),
    ],
)
def test_what_has_another_form_is_named(report: ParityReport, path: tuple[Any, ...], value: Any, said: str) -> None:
    content = copy.deepcopy(report.to_json())
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(FormatError, match=said):
        report_from_json(content, "report.json")
