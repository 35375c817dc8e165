"""The long steps of a release with results of earlier runs: the export of each target, and the verification of all.

An export is known by what it is made of: the files of model and adapter, the options that concern its target, and what
it says of its origin. A verification by the artefacts' bytes, its own options, the runtimes that may run here, and the
versions of all that these are made of, as `qalora.parity.runtimes` records it. Only a report without a failed or
unproven gate is kept. Artefacts are copied into the release and not linked: onnx refuses to load data from a file that
has a second link, as one that could lead elsewhere.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora.converters import layouts
from qalora.converters.exports import ExportJob, run_jobs
from qalora.converters.plan import Progress
from qalora.errors import InputError
from qalora.formats.json_text import read_json
from qalora.formats.output import new_file, write_json
from qalora.formats.record_json import decode, encode
from qalora.options import fields_of
from qalora.options.export import Writing
from qalora.parity.artifacts import may_run
from qalora.parity.runtimes import RUNTIMES
from qalora.parity.runtimes.node import node_versions
from qalora.pipeline.steps import MAKERS, Result, Step, Store, versions
from qalora.releasing.package import ReleasePlan, Stage, Steps, prove

if TYPE_CHECKING:
    from qalora.parity import ParityReport

__all__ = ["CachedSteps", "Notice", "export_step", "proof_step", "proof_versions"]

LIMIT = 1 << 30
"""Bytes of a report that are read at most."""

Notice = Callable[[str, str, float | None], None]
"""Called with a step, "started", "reused" or "finished", and the seconds that it took."""


def export_step(target: str, options: Mapping[str, Any], inputs: Mapping[str, str | None]) -> Step:
    """The export of one target; options is a release's `to_json`."""
    keys = [one.name for one in fields_of(Writing) if one.target in ("", target)]
    concerned = {key: options[key] for key in (*keys, "lora_slots", "minima", "convention")}
    return Step(kind="export", name=target, options=concerned, inputs=inputs, libraries=versions(MAKERS))


def proof_step(options: Mapping[str, Any], inputs: Mapping[str, str | None]) -> Step:
    """The verification of all artefacts."""
    keys = ("convention", "device", "dynamic_int8", "generate", "level", "max_tokens", "memory", "minima", "prompts")
    chosen = {key: options[key] for key in (*keys, "text", "threads")}
    chosen["runtimes"] = {target: may_run(target) for target in options["targets"]}
    libraries = proof_versions(options["targets"])
    return Step(kind="verify", name="report.json", options=chosen, inputs=inputs, libraries=libraries)


def proof_versions(targets: Iterable[str]) -> dict[str, str]:
    """The versions that may decide what a verification of these targets' artefacts finds; the base, which runs in its
    own runtime too, may be of any format.
    """
    kinds = {kind for target in targets for kind in may_run(target)}
    kinds |= {kind for one in layouts() for kind in one.runtimes}
    found = versions({*MAKERS, *(name for kind in kinds for name in RUNTIMES[kind].imports)})
    return found | node_versions(name for kind in kinds for name in RUNTIMES[kind].node)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSteps(Steps):
    """`Steps` that look into a work folder first. inputs: the digests of model and adapter files."""

    store: Store
    inputs: Mapping[str, str | None]
    notice: Notice = lambda step, state, seconds: None

    def write(self, planned: ReleasePlan, folder: Path, progress: Progress) -> None:
        """Export what is not there yet; then put all of it into the folder."""
        for job in planned.jobs:
            made = self._export(planned, job, progress)
            shutil.copytree(made.path, folder / job.plan.target, copy_function=shutil.copyfile)

    def _export(self, planned: ReleasePlan, job: ExportJob, progress: Progress) -> Result:
        target = job.plan.target
        step = export_step(target, planned.options.to_json(), self.inputs)

        def action(place: Path) -> None:
            run_jobs([job], place.parent, progress=progress)

        return self._done(f"export {target}", step, action)

    def _done(self, label: str, step: Step, action: Callable[[Path], None]) -> Result:
        self.store.use(label, step)
        found = self.store.found(step)
        self.notice(label, "started" if found is None else "reused", None)
        if found is not None:
            return found
        made = self.store.run(step, action)
        self.store.took(label, made.seconds)
        self.notice(label, "finished", made.seconds)
        return made

    def prove(self, planned: ReleasePlan, folder: Path, memory: int | None, device: str, stage: Stage) -> ParityReport:
        """The report of the same artefacts, or a new one."""
        steps = {
            job.plan.target: export_step(job.plan.target, planned.options.to_json(), self.inputs)
            for job in planned.jobs
        }
        made = {target: found.digest for target, step in steps.items() if (found := self.store.found(step)) is not None}
        step = proof_step({**planned.options.to_json(), "memory": memory, "device": device}, {**self.inputs, **made})
        self.store.use("verify", step)
        found = self.store.found(step)
        kept = None if found is None else _kept(found.path)
        self.notice("verify", "started" if kept is None else "reused", None)
        report = self._proven(planned, folder, memory, device, stage, step) if kept is None else kept
        self.notice("release", "started", None)
        return report

    def _proven(
        self, planned: ReleasePlan, folder: Path, memory: int | None, device: str, stage: Stage, step: Step
    ) -> ParityReport:
        started = time.monotonic()
        report = prove(planned, folder, memory=memory, device=device, stage=stage)
        seconds = time.monotonic() - started
        self.store.took("verify", seconds)
        self.notice("verify", "finished", seconds)
        if report.passed():
            self.store.run(step, lambda place: _write(place, report))
        return report


def _write(place: Path, report: ParityReport) -> None:
    """The report between runs: every number whole, NaN and Infinity as Python writes them."""
    with new_file(place) as file:
        write_json(file, encode(report))


def _kept(path: Path) -> ParityReport | None:
    """What `_write` wrote; None for anything else."""
    from qalora.parity import ParityReport

    try:
        return decode(ParityReport, read_json(path, LIMIT), str(path))
    except InputError:
        return None
