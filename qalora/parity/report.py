"""The parity report: what was compared, every metric, every gate; as records, as JSON, as a table for a terminal.

The JSON has a version, "schema": "qalora.parity/1": later versions of it add keys and rename none. An artefact's
"weights" has the fields of `weights.WeightMetrics` and `findings.TensorDifference`, each of its "runs" those of
`RunReport`. Keys are sorted by whoever writes it; reals have six significant digits; a value that is not finite is
null. Nothing in it depends on where or when it was made, except what the runtimes computed and, under "speed", how
fast they were.

This module computes nothing and judges nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from qalora.formats.record_json import Key, encode
from qalora.parity.evidence import Generation
from qalora.parity.gates import GateResult, Status, worst
from qalora.parity.layerwise import LayerError
from qalora.parity.metrics import LogitMetrics
from qalora.parity.models import Contents
from qalora.parity.noise import Noise
from qalora.parity.runtimes import RuntimeInfo
from qalora.parity.weights import WeightMetrics

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "SCHEMA",
    "AdapterSummary",
    "ArtifactReport",
    "ByToken",
    "ParityReport",
    "RunReport",
    "Speed",
    "number",
    "percent",
    "render",
    "runtime_text",
]

SCHEMA = "qalora.parity/1"
COUNTED: tuple[Status, ...] = ("pass", "fail", "ambiguous", "not proven")
"""The statuses in the order in which they are counted."""

LISTED = 20
"""Differing tensors that the JSON lists for an artefact; the counts are of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast a runtime was, and what opening and running it added to the process's resident memory.

    prefill, steps   tokens a second, of whole windows and one at a time through the cache; None where not measured
    reference        prefill of the reference, in float32 torch from packed codes
    memory           bytes, of which what the page cache lends is a part; None where the system does not tell
    """

    prefill: float | None
    steps: float | None
    reference: float | None
    memory: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ByToken:
    """For plots: KL and the largest difference at each token; logits of the first window, (reference, artefact)."""

    kl: tuple[float, ...]
    max: tuple[float, ...]
    sample: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One artefact in one runtime; what was not asked for is None.

    kind           the runtime as `open_runtime` knows it; runtime: what it says of itself, None if it did not run
    rounding       what its kernels round, as the reference models it: `qalora.parity.roundings.Rounding.kind`
    logits         against the reference
    own            against the artefact's own weights in float32 torch, where it holds a float model in integers: the
                   gates, and what follows here, are then about these
    modelled       against the reference under that rounding
    simulated      the reference under that rounding against the reference
    stepwise       a token at a time through the cache, against the runtime's own single pass over the same tokens
    batch          sequences of several lengths in one batch, against the runtime's own pass over each
    layers         the hidden state after each layer; none where the runtime does not tell
    fault          where the logits go wrong, in one sentence; None where they do not
    speed          what it took; never judged, and left out where a report must not depend on the machine
    lost           of the adapter; None without one
    lost_unrounded the same against the side branch, whose minima are not rounded
    """

    kind: str
    runtime: RuntimeInfo | None
    rounding: str
    logits: LogitMetrics | None = None
    own: LogitMetrics | None = None
    modelled: LogitMetrics | None = None
    simulated: LogitMetrics | None = None
    stepwise: LogitMetrics | None = None
    batch: LogitMetrics | None = None
    speed: Speed | None = None
    by_token: ByToken | None = None
    lost: float | None = None
    lost_unrounded: float | None = None
    generations: tuple[Generation, ...] = ()
    layers: tuple[LayerError, ...] = ()
    fault: str | None = None
    gates: tuple[GateResult, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactReport:
    """One artefact: its name, its format, its weights, its runs. `holds` is "folded" or "base and adapter".

    layers  how much of the adapter each module's weight has lost, from `qalora.parity.layers`
    """

    name: str
    kind: str
    holds: Contents
    weights: WeightMetrics
    layers: Annotated[Mapping[str, float], Key("adapter_lost_by_layer")] = field(default_factory=dict)
    gates: tuple[GateResult, ...]
    runs: tuple[RunReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSummary:
    """The adapter that was to survive.

    minima       what the fold rounds the minima to
    trained_with what the adapter was trained with: "float16", "float32", or None for the side branch
    effect_rms   RMS of adapted - base over tokens x vocabulary; None without logits
    fold_lost    |reference - adapted| / |adapted - base|; None without logits
    unrounded    |reference - side branch| / |side branch - base|; None without logits
    """

    layers: int
    convention: str
    minima: str
    trained_with: str | None
    effect_rms: float | None = None
    fold_lost: float | None = None
    unrounded: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ParityReport:
    """Everything that `qalora.parity.verify` found.

    level    "weights", "logits" or "generation"
    text     where the tokens came from
    tokens   how many; windows: how many independent sequences they make
    noise    float32's own, on the reference's logits; None at level "weights"
    device   the kind of device that computed them; None at level "weights"
    gates    those of the reference itself (the fold)
    reference_runs   the reference in its own runtime, where it has one: whether what we read is what its file says
    comparison   PyTorch's dynamic INT8 of the same model, where it was asked for: measured, and not judged
    """

    reference: str
    level: str
    text: str | None
    tokens: int
    windows: int
    adapter: AdapterSummary | None
    noise: Noise | None
    gates: tuple[GateResult, ...]
    reference_runs: tuple[RunReport, ...] = ()
    artifacts: tuple[ArtifactReport, ...]
    comparison: RunReport | None = None
    device: str | None = None

    def runs(self) -> list[tuple[str, RunReport]]:
        """Every run with the name of its artefact: first the reference's own, and last the comparison, of it too."""
        named_runs = [("reference", run) for run in self.reference_runs]
        named_runs += [(artifact.name, run) for artifact in self.artifacts for run in artifact.runs]
        return named_runs if self.comparison is None else [*named_runs, ("reference", self.comparison)]

    def results(self) -> Iterator[tuple[str, GateResult]]:
        """Every gate with the place it was applied at: "reference", an artefact, or "artefact in runtime"."""
        for result in self.gates:
            yield "reference", result
        for run in self.reference_runs:
            for result in run.gates:
                yield f"reference in {run.kind}", result
        for artifact in self.artifacts:
            for result in artifact.gates:
                yield artifact.name, result
            for run in artifact.runs:
                for result in run.gates:
                    yield f"{artifact.name} in {run.kind}", result

    def counts(self) -> str:
        """How many gates have which status, such as "55 pass, 1 ambiguous"."""
        by_status = Counter(result.status for _, result in self.results())
        return ", ".join(f"{by_status[status]} {status}" for status in COUNTED if by_status[status])

    def __repr__(self) -> str:
        """In a line: of what, and how it came out."""
        return f"ParityReport({self.reference}, {len(self.artifacts)} artefacts, gates: {self.counts()})"

    def passed(self, *, allow_unproven: bool = False) -> bool:
        """Whether no gate failed, and, unless `allow_unproven`, none is unproven."""
        bad = {"fail"} if allow_unproven else {"fail", "not proven"}
        return all(result.status not in bad for _, result in self.results())

    def failure(self) -> str:
        """One sentence about what did not pass; empty if everything did."""
        bad = [(where, result) for where, result in self.results() if result.status in ("fail", "not proven")]
        bad.sort(key=lambda pair: pair[1].status)  # "fail" before "not proven"
        if not bad:
            return ""
        (where, first), rest = bad[0], len(bad) - 1
        return f"{where}: {_sentence(first)}" + (f" (and {rest} more)" if rest else "")

    def to_json(self, *, speed: bool = True) -> dict[str, Any]:
        """The report as JSON, schema "qalora.parity/1"; without `speed` nothing in it depends on how fast it went."""
        content: dict[str, Any] = {"schema": SCHEMA, "passed": self.passed(), **encode(self, _six_digits)}
        content["text"] = {"source": self.text, "tokens": content.pop("tokens"), "windows": content.pop("windows")}
        if self.noise is not None:  # the bound that follows from the numbers as they are written
            content["noise"]["bound"] = _six_digits(Noise(**content["noise"]).bound)
        for artifact in content["artifacts"]:
            weights = artifact["weights"]
            total, different = weights.pop("total"), weights.pop("different")
            weights |= {key: value for key, value in total.items() if key != "name"}
            weights |= {"differing_tensors": len(different), "different": different[:LISTED]}
        for run in (run for run in _runs(content) if not speed):
            run["speed"] = None
        return content


def _sentence(result: GateResult) -> str:
    if result.value is None:
        return f"{result.gate} {result.status}: {result.detail}"
    detail = f" ({result.detail})" if result.detail else ""
    return f"{result.gate} {number(result.value)}, bound {number(result.bound)}{detail}"


def _runs(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All runs of a report's JSON."""
    judged = (run for artifact in content["artifacts"] for run in artifact["runs"])
    return [*content["reference_runs"], *judged, *([] if content["comparison"] is None else [content["comparison"]])]


def _six_digits(number: float) -> float | None:
    """Six digits; null for what is not finite."""
    return float(f"{number:.6g}") if math.isfinite(number) else None


def render(report: ParityReport) -> list[RenderableType]:
    """The report for a terminal: a table of artefacts, a table of runs, and a line for each gate that did not pass."""
    from rich.text import Text

    parts: list[RenderableType] = [_weights_table(report)]
    notes = [(artifact.name, note) for artifact in report.artifacts for note in artifact.weights.notes]
    parts += [Text(f"{_short(name)}: {note}", style="dim") for name, note in notes]
    if report.level != "weights":
        parts.append(_runs_table(report))
        parts += [
            Text(f"{_short(name)}: {runtime_text(run)}", style="dim") for name, run in report.runs() if run.runtime
        ]
    for where, result in report.results():
        if result.status != "pass":
            style = "yellow" if result.status == "ambiguous" else "bold red"
            parts.append(Text(f"{result.status.upper()}  {where}: {_sentence(result)}", style=style))
    parts += [
        Text(f"{_short(name)} in {run.kind}: {run.fault}", style="bold red") for name, run in report.runs() if run.fault
    ]
    parts.append(Text(f"gates: {report.counts()}", style="bold green" if report.passed() else "bold red"))
    return parts


def _weights_table(report: ParityReport) -> RenderableType:
    from rich.table import Table

    table = Table(title="weights, read back", title_justify="left")
    steps = any(artifact.weights.total.step_max for artifact in report.artifacts)
    columns = ["artefact", "holds", "tensors", "codes", "differ", "scale ULP", "min ULP", "floats differ"]
    for column in (*columns, *(["steps off (RMS)"] if steps else []), "gates"):
        table.add_column(column, justify="left" if column in ("artefact", "holds") else "right")
    for artifact in report.artifacts:
        total = artifact.weights.total
        table.add_row(
            _short(artifact.name),
            artifact.holds,
            str(artifact.weights.tensors),
            f"{total.codes:,}",
            f"{total.codes_differ:,}",
            number(total.scale_ulp),
            number(total.min_ulp),
            f"{total.values_differ:,}",
            *([f"{total.step_max:.3g} ({total.step_rms:.3g})"] if steps else []),
            _verdict(artifact.gates),
        )
    return table


def _runs_table(report: ParityReport) -> RenderableType:
    from rich.table import Table

    table = Table(title=f"logits of {report.tokens} tokens, each in its own runtime", title_justify="left")
    columns = ["artefact", "runtime"]
    columns += ["lost", "unrounded"] if report.adapter is not None else []
    columns += ["max", "RMS", "KL", "top-1", "perplexity", "tokens/s", "greedy", "gates"]
    for column in columns:
        table.add_column(column, justify="left" if column in ("artefact", "runtime") else "right")
    for name, run in report.runs():
        losses = [percent(run.lost), percent(run.lost_unrounded)] if report.adapter is not None else []
        table.add_row(
            _short(name),
            run.kind,
            *losses,
            *_logit_cells(run.logits),
            _speed(run.speed),
            _greedy(run),
            _verdict(run.gates) if run.gates else "not judged",
        )
        if run.own is not None:
            table.add_row("", "by its own weights", *[""] * len(losses), *_logit_cells(run.own), "", "", "")
    return table


def _logit_cells(metrics: LogitMetrics | None) -> list[str]:
    if metrics is None:
        return [""] * 5
    cells = [number(value) for value in (metrics.max, metrics.rms, metrics.kl_mean)]
    return [*cells, f"{metrics.top1:.4f}", f"{metrics.perplexity:.3f}"]


def runtime_text(run: RunReport) -> str:
    """What a runtime says of itself; empty where it did not run."""
    info = run.runtime
    return "" if info is None else f"{info.name} {info.version}, {info.backend}, {info.dtype}"


def _short(name: str) -> str:
    """A name that leaves room for the figures: the folder and the end of a long one."""
    folder, slash, file = name.rpartition("/")
    return name if len(name) <= 24 else f"{folder[:12]}{slash}\u2026{file[-10:]}"


def _speed(speed: Speed | None) -> str:
    """Prefill, and its ratio to the reference."""
    if speed is None or speed.prefill is None:
        return ""
    ratio = f" ({speed.prefill / speed.reference:.1f}x)" if speed.reference else ""
    return f"{speed.prefill:.0f}{ratio}"


def _greedy(run: RunReport) -> str:
    if not run.generations:
        return ""
    other = [generation.divergence for generation in run.generations if generation.divergence is not None]
    if not other:
        return f"{sum(len(generation.tokens) for generation in run.generations)} same"
    return f"from {other[0]}" if len(run.generations) == 1 else f"{len(other)} of {len(run.generations)} differ"


def _verdict(gates: tuple[GateResult, ...]) -> str:
    status = worst(gates)
    return status if status == "pass" else status.upper()


def percent(value: float | None) -> str:
    """A share for a table, with three digits; empty for None."""
    return "" if value is None else f"{100 * value:.3g} %"


def number(value: float | None) -> str:
    """A number for a table: whole ones whole, others with three digits; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.3g}"
