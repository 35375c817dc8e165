"""qalora release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.options import (
    convention_option,
    dry_run_option,
    export_options,
    force_option,
    minima_option,
)
from qalora.cli.verifying import verify_options

if TYPE_CHECKING:
    pass


@click.command(
    "release",
    epilog="Example: qalora release base --adapter adapter --to gptq --to onnx --to gguf -o dist",
)
@click.argument("model")
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter to fold.")
@click.option("--to", "targets", multiple=True, required=True, metavar="FORMAT", help="gptq, gguf, onnx. Repeatable.")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), metavar="DIST")
@convention_option
@minima_option
@export_options
@verify_options
@force_option
@dry_run_option
def command(
    model: str,
    adapter: Path | None,
    targets: tuple[str, ...],
    out: Path,
    convention: str | None,
    minima: str | None,
    dry_run: bool,
    force: bool,
    **options: Any,
) -> None:
    """Fold an adapter into MODEL, export it, verify every artefact in its own runtime, and package the result.

    DIST appears only when every gate has passed: the artefacts, the report, a model card and SHA256SUMS.
    """
    run_release(
        model,
        adapter,
        targets,
        out,
        convention=convention,
        minima=minima,
        dry_run=dry_run,
        force=force,
        options=options,
    )
