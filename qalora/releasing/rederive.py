"""Make a release again from its base and adapter, and compare: every byte of the artefacts, then the report.

One target at a time is written beside nothing, in a temporary folder, and deleted when it has been compared. Then the
release's own artefacts are verified again, and the report compared with the one that comes out: every count, name and
verdict has to be the same. The figures of logits have to be the same too where this machine computes as the one did
that made the release, which the report's own noise tells: that of float32 sums in another order is another number on
another processor, or with other threads. Where it is not the same, figures that differ are told, and judged by the
gates alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qalora.adapter import Adapter, read_adapter
from qalora.adapter.writing import write_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters.exports import ExportJob, export_jobs, run_jobs
from qalora.errors import InputError
from qalora.formats.files import files_below
from qalora.formats.record_json import encode
from qalora.releasing.digests import content_digest
from qalora.releasing.findings import Check, Finding
from qalora.releasing.integrity import differing_tensor
from qalora.releasing.manifest import MANIFEST, adapter_part, artifact_part, base_part, make_manifest, provenance
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.package import ADAPTER, REPORT, ReleasePlan, prove
from qalora.releasing.records import AdapterEntry, BaseEntry, LayerDigest, Manifest, TensorDigest

__all__ = ["Inputs", "compare_reports", "make_again"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a release is made from. adapter: its folder, None for the release's own copy; text and template: None for
    those of qalora.
    """

    base: Checkpoint
    adapter: Path | None = None
    text: str | None = None
    template: str | None = None


@dataclass(slots=True)
class _Again:
    """What is found while a release is made again."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, where: str, problem: str) -> None:
        self.findings.append(Finding(where=where, problem=problem))


def make_again(
    folder: Path,
    manifest: Manifest,
    report: Mapping[str, Any],
    inputs: Inputs,
    *,
    progress: Callable[[str], None] = lambda what: None,
) -> Check:
    """Ask whether base and adapter are the ones, and whether they give every byte, and every figure, of the release."""
    again = _Again()
    try:
        planned = _plan(folder, manifest, inputs, again, progress)
        if planned is not None and not again.findings:
            for job in planned.jobs:
                progress(f"making {job.plan.target} again")
                _compare_target(folder, manifest, job, again)
            _compare_adapter(folder, planned, again)
            if not again.findings:
                _measure(folder, manifest, report, planned, again, progress)
    except InputError as error:
        again.add("made again", str(error))
    return Check(question="made again", findings=tuple(again.findings), notes=tuple(again.notes))


def _plan(
    folder: Path, manifest: Manifest, inputs: Inputs, again: _Again, progress: Callable[[str], None]
) -> ReleasePlan | None:
    progress("reading the base")
    base = base_part(inputs.base)
    _compare_base(base, manifest.base, again)
    if again.findings:
        return None
    adapter = _adapter(folder, manifest, inputs)
    entry = adapter_part(adapter)
    _compare_adapters(entry, manifest.adapter, again)
    if again.findings:
        return None
    options = ReleaseOptions.of_entry(manifest.options, text=inputs.text, template=inputs.template)
    export = options.with_provenance(provenance(base.digest, None if entry is None else entry.digest))
    jobs = export_jobs(inputs.base, options.targets, export, adapter=adapter, minima=options.minima)
    return ReleasePlan(
        model=inputs.base, adapter=adapter, options=options, jobs=tuple(jobs), base=base, adapter_entry=entry
    )


def _compare_base(base: BaseEntry, entry: BaseEntry, again: _Again) -> None:
    """The first tensor that differs, and each companion file."""
    for name in _other(base.tensors, entry.tensors)[:1]:
        differ = _difference(base.tensors.get(name), entry.tensors.get(name))
        again.add(f"base: {name}", f"{differ}: it is not the base of this release")
        return
    if base.digest != entry.digest:
        again.add(f"{MANIFEST}: base.digest", "not that of its tensors")
    for name in _other(base.files, entry.files):
        again.add(f"base: {name}", f"not the file that {MANIFEST} names")
    if base.config != entry.config:
        again.add("base: config.json", f"not the one that {MANIFEST} names")


def _other(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The names of what is not the same in both."""
    return [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]


def _difference(mine: TensorDigest | LayerDigest | None, theirs: TensorDigest | LayerDigest | None) -> str:
    if mine is None or theirs is None:
        return "only one of the two has it"
    return f"other {' and '.join(_other(encode(mine), encode(theirs)))}"


def _adapter(folder: Path, manifest: Manifest, inputs: Inputs) -> Adapter | None:
    if manifest.adapter is None:
        if inputs.adapter is not None:
            raise InputError(field="adapter", expected="none, as this release has none", got=str(inputs.adapter))
        return None
    place = inputs.adapter if inputs.adapter is not None else folder / ADAPTER
    if not place.exists():
        raise InputError("this release was made with an adapter", todo="give it as `adapter`")
    return read_adapter(place, inputs.base, convention=manifest.options.convention)


