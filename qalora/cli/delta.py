"""qalora delta make, qalora delta apply."""

from __future__ import annotations

from pathlib import Path

import click

from qalora.cli.closing import nbytes_of, print_made, print_next
from qalora.cli.options import Command, Group, force_option, output_option
from qalora.cli.progress import log_format_option, progress_bar

__all__ = ["command"]


@click.group("delta", cls=Group, example="qalora delta make base-dist dist -o dist.delta")
def command() -> None:
    """Make and apply deltas between releases. A delta holds only what a fine-tune changed."""


@command.command("make", cls=Command, example="qalora delta make base-dist dist -o dist.delta")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("dist", type=click.Path(path_type=Path))
@output_option("The folder to write.")
@force_option
@log_format_option
def make(base: Path, dist: Path, out: Path, force: bool) -> None:
    """Write a delta that turns the release BASE into the release DIST, byte for byte."""
    from qalora.delta import check_base, write_delta

    check_base(base, out, force=force)
    with progress_bar(nbytes_of(dist), "delta") as progress:
        delta = write_delta(base, dist, out, force=force, progress=progress)
    print_made(delta.folder, note=f"{100 * delta.ratio:.1f} % of the release")
    print_next(("qalora", "delta", "apply", delta.folder, base, "-o", "OUT"))


@command.command("apply", cls=Command, example="qalora delta apply dist.delta base-dist -o dist")
@click.argument("delta", type=click.Path(path_type=Path))
@click.argument("base", type=click.Path(path_type=Path))
@output_option("The folder to write. It appears only if every file has the digest that the delta lists.")
@click.option(
    "--to",
    "targets",
    multiple=True,
    metavar="FORMAT",
    help="Rebuild only this sub-folder of the release, such as gguf. Repeatable.",
)
@force_option
@log_format_option
def apply(delta: Path, base: Path, out: Path, targets: tuple[str, ...], force: bool) -> None:
    """Rebuild a release, byte for byte, from DELTA and the release BASE that it was made from.

    With --to, BASE can be that sub-folder itself, or its one file of weights. A wrong base or a damaged delta is
    refused before anything is written.
    """
    from qalora.delta import apply_delta, chosen_files

    total = sum(file.nbytes for file in chosen_files(delta, targets))
    with progress_bar(total, "writing") as progress:
        done = apply_delta(delta, base, out, targets=targets, force=force, progress=progress)
    print_made(done.folder, note=f"{len(done.files)} files, each with the digest that the delta promises")
    if not targets:
        print_next(("qalora", "check", done.folder))
