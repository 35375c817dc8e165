"""The page: well formed, without a network, every name escaped, and every plot where there is something to plot."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qalora.cli.demo import TARGETS
from qalora.converters import target
from qalora.parity import ParityReport, verify
from qalora.parity.charts import Series, heat_map, line_chart, scatter
from qalora.parity.html import COLORS, to_html

VOID = {"meta", "br"}


class Tags(HTMLParser):
    """Checks that every tag is closed, in order; keeps their names, attributes and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def report(base, adapter, folded, write, tmp_path_factory: pytest.TempPathFactory) -> ParityReport:
    """The right model in our own folder, and one without the adapter."""
    root = tmp_path_factory.mktemp("html")
    places = [write("qalora", model, root / name) for name, model in (("right", folded), ("wrong", base))]
    return verify(base, [place.parent for place in places], adapter=adapter, level="logits", max_tokens=40)


def test_it_is_well_formed_and_asks_for_nothing(report: ParityReport) -> None:
    page = to_html(report)
    tags = Tags(page)
    assert not any({"src", "href", "srcset", "action"} & attributes.keys() for _, attributes in tags.seen)
    assert not re.search(r"url\(|@import|<script", page)
    assert "prefers-color-scheme: dark" in page
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags.seen


def test_it_shows_what_happened(report: ParityReport) -> None:
    tags = Tags(to_html(report))
    text = " ".join(tags.text)
    assert "Not proven the same" in text
    for heading in (
        "Weights, read back",
        "By layer",
        "By token",
        "Logits against the reference",
        "Adapter lost by layer",
        "Weight error by layer",
    ):
        assert heading in tags.text
    assert "Nothing is lost in any layer's weights of right/qalora." in text
    assert "at most 100 %" in text  # of the one that is the base
    assert "wrong/qalora in torch: first at fault is layer 0" in text
    assert sum(tag == "svg" for tag, _ in tags.seen) == 1 + 2 + 2 + 1 + 1
    assert sum(attributes.get("class") == "curve s0 dashed" for _, attributes in tags.seen) == 1
    assert [result.derivation in tags.text for _, result in report.results()].count(False) == 0


def test_every_curve_of_the_demo_has_a_colour_of_its_own() -> None:
    """Its runs are the reference's, those of each format's runtimes, and one of the portable graph."""
    runs = 2 + sum(len(target(name).runtimes) + len(target(name).generators) for name in TARGETS)
    assert len({light for light, _ in COLORS}) == len({dark for _, dark in COLORS}) >= runs


def test_names_are_escaped(report: ParityReport) -> None:
    nasty = '<script>alert("x")</script>'
    artifacts = tuple(replace(artifact, name=nasty) for artifact in report.artifacts)
    tags = Tags(to_html(replace(report, reference=nasty, artifacts=artifacts)))
    assert all(tag != "script" for tag, _ in tags.seen)
    assert any(nasty in text for text in tags.text)


def test_without_speed_it_says_nothing_of_it(report: ParityReport) -> None:
    assert "tokens/s" in to_html(report)
    assert "tokens/s" not in to_html(report, speed=False)


def test_charts_of_nothing_and_of_what_is_not_finite() -> None:
    line_chart([Series(name="a", values=[0.0, 0.0], color=0)])
    drawn = Tags(line_chart([Series(name="a", values=[1e-3, float("inf"), 0.0, float("nan")], color=0)]))
    (points,) = [attributes["points"] for tag, attributes in drawn.seen if tag == "polyline"]
    assert points is not None
    assert len(points.split()) == 4
    assert "nan" not in points and "inf" not in points
    assert "circle" not in scatter([(float("nan"), 1.0)], color=0)
    assert "layer 3" in heat_map({"model.layers.3.mlp.up_proj": float("inf")})


def test_a_long_series_keeps_its_peak(tmp_path: Path) -> None:
    values = [1e-6] * 5000
    values[4321] = 1.0
    (points,) = [
        attributes["points"]
        for tag, attributes in Tags(line_chart([Series(name="a", values=values, color=0)])).seen
        if tag == "polyline"
    ]
    assert points is not None
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) <= 400
    assert heights.count(min(heights)) == 1
