"""The steps of a pipeline, each by its record: what the commands do, and the steps of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from qalora.adapter import Adapter, given_adapter, open_adapter
from qalora.calibration import check_quantize, quantize_model
from qalora.checkpoint import Checkpoint
from qalora.converters import exports, load
from qalora.converters.plan import Plan
from qalora.engines import Engine
from qalora.formats.output import check_apart, check_output, check_writable, left_beside
from qalora.options.export import Export
from qalora.options.quantize import Quantize
from qalora.options.release import Package
from qalora.options.train import TrainOptions
from qalora.options.verify import Verify
from qalora.options.words import CheckpointFormat, Convention
from qalora.pipeline.watching import Watch
from qalora.releasing.checksums import SUMS
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.package import Release, Steps, plan_release, preview, release
from qalora.training import check_before, train
from qalora.training.documents import Account
from qalora.training.interrupt import Interrupted

__all__ = [
    "check_release",
    "make_base",
    "make_release",
    "placed",
    "preview_release",
    "save",
    "train_adapter",
]


def save(
    model: Checkpoint,
    out: Path,
    *,
    max_shard_size: int,
    force: bool,
    dry_run: bool,
    watch: Watch,
    engine: Engine | None = None,
) -> Plan:
    """Plan our own folder and, unless it is a dry run, write it to `out`; gives the plan."""
    plan = exports.plan_folder(model, max_shard_size=max_shard_size)
    check_output(out, force=force, names=list(plan.files))
    if not dry_run:
        with watch.writing(sum(tensor.nbytes for tensor in plan.tensors), "writing") as progress:
            job = exports.ExportJob(plan=plan, model=model)
            exports.run_job(job, out, force=force, progress=progress, engine=engine)
    return plan


def make_base(
    model: str | Path,
    options: Quantize,
    out: Path,
    *,
    form: CheckpointFormat | None = None,
    force: bool = False,
    dry_run: bool = False,
    watch: Watch,
    engine: Engine | None = None,
) -> Plan:
    """Quantize a model and write it as a folder of ours; gives the plan of what is written.

    Layers that are searched, or quantized on a text, are kept beside the output until it is there: where the process
    is killed or interrupted, the same call goes on from them. Those that an engine searches are not kept.
    """
    check_apart(out, model)
    check_output(out, force=force, names=["config.json"])
    check_quantize(options)
    source = load(model, checkpoint_format=form, note=watch.note)
    check_apart(out, source.path)
    if not dry_run:
        check_writable(out)
    layers = int(source.config.get("num_hidden_layers") or 1)
    calibrated = options.calibration is not None and not dry_run
    searched = options.method != "rtn" and engine is None and not dry_run
    with ExitStack() as stack:
        keep = stack.enter_context(_kept_layers(out)) if calibrated or searched else None
        with watch.layers(layers) as tick:
            quantized = quantize_model(source, options, keep=keep, tick=tick, engine=engine)
            if calibrated:
                # this does the work; `rows` would name this tensor where another is at fault
                quantized.tensors[quantized.linears[0]].read(0, 1)
        size = options.max_shard_size
        return save(quantized, out, max_shard_size=size, force=force, dry_run=dry_run, watch=watch, engine=engine)


@contextmanager
def _kept_layers(out: Path) -> Iterator[Path]:
    """The file of the layers that are done, see `left_beside`; Interrupted says how to go on."""
    with left_beside(out, ".layers") as file:
        try:
            yield file
        except KeyboardInterrupt as error:
            if not file.exists():
                raise
            raise Interrupted(
                f"interrupted; the layers that are done are in {file}, and the same command goes on from them"
            ) from error


def train_adapter(
    model: str | Path, options: TrainOptions, *, form: CheckpointFormat | None = None, watch: Watch
) -> Adapter:
    """Train an adapter on a model and write it to `options.out`."""
    check_before(options)
    base = load(model, checkpoint_format=form, note=watch.note)

    def on_account(account: Account) -> None:
        for line in account.lines():
            watch.note(line)

    with watch.training() as show:
        return train(base, options, show, on_account)


def check_release(package: Package, *, force: bool, password: str | None) -> None:
    """Refuse before the long work what would be refused after it."""
    check_output(package.out, force=force, names=[SUMS])
    if package.sign is not None:
        from qalora.releasing.signing import check_key

        check_key(package.sign, password=password)


def check_before_release(
    export: Export,
    verify: Verify,
    package: Package,
    adapter: str | Path | Adapter | None,
    convention: Convention | None,
    *,
    force: bool,
    password: str | None,
) -> None:
    """Refuse what can be refused before a model is opened, which may mean a download."""
    exports.check_fold(adapter, export.minima, convention)
    exports.check_targets(export.targets, exports.writing(export))
    check_release(package, force=force, password=password)
    ReleaseOptions.of(export, verify, package, convention)  # which reads the files that they name
    if isinstance(adapter, str | Path):
        open_adapter(Path(adapter))


def make_release(
    base: Checkpoint,
    adapter: Adapter | Path | None,
    export: Export,
    verify: Verify,
    package: Package,
    *,
    convention: Convention | None = None,
    force: bool = False,
    password: str | None = None,
    steps: Steps | None = None,
    watch: Watch | None = None,
) -> Release:
    """Fold, export, verify and package; see `qalora.releasing.package.release`."""
    watch = watch or Watch()
    options, read = _read(base, adapter, export, verify, package, convention)
    planned = plan_release(base, options, package.out, adapter=read, force=force)
    with watch.writing(planned.nbytes, "writing") as progress, watch.verification() as stage:
        done = release(
            planned,
            package.out,
            force=force,
            allow_unproven=verify.allow_unproven,
            memory=verify.memory_bytes,
            device=verify.device,
            progress=progress,
            stage=stage,
            judged=watch.judged,
            steps=steps,
            sign_key=package.sign,
            password=password,
        )
    watch.done(done)
    return done


def preview_release(
    base: Checkpoint,
    adapter: Adapter | Path | None,
    export: Export,
    verify: Verify,
    package: Package,
    *,
    convention: Convention | None = None,
    force: bool = False,
) -> list[Plan]:
    """What `make_release` would write."""
    options, read = _read(base, adapter, export, verify, package, convention)
    return preview(base, options, package.out, adapter=read, force=force)


def _read(
    base: Checkpoint,
    adapter: Adapter | Path | None,
    export: Export,
    verify: Verify,
    package: Package,
    convention: Convention | None,
) -> tuple[ReleaseOptions, Adapter | None]:
    """The options of a release, with the files that they name, and its adapter."""
    options = ReleaseOptions.of(export, verify, package, convention)
    return options, None if adapter is None else given_adapter(adapter, base, convention=convention)


def placed(options: TrainOptions, out: Path, *, resume: bool) -> TrainOptions:
    """The options of a training whose adapter goes to `out`."""
    return replace(options, out=out, resume=resume)
