"""qalora verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qalora.cli.closing import print_made, print_next
from qalora.cli.options import (
    Command,
    checkpoint_format_option,
    convention_option,
    force_option,
    json_flag,
    minima_option,
    open_model,
    options_of,
    print_json,
    record_from,
    table_console,
)
from qalora.cli.progress import log_format_option, log_gates, verification_bar
from qalora.errors import ProofError
from qalora.options.engine import Sharing
from qalora.options.verify import Verify


@click.command(
    "verify",
    cls=Command,
    example="qalora verify base dist/gguf dist/onnx --adapter adapter --report report.html",
)
@click.argument("reference")
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="The adapter in the artefacts. REFERENCE is then the base."
)
@convention_option
@minima_option
@checkpoint_format_option
@options_of(Verify)
@options_of(Sharing)
@click.option(
    "--report",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Write the report: .json, .html (a page with plots) or .xml (JUnit). Repeatable.",
)
@force_option
@json_flag
@log_format_option
def command(
    reference: str,
    artifacts: tuple[Path, ...],
    adapter: Path | None,
    convention: Any,
    minima: Any,
    checkpoint_format: str | None,
    files: tuple[Path, ...],
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Prove that each ARTIFACT computes what REFERENCE and the adapter compute, each in its own runtime.

    Weights are read back and compared bit for bit, then logits over the same tokens, then greedy tokens from a prompt.
    Every bound is derived from a measurement on this model; the report shows how. Exit status 1 if a gate fails
    or a runtime is missing.
    """
    options, sharing = record_from(Verify, settings), record_from(Sharing, settings)

    from qalora.adapter import open_adapter
    from qalora.engines import engine_of
    from qalora.parity import verify
    from qalora.parity.artifacts import recognize
    from qalora.parity.report import render
    from qalora.parity.saving import check_files, save_report
    from qalora.parity.text import verify_arguments

    check_files(files, force=force)
    recognize(artifacts)
    if adapter is not None:
        open_adapter(adapter)  # what is wrong with it is to be known before a model is fetched
    arguments = verify_arguments(options)
    base = open_model(reference, checkpoint_format)
    with engine_of(sharing) as engine, verification_bar() as progress:
        report = verify(
            base,
            artifacts,
            adapter=adapter,
            convention=convention,
            minima=minima,
            engine=engine,
            progress=progress,
            **arguments,
        )
    log_gates(report)
    for file in files:
        save_report(report, file, force=force)
    if as_json:
        print_json(report.to_json())
    else:
        console = table_console()
        for part in render(report):
            console.print(part)
        print_made(*files)
    if not report.passed(allow_unproven=options.allow_unproven):
        raise ProofError(report.failure())
    if not as_json:
        fold = () if adapter is None else ("--adapter", adapter)
        print_next(("qalora", "release", reference, *fold, "--to", "gguf", "-o", "dist"))
