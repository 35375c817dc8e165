"""qalora check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qalora.cli.options import Command, checkpoint_format_option, json_flag, open_model, print_json
from qalora.cli.progress import log_format_option, say_stage

if TYPE_CHECKING:
    from qalora.releasing.check import Checked

__all__ = ["command"]


@click.command(
    "check", cls=Command, epilog="Example: qalora check dist --base base --adapter adapter --public-key key.pub"
)
@click.argument("dist", type=click.Path(path_type=Path))
@click.option("--base", help="The model it was made from: every byte is computed again.")
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter; else the release's own copy.")
@click.option(
    "--public-key", type=click.Path(path_type=Path), metavar="KEY", help="Check model.sig with this public key."
)
@click.option("--text", type=click.Path(path_type=Path), help="The text that the report was measured on.")
@click.option("--card-template", type=click.Path(path_type=Path), help="The template that the card was made with.")
@click.option("--open/--no-open", "opens", default=True, help="Whether each artefact is opened in its runtime.")
@click.option("--allow-unproven", is_flag=True, help="Exit 0 even where a runtime is not installed.")
@checkpoint_format_option
@json_flag
@log_format_option
def command(
    dist: Path,
    base: str | None,
    adapter: Path | None,
    public_key: Path | None,
    text: Path | None,
    card_template: Path | None,
    opens: bool,
    allow_unproven: bool,
    checkpoint_format: str | None,
    as_json: bool,
) -> None:
    """Check a release: checksums, signature, whether its parts agree, whether every artefact opens; and with the base,
    that base and adapter give every byte of it and every figure of its report.

    Everything that is wrong is named. Exit status 1 if anything is.
    """
    from qalora.errors import InputError, ProofError
    from qalora.parity.text import read_text
    from qalora.releasing.check import check_is_release, check_release

    told = {"text": text, "template": card_template}
    texts = {name: None if path is None else read_text(path) for name, path in told.items()}
    for path in (adapter, public_key):
        if path is not None and not path.exists():
            raise InputError(f"{path}: no such file or folder")
    check_is_release(dist)
    found = check_release(
        dist,
        base=None if base is None else open_model(base, checkpoint_format),
        adapter=adapter,
        public_key=public_key,
        text=texts["text"],
        template=texts["template"],
        open_artifacts=opens,
        allow_unproven=allow_unproven,
        progress=say_stage,
    )
    print_json(_json(dist, found)) if as_json else _print(found)
    if found.findings:
        more = len(found.findings) - 1
        raise ProofError(f"{dist} is not what it says: {found.findings[0]}" + (f" (and {more} more)" if more else ""))


def _print(found: Checked) -> None:
    for stage in found.stages:
        state = "not asked" if stage.skipped else "WRONG" if stage.findings else "right"
        click.echo(f"{stage.question:>14}  {state}" + (f": {stage.skipped}" if stage.skipped else ""))
        for finding in stage.findings:
            click.echo(f"{'':>16}{finding}")
        for note in stage.notes:
            click.echo(f"{'':>16}note: {note}")


def _json(dist: Path, found: Checked) -> dict[str, object]:
    from qalora.formats.record_json import encode

    stages = [{**encode(stage), "skipped": stage.skipped or None} for stage in found.stages]
    return {"schema": "qalora.check/1", "release": dist.name, "passed": not found.findings, "stages": stages}
