"""qalora release recipe.toml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qalora.cli.options import dry_run_option, force_option, table_console
from qalora.cli.progress import json_log, log_event, log_format_option, say
from qalora.errors import InputError

if TYPE_CHECKING:
    from qalora.cli.release.pipeline import Pipeline, Row

__all__ = ["command", "open_recipe"]


@click.command("release", epilog="Example: qalora release recipe.toml --dry-run")
@click.argument("recipe", metavar="RECIPE.toml", type=click.Path(path_type=Path))
@force_option
@dry_run_option
@log_format_option
@click.pass_context
def command(context: click.Context, recipe: Path, force: bool, dry_run: bool) -> None:
    """Do what a recipe says: quantize, train or take an adapter, export, verify, package.

    Steps whose inputs and options have not changed are not done again, and an interrupted training goes on. --dry-run
    prints what would be done, with sizes and the time that it took last. --force replaces an earlier release; steps
    are reused all the same.
    """
    from qalora.formats.output import check_output
    from qalora.release.checksums import SUMS

    pipeline = open_recipe(recipe, context, force=force)
    rows = pipeline.survey(local=dry_run)
    if dry_run:
        pipeline.plan(force=True)
        _show(rows)
        if not pipeline.released and not force and pipeline.out.exists():
            say(f"{pipeline.out} exists already; to replace it give --force")
    elif pipeline.released:
        with pipeline.store.opened():  # which keeps the digests
            pass
        click.echo(f"nothing has changed: {pipeline.out}")
    else:
        check_output(pipeline.out, force=force, names=[SUMS])
        pipeline.plan(force=force)
        with pipeline.store.opened():
            pipeline.run()


def open_recipe(recipe: Path, context: click.Context, *, force: bool) -> Pipeline:
    """Read and check a recipe; nothing is done, and no weight is read."""
    from qalora.cli.release.pipeline import Pipeline
    from qalora.cli.release.schema import sections
    from qalora.release.recipe import check_recipe, read_recipe
    from qalora.release.steps import Store

    source = read_recipe(recipe)
    found = check_recipe(source, sections(source.folder))
    if "train" in found and "adapter" in found:
        raise InputError(
            f"{source.where('adapter')}: [adapter]", expected="[train] or [adapter]", got="both", todo="leave one out"
        )
    try:
        store = Store(source.folder / found[""].get("work", ".qalora"), recipe)
    except InputError as error:
        raise InputError(f"{source.where('work')}: {error}") from error
    return Pipeline(source=source, found=found, store=store, context=context, force=force)


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
