"""qalora release --apply DELTA BASE."""

from __future__ import annotations

from pathlib import Path

import click

from qalora.cli.options import force_option, output_option
from qalora.cli.progress import log_format_option, progress_bar

__all__ = ["command"]


@click.command("release --apply", epilog="Example: qalora release --apply dist.delta base-dist -o dist")
@click.option("--apply", is_flag=True, expose_value=False, hidden=True)
@click.argument("delta", type=click.Path(path_type=Path))
@click.argument("base", type=click.Path(path_type=Path))
@output_option("The folder to write; it appears only when every file has the digest that the delta promises.")
@click.option(
    "--to",
    "targets",
    multiple=True,
    metavar="FORMAT",
    help="Only this sub-folder of the release: gguf, mlx, ... Repeatable. BASE may then be the part that is there.",
)
@force_option
@log_format_option
def command(delta: Path, base: Path, out: Path, targets: tuple[str, ...], force: bool) -> None:
    """Rebuild a release from BASE, the release that DELTA was made over, byte for byte.

    With --to, BASE may be that sub-folder itself, or its one file of weights. A wrong base, or a damaged delta, is
    refused before anything is written.
    """
    from qalora.release.delta import apply_delta, chosen_files

    total = sum(file.nbytes for file in chosen_files(delta, targets))
    with progress_bar(total, "writing") as progress:
        done = apply_delta(delta, base, out, targets=targets, force=force, progress=progress)
    click.echo(f"{len(done.files)} files, {done.nbytes:,} bytes, each with its digest")
    click.echo(f"written: {done.folder}")
