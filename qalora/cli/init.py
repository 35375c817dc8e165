"""qalora init."""

from __future__ import annotations

from pathlib import Path

import click

from qalora.cli.options import Command, force_option
from qalora.cli.progress import log_format_option

__all__ = ["command"]


@click.command("init", cls=Command, epilog="Example: qalora init recipe.toml")
@click.argument("file", metavar="[FILE]", default="recipe.toml", type=click.Path(path_type=Path))
@force_option
@log_format_option
def command(file: Path, force: bool) -> None:
    """Write a commented recipe to FILE, recipe.toml by default: every section and key, its help, type and default."""
    from qalora.formats.output import new_file
    from qalora.pipeline.recipe_text import commented_recipe

    with new_file(file, force=force) as place:
        place.write_text(commented_recipe(), encoding="utf-8")
    click.echo(f"written: {file}")
