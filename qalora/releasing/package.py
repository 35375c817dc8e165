"""Fold, export, verify and package: the last step of a fine-tuning pipeline, in one call.

    DIST/  README.md (model card)  LICENSE, NOTICE of the base where it has them  manifest.json  sbom.cdx.json
           report.json  report.html  SHA256SUMS  adapter/  gptq/  onnx/  gguf/ ...

The folder appears only when every gate has passed. When one fails, the report stays beside its place, as
`<DIST>.report.json`, and nothing else does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qalora.adapter import Adapter
from qalora.adapter.writing import write_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters.exports import ExportJob, export_jobs, run_jobs
from qalora.converters.huggingface import LICENCES
from qalora.converters.plan import Plan, Progress
from qalora.errors import ProofError
from qalora.formats.output import check_apart, check_output, new_folder, text_bytes, write_json
from qalora.formats.record_json import encode
from qalora.releasing.card import card_text, check_template
from qalora.releasing.checksums import SUMS, write_sums
from qalora.releasing.manifest import (
    MANIFEST,
    adapter_part,
    artifact_part,
    base_part,
    make_manifest,
    provenance,
)
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.records import AdapterEntry, BaseEntry
from qalora.releasing.sbom import SBOM, sbom_bytes
from qalora.releasing.signing import sign

if TYPE_CHECKING:
    from qalora.parity import ParityReport

__all__ = [
    "ADAPTER",
    "CARD",
    "LICENCES",
    "PAGE",
    "REPORT",
    "Release",
    "ReleasePlan",
    "Steps",
    "package",
    "plan_release",
    "preview",
    "prove",
    "release",
]

Stage = Callable[[str, float], None]

REPORT = "report.json"
PAGE = "report.html"
CARD = "README.md"
ADAPTER = "adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasePlan:
    """What a release is going to be made of.

    jobs      the export of each target
    base      what the manifest says of the model, and `adapter_entry` of the adapter: see `qalora.releasing.manifest`
    """

    model: Checkpoint
    adapter: Adapter | None
    options: ReleaseOptions
    jobs: tuple[ExportJob, ...]
    base: BaseEntry
    adapter_entry: AdapterEntry | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are going to be written."""
        return sum(tensor.nbytes for job in self.jobs for tensor in job.plan.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What a release did: its folder, the plans of its artefacts, and the proof."""

    folder: Path
    plans: tuple[Plan, ...]
    report: ParityReport


class Steps:
    """The long steps of a release. A subclass may take a result from an earlier run instead."""

    def write(self, planned: ReleasePlan, folder: Path, progress: Progress) -> None:
        """Put every artefact into `folder/<target>/`."""
        run_jobs(planned.jobs, folder, progress=progress)

    def prove(self, planned: ReleasePlan, folder: Path, memory: int | None, device: str, stage: Stage) -> ParityReport:
        """Verify the artefacts in `folder`."""
        return prove(planned, folder, memory=memory, device=device, stage=stage)


def plan_release(
    model: Checkpoint, options: ReleaseOptions, out: Path, *, adapter: Adapter | None = None, force: bool = False
) -> ReleasePlan:
    """Check everything that can be refused: the output, and each target's plan. Reads the model for its digests."""
    preview(model, options, out, adapter=adapter, force=force)  # refuses before the long reading
    base, entry = base_part(model), adapter_part(adapter)
    export = options.with_provenance(provenance(base.digest, None if entry is None else entry.digest))
    jobs = export_jobs(model, options.targets, export, adapter=adapter, minima=options.minima)
    return ReleasePlan(model=model, adapter=adapter, options=options, jobs=tuple(jobs), base=base, adapter_entry=entry)


def preview(
    model: Checkpoint, options: ReleaseOptions, out: Path, *, adapter: Adapter | None = None, force: bool = False
) -> list[Plan]:
    """The plans of `plan_release` without reading the model: digests have one length, so that sizes are the same."""
    check_output(out, force=force, names=[SUMS])
    check_apart(out, model.path)
    if options.template is not None:
        check_template(options.template)
    blank = "sha256:" + 64 * "0"
    export = options.with_provenance(provenance(blank, None if adapter is None else blank))
    jobs = export_jobs(model, options.targets, export, adapter=adapter, minima=options.minima)
    return [job.plan for job in jobs]


def release(
    planned: ReleasePlan,
    out: Path,
    *,
    force: bool = False,
    allow_unproven: bool = False,
    memory: int | None = None,
    device: str = "cpu",
    progress: Progress = lambda name, nbytes: None,
    stage: Stage = lambda stage, share: None,
    judged: Callable[[ParityReport], None] = lambda report: None,
    steps: Steps | None = None,
    sign_key: Path | None = None,
    password: str | None = None,
) -> Release:
    """Export what was planned, verify every artefact, and write the folder; sign it where a private key is given.

    memory is what runtimes may take, in bytes, and device where the reference computes; progress is called with each
    tensor written, stage with each stage of the verification and the share that is done, judged with the report; steps
    may know results of an earlier run.
    Raises ProofError, after leaving the report beside `out`, when a gate fails, or when an artefact is not proven and
    `allow_unproven` is not set.
    """
    failed = out.parent / f"{out.name}.{REPORT}"
    with new_folder(out, force=force, names=[SUMS]) as folder:
        does = steps or Steps()
        does.write(planned, folder, progress)
        report = does.prove(planned, folder, memory, device, stage)
        judged(report)
        if not report.passed(allow_unproven=allow_unproven):
            write_json(failed, report.to_json())
            raise ProofError(f"{out} was not written: {report.failure()}; the report is in {failed}")
        package(planned, folder, report)
        if sign_key is not None:
            sign(folder, sign_key, password=password, name=out.name)
    failed.unlink(missing_ok=True)  # of an earlier run
    return Release(folder=out, plans=tuple(job.plan for job in planned.jobs), report=report)


def prove(
    planned: ReleasePlan,
    folder: Path,
    *,
    memory: int | None = None,
    device: str = "cpu",
    stage: Stage = lambda stage, share: None,
) -> ParityReport:
    """Verify the artefacts in `folder`."""
    from qalora.parity import verify

    return verify(
        planned.model,
        [folder / job.plan.target for job in planned.jobs],
        adapter=planned.adapter,
        relative_to=folder,
        memory=memory,
        device=device,
        progress=stage,
        **planned.options.verification(),
    )


def package(planned: ReleasePlan, folder: Path, report: ParityReport) -> None:
    """Write everything that lies beside the artefacts in `folder`."""
    from qalora.parity.html import to_html
    from qalora.parity.reading import report_from_json

    if planned.adapter is not None and planned.options.with_adapter:
        write_adapter(planned.adapter, folder / ADAPTER)
    content = report.to_json(speed=False)
    write_json(folder / REPORT, content)
    again = report_from_json(content, REPORT)  # card and page are of the JSON, as a check makes them from there
    (folder / PAGE).write_bytes(text_bytes(to_html(again, speed=False)))
    licences = [name for name in LICENCES if name in planned.model.files]
    for name in licences:
        shutil.copyfile(planned.model.files[name], folder / name)
    artifacts = [artifact_part(job.plan, folder, planned.base.parameters) for job in planned.jobs]
    manifest = make_manifest(
        base=planned.base,
        adapter=planned.adapter_entry,
        options=planned.options,
        artifacts=artifacts,
        report=report,
        licences=licences,
    )
    write_json(folder / MANIFEST, encode(manifest))
    (folder / SBOM).write_bytes(sbom_bytes(manifest))
    (folder / CARD).write_bytes(text_bytes(card_text(manifest, again, template=planned.options.template)))
    write_sums(folder, {name: file.sha256 for part in artifacts for name, file in part.files.items()})
