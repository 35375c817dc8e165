"""The parity report as one HTML file that needs no network: tables, gates with their derivations, and plots.

Plots are inline SVG; the page follows the reader's light or dark setting and a phone's width. Every text that comes
from a model or an artefact is escaped. What is drawn is computed elsewhere: see `charts` for how.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from qalora.parity.charts import Series, heat_map, line_chart, scatter
from qalora.parity.gates import GateResult, worst
from qalora.parity.report import ArtifactReport, ParityReport, RunReport, Speed, number, percent, runtime_text

__all__ = ["to_html"]

COLORS = (
    *(("#0969da", "#4493f8"), ("#bc4c00", "#f0883e"), ("#1a7f37", "#3fb950"), ("#8250df", "#ab7df8")),
    *(("#bf3989", "#db61a2"), ("#59636e", "#9198a1"), ("#0b7285", "#39c5cf"), ("#9a6700", "#d29922")),
    *(("#82071e", "#ff8182"), ("#3d348b", "#8c96ff"), ("#5a3e1b", "#c69b6d"), ("#4d7c0f", "#a3d977")),
)
"""Of curves, on a light page and on a dark one."""
MOST = len(COLORS)
"""Colours that the page has for lines and dots."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --page: #fff; --card: #f6f8fa; --line: #d1d9e0;
  --good: #1a7f37; --bad: #cf222e; --maybe: #9a6700; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --page: #0d1117; --card: #161b22;
  --line: #3d444d; --good: #3fb950; --bad: #f85149; --maybe: #d29922; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.pass { color: var(--good); } .fail { color: var(--bad); } .ambiguous, .not-proven { color: var(--maybe); }
