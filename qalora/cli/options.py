"""Options of commands, made of the records that hold them; and what several commands share beside.

A record's field is a flag: its help, its type, its range and its default are those of the field. What a user did not
give is left to the record.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from qalora.cli.progress import say
from qalora.errors import with_options
from qalora.options import Option, fields_of
from qalora.options.words import CheckpointFormat, Convention, Minima

if TYPE_CHECKING:
    from rich.console import Console

    from qalora.checkpoint import Checkpoint
    from qalora.converters.plan import Plan

__all__ = [
    "Command",
    "Group",
    "WithExample",
    "checkpoint_format_option",
    "convention_option",
    "dry_run_option",
    "force_option",
    "json_flag",
    "minima_option",
    "open_model",
    "options_of",
    "output_option",
    "print_json",
    "print_plans",
    "record_from",
    "spelling",
    "table_console",
]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_SPELLING = "qalora.spelling"
_KINDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


class WithExample(click.Command):
    """A command whose help begins with an example, right after the first sentence.

    example  the line that most people want
    """

    def __init__(self, *arguments: Any, example: str = "", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.example = example

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The first sentence, the example, and the rest."""
        first, rest = _first_sentence(inspect.cleandoc(self.help or ""))
        for part in (first, self.example, rest):
            if not part:
                continue
            formatter.write_paragraph()
            with formatter.indentation():
                if part is self.example:  # in one line, to be copied
                    formatter.write(f"{'':>{formatter.current_indent}}Example: {part}\n")
                else:
                    formatter.write_text(part)


def _first_sentence(text: str) -> tuple[str, str]:
    """(the first sentence, what follows it)."""
    match = re.match(r"(.+?\.)(?:\s+|$)", text, re.DOTALL)
    return (text, "") if match is None else (match[1], text[match.end() :])


class Command(WithExample):
    """A command whose help has the options of experts under a heading of their own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Two lists of options."""
        lists: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                lists[isinstance(param, _Option) and param.option.expert].append(record)
        for expert, heading in ((False, "Options"), (True, "Options for experts")):
            if lists[expert]:
                with formatter.section(heading):
                    formatter.write_dl(lists[expert])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """From here on an error knows how this command spells its options."""
        ctx.meta[_SPELLING] = {str(param.name): _spelled(param) for param in self.params}
        return super().parse_args(ctx, args)


class Group(WithExample, click.Group):
    """A group of commands, likewise."""


def spelling(ctx: click.Context) -> Callable[[str], str]:
    """How the command that failed spells an option; what is none of its stays in backquotes."""
    known: dict[str, str] = ctx.meta.get(_SPELLING, {})
    return lambda name: known.get(name, f"`{name}`")


def _spelled(param: click.Parameter) -> str:
    return max(param.opts, key=len) if isinstance(param, click.Option) else str(param.human_readable_name)


