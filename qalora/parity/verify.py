"""Verify: read artefacts back, run each in its own runtime over the same tokens, compare, and judge.

With an adapter the reference is the base, and every artefact is expected to hold the folded model; or, where a GPTQ
folder keeps the base's integer zeros and has the adapter beside it, both. The weights are compared with what
`qalora.folding` gives, and what that gives is itself checked against base + factor * B @ A. The logits are compared
with forwards that know nothing of the fold (`qalora.parity.reference`).
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qalora.adapter import Adapter, read_adapter
from qalora.checkpoint import Checkpoint
from qalora.errors import FormatError, InputError, MissingLibraryError
from qalora.parity.artifacts import (
    GENERATORS,
    RUNTIMES,
    Artifact,
    accuracy_level,
    is_symmetric,
    open_artifact,
    recognize,
)
from qalora.parity.foldcheck import check_fold, compare_adapters
from qalora.parity.gates import Evidence, GateResult, Generation, Noise, judge, refused, unproven
from qalora.parity.layers import adapter_by_layer
from qalora.parity.metrics import LogitMetrics, TokenMetrics, concatenate, lost, squared_distance, summarize
from qalora.parity.metrics import token_metrics as compare_tokens
from qalora.parity.reference import Forward, Reference
from qalora.parity.report import AdapterSummary, ArtifactReport, ByToken, ParityReport, RunReport, Speed
from qalora.parity.roundings import EXACT, Rounding
from qalora.parity.runtimes import Runtime, RuntimeInfo, open_runtime
from qalora.parity.spool import Spool
from qalora.parity.text import Work, make_work
from qalora.parity.weights import compare_weights

__all__ = ["LEVELS", "Level", "verify"]

Level = Literal["weights", "logits", "generation"]
LEVELS: tuple[Level, ...] = ("weights", "logits", "generation")

STEPS = 32
"""Tokens of the first window that each runtime computes one at a time as well."""

SAMPLED = 300
"""Logits of the first window that the report keeps for a plot."""

FOLDED = "folded"
BESIDE = "base and adapter"

Stage = Callable[[str], None]


def verify(
    reference: Checkpoint | str | Path,
    artifacts: Sequence[Path],
    *,
    adapter: Adapter | None = None,
    minima: Literal["float16", "float32"] | None = None,
    level: Level = "generation",
    text: str | None = None,
    tokens: Sequence[int] | None = None,
    prompt: str | None = None,
    max_tokens: int = 256,
    generate: int = 24,
    threads: int | None = None,
    relative_to: Path | None = None,
    progress: Stage = lambda stage: None,
) -> ParityReport:
    """Compare artefacts with the reference at a level, each level with all before it.

    reference    the base if there is an adapter, else the model that the artefacts hold
    artifacts    files and folders, recognised by what they are; a folder of artefacts stands for all of them
    minima       what the fold rounds to: what the adapter was trained with, or float16, by default
    level        "weights": read back; "logits": run over the tokens; "generation": greedy tokens from a prompt as well
    text, tokens, max_tokens   what to compute on: see `qalora.parity.text.make_work`
    prompt, generate           what to continue, and by how many tokens
    relative_to  artefacts are named relative to this folder
    progress     called with a line for each stage

    A runtime that is not installed makes its artefact "not proven". Raises InputError for what cannot be read.
    """
    if level not in LEVELS:
        raise InputError("--level", expected=f"one of {', '.join(LEVELS)}", got=repr(level))
    if max_tokens < 1 or generate < 1:
        raise InputError("max_tokens and generate", expected="at least 1", got=f"{max_tokens} and {generate}")
    opened = [(artifact, open_artifact(artifact)) for artifact in recognize(artifacts, relative_to)]
    job = _Job.of(reference, adapter, minima, [_holds(adapter, *found) for found in opened])
    gates = _fold_gates(job, progress)
    weights = [_weights(job, artifact, checkpoint, progress) for artifact, checkpoint in opened]
    if level == "weights":
        return _report(job, level, weights, gates)
    work = make_work(job.base, text=text, tokens=tokens, prompt=prompt, max_tokens=max_tokens)
    with tempfile.TemporaryDirectory(prefix="qalora-verify-") as folder:
        progress("reference")
        bench = _Bench.of(job, work, Path(folder))
        runner = _Runner(bench=bench, job=job, generate=generate if level == "generation" else 0, threads=threads)
        reports = []
        for artifact, report in zip([artifact for artifact, _ in opened], weights, strict=True):
            progress(f"running {artifact.name}")
            with _threads_kept():
                reports.append(replace(report, runs=runner.runs(artifact, report.holds)))
        return _report(job, level, reports, gates, bench)


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Give torch back its threads: a runtime in this process may set them for all."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is compared: base, adapter, and the folded model, None where no artefact is to hold it."""

    base: Checkpoint
    folded: Checkpoint | None
    adapter: Adapter | None
    minima: Literal["float16", "float32"]

    @classmethod
    def of(
        cls,
        reference: Checkpoint | str | Path,
        adapter: Adapter | None,
        minima: Literal["float16", "float32"] | None,
        holds: Sequence[str],
    ) -> _Job:
        from qalora.converters import load

        base = reference if isinstance(reference, Checkpoint) else load(reference)
        chosen = minima or (adapter.minima if adapter is not None else None) or "float16"
        folded = base if adapter is None else None
        if adapter is not None and FOLDED in holds:
            from qalora.folding import fold

            folded = fold(base, adapter, minima=chosen)
        return cls(base=base, folded=folded, adapter=adapter, minima=chosen)

    def expected(self, holds: str) -> Forward:
        """What an artefact should compute."""
        if self.adapter is None:
            return Forward(weights="base")
        return Forward(weights=self.minima if holds == FOLDED else "side")

    @property
    def usual(self) -> Forward:
        """What the most telling artefact should compute: the folded model, where one is to hold it."""
        return self.expected(BESIDE if self.folded is None else FOLDED)

    @property
    def adapted(self) -> Forward:
        """What the adapter was trained with."""
        if self.adapter is None:
            return Forward(weights="base")
        return Forward(weights=self.adapter.minima or "side")


