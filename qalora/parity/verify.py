"""Verify: read artefacts back, run each in its own runtime over the same tokens, compare, and judge.

With an adapter the reference is the base, and every artefact is expected to hold the folded model; or, where a GPTQ
folder keeps the base's integer zeros, or a GGUF file the base, and has the adapter beside it, both. The weights are
compared with what `qalora.folding` gives, and what that gives is itself checked against base + factor * B @ A. The
logits are compared with forwards that know nothing of the fold (`qalora.parity.reference`). The reference's own file
runs first, in the runtime that owns its format: a mistake of our reader would be in the artefacts too, and unseen.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from qalora.adapter import Adapter, Convention, given_adapter, read_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.format import EXACT
from qalora.devices import find_device
from qalora.engines import Engine
from qalora.errors import InputError, shown
from qalora.folding import check_minima
from qalora.options.words import Level
from qalora.parity.artifacts import Artifact, memory_needed, open_artifact, recognize, runtimes_of
from qalora.parity.baseline import Baseline
from qalora.parity.evidence import Evidence
from qalora.parity.foldcheck import compare_adapters
from qalora.parity.gates import GateResult, judge
from qalora.parity.memory import available_memory
from qalora.parity.metrics import lost
from qalora.parity.models import BESIDE, Contents, ReferenceModels, holds
from qalora.parity.readback import ReadBack
from qalora.parity.reference import Forward
from qalora.parity.report import AdapterSummary, ArtifactReport, ParityReport, RunReport
from qalora.parity.running import Runner
from qalora.parity.runtimes.settings import keep_settings
from qalora.parity.text import make_inputs

__all__ = ["ProgressCallback", "verify"]

ProgressCallback = Callable[[str, float], None]
"""Called with what is being done and the share of all work that is done, 0 to 1."""


def verify(
    reference: Checkpoint | str | Path,
    artifacts: Sequence[Path],
    *,
    adapter: Adapter | Path | str | None = None,
    convention: Convention | None = None,
    minima: Literal["float16", "float32"] | None = None,
    level: Level = "generation",
    text: str | None = None,
    tokens: Sequence[int] | None = None,
    prompts: Sequence[str] = (),
    max_tokens: int = 256,
    generate: int = 24,
    threads: int | None = None,
    memory: int | None = None,
    device: str = "cpu",
    dynamic_int8: bool = False,
    relative_to: Path | None = None,
    engine: Engine | None = None,
    progress: ProgressCallback = lambda stage, share: None,
) -> ParityReport:
    """Compare artefacts with the reference at a level, each level with all before it.

    reference    the base if there is an adapter, else the model that the artefacts hold
    artifacts    files and folders, recognised by what they are; a folder of artefacts stands for all of them
    adapter      what the artefacts hold beside the base, or its folder; convention: see `qalora.adapter.read_adapter`
    minima       what the fold rounds to: what the adapter was trained with, or float16, by default
    level        "weights": read back; "logits": run over the tokens; "generation": greedy tokens from prompts as well
    text, tokens, max_tokens   what to compute on: see `qalora.parity.text.make_inputs`
    prompts, generate          what to continue, and by how many tokens
    memory       bytes that runtimes and the reference may take; what the system has to give, by default
    device       where the reference computes; the artefacts' runtimes are as they are
    dynamic_int8   PyTorch's dynamic INT8 of the same model, as a row to compare with
    relative_to  artefacts are named relative to this folder
    engine       reads and compares the weights, in other processes
    progress     called at each stage

    A runtime that is not installed, or that needs more memory, makes its artefact "not proven". Raises InputError for
    what cannot be read.
    """
    _check_options(level, minima, max_tokens=max_tokens, generate=generate, threads=threads, memory=memory)
    place = find_device(device, float64=False)
    opened = [(artifact, open_artifact(artifact)) for artifact in recognize(artifacts, relative_to)]
    base = reference if isinstance(reference, Checkpoint) else load(reference)
    read = None if adapter is None else given_adapter(adapter, base, convention=convention)
    contents = [holds(read, *pair) for pair in opened]
    room = available_memory() if memory is None else memory
    left = max(0, room - _needed([artifact for artifact, _ in opened], room) - _table_bytes(base))
    models = ReferenceModels.of(base, read, minima, contents, memory=0 if level == "weights" else left)
    gates, weights = _read_back(models, opened, contents, progress, engine)
    if level == "weights":
        return _report(models, level, weights, gates)
    tokenizer = models.tokenizer.opened()
    inputs = make_inputs(models.base, tokenizer, text=text, tokens=tokens, prompts=prompts, max_tokens=max_tokens)
    with tempfile.TemporaryDirectory(prefix="qalora-verify-") as folder:
        share = _Share(progress, len(inputs.windows) * _passes(models, [artifact for artifact, _ in opened], contents))
        share.stage("reference")
        baseline = Baseline.of(models, inputs, Path(folder), memory=left, device=place, tick=share.tick)
        runner = Runner(
            baseline=baseline,
            models=models,
            generate=generate if level == "generation" else 0,
            threads=threads,
            memory=room,
            device=place,
            tick=share.tick,
        )
        own: tuple[RunReport, ...] = ()
        if models.own is not None:
            share.stage("running the reference in its own runtime")
            with _keep_threads():
                own = runner.of_reference()
        reports: list[ArtifactReport] = []
        for (artifact, checkpoint), report in zip(opened, weights, strict=True):
            share.stage(f"running {artifact.name}")
            with _keep_threads(), keep_settings():
                able = runner.for_integers(checkpoint, Path(folder) / str(len(reports)))
                reports.append(replace(report, runs=able.runs(artifact, report.holds, report.weights)))
        comparison = None
        if dynamic_int8:
            share.stage("running dynamic INT8")
            with _keep_threads(), keep_settings():
                comparison = runner.dynamic_int8()
        return replace(_report(models, level, reports, gates, baseline), reference_runs=own, comparison=comparison)


def _needed(artifacts: Sequence[Artifact], room: int) -> int:
    """What the largest of the runtimes that there is room for takes: the reference has to leave it."""
    return max((needed for artifact in artifacts if (needed := memory_needed(artifact)) <= room), default=0)


def _table_bytes(model: Checkpoint) -> int:
    """What embedding and output layer take in the reference, in float32."""
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    return sum(4 * math.prod(model.tensors[name].shape) for name in tables if name in model.tensors)


def _check_options(level: str, minima: str | None, **numbers: int | None) -> None:
    """InputError for an option out of range, before anything is opened."""
    if level not in get_args(Level):
        raise InputError(field="level", expected=f"one of {', '.join(get_args(Level))}", got=shown(level))
    check_minima(minima)
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(name, expected="at least 1", got=str(number))


@contextmanager
def _keep_threads() -> Iterator[None]:
    """Give torch back its threads: a runtime in this process may set them for all."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(slots=True)
