"""Tables and plot of `compare_training.py`, made of the cells that are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from comparison_plan import (
    RATES,
    SEEDS,
    START,
    VARIANTS,
    VARIED,
    Done,
    base_name,
    search,
    stale,
    trained_name,
    tried_rates,
    worth,
)
from marked_page import put

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
WIDTHS = (4, 3, 2)
NAMES = {"qalora": "QA-LoRA", "qlora": "QLoRA", "peqa": "PEQA"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """label for the table, name and colour for the plot; kind of its cells, and what of them is shown.

    color is empty for what the plot leaves out.
    """

    label: str
    kind: str
    field: str = "perplexity"
    name: str = ""
    color: str = ""


ROWS = (
    Row(label="float model", kind="float"),
    Row(label="base, before training", kind="base", name="base", color="#999999"),
    Row(label="QA-LoRA unfolded, minima not rounded", kind="exported", field="unfolded"),
    Row(label="**QA-LoRA folded**", kind="qalora", name="QA-LoRA folded", color="#0072b2"),
    Row(label="QA-LoRA folded, at full strength", kind="qalora", field="full"),
    Row(label="QA-LoRA folded, GGUF in llama.cpp", kind="exported"),
    Row(label="QLoRA, float adapter kept", kind="qlora", name="QLoRA kept", color="#d55e00"),
    Row(label="QLoRA, float adapter kept, at full strength", kind="qlora", field="full"),
    Row(label="QLoRA merged, GPTQ again", kind="requantized", name="QLoRA, GPTQ again", color="#e69f00"),
    Row(label="QLoRA merged, rounded again", kind="requantized", field="rounded"),
    Row(label="PEQA: scales trained", kind="peqa", name="PEQA", color="#009e73"),
)


def cells_of(done: Done, kind: str, base: str) -> list[Mapping[str, Any]]:
    """The cells of a row at one width: the best rate's, by seed, for what is trained."""
    if kind == "float":
        names = ["float"]
    elif kind == "base":
        names = [f"base-{base}"]
    elif kind in START:
        best = search(done, kind, base)[1]
        names = [] if best is None else [trained_name(kind, base, best, seed) for seed in SEEDS]
    else:
        names = [f"{kind}-{base}-{seed}" for seed in SEEDS]
    return [done[name] for name in names if name in done and not stale(done, name)]


def values_of(done: Done, row: Row, base: str) -> list[float]:
    """What a row shows at one width, by seed; infinite where training failed."""
    found = [cell.get(row.field) for cell in cells_of(done, row.kind, base)]
    return [math.inf if value is None else float(value) for value in found]


def shown(values: Sequence[float]) -> str:
    """Mean and spread; a single value alone; nothing for none."""
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean = f"{sum(values) / len(values):,.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.2f}..{max(values):,.2f})"


def least_of(cells: Sequence[Mapping[str, Any]], field: str, form: str, unit: float = 1.0) -> str:
    """The least of a field over the cells that have it, which other work on the machine disturbed least."""
    values = [cell[field] for cell in cells if cell.get(field) is not None]
    return format(min(values) / unit, form) if values else ""


def base_names(method: str) -> list[str]:
    """The bases by width, in the order of the columns."""
    return [base_name(bits, method) for bits in WIDTHS]


def lines_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    head = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return head + ["| " + " | ".join(row) + " |" for row in rows]


def perplexities(done: Done, method: str) -> list[str]:
    """Rows are methods, columns widths: mean and spread over the seeds."""
    bases, rows = base_names(method), []
    for row in ROWS:
        parameters = {
            cell["parameters"] for base in bases for cell in cells_of(done, row.kind, base) if "parameters" in cell
        }
        count = "" if not parameters else f"{max(parameters) / 1e6:.2f} M"
        rows.append([row.label, count, *(shown(values_of(done, row, base)) for base in bases)])
    return lines_of(["held-out perplexity", "trained", *(f"{bits} bits" for bits in WIDTHS)], rows)


def costs(done: Done, method: str) -> list[str]:
    """Best rate and strengths, the least time and memory of a training; of QA-LoRA the codes that all folds changed."""
    rows = []
    for kind in START:
        for bits, base in zip(WIDTHS, base_names(method), strict=True):
            cells = cells_of(done, kind, base)
            if not cells:
                continue
            folds = [*cells, *cells_of(done, "exported", base)] if kind == "qalora" else []
            rows.append(
                [
                    NAMES[kind],
                    f"{bits}",
                    search(done, kind, base)[1] or "",
                    ", ".join(f"{cell['strength']:g}" for cell in cells if "strength" in cell),
                    str(len(cells)),
                    least_of(cells, "seconds", ".0f"),
                    least_of(cells, "processor_seconds", ".0f"),
                    least_of(cells, "peak_bytes", ".1f", 1e9),
                    str(sum(cell["codes_differ"] for cell in folds)) if folds else "",
                ]
            )
    header = ["trained", "bits", "best rate", "strength", "seeds", "wall s", "processor s", "peak GB", "codes changed"]
    return lines_of(header, rows) if rows else []


