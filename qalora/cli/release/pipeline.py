"""The steps of a recipe, each a command of ours with its options: what it is made of, and how it is done.

quantize  qalora quantize BASE -o WORK/quantize/<key>/<name of the base>
train     qalora train MODEL -o WORK/train/<key>/adapter
export *, verify, release     qalora release, with results of earlier runs
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli import quantize, train
from qalora.cli.progress import json_log, log_event, say
from qalora.cli.release import make
from qalora.cli.release.schema import LEFT_OUT, arguments
from qalora.errors import InputError
from qalora.formats.gguf_split import split_files
from qalora.release.cached import CachedSteps, export_step, proof_step, proof_versions
from qalora.release.checksums import SUMS
from qalora.release.recipe import Source
from qalora.release.steps import MAKERS, Result, Step, Store, versions

if TYPE_CHECKING:
    from qalora.adapter import Adapter
    from qalora.checkpoint import Checkpoint
    from qalora.release.options import ReleaseOptions

__all__ = ["Pipeline", "Row"]

NO_MATTER = {"train": {"save_every"}}
"""Options of a step that change nothing in its result."""


@dataclass(slots=True, kw_only=True)
class Row:
    """A step as `--dry-run` shows it: state is "reused", "goes on" or "to do"; bytes and seconds None where unknown."""

    label: str
    state: str
    nbytes: int | None = None
    seconds: float | None = None


@dataclass(slots=True, kw_only=True)
class _Thing:
    """A model or adapter on the way: where it is and its digest, both None where it is still to be made."""

    path: str | None
    digest: str | None


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """A checked recipe. `survey` says what a run would do, `run` does it."""

    source: Source
    found: Mapping[str, Mapping[str, Any]]
    store: Store
    context: click.Context
    force: bool
    rows: list[Row] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Where the release goes."""
        return Path(self.found["release"]["output"])

    @property
    def released(self) -> bool:
        """Whether, by the last `survey`, the release is there and nothing has changed."""
        return self.rows[-1].state == "reused"

    # what a run would do

    def survey(self, *, local: bool) -> list[Row]:
        """Every step with its state. local: nothing is fetched for it."""
        self.rows = []
        base = self._base(local=local)
        model = self._look("quantize", self._quantize_step(base)) if "quantize" in self.found else base
        adapter = self._adapter()
        if "train" in self.found:
            step = self._train_step(model)
            adapter = self._look("train", step)
            if self.rows[-1].state == "to do" and self.store.begun(step) is not None:
                self.rows[-1].state = "goes on"
        options, settings = self._release_options()
        inputs = self._inputs(model, adapter)
        exported = {
            target: self._look(f"export {target}", export_step(target, options.to_json(), inputs)).digest
            for target in options.targets
        }
        checked = proof_step({**options.to_json(), "memory": settings["memory"]}, {**inputs, **exported})
        self._look("verify", checked)
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
        from qalora.converters import load
        from qalora.release.package import preview

        rows = {row.label: row for row in self.rows}
        if self._base(local=True).path is None:
            say(f"{self.found['base']['model']} is not here yet: nothing can be planned")
            return
        with self._blaming("base"):
            model = load(self.found["base"]["model"], checkpoint_format=self.found["base"].get("checkpoint-format"))
        if "quantize" in self.found:
            model = self._planned_model(model, rows["quantize"])
        with self._blaming("base", "train", "adapter"):
            adapter = self._planned_adapter(model, rows)
        options, _ = self._release_options()
        with self._blaming("export", "release"):
            plans = preview(model, options, self.out, adapter=adapter, force=force)
        for plan in plans:
            row = rows[f"export {plan.target}"]
            row.nbytes = row.nbytes if row.nbytes is not None else plan.nbytes

    def _planned_model(self, base: Checkpoint, row: Row) -> Checkpoint:
        from qalora.converters import native
        from qalora.converters.plan import ExportOptions
        from qalora.tensor import BITS

        settings = self._settings(quantize.command, "quantize", ["--output=-", "--", "-"])
        size = settings.pop("max_shard_size")
        own = {key: value for key, value in settings.items() if key not in (*LEFT_OUT, "model", "checkpoint_format")}
        if own["bits"] == "auto" and own["budget"] is not None:  # choosing widths takes long: planned as one width
            width = max((bits for bits in BITS if bits < own["budget"]), default=BITS[0])
            own |= {"bits": str(width), "budget": None, "widths": ()}
            if own["method"] == "rtn" and not own["fit_minima"]:
                usual = {str(param.name): param.default for param in quantize.command.params}
                text = {key: usual[key] for key in ("calibration_tokens", "sequence_length")}
                own |= {"calibration": None, **text}  # which are for the choice alone
        with self._blaming("quantize"):
            model = quantize.quantized_model(base, **own)
            plan = native.plan(model, ExportOptions(max_shard_size=size))
        row.nbytes = row.nbytes if row.nbytes is not None else plan.nbytes
        return model

    def _planned_adapter(self, model: Checkpoint, rows: Mapping[str, Row]) -> Adapter | None:
        from qalora.adapter import read_adapter
        from qalora.training.loop import untrained

        if "adapter" in self.found:
            convention = self.found["adapter"].get("convention")
            return read_adapter(Path(self.found["adapter"]["path"]), model, convention=convention)
        if "train" not in self.found:
            return None
        settings = self._settings(train.command, "train", ["--output=-", "--", "-"])
        left = {
            key: value
            for key, value in settings.items()
            if key not in ("model", "as_json", "checkpoint_format", "dry_run")
        }
        adapter = untrained(model, train.train_options(**left))
        row = rows["train"]
        if row.nbytes is None:
            row.nbytes = sum(4 * (layer.a.numel() + layer.b.numel()) for layer in adapter.layers.values())
        return adapter

    # the run itself

    def run(self) -> None:
        """Do every step that is not done yet, and release."""
        base = self._base(local=False)
        model = base
        if "quantize" in self.found:
            with self._blaming("base", "quantize"):
                model = self._done("quantize", self._quantize_step(base), lambda out: self._quantize(base, out))
        adapter = self._adapter()
        if "train" in self.found:
            step, trained = self._train_step(model), model
            with self._blaming("base", "train"):
                adapter = self._done("train", step, lambda out: self._train(trained, step, out))
        with self._blaming("base", "adapter", "export", "verify", "release"):
            self._release(model, adapter)

    def _done(self, label: str, step: Step, action: Callable[[Path], None]) -> _Thing:
        self.store.use(label, step)
        result: Result | None = self.store.found(step)
        begun = result is None and self.store.begun(step) is not None
        _notice(label, "reused" if result is not None else "goes on" if begun else "started", None)
        if result is None:
            result = self.store.run(step, action)
            self.store.took(label, result.seconds)
            _notice(label, "finished", result.seconds)
        return _Thing(path=str(result.path), digest=result.digest)

    def _quantize(self, base: _Thing, out: Path) -> None:
        given = self._format("quantize")
        words = [*self._words(quantize.command, "quantize"), *given, f"--output={out}", "--", str(base.path)]
        self._call(quantize.command, words)

    def _train(self, model: _Thing, step: Step, out: Path) -> None:
        goes_on = ["--resume"] if self.store.begun(step) is not None else []
        given = self._format("train")
        words = [*self._words(train.command, "train"), *given, *goes_on, f"--output={out}", "--"]
        self._call(train.command, [*words, str(model.path)])

    def _release(self, model: _Thing, adapter: _Thing | None) -> None:
        step = self._release_step(model, adapter)
        started, before = time.monotonic(), 0.0

        def notice(label: str, state: str, seconds: float | None) -> None:
            nonlocal before
            before += seconds or 0.0
            _notice(label, state, seconds)

        steps = CachedSteps(store=self.store, inputs=self._inputs(model, adapter), notice=notice)
        words = self._release_words(model.path or "-", None if adapter is None else adapter.path)
        with make.command.make_context("release", words, parent=self.context) as context:
            make.make(**context.params, steps=steps)
        seconds = time.monotonic() - started - before
        self.store.took("release", seconds)
        released = {"key": step.key, "out": str(self.out.absolute()), "digest": self.store.digest(self.out)}
        self.store.finish(released, keep=bool(self.found[""].get("keep", False)))
        _notice("release", "finished", seconds)

    def _call(self, command: click.Command, words: list[str]) -> None:
        with command.make_context(command.name, words, parent=self.context) as context:
            command.invoke(context)

    # what steps are made of

    def _base(self, *, local: bool) -> _Thing:
        """The base; a folder or file, or what is here of the Hub."""
        from qalora.converters.huggingface import download

        given = self.found["base"]["model"]
        path = Path(given)
        with self._blaming("base"):
            if not path.exists():
                try:
                    path = download(given, here=local)
                except InputError:
                    if local:
                        return _Thing(path=None, digest=None)
                    raise
            if path.is_file():
                files = sorted(path.parent.iterdir()) if path.suffix == ".onnx" else split_files(path)
                digests = [self.store.digest(one) for one in files if one.is_file()]
                return _Thing(path=given, digest=" ".join(digests))
            return _Thing(path=given, digest=self.store.digest(path, skip=[self.out]))

    def _adapter(self) -> _Thing | None:
        if "adapter" not in self.found:
            return None
        path = self.found["adapter"]["path"]
        return _Thing(path=path, digest=self.store.digest(Path(path)))

    def _inputs(self, model: _Thing, adapter: _Thing | None) -> dict[str, str | None]:
        called = os.path.basename(os.path.abspath(self.found["base"]["model"]))  # noqa: PTH100, PTH119 - links stay
        return {"model": model.digest, "called": called, "adapter": "none" if adapter is None else adapter.digest}

    def _quantize_step(self, base: _Thing) -> Step:
        given = Path(self.found["base"]["model"])
        name = given.stem if given.is_file() else given.resolve().name or "model"
        settings = self._portable(
            quantize.command, self._settings(quantize.command, "quantize", ["--output=-", "--", "-"])
        )
        made = versions(MAKERS) if settings["calibration"] is None else _readers()
        return Step(kind="quantize", name=name, options=settings, inputs={"base": base.digest}, libraries=made)

    def _train_step(self, model: _Thing) -> Step:
        settings = self._settings(train.command, "train", ["--output=-", "--", "-"])
        data = settings.pop("data")
        told = self.store.digest(Path(data)) if Path(data).is_file() else f"dataset {data}"
        return Step(
            kind="train",
            name="adapter",
            options=self._portable(train.command, settings),
            inputs={"model": model.digest, "data": told},
            libraries=_readers(),
        )

    def _release_step(self, model: _Thing, adapter: _Thing | None) -> Step:
        words = self._release_words("-", None)
        params = make.command.make_context("release", words, parent=self.context).params
        options = {**self._portable(make.command, params), "time": os.environ.get("SOURCE_DATE_EPOCH")}
        inputs = self._inputs(model, adapter)
        libraries = proof_versions(params["targets"])
        return Step(kind="release", name="release", options=options, inputs=inputs, libraries=libraries)

    def _release_options(self) -> tuple[ReleaseOptions, dict[str, Any]]:
        """The release's options as its command reads them, and {"memory"}."""
        words = self._release_words("-", None)
        params = make.command.make_context("release", words, parent=self.context).params
        left_out = make.PACKAGING
        with self._blaming("verify", "export"):
            options, memory = make.release_options({k: v for k, v in params.items() if k not in left_out})
        return options, {"memory": memory}

    def _release_words(self, model: str, adapter: str | None) -> list[str]:
        words = [word for name in ("export", "verify", "release") for word in self._words(make.command, name)]
        convention = self.found.get("adapter", {}).get("convention")
        words += [f"--convention={convention}"] if convention is not None else []
        words += [f"--adapter={adapter}"] if adapter is not None else []
        return [*words, *self._format("release"), *(["--force"] if self.force else []), "--", model]

    def _words(self, command: click.Command, section: str) -> list[str]:
        return arguments(command, self.found.get(section, {}))

    def _format(self, section: str) -> list[str]:
        """--checkpoint-format for the sections that read the base; what [quantize] makes is a folder of ours."""
        given = self.found["base"].get("checkpoint-format")
        ours = "quantize" in self.found and section != "quantize"
        return [] if given is None or ours else [f"--checkpoint-format={given}"]

    def _settings(self, command: click.Command, section: str, rest: list[str]) -> dict[str, Any]:
        words = [*self._words(command, section), *self._format(section), *rest]
        return dict(command.make_context(command.name, words, parent=self.context).params)

    def _portable(self, command: click.Command, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What of a command's settings decides its result, as JSON: a file counts by its content."""
        paths = {param.name for param in command.params if isinstance(param.type, click.Path)}
        left_out = {"model", "adapter", *LEFT_OUT, *NO_MATTER.get(str(command.name), ())}
        return {
            name: self.store.digest(Path(value)) if name in paths and value is not None else value
            for name, value in settings.items()
            if name not in left_out
        }

    @contextmanager
    def _blaming(self, *names: str) -> Iterator[None]:
        """Put file and line before an error that begins with a key of these sections, or with a key's value."""
        try:
            yield
        except InputError as error:
            said = str(error)
            found = [(name, key) for name in names for key in self.found.get(name, {}) if self._about(said, name, key)]
            if not found or said.startswith(f"{self.source.path}:"):
                raise
            name, key = found[0]
            where = self.source.where(*(self.source.written(name, key) or (name,)))
            raise InputError(f"{where}: [{name}] {said.removeprefix('--')}") from error

    def _about(self, said: str, name: str, key: str) -> bool:
        """Whether a message is about a key: it begins with its value, or names it before a colon or further on."""
        value = self.found[name][key]
        values = [re.escape(str(one)) for one in (value if isinstance(value, list) else [value])]
        named = rf"(?:--)?{key.replace('-', '[-_]')}(?![\w-])"
        begun = "|".join(one for one in values if len(one) > 1)
        return re.search(rf"(?:^|: ){named}", said) is not None or bool(
            begun and re.match(rf"(?:{begun})(?![\w-])", said)
        )


def _readers() -> dict[str, str]:
    """The versions of what decides a result made of a text: how data become tokens among them."""
    from qalora.training.data import READING

    return {**versions(MAKERS), "reading": str(READING)}


def _notice(step: str, state: str, seconds: float | None) -> None:
    """Say on stderr where a run is."""
    if json_log():
        took = {} if seconds is None else {"seconds": round(seconds, 3)}
        log_event("step", step=step, state=state, **took)
    elif state != "finished":
        click.echo(f"{step}: {state}", err=True)
