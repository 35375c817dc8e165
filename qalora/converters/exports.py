"""Exports of one model to several formats: everything is planned before anything is written, and all appear or none.

With an adapter, each format gets the folded model, except GPTQ over a base with integer zero points: there the base
keeps its own zeros, and the adapter travels beside it as an exact plain LoRA, which is small. Tensors that an adapter
brings whole, such as embeddings with new tokens, are the model's own then, in every format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qalora.adapter import Adapter, carry
from qalora.checkpoint import Checkpoint
from qalora.converters import TARGETS, native, target
from qalora.converters.device_load import with_device_load
from qalora.converters.plan import ExportOptions, Plan, Progress
from qalora.engines import Engine, pieces_of
from qalora.errors import InputError, about
from qalora.folding import check_minima, fold
from qalora.formats.output import check_apart, check_output, new_folder
from qalora.formats.share import Share
from qalora.options import fields_of
from qalora.options.export import Writing
from qalora.options.words import Convention, Minima

__all__ = [
    "ExportJob",
    "check_fold",
    "check_places",
    "check_targets",
    "export",
    "export_jobs",
    "plan_folder",
    "run_job",
    "run_jobs",
    "save",
    "write_jobs",
    "writing",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """One format's plan, and the model that it was made for."""

    plan: Plan
    model: Checkpoint


def check_targets(targets: Sequence[str], options: ExportOptions) -> None:
    """InputError for a format that is none, for none at all, and for an option that concerns none of them."""
    if not targets:
        raise InputError(field="targets", expected=f"at least one of {', '.join(TARGETS)}", got="none")
    for name in targets:
        target(name)
    if options.lora_slots and not any(target(name).slots for name in targets):
        able = " or ".join(name for name in TARGETS if target(name).slots)
        raise InputError(field="lora_slots", expected=f"{able} among the formats", got=", ".join(targets))


def check_fold(adapter: object, minima: Minima | None, convention: Convention | None) -> None:
    """InputError for options of a fold where no adapter is folded."""
    check_minima(minima)
    for name, value in (("minima", minima), ("convention", convention)):
        if adapter is None and value is not None:
            raise InputError(f"`{name}` needs an adapter to fold", todo="give `adapter`, or leave it out", field=name)


def writing(options: Writing, *, lora_slots: str | Iterable[str] = ()) -> ExportOptions:
    """What writers are told, of what a user chose."""
    own = {one.name: getattr(options, one.name) for one in fields_of(Writing)}
    return ExportOptions(**own, lora_slots=frozenset([lora_slots] if isinstance(lora_slots, str) else lora_slots))


def check_places(out: Path, targets: Sequence[str], *, force: bool) -> None:
    """OutputError for an output that exists, without `force`; with it the plans say what it may replace."""
    for name in () if force else targets:
        check_output(out / name, force=False)


def export_jobs(
    model: Checkpoint,
    targets: Sequence[str],
    options: ExportOptions,
    *,
    adapter: Adapter | None = None,
    minima: Minima | None = None,
) -> list[ExportJob]:
    """Plan each target; raises if one of them cannot be, or would lose what is not allowed.

    minima defaults to what the adapter was trained with, and to float16 where it does not say. Whether the adapter lies
    beside the base or is folded is decided here for each format, so that options.adapter is to be None.
    """
    check_targets(targets, options)
    if options.adapter is not None:
        raise InputError("ExportOptions.adapter", expected="None where several formats are planned", got="an adapter")
    model = carry(model, adapter)
    writers = {name: target(name) for name in dict.fromkeys(targets)}
    beside = {name for name, writer in writers.items() if adapter is not None and writer.ships(model, options)}
    folded = model
    if adapter is not None and beside != set(writers):  # what cannot be folded may still lie beside
        folded = fold(model, adapter, minima=minima or adapter.minima or "float16")
    jobs = []
    for name, writer in writers.items():
        source = writer.source(model if name in beside else folded)
        with about("targets"):
            plan = writer.plan(source, replace(options, adapter=adapter if name in beside else None))
            plan.check(options.allow_loss)
            plan = with_device_load(plan, source)
        jobs.append(ExportJob(plan=plan, model=source))
    return jobs


