"""Fold, export, verify and package: the last step of a fine-tuning pipeline, in one call.

    DIST/  README.md (model card)  LICENSE, NOTICE of the base where it has them  report.json  report.html  SHA256SUMS
           gptq/  onnx/  gguf/ ...

The folder appears only when every gate has passed. When one fails, the report stays beside its place, as
`<DIST>.report.json`, and nothing else does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.converters.exports import ExportJob, export_jobs, run_jobs
from qalora.converters.plan import ExportOptions, Plan, Progress
from qalora.errors import ProofError
from qalora.formats.output import check_output, new_folder, write_json
from qalora.release.card import write_card
from qalora.release.checksums import SUMS, write_sums

if TYPE_CHECKING:
    from qalora.parity import ParityReport

__all__ = ["Release", "plan_release", "release"]

REPORT = "report.json"
PAGE = "report.html"
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What a release did: its folder, the plans of its artefacts, and the proof."""

    folder: Path
    plans: tuple[Plan, ...]
    report: ParityReport


def plan_release(
    model: Checkpoint,
    targets: Sequence[str],
    out: Path,
    options: ExportOptions,
    *,
    adapter: Adapter | None = None,
    minima: Literal["float16", "float32"] | None = None,
    force: bool = False,
) -> list[ExportJob]:
    """Check everything that can be refused: the output, and each target's plan."""
    check_output(out, force=force, names=[SUMS])
    return export_jobs(model, targets, options, adapter=adapter, minima=minima)


def release(
    model: Checkpoint,
    jobs: Sequence[ExportJob],
    out: Path,
    *,
    adapter: Adapter | None = None,
    force: bool = False,
    allow_unproven: bool = False,
    progress: Progress = lambda name, nbytes: None,
    stage: Callable[[str, float], None] = lambda stage, share: None,
    **verify_options: Any,
) -> Release:
    """Export the planned jobs, verify every artefact, and write the folder.

    progress is called with each tensor written, stage with each stage of the verification and the share that is done;
    verify_options go to `qalora.parity.verify`. Raises ProofError, after leaving the report beside `out`, when a gate
    fails, or when an artefact is not proven and `allow_unproven` is not set.
    """
    from qalora.parity import verify
    from qalora.parity.html import to_html

    with new_folder(out, force=force, names=[SUMS]) as folder:
        run_jobs(jobs, folder, progress=progress)
        artifacts = [folder / job.plan.target for job in jobs]
        report = verify(model, artifacts, adapter=adapter, relative_to=folder, progress=stage, **verify_options)
        if not report.passed(allow_unproven=allow_unproven):
            failed = out.parent / f"{out.name}.{REPORT}"
            write_json(failed, report.to_json())
            raise ProofError(f"{out} was not written: {report.failure()}; the report is in {failed}")
        write_json(folder / REPORT, report.to_json(speed=False))
        (folder / PAGE).write_text(to_html(report, speed=False), encoding="utf-8")
        for name in LICENCES:
            if name in model.files:
                shutil.copyfile(model.files[name], folder / name)
        plans = tuple(job.plan for job in jobs)
        write_card(folder / "README.md", model=model, adapter=adapter, plans=plans, report=report)
        write_sums(folder)
    return Release(folder=out, plans=plans, report=report)
