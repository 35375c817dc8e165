"""qalora check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qalora.cli.closing import nbytes_of, print_next
from qalora.cli.options import Command, checkpoint_format_option, json_flag, open_model, print_json, spelling
from qalora.cli.progress import log_format_option, say_stage
from qalora.errors import with_options
from qalora.options.fields import readable

if TYPE_CHECKING:
    from qalora.releasing.check import Checked

__all__ = ["command"]


@click.command("check", cls=Command, example="qalora check dist --base base")
@click.argument("dist", type=click.Path(path_type=Path))
@click.option("--base", help="The base model. With it, every byte is computed again.")
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter. Default: the copy in the release.")
@click.option(
    "--public-key", type=click.Path(path_type=Path), metavar="KEY", help="Check model.sig with this public key."
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="The text that the report was measured on, if one was given."
)
@click.option(
    "--card-template",
    type=click.Path(path_type=Path),
    help="The template that the card was made with, if one was given.",
)
@click.option("--open/--no-open", "opens", default=True, help="Open each artefact in its runtime (default), or do not.")
@click.option("--allow-unproven", is_flag=True, help="Exit 0 even if a runtime is not installed.")
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
    """Check the release DIST: checksums, signature, whether its files agree, and whether every artefact opens.

    With --base every byte and every figure of the report is computed again. All checks run even if one fails. Checks
    that cannot run are shown as skipped, with the reason. Exit status 1 if anything is wrong.
    """
    from qalora.errors import InputError, ProofError
    from qalora.parity.text import read_text
    from qalora.releasing.check import check_is_release, check_release

    paths = {"text": text, "template": card_template}
    texts = {name: None if path is None else read_text(path) for name, path in paths.items()}
    for path in (adapter, public_key):
        if path is not None and not path.exists():
            raise InputError(f"{path}: no such file or folder")
    check_is_release(dist)
    checked = check_release(
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
    print_json(_json(dist, checked)) if as_json else _print(checked)
    if checked.findings:
        more = len(checked.findings) - 1
        raise ProofError(f"{dist} failed the check: {checked.findings[0]}" + (f" (and {more} more)" if more else ""))
    if not as_json:
        _close(dist, checked)


def _close(dist: Path, checked: Checked) -> None:
    skipped = sum(bool(check.skipped) for check in checked.checks)
    counts = f"{len(checked.checks) - skipped} checks ok" + (f", {skipped} skipped" if skipped else "")
    click.echo(f"checked: {dist}, {readable(nbytes_of(dist))}, {counts}")
    print_next(("qalora", "push", dist, "OWNER/NAME"))


def _print(checked: Checked) -> None:
    flags = spelling(click.get_current_context())
    for check in checked.checks:
        state = "skipped" if check.skipped else "FAILED" if check.findings else "ok"
        click.echo(
            f"{check.question:>14}  {state}" + (f": {with_options(check.skipped, flags)}" if check.skipped else "")
        )
        for finding in check.findings:
            click.echo(f"{'':>16}{finding}")
        for note in check.notes:
            click.echo(f"{'':>16}note: {with_options(note, flags)}")


def _json(dist: Path, checked: Checked) -> dict[str, object]:
    from qalora.formats.record_json import encode

    checks = [{**encode(check), "skipped": check.skipped or None} for check in checked.checks]
    return {"schema": "qalora.check/1", "release": dist.name, "passed": not checked.findings, "stages": checks}