def _fold_gates(job: _Job, progress: Stage) -> tuple[GateResult, ...]:
    if job.adapter is None or job.folded is None:
        return ()
    progress("checking the fold")
    checked = check_fold(job.base, job.folded, job.adapter, job.minima)
    return tuple(judge(Evidence(fold=checked)))


def _weights(job: _Job, artifact: Artifact, checkpoint: Checkpoint, progress: Stage) -> ArtifactReport:
    progress(f"reading {artifact.name}")
    holds = _holds(job.adapter, artifact, checkpoint)
    expected = job.folded if holds == FOLDED and job.folded is not None else job.base
    found = compare_weights(checkpoint, expected, residual=artifact.kind in ("gptq", "onnx"))
    beside = None
    if holds == BESIDE and job.adapter is not None:
        beside = compare_adapters(read_adapter(artifact.path, checkpoint), job.adapter)
    gates = judge(Evidence(weights=found, beside=beside))
    layers = {}
    if job.adapter is not None and holds == FOLDED:
        layers = adapter_by_layer(checkpoint, job.base, job.adapter, job.adapter.minima or "float32")
    return ArtifactReport(
        name=artifact.name, kind=artifact.kind, holds=holds, weights=found, gates=tuple(gates), runs=(), layers=layers
    )


def _holds(adapter: Adapter | None, artifact: Artifact, checkpoint: Checkpoint) -> str:
    """A GPTQ reader notes an adapter that lies beside the weights and is no residual of theirs."""
    own = str(artifact.path / "adapter_config.json")
    return BESIDE if adapter is not None and any(note.startswith(own) for note in checkpoint.notes) else FOLDED


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """The reference's side of every comparison, computed once."""

    work: Work
    spool: Spool
    noise: Noise
    effect: float
    side_effect: float
    speed: float

    @classmethod
    def of(cls, job: _Job, work: Work, folder: Path) -> _Bench:
        spool = Spool(Reference(job.base, job.adapter), work.windows, folder)
        base, side = Forward(weights="base"), Forward(weights="side")
        noise = spool.noise(job.usual)
        began = time.perf_counter()
        spool.logits(job.usual, 0)
        speed = len(work.windows[0]) / (time.perf_counter() - began)
        if job.adapter is None:
            return cls(work=work, spool=spool, noise=noise, effect=0.0, side_effect=0.0, speed=speed)
        return cls(
            work=work,
            spool=spool,
            noise=noise,
            effect=spool.distance(job.adapted, base),
            side_effect=spool.distance(side, base),
            speed=speed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runner:
    """Runs artefacts in their runtimes, one at a time."""

    bench: _Bench
    job: _Job
    generate: int
    threads: int | None

    def runs(self, artifact: Artifact, holds: str) -> tuple[RunReport, ...]:
        """Every run of one artefact: in the runtimes that prove it, then in those that only generate, if installed."""
        done = [self._run(kind, artifact, holds) for kind in RUNTIMES[artifact.kind]]
        logits = done[0].logits
        if self.generate and logits is not None and artifact.path.parent.name != "portable":
            for kind in GENERATORS.get(artifact.kind, ()):
                run = self._generator(kind, artifact, holds, logits.max)
                done += [] if run is None else [run]
        return tuple(done)

    def _run(self, kind: str, artifact: Artifact, holds: str) -> RunReport:
        before = _resident()
        try:
            runtime = open_runtime(kind, artifact.path, threads=self.threads)
        except MissingLibraryError as error:
            return RunReport(kind=kind, runtime=None, rounding="none", gates=(unproven("runtime", str(error)),))
        except FormatError as error:
            return RunReport(kind=kind, runtime=None, rounding="none", gates=(refused("runtime", str(error)),))
        with closing(runtime):
            rounding = _rounding(artifact, runtime.info)
            report = self._measure(kind, runtime, rounding, self.job.expected(holds))
            after = _resident()
        speed = report.speed
        if speed is None or before is None or after is None:
            return report
        return replace(report, speed=replace(speed, memory=max(0, after - before)))

    def _measure(self, kind: str, runtime: Runtime, rounding: Rounding, expected: Forward) -> RunReport:
        spool, job = self.bench.spool, self.job
        rounded = replace(expected, rounding=rounding)
        first = torch.empty(0)
        sample: tuple[tuple[float, float], ...] = ()
        plain: list[TokenMetrics] = []
        modelled: list[TokenMetrics] = []
        from_adapted = from_side = fastest = 0.0
        for n, window in enumerate(spool.windows):
            began = time.perf_counter()
            y = runtime.logits(window)
            fastest = max(fastest, len(window) / (time.perf_counter() - began))
            if n == 0:
                first, sample = y[:STEPS].clone(), _sample(spool.logits(expected, n), y)
            plain.append(compare_tokens(y, spool.logits(expected, n), window[1:]))
            if rounding != EXACT:
                modelled.append(compare_tokens(y, spool.logits(rounded, n), window[1:]))
            if job.adapter is not None:
                from_adapted += squared_distance(y, spool.logits(job.adapted, n))
                from_side += squared_distance(y, spool.logits(Forward(weights="side"), n))
        logits = summarize(concatenate(plain))
        tokens = concatenate(plain)
        by_token = ByToken(kl=tuple(tokens.kl.tolist()), max=tuple(tokens.max.tolist()), sample=sample)
        stepwise, steps = _through_the_cache(runtime, spool.windows[0][:STEPS], first)
        adapted = job.adapter is not None
        evidence = Evidence(
            rounding=rounding,
            logits=logits,
            modelled=summarize(concatenate(modelled)) if modelled else None,
            simulated=None if rounding == EXACT else spool.compare(rounded, expected),
            stepwise=stepwise,
            noise=self.bench.noise,
            lost=lost(from_adapted, self.bench.effect) if adapted else None,
            fold_lost=lost(spool.distance(expected, job.adapted), self.bench.effect) if adapted else 0.0,
            effect_rms=math.sqrt(self.bench.effect / spool.logit_count),
            generation=self._generation(runtime, expected, logits.max) if self.generate else None,
        )
        speed = Speed(prefill=fastest, steps=steps, reference=self.bench.speed, memory=None)
        unrounded = lost(from_side, self.bench.side_effect) if adapted else None
        return replace(_run_report(kind, runtime.info, evidence, unrounded), speed=speed, by_token=by_token)

    def _generator(self, kind: str, artifact: Artifact, holds: str, max_logit: float) -> RunReport | None:
        """A run that only generates; None where its library is not installed, which leaves nothing unproven."""
        try:
            runtime = open_runtime(kind, artifact.path, threads=self.threads)
        except MissingLibraryError:
            return None
        with closing(runtime):
            evidence = Evidence(generation=self._generation(runtime, self.job.expected(holds), max_logit))
            return _run_report(kind, runtime.info, evidence, None)

    def _generation(self, runtime: Runtime, expected: Forward, max_logit: float) -> Generation:
        """Generate, then let one forward of the reference say where it would have gone another way."""
        work = self.bench.work
        tokens = tuple(runtime.generate(work.prompt, self.generate))
        logits = self.bench.spool.reference.logits([*work.prompt, *tokens], expected)
        choices = logits[len(work.prompt) - 1 : -1] if tokens else logits[:0]
        wanted = choices.argmax(dim=1).tolist()
        divergence = next((n for n, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b), None)
        gap = None
        if divergence is not None:
            row = choices[divergence]
            gap = float(row[wanted[divergence]] - row[tokens[divergence]])
        return Generation(
            tokens=tokens,
            text=None if work.decode is None else work.decode(list(tokens)),
            divergence=divergence,
            expected=None if divergence is None else wanted[divergence],
            gap=gap,
            max_logit=max_logit,
        )


def _sample(reference: Tensor, y: Tensor) -> tuple[tuple[float, float], ...]:
    """(reference, artefact) of SAMPLED logits, evenly spread over tokens and vocabulary."""
    at = torch.linspace(0, reference.numel() - 1, min(SAMPLED, reference.numel()), dtype=torch.float64).long()
    return tuple(zip(reference.flatten()[at].tolist(), y.flatten()[at].tolist(), strict=True))


def _through_the_cache(runtime: Runtime, tokens: Sequence[int], whole: Tensor) -> tuple[LogitMetrics, float]:
    """The runtime a token at a time against its own single pass; and its tokens a second."""
    began = time.perf_counter()
    y = runtime.steps(tokens)
    seconds = time.perf_counter() - began
    return summarize(compare_tokens(y, whole, tokens[1:])), len(tokens) / seconds


def _resident() -> int | None:
    """Bytes of this process in memory, where the system tells."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _run_report(kind: str, info: RuntimeInfo, evidence: Evidence, unrounded: float | None) -> RunReport:
    return RunReport(
        kind=kind,
        runtime=info,
        rounding=evidence.rounding.kind,
        logits=evidence.logits,
        modelled=evidence.modelled,
        simulated=evidence.simulated,
        stepwise=evidence.stepwise,
        lost=evidence.lost,
        lost_unrounded=unrounded,
        generation=evidence.generation,
        gates=tuple(judge(evidence)),
    )


def _rounding(artifact: Artifact, info: RuntimeInfo) -> Rounding:
    """What the runtime's kernels round, from what it says of itself."""
    if info.dtype in ("float16", "bfloat16"):
        return Rounding(kind="float16" if info.dtype == "float16" else "bfloat16")
    if artifact.kind == "gguf" and info.name != "torch":
        return Rounding(kind="q8")
    if artifact.kind == "gptq":
        lora = (artifact.path / "adapter_config.json").exists()
        zeros: Literal["symmetric", "nearest"] = "symmetric" if is_symmetric(artifact.path) else "nearest"
        return Rounding(kind="lora" if lora else "weights", zeros=zeros)
    if artifact.kind == "onnx" and accuracy_level(artifact.path) == 4:
        return Rounding(kind="int8")
    return EXACT


def _report(
    job: _Job,
    level: Level,
    artifacts: Sequence[ArtifactReport],
    gates: tuple[GateResult, ...],
    bench: _Bench | None = None,
) -> ParityReport:
    return ParityReport(
        reference=job.base.path.name,
        level=level,
        text=None if bench is None else bench.work.source,
        tokens=0 if bench is None else sum(len(window) for window in bench.work.windows),
        windows=0 if bench is None else len(bench.work.windows),
        adapter=_adapter_summary(job, bench),
        noise=None if bench is None else bench.noise,
        gates=gates,
        artifacts=tuple(artifacts),
    )


def _adapter_summary(job: _Job, bench: _Bench | None) -> AdapterSummary | None:
    if job.adapter is None:
        return None
    summary = AdapterSummary(
        layers=len(job.adapter.layers),
        convention=job.adapter.convention,
        minima=job.minima,
        trained_with=job.adapter.minima,
    )
    if bench is None:
        return summary
    spool, expected = bench.spool, job.usual
    return replace(
        summary,
        effect_rms=math.sqrt(bench.effect / spool.logit_count),
        fold_lost=lost(spool.distance(expected, job.adapted), bench.effect),
        unrounded=lost(spool.distance(expected, Forward(weights="side")), bench.side_effect),
    )
