"""qalora init."""

from __future__ import annotations

from pathlib import Path

import click

from qalora.cli.closing import print_made, print_next
from qalora.cli.options import Command, force_option
from qalora.cli.progress import log_format_option

__all__ = ["command"]


@click.command("init", cls=Command, example="qalora init recipe.toml")
@click.argument("file", metavar="[FILE]", default="recipe.toml", type=click.Path(path_type=Path))
@force_option
@log_format_option
def command(file: Path, force: bool) -> None:
    """Write a commented recipe to FILE (default: recipe.toml), with every key, its help, type and default."""
    from qalora.formats.output import new_file
    from qalora.pipeline.recipe_text import commented_recipe

    with new_file(file, force=force) as place:
        place.write_text(commented_recipe(), encoding="utf-8")
    print_made(file)
    print_next(("qalora", "run", file, "--dry-run"))
