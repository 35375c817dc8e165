"""qalora release: a command with several ways in, each a thin module of this package, imported when it is gone.

qalora release MODEL ... -o DIST          make      fold, export, verify, package
qalora release recipe.toml                recipe    the same and what comes before it, from a file
qalora release --init [FILE]              init      write such a file
qalora release --check DIST               check     is it whole, and what it says it is
qalora release --apply DELTA BASE -o OUT  apply     a release from another one and what differs
qalora release --push-to REPO DIST        push      upload one
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from qalora.cli.release import make

__all__ = ["WAYS", "command", "way_of"]

WAYS = ("check", "apply", "init", "push", "recipe", "make")
"""The ways, each the name of its module, which holds the command. Those of a flag of their own are the first three."""


def _command(way: str) -> click.Command:
    found: click.Command = importlib.import_module(f"qalora.cli.release.{way}").command
    return found


def all_options() -> click.Command:
    """A command that has every option of every way and does nothing: what it parses says which way is meant.

    ValueError where two ways spell an option alike, and one takes a value where the other takes none.
    """
    takes: dict[str, tuple[bool, int]] = {}
    params: list[click.Parameter] = [
        click.Option(["-h", "--help", "help"], is_flag=True),
        click.Argument(["words"], nargs=-1, type=click.UNPROCESSED),
    ]
    for option in (one for way in WAYS for one in _command(way).params if isinstance(one, click.Option)):
        form = (option.is_flag, option.nargs)
        for spelled in (option.opts, option.secondary_opts):
            if any(takes.get(one, form) != form for one in spelled):
                raise ValueError(f"qalora release: {spelled[0]} has two forms")
            new = [one for one in spelled if one not in takes]
            takes |= dict.fromkeys(new, form)
            if not new:
                continue
            name = f"{option.name}" if spelled is option.opts else f"no_{option.name}"
            kind = {"is_flag": True} if option.is_flag else {"type": click.UNPROCESSED, "nargs": option.nargs}
            params.append(click.Option([*new, name], expose_value=True, **kind))
    settings = {"ignore_unknown_options": True, "allow_interspersed_args": True}
    return click.Command("release", params=params, context_settings=settings, add_help_option=False)


def way_of(arguments: list[str]) -> tuple[str, bool]:
    """The way that arguments mean, which need not be right, and whether they ask for its help."""
    found = all_options().make_context("release", list(arguments), resilient_parsing=True).params
    words = [word for word in found["words"] if word[:1] != "-"]
    asks = bool(found["help"]) or found["repo"] in ("-h", "--help")
    for way in WAYS[:3]:
        if found[way]:
            return way, asks
    if words and words[0].endswith(".toml"):
        return "recipe", asks
    return ("push" if found["repo"] is not None and found["out"] is None else "make"), asks


class _Ways(click.Command):
    """The command of `make`, which hands over to another module's where the arguments lead there."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        way, asks = way_of(args)
        if way == "make":
            return super().make_context(info_name, args, parent, **extra)
        found = _command(way)
        return found.make_context(found.name, ["--help"] if asks else args, parent, **extra)


command = _Ways(
    name="release",
    callback=make.command.callback,
    params=make.command.params,
    help=make.command.help,
    epilog=make.command.epilog,
)
"""qalora release MODEL."""
