"""A command's last lines: what was made, where, how large, and what to run next.

    written: base, 76.3 MB
    next: qalora train base --data text.jsonl -o adapter

With `--json` stdout has JSON alone, and nothing of this.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import click

from qalora.options.fields import readable

__all__ = ["REMAINS", "nbytes_of", "print_dry", "print_made", "print_next"]

REMAINS = {
    "train": "if there is a checkpoint beside the output, `resume` continues from it",
    "run": "finished steps are kept; run the same command again to continue",
    "push": "a part of the upload may be there; run the same command again to complete it",
    "demo": "run it again with --force",
}
"""What is left of each command after Ctrl-C, where it is more than nothing."""


def nbytes_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> Iterator[Path]:
    return iter([path]) if path.is_file() else (one for one in path.rglob("*") if one.is_file())


def print_made(*paths: Path, note: str = "") -> None:
    """A line for each thing that was made; `note` says more about the last."""
    for n, path in enumerate(paths, 1):
        more = f", {note}" if note and n == len(paths) else ""
        click.echo(f"written: {path}, {readable(nbytes_of(path))}{more}")


def print_dry() -> None:
    """The last line of a dry run."""
    click.echo("nothing was written; leave out --dry-run to write it")


def print_next(*commands: tuple[object, ...]) -> None:
    """What to run next, each command as its words; a word in capitals, such as FILE, is for the user to replace."""
    for words in commands:
        click.echo(f"next: {shlex.join(map(str, words))}")
