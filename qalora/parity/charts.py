"""Small charts as SVG text: lines over a logarithmic axis, a scatter, a heat map. Colours are the page's classes.

Values that are 0 or not finite stand at the lower edge of a logarithmic axis. Long series are drawn as the maximum of
each of POINTS bins, so that no peak is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "heat_map", "line_chart", "scatter"]

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
POINTS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line: its name, its values by position, the number of its colour; dashed: a bound."""

    name: str
    values: Sequence[float]
    color: int
    dashed: bool = False


def line_chart(series: Sequence[Series], unit: str = "token") -> str:
    """Lines over positions 0.. of `unit`, the values on a logarithmic axis."""
    curves = [(entry, _binned(entry.values)) for entry in series if entry.values]
    known = [value for _, values in curves for value in values if value > 0 and math.isfinite(value)]
    if not known:
        return _svg(_label(WIDTH / 2, HEIGHT / 2, f"0 at every {unit}", "middle"))
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    low, high = (low, high) if low < high else (low - 1, high + 1)

    def y(value: float) -> float:
        at = math.log10(value) if value > 0 and math.isfinite(value) else (low if value <= 0 else high)
        return TOP + (high - at) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = _log_axis(low, high, y)
    length = max(len(entry.values) for entry, _ in curves)
    for entry, values in curves:
        step = (WIDTH - LEFT - RIGHT) / max(1, len(values) - 1)
        points = " ".join(f"{LEFT + n * step:.1f},{y(value):.1f}" for n, value in enumerate(values))
        look = f"curve s{entry.color}" + (" dashed" if entry.dashed else "")
        parts.append(f'<polyline class="{look}" points="{points}"/>')
    parts.append(_label(LEFT, HEIGHT - 6, "0", "start"))
    parts.append(_label(WIDTH - RIGHT, HEIGHT - 6, f"{unit} {length - 1}", "end"))
    return _svg("".join(parts))


def _binned(values: Sequence[float]) -> list[float]:
    size = math.ceil(len(values) / POINTS)
    return [max(values[n : n + size]) for n in range(0, len(values), size)]


def _log_axis(low: int, high: int, y: Callable[[float], float]) -> list[str]:
    parts = []
    step = max(1, (high - low) // 6)
    for power in range(low, high + 1, step):
        at = y(10.0**power)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_label(LEFT - 4, at + 4, f"1e{power}", "end"))
    return parts


def scatter(pairs: Sequence[tuple[float, float]], *, color: int) -> str:
    """Dots at (x, y) with one scale for both, and the line where they are equal."""
    known = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    values = [value for pair in known for value in pair]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = (high - low) or 1.0
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - low) / span * across, TOP + (high - y) / span * up

    (x1, y1), (x2, y2) = place(low, low), place(high, high)
    parts = [f'<line class="axis" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>']
    for x, y in known:
        cx, cy = place(x, y)
        parts.append(f'<circle class="dot s{color}" cx="{cx:.1f}" cy="{cy:.1f}" r="2.2"/>')
    parts += [_label(LEFT - 4, y1, f"{low:.3g}", "end"), _label(LEFT - 4, y2 + 8, f"{high:.3g}", "end")]
    parts += [_label(LEFT, HEIGHT - 6, f"{low:.3g}", "start"), _label(WIDTH - RIGHT, HEIGHT - 6, f"{high:.3g}", "end")]
    return _svg("".join(parts))


def heat_map(values: Mapping[str, float]) -> str:
    """A cell for each module: kinds down, layers across; the stronger the larger, by the logarithm from 1e-8 to 1."""
    cells = {}
    for module, value in values.items():
        parts = module.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), 0)
        cells[parts[-1], layer] = (module, value)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells})
    width, height = (WIDTH - 70 - RIGHT) / len(layers), 22
    elements = []
    for row, kind in enumerate(kinds):
        elements.append(_label(66, TOP + row * height + 14, kind, "end"))
        for column, layer in enumerate(layers):
            if (kind, layer) in cells:
                elements.append(_cell(70 + column * width, TOP + row * height, width, height, *cells[kind, layer]))
    bottom = TOP + len(kinds) * height
    elements.append(_label(70, bottom + 14, f"layer {layers[0]}", "start"))
    elements.append(_label(WIDTH - RIGHT, bottom + 14, str(layers[-1]), "end"))
    return _svg("".join(elements), bottom + 22)


def _cell(x: float, y: float, width: float, height: float, module: str, value: float) -> str:
    strength = (
        1.0 if not math.isfinite(value) else min(1.0, max(0.0, (math.log10(value) + 8) / 8)) if value > 0 else 0.0
    )
    look = f'class="cell" opacity="{0.15 + 0.85 * strength:.2f}"' if strength else 'class="empty"'
    title = f"<title>{escape(module)}: {value:.3g}</title>"
    return f'<rect {look} x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 2}">{title}</rect>'


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(content: str, height: float = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{content}</svg>'
