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
from itertools import pairwise
from typing import Any

import click

from qalora.cli.release import make

__all__ = ["WAYS", "command"]

WAYS = {"--check": "check", "--apply": "apply", "--init": "init", "--push-to": "push"}
"""The option that leads to each module; without one of them it is `recipe` for a .toml file, else `make`."""


def way_of(arguments: list[str]) -> tuple[str, list[str]]:
    """The module, and the arguments that its command gets."""
    if "-o" in arguments or "--output" in arguments:  # a release that is also uploaded
        known = [flag for flag in WAYS if flag not in ("--check", "--push-to")]
    else:
        known = list(WAYS)
    flags = [flag for flag in known if flag in arguments]
    if flags:
        rest = list(arguments)
        if flags[0] != "--push-to":
            rest.remove(flags[0])
        return WAYS[flags[0]], rest
    words = [word for before, word in pairwise(["", *arguments]) if before != "--log-format" and word[:1] != "-"]
    first = next(iter(words), "")
    return ("recipe", arguments) if first.endswith(".toml") else ("make", arguments)


class _Ways(click.Command):
    """The command of `make`, which hands over to another module's where the arguments lead there."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        way, rest = way_of(args)
        if way == "make":
            return super().make_context(info_name, args, parent, **extra)
        if {"-h", "--help"} & set(rest):  # which --push-to would take for its repository
            rest = ["--help"]
        found: click.Command = importlib.import_module(f"qalora.cli.release.{way}").command
        return found.make_context(found.name, rest, parent, **extra)


command = _Ways(
    name="release",
    callback=make.command.callback,
    params=make.command.params,
    help=make.command.help,
    epilog=make.command.epilog,
)