class _Share:
    """How much of the work is done: a unit is one window in one pass, of the reference or of a runtime."""

    progress: ProgressCallback
    total: int
    done: int = 0
    name: str = ""

    def stage(self, name: str) -> None:
        """Another stage begins."""
        self.name = name
        self.progress(name, min(1.0, self.done / self.total))

    def tick(self) -> None:
        """A window is done."""
        self.done += 1
        self.progress(self.name, min(1.0, self.done / self.total))


def _passes(models: ReferenceModels, artifacts: Sequence[Artifact], contents: Sequence[Contents]) -> int:
    """How many passes over all windows there will be, about: a kernel's rounding takes the reference one more,
    and so does float32's noise.
    """
    forwards = {models.usual, models.adapted, *map(models.expected, contents)}
    forwards |= {Forward(weights="base"), Forward(weights="side")} if models.adapter is not None else set()
    rounded = {artifact.kind for artifact in artifacts if artifact.layout.rounding(artifact.path) != EXACT}
    own = 0 if models.own is None else 1
    return 1 + own + len(forwards) + len(rounded) + sum(len(runtimes_of(artifact)) for artifact in artifacts)


def _read_back(
    models: ReferenceModels,
    opened: Sequence[tuple[Artifact, Checkpoint]],
    contents: Sequence[Contents],
    progress: ProgressCallback,
    engine: Engine | None,
) -> tuple[tuple[GateResult, ...], list[ArtifactReport]]:
    """The gates of the fold, and a report of each artefact's weights."""
    progress("reading the weights", 0.0)
    found = ReadBack(models, opened, contents, engine)
    reports = []
    for (artifact, checkpoint), holding, metrics, layers in zip(
        opened, contents, found.metrics, found.lost, strict=True
    ):
        tokenizer, ends = models.tokenizer.compare(checkpoint), models.ends.compare(checkpoint)
        beside = None
        if holding == BESIDE and models.adapter is not None:
            beside = compare_adapters(_beside(artifact, checkpoint), models.adapter)
        gates = judge(Evidence(weights=metrics, beside=beside, tokenizer=tokenizer, ends=ends))
        reports.append(
            ArtifactReport(
                name=artifact.name,
                kind=artifact.kind,
                holds=holding,
                weights=metrics,
                gates=tuple(gates),
                runs=(),
                layers=layers,
            )
        )
    return () if found.fold is None else tuple(judge(Evidence(fold=found.fold))), reports


def _beside(artifact: Artifact, checkpoint: Checkpoint) -> Adapter:
    """The adapter that lies beside an artefact's weights."""
    kind = artifact.layout.lora
    if artifact.lora is None or kind is None or kind.read is None:
        return read_adapter(checkpoint.beside or artifact.path, checkpoint)
    return kind.read(artifact.lora, checkpoint)


def _report(
    models: ReferenceModels,
    level: Level,
    artifacts: Sequence[ArtifactReport],
    gates: tuple[GateResult, ...],
    baseline: Baseline | None = None,
) -> ParityReport:
    return ParityReport(
        reference=models.base.path.name,
        level=level,
        text=None if baseline is None else baseline.inputs.source,
        tokens=0 if baseline is None else sum(len(window) for window in baseline.inputs.windows),
        windows=0 if baseline is None else len(baseline.inputs.windows),
        adapter=_adapter_summary(models, baseline),
        noise=None if baseline is None else baseline.noise,
        device=None if baseline is None else baseline.logit_cache.reference.device.type,
        gates=gates,
        artifacts=tuple(artifacts),
    )


def _adapter_summary(models: ReferenceModels, baseline: Baseline | None) -> AdapterSummary | None:
    if models.adapter is None:
        return None
    summary = AdapterSummary(
        layers=len(models.adapter.layers),
        convention=models.adapter.convention,
        minima=models.minima,
        trained_with=models.adapter.minima,
    )
    if baseline is None:
        return summary
    logit_cache, expected = baseline.logit_cache, models.usual
    return replace(
        summary,
        effect_rms=math.sqrt(baseline.effect / logit_cache.logit_count),
        fold_lost=lost(logit_cache.distance(expected, models.adapted), baseline.effect),
        unrounded=lost(logit_cache.distance(expected, Forward(weights="side")), baseline.side_effect),
    )