class _Option(click.Option):
    """An option of a record."""

    def __init__(self, *arguments: Any, option: Option, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.option = option


class _Value(click.ParamType[Any]):
    """One value of an option, as its field takes it."""

    def __init__(self, option: Option) -> None:
        self.option = option
        self.name = option.flag

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value; InputError for one that the option does not take."""
        return self.option.parse(value) if isinstance(value, str) else value

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Its words, or what kind of value it takes."""
        option = self.option
        words = [*option.words, *([option.empty] if option.empty else [])]
        if not option.free:
            return f"[{'|'.join(words)}]"
        return option.metavar or "|".join([_KINDS.get(option.kind, "VALUE"), *words])


def options_of(record: type, *, leave_out: Collection[str] = ()) -> Callable[[F], F]:
    """The options of a record; `record_from` makes the record of what the user gave."""

    def decorate(function: F) -> F:
        known = [one for one in fields_of(record) if one.name not in leave_out]
        for option in sorted(known, key=lambda one: not one.required)[::-1]:
            function = _decorator(option, record)(function)
        return function

    return decorate


def _decorator(option: Option, record: type) -> Callable[[F], F]:
    flag = f"--{option.flag}"
    names = {one.name: f"--{one.flag}" for one in fields_of(record)}
    text = with_options(option.help, lambda name: names.get(name, name))
    settings: dict[str, Any] = {"help": f"{text} Repeatable." if option.many is not None else text}
    settings |= {"cls": _Option, "option": option}
    if option.kind is bool:
        off = f"--without-{option.flag.removeprefix('with-')}" if option.flag.startswith("with-") else ""
        names_of = f"{flag}/{off}" if off else flag
        return click.option(names_of, option.name, default=option.default, is_flag=True, **settings)
    if option.default not in (None, (), frozenset()) and not option.required:
        settings |= {"default": _size_text(option) if option.size else option.default, "show_default": True}
    return click.option(
        *(["-o"] if option.flag == "output" else []),
        flag,
        option.name,
        type=_Value(option),
        required=option.required,
        multiple=option.many is not None,
        **settings,
    )


def _size_text(option: Option) -> str:
    """A size as people write it."""
    return f"{option.default / 1e9:g}GB"


def record_from(record: type[T], settings: dict[str, Any], **fixed: Any) -> T:
    """Take what `options_of` added out of a command's settings, and make the record of it.

    fixed  fields that are set beside what the user gave
    """
    context = click.get_current_context()
    own = {}
    for option in fields_of(record):
        if option.name in settings:
            value = settings.pop(option.name)
            if context.get_parameter_source(option.name) is not ParameterSource.DEFAULT:
                own[option.name] = value
    return record(**own, **fixed)


def output_option(what: str) -> Callable[[F], F]:
    """-o/--output, required; `what` says what appears there."""
    return click.option(
        "-o", "--output", "out", required=True, type=click.Path(path_type=Path), metavar="DIR", help=what
    )


def force_option(function: F) -> F:
    """--force."""
    return click.option("--force", is_flag=True, help="Replace an earlier output.")(function)


def dry_run_option(function: F) -> F:
    """--dry-run."""
    return click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")(function)


def json_flag(function: F) -> F:
    """--json as a flag: machine-readable on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def minima_option(function: F) -> F:
    """--minima, None where it is not given."""
    return click.option(
        "--minima",
        type=click.Choice(list(_words(Minima))),
        help="Data type that the folded minima are rounded to. Default: as in the adapter's training, or float16.",
    )(function)


def convention_option(function: F) -> F:
    """--convention, None where it is not given."""
    return click.option(
        "--convention",
        type=click.Choice(list(_words(Convention))),
        help="How the adapter is scaled, if its files do not say.",
    )(function)


def checkpoint_format_option(function: F) -> F:
    """--checkpoint-format, for `open_model`."""
    return click.option(
        "--checkpoint-format",
        type=click.Choice(list(_words(CheckpointFormat))),
        help="How a GPTQ folder stores its zero points, if its label is wrong.",
    )(function)


def _words(kind: Any) -> tuple[str, ...]:
    words: tuple[str, ...] = kind.__args__
    return words


def open_model(model: str, checkpoint_format: str | None = None) -> Checkpoint:
    """Load a MODEL argument, and say on stderr what its reader noted."""
    from qalora.converters import load

    return load(model, checkpoint_format=checkpoint_format, note=say)


def print_json(content: object) -> None:
    """Machine-readable output: sorted keys, on stdout."""
    click.echo(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False))


def table_console() -> Console:
    """A console for tables on stdout, wide enough for them where it is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=170)


def print_plans(plans: Sequence[Plan], *, details: bool) -> None:
    """A table for each plan: carriers with counts and bytes; every tensor where `details` is set."""
    from rich.table import Table

    console = table_console()
    for plan in plans:
        table = Table(title=f"{plan.target}: {plan.nbytes:,} bytes", title_justify="left")
        for column in ("tensor" if details else "tensors", "carrier", "file", "bytes", "exact"):
            table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
        for row in _plan_rows(plan, details):
            table.add_row(*row)
        console.print(table)
        if plan.device_load is not None:
            console.print(f"  a device loads: {plan.device_load}", markup=False)
        for note in plan.notes:
            console.print(f"  note: {note}", markup=False)


def _plan_rows(plan: Plan, details: bool) -> list[tuple[str, str, str, str, str]]:
    def exact(loss: object) -> str:
        return "yes" if loss is None else str(getattr(loss, "size", loss))

    if details:
        return [(t.name, t.carrier, f"{t.file} @ {t.offset}", f"{t.nbytes:,}", exact(t.loss)) for t in plan.tensors]
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for tensor in plan.tensors:
        kinds.setdefault((tensor.carrier, tensor.file, exact(tensor.loss)), []).append(tensor.nbytes)
    return [(str(len(sizes)), carrier, file, f"{sum(sizes):,}", loss) for (carrier, file, loss), sizes in kinds.items()]