def searches(done: Done, method: str) -> list[str]:
    """The perplexity of seed 0 on the validation windows, at every rate that was tried."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    for kind in START:
        for bits, base in zip(WIDTHS, base_names(method), strict=True):
            tried = tried_rates(done, kind, base)
            found[kind, bits] = {rate: shown([worth(cell)]) for rate, cell in tried.items()}
    rates = [rate for rate in RATES if any(rate in values for values in found.values())]
    rows = [
        [NAMES[kind], f"{bits}", *(values.get(rate, "") for rate in rates)]
        for (kind, bits), values in found.items()
        if values
    ]
    return lines_of(["validation, seed 0 at rate", "bits", *rates], rows) if rows else []


def variants(done: Done, method: str) -> list[str]:
    """What each change of QA-LoRA does, at one width: with seed 0, and with all where there are others."""
    base = base_name(VARIED, method)
    rows = []
    for kind, label in {"qalora": "as above", **VARIANTS}.items():
        if cells := cells_of(done, kind, base):
            values = values_of(done, Row(label="", kind=kind), base)
            every = shown(values) if len(values) > 1 else ""
            rows.append([label, shown([worth(cells[0])]), shown(values[:1]), every])
    header = [
        f"QA-LoRA folded with one thing changed, {VARIED} bits",
        "validation, seed 0",
        "held-out, seed 0",
        "all seeds",
    ]
    return lines_of(header, rows) if len(rows) > 1 else []


def written(done: Done, method: str = "gptq") -> str:
    """All tables as Markdown."""
    parts = [perplexities(done, method), costs(done, method), searches(done, method), variants(done, method)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def write_page(page: Path, done: Done, method: str = "gptq") -> None:
    """Put the tables into a page, and the plot beside it, under the page's name."""
    put(page, written(done, method), BEGIN, END)
    page.with_suffix(".svg").write_text(plot(done, method), encoding="utf-8")


WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 400, 56, 16, 190, 36
STEPS = (1, 1.5, 2, 3, 5, 7)
"""Where a decade of the axis has lines."""


def plot(done: Done, method: str = "gptq") -> str:
    """An SVG: for each width a mark for each method, mean over the seeds with a bar from least to most, logarithmic."""
    rows = [row for row in ROWS if row.color]
    points = {
        (row.name, n): [value for value in values_of(done, row, base) if math.isfinite(value)]
        for row in rows
        for n, base in enumerate(base_names(method))
    }
    floats = values_of(done, ROWS[0], "")
    every = [value for values in points.values() for value in values] + floats
    low, high = (min(every) / 1.1, max(every) * 1.1) if every else (10.0, 100.0)

    def y(value: float) -> float:
        share = math.log(high / value) / math.log(high / low)
        return TOP + share * (HEIGHT - TOP - BOTTOM)

    parts = _axis(low, high, y)
    if floats:
        at, end = y(floats[0]), WIDTH - RIGHT
        parts.append(f'<path d="M{LEFT} {at:.1f}H{end}" stroke="#000" stroke-dasharray="4 3"/>')
        parts.append(_text(end + 6, at + 4, "float model"))
    each = (WIDTH - LEFT - RIGHT) / len(WIDTHS)
    for n, bits in enumerate(WIDTHS):
        parts.append(_text(LEFT + (n + 0.5) * each, HEIGHT - 12, f"{bits} bits", "middle"))
        for k, row in enumerate(rows):
            x = LEFT + n * each + (k + 1) * each / (len(rows) + 1)
            parts += _mark(
                x, [y(value) for value in sorted(points[row.name, n])], row.color, _mean(points[row.name, n], y)
            )
    for k, row in enumerate(rows):
        place = TOP + 60 + 22 * k
        parts.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{place}" r="5" fill="{row.color}"/>')
        parts.append(_text(WIDTH - RIGHT + 32, place + 4, row.name))
    font = 'font-family="sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>'
    title = "<title>Held-out perplexity by method and width</title>"
    return f'{head}{title}\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"


def _mean(values: Sequence[float], y: Callable[[float], float]) -> float | None:
    return y(sum(values) / len(values)) if values else None


def _mark(x: float, ends: Sequence[float], color: str, at: float | None) -> list[str]:
    if at is None:
        return []
    bar = f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[-1]:.1f}" stroke="{color}" stroke-width="3"/>'
    return [bar, f'<circle cx="{x:.1f}" cy="{at:.1f}" r="5" fill="{color}"/>']


def _axis(low: float, high: float, y: Callable[[float], float]) -> list[str]:
    parts = [_text(14, TOP + 120, "held-out perplexity", "middle", f' transform="rotate(-90 14 {TOP + 120})"')]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    lines = [step * 10.0**decade for decade in decades for step in STEPS]
    inside = [value for value in lines if low <= value <= high]
    for value in (
        inside if len(inside) <= 16 else [value for value in inside if value == 10 ** round(math.log10(value))]
    ):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y(value) + 4, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", "end"))
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
