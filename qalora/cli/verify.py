"""qalora verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qalora.cli.options import (
    checkpoint_format_option,
    convention_option,
    force_option,
    minima_option,
    open_model,
    table_console,
    verify_options,
    verify_settings,
)
from qalora.cli.progress import log_format_option, log_gates, verification_bar
from qalora.errors import ProofError


@click.command(
    "verify",
    epilog="Example: qalora verify base dist/onnx dist/gguf --adapter adapter --json report.json",
)
@click.argument("reference")
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--adapter", type=click.Path(path_type=Path), help="What the artefacts hold beside REFERENCE, the base.")
@convention_option
@minima_option()
@checkpoint_format_option
@click.option(
    "--level",
    type=click.Choice(["weights", "logits", "generation"]),
    default="generation",
    show_default=True,
    help="How far to go; each level includes those before it.",
)
@verify_options
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the report as JSON.")
@click.option(
    "--html", "html_file", type=click.Path(path_type=Path), metavar="FILE", help="Write it as a page with plots."
)
@click.option("--junit", "junit_file", type=click.Path(path_type=Path), metavar="FILE", help="Write it as JUnit XML.")
@force_option
@log_format_option
def command(
    reference: str,
    artifacts: tuple[Path, ...],
    adapter: Path | None,
    convention: str | None,
    minima: str | None,
    checkpoint_format: str | None,
    level: str,
    json_file: Path | None,
    html_file: Path | None,
    junit_file: Path | None,
    force: bool,
    allow_unproven: bool,
    **settings: Any,
) -> None:
    """Prove that each ARTIFACT computes what REFERENCE and the adapter do, each in its own runtime.

    Weights are read back and compared bit for bit; logits over the same tokens; greedy tokens from a prompt. Every
    bound is derived from a measurement on this very model, and the report says how. Exit status 1 if a gate fails, or
    if a runtime is missing.
    """
    from qalora.adapter import open_adapter
    from qalora.formats.output import check_output, new_file, text_bytes, write_json
    from qalora.parity import verify
    from qalora.parity.artifacts import recognize
    from qalora.parity.html import to_html
    from qalora.parity.junit import to_junit
    from qalora.parity.report import render

    for file in (json_file, html_file, junit_file):
        if file is not None:
            check_output(file, force=force)
    recognize(artifacts)
    if adapter is not None:
        open_adapter(adapter)  # what is wrong with it is to be known before a model is fetched
    chosen = verify_settings(**settings)
    base = open_model(reference, checkpoint_format)
    with verification_bar() as progress:
        report = verify(
            base,
            artifacts,
            adapter=adapter,
            convention=convention,  # type: ignore[arg-type]
            minima=minima,  # type: ignore[arg-type]
            level=level,  # type: ignore[arg-type]
            progress=progress,
            **chosen,
        )
    log_gates(report)
    if json_file is not None:
        with new_file(json_file, force=force) as place:
            write_json(place, report.to_json())
    if html_file is not None:
        with new_file(html_file, force=force) as place:
            place.write_bytes(text_bytes(to_html(report)))
    if junit_file is not None:
        with new_file(junit_file, force=force) as place:
            place.write_text(to_junit(report), encoding="utf-8")
    console = table_console()
    for part in render(report):
        console.print(part)
    if not report.passed(allow_unproven=allow_unproven):
        raise ProofError(report.failure())
