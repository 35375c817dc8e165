"""qalora run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qalora.cli.closing import print_next
from qalora.cli.options import Command, dry_run_option, force_option, json_flag, print_json, table_console
from qalora.cli.progress import json_log, log_event, log_format_option, watch
from qalora.cli.push import print_push, print_sent
from qalora.cli.release import print_release

if TYPE_CHECKING:
    from qalora.pipeline import Row

__all__ = ["command"]


@click.command("run", cls=Command, example="qalora run recipe.toml")
@click.argument("recipe", metavar="RECIPE.toml", type=click.Path(path_type=Path))
@force_option
@dry_run_option
@json_flag
@log_format_option
def command(recipe: Path, force: bool, dry_run: bool, as_json: bool) -> None:
    """Run a recipe: quantize, train (or use an adapter that you have), export, verify, package.

    Steps whose inputs and options have not changed are reused, and an interrupted training continues. --dry-run prints
    what would be done, with sizes and the time that each step took last time. --force replaces an earlier release;
    finished steps are still reused.
    """
    from qalora.pipeline import run
    from qalora.pipeline.recipe import read_recipe

    progress = replace(
        watch(), done=(lambda done: None) if as_json else print_release, planned=print_push, sent=print_sent
    )
    rows = run(recipe, force=force, dry_run=dry_run, watch=progress)
    if as_json:
        print_json(
            [{"step": row.label, "state": row.state, "bytes": row.nbytes, "seconds": row.seconds} for row in rows]
        )
    elif dry_run:
        _show(rows)
        if not json_log():
            print_next(("qalora", "run", recipe))
    else:
        if rows[-1].state == "reused":
            click.echo("nothing has changed: the release is there already")
        print_next(("qalora", "check", read_recipe(recipe)[1].release.out))


def _show(rows: list[Row]) -> None:
    """What would be done: a table, or a JSON line for each step."""
    if json_log():
        for row in rows:
            log_event("step", step=row.label, state=row.state, bytes=row.nbytes, seconds=row.seconds)
        return
    from rich.table import Table

    table = Table()
    for column in ("step", "", "bytes", "seconds, last time"):
        table.add_column(column, justify="right" if column.startswith(("bytes", "seconds")) else "left")
    for row in rows:
        size = "" if row.nbytes is None else f"{row.nbytes:,}"
        last = "" if row.state == "reused" else "unknown" if row.seconds is None else f"{row.seconds:.1f}"
        table.add_row(row.label, row.state, size, last)
    console = table_console()
    console.print(table)
    left = [row.seconds for row in rows if row.state != "reused"]
    known = [seconds for seconds in left if seconds is not None]
    if not left:
        console.print("nothing to do")
    else:
        console.print(f"time left: about {sum(known):.0f} s" if len(known) == len(left) else "time left: unknown")
