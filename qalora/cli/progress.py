"""Progress on stderr: bars for people, JSON lines for pipelines.

With `--log-format json` stderr has one JSON object a line, each with "event"; docs/pipelines.md lists them. Commands
use the bars of this module and need not know which it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qalora.errors import with_options
from qalora.formats.output import text_bytes

if TYPE_CHECKING:
    from qalora.converters.plan import Progress
    from qalora.parity.report import ParityReport
    from qalora.pipeline.watching import Watch
    from qalora.training.pace import Progress as TrainingProgress
    from qalora.training.pace import StepReport

__all__ = [
    "EVENTS",
    "asks_for_json",
    "json_log",
    "layers_bar",
    "log_event",
    "log_format_option",
    "log_gates",
    "progress_bar",
    "say",
    "say_stage",
    "training_bar",
    "verification_bar",
    "watch",
]

F = TypeVar("F", bound=Callable[..., Any])

EVENTS = {
    "step": "a step of a recipe: `step`, `state` (started, reused, goes on, finished), `seconds` when finished",
    "progress": "`stage`, and, where it is known, the `share` that is done, 0 to 1, once for each percent; `bytes` and "
    "`total` where bytes are counted; `step`, `steps`, `loss`, `held_out`, `tokens_per_second`, `seconds_left` in "
    "training",
    "gate": "a gate was judged: `at`, `gate`, `status` (pass, fail, ambiguous, not proven), `value`, `bound`, `detail`",
    "note": "`message`: what the user should know",
    "done": "the last line of a command that ends well; `status` is 0",
    "error": "the last line of one that does not: `status` (1 not proven, or interrupted; 2 bad usage or input) and "
    "`message`",
}
"""Each event of `--log-format json` and what is in it."""

_META = "qalora.log_format"


def log_format_option(function: F) -> F:
    """--log-format, which the functions of this module find in the context."""

    def store(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.meta[_META] = value

    return click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        is_eager=True,
        expose_value=False,
        callback=store,
        help="Progress on stderr: text (bars and lines, the default) or json (one object per line).",
    )(function)


def json_log() -> bool:
    """Whether the command that runs was asked for JSON lines."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_META) == "json"


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether arguments, which need not be right otherwise, ask for JSON lines."""
    return "--log-format=json" in arguments or ("--log-format", "json") in pairwise(arguments)


def log_event(event: str, **content: object) -> None:
    """A JSON line on stderr. What UTF-8 cannot hold, such as a byte of a path, stands as an escape in its text."""
    fields = {
        key: text_bytes(value).decode("utf-8") if isinstance(value, str) else value for key, value in content.items()
    }
    click.echo(json.dumps({"event": event, **fields}), err=True)


def say(message: str) -> None:
    """A note on stderr; an option in backquotes is shown as the flag that it is."""
    message = with_options(message, _flag)
    if json_log():
        log_event("note", message=message)
    else:
        click.echo(f"note: {message}", err=True)


def _flag(name: str) -> str:
    context = click.get_current_context(silent=True)
    params = [] if context is None else context.command.params
    return next((max(one.opts, key=len) for one in params if one.name == name), f"`{name}`")


def say_stage(stage: str) -> None:
    """A stage begins of which no share is known."""
    if json_log():
        log_event("progress", stage=stage)
    else:
        click.echo(f"{stage} ...", err=True)


def log_gates(report: ParityReport) -> None:
    """Every gate of a report, in JSON lines alone: people get the table."""
    if not json_log():
        return
    for where, result in report.results():
        numbers = {"value": _number(result.value), "bound": _number(result.bound)}
        log_event("gate", at=where, gate=result.gate, status=result.status, detail=result.detail, **numbers)


def _number(value: float | None) -> float | None:
    """Six significant digits; what is not finite is no JSON."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


class _Percents:
    """A JSON line for each stage and each whole percent of it."""

    def __init__(self) -> None:
        self._latest: tuple[str, int] | None = None

    def show(self, stage: str, share: float, **more: object) -> None:
        now = (stage, int(100 * share))
        if now != self._latest:
            self._latest = now
            log_event("progress", stage=stage, share=round(share, 4), **more)


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Progress]:
    """A bar of bytes, silent where stderr is no terminal; gives the function to call with (name, bytes)."""
    if json_log():
        percents, done = _Percents(), 0

        def count(name: str, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            percents.show(what, min(1.0, done / max(1, total)), bytes=done, total=total)

        yield count
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda name, nbytes: bar.advance(task, nbytes)


@contextmanager
def verification_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar with the stage and the time left; a line for each stage where stderr is no terminal."""
    if json_log():
        yield _Percents().show
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    latest = ""
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("verify", total=1.0)

        def show(stage: str, share: float) -> None:
            nonlocal latest
            bar.update(task, completed=share, description=stage)
            if not console.is_terminal and stage != latest:
                click.echo(f"{100 * share:3.0f} % {stage} ...", err=True)
            latest = stage

        yield show


@contextmanager
def layers_bar(layers: int) -> Iterator[Callable[[], None]]:
    """A bar of decoder layers, silent where stderr is no terminal; gives the function to call after each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if json_log():
        percents, done = _Percents(), 0

        def count() -> None:
            nonlocal done
            done = done % layers + 1  # from the beginning where there is another round
            percents.show("calibrating", done / layers)

        yield count
        return
    console = Console(stderr=True)
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=layers, visible=False)

        def advance() -> None:
            if bar.tasks[task].finished:
                bar.reset(task)
            bar.update(task, advance=1, visible=True)

        yield advance


@contextmanager
def training_bar() -> Iterator[TrainingProgress]:
    """A bar of steps, with losses and tokens a second; lines now and then where stderr is no terminal."""
    if json_log():
        percents = _Percents()

        def log(report: StepReport) -> None:
            if report.note:
                say(report.note)
            keys = ("loss", "held_out", "tokens_per_second", "seconds_left")
            figures = {key: _number(getattr(report, key)) for key in keys}
            percents.show("training", report.step / report.steps, step=report.step, steps=report.steps, **figures)

        yield log
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task, latest = bar.add_task("", total=None), -1

        def show(report: StepReport) -> None:
            nonlocal latest
            text = _of_training(report)
            bar.update(task, total=report.steps, completed=report.step, description=text)
            if report.note:
                say(report.note)
            due = report.step in (1, report.steps) or report.step % max(1, report.steps // 6) == 0
            if not console.is_terminal and due and report.step != latest:
                click.echo(f"step {report.step} of {report.steps}: {text}", err=True)
            latest = report.step

        yield show


def _of_training(report: StepReport) -> str:
    parts = [
        f"{words} {value:.3f}"
        for words, value in (("loss", report.loss), ("held-out", report.held_out))
        if math.isfinite(value)
    ]
    if report.tokens_per_second:
        parts.append(f"{report.tokens_per_second:.0f} tokens/s")
    if report.step < report.steps:
        parts.append(f"{timedelta(seconds=round(report.seconds_left))} left")
    return "  ".join(parts)


def watch() -> Watch:
    """What the steps of a pipeline say, on stderr."""
    from qalora.pipeline.watching import Watch

    return Watch(
        writing=progress_bar,
        layers=layers_bar,
        training=training_bar,
        verification=verification_bar,
        note=say,
        step=say_step,
        judged=log_gates,
    )


def say_step(step: str, state: str, seconds: float | None) -> None:
    """Where a run of a recipe is."""
    if json_log():
        log_event("step", step=step, state=state, **({} if seconds is None else {"seconds": round(seconds, 3)}))
    elif state != "finished":
        click.echo(f"{step}: {state}", err=True)