def _compare_adapters(ours: AdapterEntry | None, entry: AdapterEntry | None, again: _Again) -> None:
    if ours is None or entry is None:
        return
    for name in [*_other(ours.layers, entry.layers), *_other(ours.saved, entry.saved)][:1]:
        layers = name in ours.layers or name in entry.layers
        differ = _difference(ours.layers.get(name), entry.layers.get(name)) if layers else "a different one"
        again.add(f"adapter: {name}", f"{differ}: it is not the adapter of this release")
        return
    for key in ("convention", "minima", "digest"):
        mine, theirs = getattr(ours, key), getattr(entry, key)
        if mine != theirs:
            again.add(f"adapter: {key}", f"{mine} where {MANIFEST} says {theirs}")


def _compare_target(folder: Path, manifest: Manifest, job: ExportJob, again: _Again) -> None:
    """Write one target again, and name the first tensor that differs in each of its files."""
    target = job.plan.target
    entry = next((artifact for artifact in manifest.artifacts if artifact.target == target), None)
    if entry is None:
        again.add(target, f"{MANIFEST} lists no such artefact, and its options name it")
        return
    with tempfile.TemporaryDirectory(prefix="qalora-check-") as temporary:
        run_jobs([job], Path(temporary))
        copy = Path(temporary) / target
        names, there = {*files_below(copy)}, {*files_below(folder / target)}
        for name in sorted(names | there):
            if name not in names or name not in there:
                problem = "base and adapter give no such file" if name in there else "it is not there"
                again.add(f"{target}/{name}", problem)
                continue
            rows = [row for row in entry.tensors if row.file == name]
            differs = differing_tensor(copy / name, folder / target / name, rows)
            if differs is not None:
                again.add(f"{target}/{name}: {differs}", "not what base and adapter give")


def _compare_adapter(folder: Path, planned: ReleasePlan, again: _Again) -> None:
    if planned.adapter is None or not planned.options.with_adapter:
        return
    with tempfile.TemporaryDirectory(prefix="qalora-check-") as temporary:
        write_adapter(planned.adapter, Path(temporary))
        for name in files_below(Path(temporary)):
            there = folder / ADAPTER / name
            if not there.is_file() or differing_tensor(Path(temporary) / name, there, []) is not None:
                again.add(f"{ADAPTER}/{name}", "not the adapter's")


def _measure(
    folder: Path,
    manifest: Manifest,
    report: Mapping[str, Any],
    planned: ReleasePlan,
    again: _Again,
    progress: Callable[[str], None],
) -> None:
    """Verify the artefacts again, compare the report, and the manifest that follows."""
    text_digest, options = manifest.options.text, planned.options
    if text_digest is not None and options.text is None:
        again.notes.append("the report was measured on a text of its own: give it as `text` to measure again")
        return
    digest = None if options.text is None else content_digest(options.text.encode())
    if digest != text_digest:
        expected = f"the text that the report was measured on, {text_digest or 'which comes with qalora'}"
        raise InputError(field="text", expected=expected, got=f"a text with {digest}")
    second_report = prove(planned, folder, stage=lambda stage, share: progress(f"measuring again: {stage}"))
    findings, notes = compare_reports(report, second_report.to_json(speed=False))
    again.findings += findings
    again.notes += notes
    earlier = {artifact.target for artifact in manifest.artifacts if artifact.device_load is None}
    parts = [artifact_part(job.plan, folder, planned.base.parameters) for job in planned.jobs]
    parts = [replace(part, device_load=None) if part.target in earlier else part for part in parts]
    second_manifest = make_manifest(
        base=planned.base,
        adapter=planned.adapter_entry,
        options=options,
        artifacts=parts,
        report=second_report,
        licences=manifest.licences,
    )
    for key in ("adapter", "artifacts", "base", "licences", "name", "options"):
        if getattr(second_manifest, key) != getattr(manifest, key):
            again.add(f"{MANIFEST}: {key}", "not what base, adapter and options give")
    versions = [
        f"{key} {second_manifest.versions[key]}"
        for key in _other(second_manifest.versions, manifest.versions)
        if key in second_manifest.versions
    ]
    if versions:
        again.notes.append(f"other versions here: {', '.join(versions)}")


MEASURED = ("threads", "speed", "device")
"""Keys of a report that tell of the machine, and are not compared."""


def compare_reports(report: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[Finding], list[str]]:
    """What a report says against what is measured: findings, and notes. See the module's docstring for figures."""
    same = report.get("noise") == second.get("noise")
    findings, notes = [], []
    for path, a, b in _differences(report, second, ""):
        problem = f"it says {_short(a)}, and measured again it is {_short(b)}"
        if same or not (isinstance(a, float) or isinstance(b, float)):
            findings.append(Finding(where=f"{REPORT}: {path}", problem=problem))
        else:
            notes.append(f"{path}: {problem}")
    if notes:
        first = f"{len(notes)} figures differ, as float32 sums do on another processor; first {notes[0]}"
        return findings, [first]
    return findings, []


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value!r:.80}"


def _differences(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(path, a's, b's) of every leaf that is not the same; lists are told by the names of their items."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b} - {*MEASURED}):
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{path}[{_label(x, n)}]")
    elif a != b:
        yield path, a, b


def _label(item: Any, n: int) -> str:
    names = [item[key] for key in ("name", "kind", "gate") if isinstance(item, dict) and isinstance(item.get(key), str)]
    return names[0][:60] if names else str(n)