.verdict { font-weight: 700; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; } td small { display: block; }
th.prose { text-align: left; } td.prose { white-space: normal; text-align: left; min-width: 16rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .3rem; } figcaption small { font-weight: 400; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--line); } SERIES
.curve { fill: none; stroke: var(--c); stroke-width: 1.5; }
.dashed { stroke-dasharray: 3 4; opacity: .6; } .dot { fill: var(--c); opacity: .7; }
.cell { fill: var(--c1); } .empty { fill: var(--line); opacity: .35; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin-top: .4rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; background: var(--c);
  margin-right: .35rem; vertical-align: -.1rem; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


def _style() -> str:
    """The page's style with the colours of curves."""
    light, dark = (" ".join(f"--c{n}: {pair[k]};" for n, pair in enumerate(COLORS)) for k in (0, 1))
    series = " ".join(f".s{n} {{ --c: var(--c{n}); }}" for n in range(len(COLORS)))
    return _STYLE.replace("LIGHT", light).replace("DARK", dark).replace("SERIES", series)


def to_html(report: ParityReport, *, speed: bool = True) -> str:
    """The page; without `speed` nothing in it depends on how fast it went."""
    parts = [_head(report), _weights(report)]
    runs = report.runs()
    if runs:
        parts += [_runs(report, runs, speed=speed), _faults(runs), _layer_plots(runs), _token_plots(runs)]
        parts.append(_scatters(runs))
    parts += [_layers(report.artifacts), _weight_maps(report.artifacts), _gates(report)]
    body = "\n".join(part for part in parts if part)
    title = escape(f"Parity with {report.reference}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_style()}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _head(report: ParityReport) -> str:
    status = "pass" if report.passed() else "fail"
    word = "Every gate passed" if report.passed() else "Not proven the same"
    lines = [f"<h1>Parity with {escape(report.reference)}</h1>", f'<p class="verdict {status}">{word}</p>']
    if not report.passed():
        lines.append(f"<p>{escape(report.failure())}</p>")
    lines.append(f'<p class="soft">gates: {report.counts()}</p>')
    if report.text is not None:
        lines.append(f'<p class="soft">{report.tokens} tokens in {report.windows} windows: {escape(report.text)}</p>')
    if report.adapter is not None:
        adapter = report.adapter
        lines.append(
            f'<p class="soft">adapter on {adapter.layers} layers, convention {escape(adapter.convention)}, minima '
            f"{escape(adapter.minima)}, trained with {escape(adapter.trained_with or 'the side branch')}</p>"
        )
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1, prose: int = 0) -> str:
    """A table: the first `text` columns are words, the last `prose` ones sentences; cells are HTML already."""
    kinds = ["text" if n < text else "prose" if n >= len(head) - prose else "number" for n in range(len(head))]
    top = "".join(f'<th class="{kind}">{escape(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    lines = [
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _weights(report: ParityReport) -> str:
    rows = []
    for artifact in report.artifacts:
        total = artifact.weights.total
        rows.append(
            [
                escape(artifact.name),
                escape(artifact.holds),
                f"{artifact.weights.tensors:,}",
                f"{total.codes:,}",
                f"{total.codes_differ:,}",
                number(total.scale_ulp),
                number(total.min_ulp),
                f"{total.values_differ:,}",
                _verdict(artifact.gates),
            ]
        )
    head = ["artefact", "holds", "tensors", "codes", "differ", "scale ULP", "min ULP", "floats differ", "gates"]
    return "<h2>Weights, read back</h2>" + _table(head, rows, text=2)


def _runs(report: ParityReport, runs: Sequence[tuple[str, RunReport]], *, speed: bool) -> str:
    rows = []
    for name, run in runs:
        logits, about = run.logits, runtime_text(run)
        cells = [escape(name), f'{escape(run.kind)}<small class="soft">{escape(about)}</small>']
        cells += [percent(run.lost)] if report.adapter is not None else []
        if logits is None:
            cells += [""] * 6
        else:
            values = (logits.max, logits.rms, logits.kl_mean, logits.kl_p99)
            cells += [*map(number, values), f"{logits.top1:.4f}", f"{logits.perplexity:.3f}"]
        cells += _speed(run.speed) if speed else []
        rows.append([*cells, _verdict(run.gates) if run.gates else "not judged"])
    head = ["artefact", "runtime", *(["lost"] if report.adapter is not None else [])]
    head += ["max", "RMS", "KL", "KL 99 %", "top-1", "perplexity"]
    head += [*(["tokens/s", "steps/s", "memory"] if speed else []), "gates"]
    return "<h2>Logits, each in its own runtime</h2>" + _table(head, rows, text=2)


def _speed(speed: Speed | None) -> list[str]:
    if speed is None:
        return ["", "", ""]
    rates = ["" if rate is None else f"{rate:.0f}" for rate in (speed.prefill, speed.steps)]
    return [*rates, "" if speed.memory is None else f"{speed.memory / 1e6:.0f} MB"]


def _series(runs: Sequence[tuple[str, RunReport]], values: str) -> list[Series]:
    return [
        Series(name=f"{name} in {run.kind}", values=getattr(run.by_token, values), color=n % MOST)
        for n, (name, run) in enumerate(runs)
        if run.by_token is not None
    ]


def _token_plots(runs: Sequence[tuple[str, RunReport]]) -> str:
    if not any(run.by_token for _, run in runs):
        return ""
    kl, largest = _series(runs, "kl"), _series(runs, "max")
    charts = _figure("KL by token", "nats, logarithmic", line_chart(kl), kl)
    charts += _figure("Largest logit difference by token", "logarithmic", line_chart(largest), largest)
    return f'<h2>By token</h2><div class="grid">{charts}</div>'


def _faults(runs: Sequence[tuple[str, RunReport]]) -> str:
    faults = [(name, run) for name, run in runs if run.fault]
    return "".join(f'<p class="fail">{escape(f"{name} in {run.kind}: {run.fault}")}</p>' for name, run in faults)


def _layer_plots(runs: Sequence[tuple[str, RunReport]]) -> str:
    """The error after each layer, and, dashed, what it may be."""
    known = [(n, name, run) for n, (name, run) in enumerate(runs) if run.layers]
    if not known:
        return ""
    curves, legend = [], []
    for n, name, run in known:
        legend.append(
            Series(name=f"{name} in {run.kind}", values=[layer.error for layer in run.layers], color=n % MOST)
        )
        curves += [
            legend[-1],
            Series(name="", values=[layer.bound for layer in run.layers], color=n % MOST, dashed=True),
        ]
    chart = _figure(
        "Difference after each layer",
        "of the hidden state's norm; dashed: its bound",
        line_chart(curves, "layer"),
        legend,
    )
    return f'<h2>By layer</h2><div class="grid">{chart}</div>'


def _scatters(runs: Sequence[tuple[str, RunReport]]) -> str:
    charts = [
        _figure(
            f"{name} in {run.kind}",
            "across: reference, up: artefact",
            scatter(run.by_token.sample, color=n % MOST),
        )
        for n, (name, run) in enumerate(runs)
        if run.by_token is not None and run.by_token.sample
    ]
    return f'<h2>Logits against the reference</h2><div class="grid">{"".join(charts)}</div>' if charts else ""


def _layers(artifacts: Sequence[ArtifactReport]) -> str:
    """A map for each artefact that has lost something; one sentence about those that have all of it."""
    charts, whole = [], []
    for artifact in (artifact for artifact in artifacts if artifact.layers):
        most = max(artifact.layers, key=lambda module: artifact.layers[module])
        if artifact.layers[most]:
            note = f"at most {percent(artifact.layers[most])}, in {most}"
            charts.append(_figure(artifact.name, note, heat_map(artifact.layers)))
        else:
            whole.append(artifact.name)
    if not charts and not whole:
        return ""
    line = f"<p>Nothing is lost in any layer's weights of {escape(', '.join(whole))}.</p>" if whole else ""
    return f'<h2>Adapter lost by layer</h2>{line}<div class="grid">{"".join(charts)}</div>'


def _weight_maps(artifacts: Sequence[ArtifactReport]) -> str:
    """A map for each artefact with weights that are not the reference's: the RMS of their errors, in steps if known."""
    charts = []
    for artifact in artifacts:
        differences = [one for one in artifact.weights.different if ".layers." in one.name and one.measured]
        steps = all(one.stepped for one in differences)
        errors = {one.name.removesuffix(".weight"): one.step_rms if steps else one.error_rms for one in differences}
        if errors:
            most = max(errors, key=lambda module: errors[module])
            note = f"RMS{' in steps' if steps else ''}, at most {errors[most]:.3g}, in {most}"
            charts.append(_figure(artifact.name, note, heat_map(errors)))
    return f'<h2>Weight error by layer</h2><div class="grid">{"".join(charts)}</div>' if charts else ""


def _figure(title: str, note: str, chart: str, legend: Sequence[Series] = ()) -> str:
    entries = "".join(f'<span class="s{entry.color}"><i></i>{escape(entry.name)}</span>' for entry in legend)
    below = f'<div class="legend">{entries}</div>' if entries else ""
    caption = f'<figcaption>{escape(title)} <small class="soft">{escape(note)}</small></figcaption>'
    return f"<figure>{caption}{chart}{below}</figure>"


def _gates(report: ParityReport) -> str:
    rows = []
    for where, result in report.results():
        cells = [escape(where), escape(result.gate), _status(result.status), number(result.value), number(result.bound)]
        rows.append([*cells, escape(result.detail), escape(result.derivation)])
    head = ["where", "gate", "status", "value", "bound", "detail", "why the bound is what it is"]
    table = _table(head, rows, text=3, prose=2)
    return f"<h2>Gates</h2><details><summary>{len(rows)} gates, with their derivations</summary>{table}</details>"


def _verdict(gates: Sequence[GateResult]) -> str:
    return _status(worst(gates))


def _status(status: str) -> str:
    return f'<span class="{status.replace(" ", "-")}">{status}</span>'