def run_jobs(
    jobs: Sequence[ExportJob],
    out: Path,
    *,
    force: bool = False,
    progress: Progress = lambda name, nbytes: None,
    engine: Engine | None = None,
) -> None:
    """Write each job to `out/<target>/`; by other processes where there is an engine.

    Raises OutputError for an output that exists without `force`.
    """
    for job in jobs:
        check_output(out / job.plan.target, force=force, names=list(job.plan.files))
        check_apart(out / job.plan.target, job.model.path)
    with ExitStack() as outputs:

        def folder(job: ExportJob) -> Path:
            place = out / job.plan.target
            return outputs.enter_context(new_folder(place, force=force, names=list(job.plan.files)))

        write_jobs([(job, folder(job)) for job in jobs], progress, engine)


def write_jobs(jobs: Sequence[tuple[ExportJob, Path]], progress: Progress, engine: Engine | None = None) -> None:
    """Write each job into its empty folder. With an engine this process makes the files, and others fill them."""
    if engine is None:
        for job, folder in jobs:
            target(job.plan.target).write(job.plan, job.model, folder, progress, Share())
        return
    frame = Share(())
    sizes = [_sizes(job.plan) for job, _ in jobs]
    pieces = []
    for number, (job, folder) in enumerate(jobs):
        target(job.plan.target).write(job.plan, job.model, folder, progress, frame)
        pieces += [(number, names) for names in pieces_of(sizes[number], engine.jobs)]
    for (number, names), written in engine.map(partial(_write_piece, jobs), pieces):
        frame.add(written)
        for name in names:
            progress(name, sizes[number][name])
    frame.check()


def _write_piece(jobs: Sequence[tuple[ExportJob, Path]], piece: tuple[int, tuple[str, ...]]) -> Mapping[Path, int]:
    """Write some tensors of a job into the files that are there; gives the bytes written into each."""
    number, names = piece
    job, folder = jobs[number]
    share = Share(names, frame=False)
    target(job.plan.target).write(job.plan, job.model, folder, lambda name, nbytes: None, share)
    return dict(share.written)


def _sizes(plan: Plan) -> dict[str, int]:
    """The bytes of each tensor, in the plan's order."""
    sizes: Counter[str] = Counter()
    for tensor in plan.tensors:
        sizes[tensor.name] += tensor.nbytes
    return dict(sizes)


def plan_folder(model: Checkpoint, *, max_shard_size: int) -> Plan:
    """Plan our own folder."""
    return with_device_load(native.plan(model, ExportOptions(max_shard_size=max_shard_size)), model)


def save(
    model: Checkpoint,
    out: Path,
    *,
    max_shard_size: int,
    force: bool = False,
    progress: Progress = lambda name, nbytes: None,
    engine: Engine | None = None,
) -> Plan:
    """Plan our own folder and write it to `out`; gives the plan."""
    plan = plan_folder(model, max_shard_size=max_shard_size)
    run_job(ExportJob(plan=plan, model=model), out, force=force, progress=progress, engine=engine)
    return plan


def run_job(job: ExportJob, out: Path, *, force: bool, progress: Progress, engine: Engine | None = None) -> None:
    """Write one job to `out` itself."""
    names = list(job.plan.files)
    check_output(out, force=force, names=names)
    check_apart(out, job.model.path)
    with new_folder(out, force=force, names=names) as folder:
        write_jobs([(job, folder)], progress, engine)


def export(
    model: Checkpoint,
    targets: Sequence[str],
    out: Path,
    options: ExportOptions | None = None,
    *,
    adapter: Adapter | None = None,
    minima: Minima | None = None,
    force: bool = False,
    progress: Progress = lambda name, nbytes: None,
    engine: Engine | None = None,
) -> list[Plan]:
    """Plan and write a model to `out/<target>/` for each target, with an adapter as `export_jobs` has it; the plans."""
    jobs = export_jobs(model, targets, options or ExportOptions(), adapter=adapter, minima=minima)
    run_jobs(jobs, out, force=force, progress=progress, engine=engine)
    return [job.plan for job in jobs]
