"""A recipe's steps: what each is made of, what of it is there already, and how it is done.

quantize                    WORK/quantize/<key>/<name of the base>
train                       WORK/train/<key>/adapter
export *, verify, release   with results of earlier runs
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qalora.adapter import Adapter, read_adapter
from qalora.calibration import quantize_model
from qalora.checkpoint import Checkpoint
from qalora.converters import load, recognise
from qalora.converters.exports import plan_folder
from qalora.converters.huggingface import download
from qalora.errors import InputError, about
from qalora.formats.output import check_output
from qalora.options import Options, fields_of, plain
from qalora.options.quantize import Quantize
from qalora.options.recipe import Recipe
from qalora.pipeline.cached import CachedSteps, export_step, proof_step, proof_versions
from qalora.pipeline.making import check_release, make_base, make_release, placed, train_adapter
from qalora.pipeline.recipe import Source, read_recipe
from qalora.pipeline.steps import MAKERS, Result, Step, Store, versions
from qalora.pipeline.watching import Watch
from qalora.releasing.checksums import SUMS
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.package import preview
from qalora.tensor import BITS
from qalora.training.data import READING
from qalora.training.plan import untrained

__all__ = ["Pipeline", "Row", "open_recipe", "run"]


@dataclass(slots=True, kw_only=True)
class Row:
    """A step as a dry run shows it: state is "reused", "goes on" or "to do"; bytes and seconds None where unknown."""

    label: str
    state: str
    nbytes: int | None = None
    seconds: float | None = None


@dataclass(slots=True, kw_only=True)
class _Thing:
    """A model or adapter on the way: where it is and its digest, both None where it is still to be made."""

    path: str | None
    digest: str | None


def open_recipe(path: Path, *, force: bool = False, watch: Watch | None = None) -> Pipeline:
    """Read and check a recipe; nothing is done, and no weight is read."""
    source, recipe = read_recipe(path)
    with source.lines_of(""), about("work"):
        store = Store(source.folder / recipe.top.work, path)
    return Pipeline(source=source, recipe=recipe, store=store, force=force, watch=watch or Watch())


def run(path: str | Path, *, force: bool = False, dry_run: bool = False, watch: Watch | None = None) -> list[Row]:
    """Do what a recipe says; steps whose inputs and options have not changed are not done again.

    force    replaces an earlier release; steps are reused all the same
    dry_run  does nothing, and fetches nothing

    Gives each step with its state before the run. InputError with file and line for what is wrong, before anything is
    done; ProofError where a gate fails.
    """
    pipeline = open_recipe(Path(path), force=force, watch=watch)
    rows = pipeline.survey(local=dry_run)
    if dry_run:
        pipeline.plan(force=True)
        if not pipeline.released and not force and pipeline.out.exists():
            pipeline.watch.note(f"{pipeline.out} exists already; to replace it give `force`")
    elif pipeline.released:
        with pipeline.store.opened():  # which keeps the digests
            pass
    else:
        check_output(pipeline.out, force=force, names=[SUMS])
        pipeline.plan(force=force)
        with pipeline.store.opened():
            pipeline.run()
    return rows


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """A checked recipe. `survey` says what a run would do, `run` does it."""

    source: Source
    recipe: Recipe
    store: Store
    force: bool
    watch: Watch
    rows: list[Row] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Where the release goes."""
        return self.recipe.release.out

    @property
    def released(self) -> bool:
        """Whether, by the last `survey`, the release is there and nothing has changed."""
        return self.rows[-1].state == "reused"

    # what a run would do

    def survey(self, *, local: bool) -> list[Row]:
        """Every step with its state. local: nothing is fetched for it."""
        self.rows = []
        base = self._base(local=local)
        model = base if self.recipe.quantize is None else self._look("quantize", self._quantize_step(base))
        adapter = self._adapter()
        if self.recipe.train is not None:
            step = self._train_step(model)
            adapter = self._look("train", step)
            if self.rows[-1].state == "to do" and self.store.begun(step) is not None:
                self.rows[-1].state = "goes on"
        options = self._release_options()
        inputs = self._inputs(model, adapter)
        exported = {
            target: self._look(f"export {target}", export_step(target, options.to_json(), inputs)).digest
            for target in options.targets
        }
        verify = self.recipe.verify
        machine = {"memory": verify.memory_bytes, "device": verify.device}
        self._look("verify", proof_step({**options.to_json(), **machine}, {**inputs, **exported}))
        self._look_at_release(self._release_step(model, adapter))
        return self.rows

    def _look(self, label: str, step: Step) -> _Thing:
        result = self.store.found(step)
        if result is None:
            self.rows.append(Row(label=label, state="to do", seconds=self.store.seconds(label)))
            return _Thing(path=None, digest=None)
        self.rows.append(Row(label=label, state="reused", nbytes=result.nbytes))
        return _Thing(path=str(result.path), digest=result.digest)

    def _look_at_release(self, step: Step) -> None:
        told = self.store.last.get("released")
        same = (
            step.key is not None
            and isinstance(told, dict)
            and told.get("key") == step.key
            and told.get("out") == str(self.out.absolute())
            and (self.out / SUMS).is_file()
            and told.get("digest") == self.store.digest(self.out)
        )
        state = "reused" if same else "to do"
        self.rows.append(Row(label="release", state=state, seconds=self.store.seconds("release")))

    def plan(self, *, force: bool) -> None:
        """Plan what is still to be written, and refuse what cannot be, before anything is done; gives rows their sizes.

        Reads headers. A model of the Hub that is not here yet is not planned.
        """
        rows, recipe = {row.label: row for row in self.rows}, self.recipe
        if self._base(local=True).path is None:
            self.watch.note(f"{recipe.base.model} is not here yet: nothing can be planned")
            return
        with self.source.lines_of("base"), about("model"):
            model = load(recipe.base.model, checkpoint_format=recipe.base.checkpoint_format)
        if recipe.quantize is not None:
            model = self._planned_model(model, recipe.quantize, rows["quantize"])
        adapter = self._planned_adapter(model, rows)
        with self.source.lines_of("release"):
            check_release(recipe.release, force=force, password=sign_password())
        self._check_delivery()
        with self.source.lines_of("export", "release"):
            plans = preview(model, self._release_options(), self.out, adapter=adapter, force=force)
        for plan in plans:
            row = rows[f"export {plan.target}"]
            row.nbytes = row.nbytes if row.nbytes is not None else plan.nbytes

    def _planned_model(self, base: Checkpoint, options: Quantize, row: Row) -> Checkpoint:
        if options.budget is not None:  # choosing widths takes long: planned as one width
            width = max((bits for bits in BITS if bits < options.budget), default=BITS[0])
            usual: dict[str, Any] = {}
            if options.method == "rtn" and not options.fit_minima:  # the text is for the choice alone
                usual = {one.name: one.default for one in fields_of(Quantize) if one.name.startswith("calibration")}
            options = replace(options, bits=width, budget=None, widths=(), **usual)
        with self.source.lines_of("quantize", "base"), about("model"):
            model = quantize_model(base, options)
            plan = plan_folder(model, max_shard_size=options.max_shard_size)
        row.nbytes = row.nbytes if row.nbytes is not None else plan.nbytes
        return model

    def _planned_adapter(self, model: Checkpoint, rows: Mapping[str, Row]) -> Adapter | None:
        given = self.recipe.adapter
        if given is not None:
            with self.source.lines_of("adapter"), about("path"):
                return read_adapter(given.path, model, convention=given.convention)
        if self.recipe.train is None:
            return None
        with self.source.lines_of("train", "base"), about("model"):
            adapter = untrained(model, self.recipe.train)
        if rows["train"].nbytes is None:
            rows["train"].nbytes = sum(4 * (one.a.numel() + one.b.numel()) for one in adapter.layers.values())
        return adapter

    # the run itself

    def run(self) -> None:
        """Do every step that is not done yet, and release."""
        base = model = self._base(local=False)
        recipe, form = self.recipe, self.recipe.base.checkpoint_format
        if (options := recipe.quantize) is not None:
            with self.source.lines_of("quantize", "base"):
                model = self._done(
                    "quantize",
                    self._quantize_step(base),
                    lambda out: make_base(str(base.path), options, out, form=form, watch=self.watch),
                )
        adapter = self._adapter()
        if (training := recipe.train) is not None:
            step, trained = self._train_step(model), str(model.path)
            resume = self.store.begun(step) is not None
            with self.source.lines_of("train", "base"):
                adapter = self._done(
                    "train",
                    step,
                    lambda out: train_adapter(
                        trained, placed(training, out, resume=resume), form=self._form, watch=self.watch
                    ),
                )
        with self.source.lines_of("export", "verify", "release", "adapter", "base"):
            self._release(model, adapter)
        self._deliver()

    def _done(self, label: str, step: Step, action: Callable[[Path], object]) -> _Thing:
        self.store.use(label, step)
        result: Result | None = self.store.found(step)
        begun = result is None and self.store.begun(step) is not None
        self.watch.step(label, "reused" if result is not None else "goes on" if begun else "started", None)
        if result is None:
            result = self.store.run(step, action)
            self.store.took(label, result.seconds)
            self.watch.step(label, "finished", result.seconds)
        return _Thing(path=str(result.path), digest=result.digest)

    def _release(self, model: _Thing, adapter: _Thing | None) -> None:
        step = self._release_step(model, adapter)
        started, before = time.monotonic(), 0.0

        def notice(label: str, state: str, seconds: float | None) -> None:
            nonlocal before
            before += seconds or 0.0
            self.watch.step(label, state, seconds)

        recipe = self.recipe
        make_release(
            load(str(model.path), checkpoint_format=self._form, note=self.watch.note),
            None if adapter is None or adapter.path is None else Path(adapter.path),
            recipe.export,
            recipe.verify,
            recipe.release,
            convention=None if recipe.adapter is None else recipe.adapter.convention,
            force=self.force,
            password=sign_password(),
            steps=CachedSteps(store=self.store, inputs=self._inputs(model, adapter), notice=notice),
            watch=self.watch,
        )
        seconds = time.monotonic() - started - before
        self.store.took("release", seconds)
        released = {"key": step.key, "out": str(self.out.absolute()), "digest": self.store.digest(self.out)}
        self.store.finish(released, keep=recipe.top.keep)
        self.watch.step("release", "finished", seconds)

    def _check_delivery(self) -> None:
        """Refuse before the long work what would be refused after it."""
        if self.recipe.delta is not None:
            from qalora.delta import check_base

            with self.source.lines_of("delta"), about("base"):
                check_base(self.recipe.delta.base, delta_of(self.out), force=self.force)
        if self.recipe.push is not None:
            from qalora.releasing.push import check_repo

            with self.source.lines_of("push"), about("repo"):
                check_repo(self.recipe.push.repo)

    def _deliver(self) -> None:
        """The delta, and the upload."""
        if self.recipe.delta is not None:
            from qalora.delta import write_delta

            total = sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file())
            with self.watch.writing(total, "delta") as progress:
                write_delta(self.recipe.delta.base, self.out, delta_of(self.out), force=self.force, progress=progress)
        if (chosen := self.recipe.push) is not None:
            from qalora.releasing.push import plan_push, push

            options = {one.name: getattr(chosen, one.name) for one in fields_of(type(chosen)) if one.name != "upload"}
            plan = plan_push(self.out, **options, allow_unproven=self.recipe.verify.allow_unproven)
            self.watch.planned(plan)
            self.watch.sent(push(plan) if chosen.upload else None)

    # what steps are made of

    @property
    def _form(self) -> Any:
        """How the base is read where its own files go on; what [quantize] makes is a folder of ours."""
        return self.recipe.base.checkpoint_format if self.recipe.quantize is None else None

    def _base(self, *, local: bool) -> _Thing:
        """The base; a folder or file, or what is here of the Hub."""
        given = self.recipe.base.model
        path = Path(given)
        with self.source.lines_of("base"), about("model"):
            if not path.exists():
                try:
                    path = download(given, here=local)
                except InputError:
                    if local:
                        return _Thing(path=None, digest=None)
                    raise
            if path.is_file():
                files = recognise(path).sources(path)
                digests = [self.store.digest(one) for one in files if one.is_file()]
                return _Thing(path=given, digest=" ".join(digests))
            return _Thing(path=given, digest=self.store.digest(path, skip=[self.out]))

    def _adapter(self) -> _Thing | None:
        given = self.recipe.adapter
        return None if given is None else _Thing(path=str(given.path), digest=self.store.digest(given.path))

    def _inputs(self, model: _Thing, adapter: _Thing | None) -> dict[str, str | None]:
        called = os.path.basename(os.path.abspath(self.recipe.base.model))  # noqa: PTH100, PTH119 - links stay
        return {
            "model": model.digest,
            "called": called,
            "read as": str(self._form),
            "adapter": "none" if adapter is None else adapter.digest,
        }

    def _quantize_step(self, base: _Thing) -> Step:
        if self.recipe.quantize is None:
            raise TypeError("no [quantize]")
        given = Path(self.recipe.base.model)
        name = given.stem if given.is_file() else given.resolve().name or "model"
        made = versions(MAKERS) if self.recipe.quantize.calibration is None else _readers()
        inputs = {"base": base.digest, "read as": str(self.recipe.base.checkpoint_format)}
        options = self._portable(self.recipe.quantize)
        return Step(kind="quantize", name=name, options=options, inputs=inputs, libraries=made)

    def _train_step(self, model: _Thing) -> Step:
        if self.recipe.train is None:
            raise TypeError("no [train]")
        options = self._portable(self.recipe.train)
        inputs = {"model": model.digest, "read as": str(self._form), "data": options.pop("data")}
        return Step(kind="train", name="adapter", options=options, inputs=inputs, libraries=_readers())

    def _release_step(self, model: _Thing, adapter: _Thing | None) -> Step:
        recipe = self.recipe
        records = (recipe.export, recipe.verify, recipe.release, recipe.adapter, recipe.delta, recipe.push)
        options = {type(one).__name__: self._portable(one) for one in records if one is not None}
        options["made"] = {"time": os.environ.get("SOURCE_DATE_EPOCH")}
        if recipe.train is not None:  # whose checkpoints change nothing but the run
            options["made"]["save_every"] = recipe.train.save_every
        libraries = proof_versions(recipe.export.targets)
        inputs = self._inputs(model, adapter)
        return Step(kind="release", name="release", options=options, inputs=inputs, libraries=libraries)

    def _release_options(self) -> ReleaseOptions:
        """The release's options with their files read."""
        recipe = self.recipe
        convention = None if recipe.adapter is None else recipe.adapter.convention
        with self.source.lines_of("verify", "release", "export"):
            return ReleaseOptions.of(recipe.export, recipe.verify, recipe.release, convention)

    def _portable(self, options: Options) -> dict[str, Any]:
        """What of a record decides a result, as JSON: a file counts by its content, what is of the Hub by its name."""

        def told(place: str, value: Any) -> Any:
            if place and value is not None:
                path = Path(value)
                return self.store.digest(path) if path.exists() else f"dataset {value}"
            return plain(value)

        return {
            one.name: told(one.place, getattr(options, one.name)) for one in fields_of(type(options)) if one.matters
        }


def delta_of(out: Path) -> Path:
    """Where the delta of a release goes."""
    return out.parent / f"{out.name}.delta"


def sign_password() -> str | None:
    """What QALORA_SIGN_PASSWORD holds, None where it is not set or empty."""
    return os.environ.get("QALORA_SIGN_PASSWORD") or None


def _readers() -> dict[str, str]:
    """The versions of what decides a result made of a text: how data become tokens among them."""
    return {**versions(MAKERS), "reading": str(READING)}
