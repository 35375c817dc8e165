"""qalora release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.options import (
    checkpoint_format_option,
    convention_option,
    dry_run_option,
    export_options,
    export_settings,
    force_option,
    minima_option,
    open_model,
    output_option,
    print_plans,
    progress_bar,
    table_console,
    targets_option,
    verification_bar,
    verify_options,
    verify_settings,
)

if TYPE_CHECKING:
    from qalora.release.package import Release

__all__ = ["command", "print_release"]


@click.command(
    "release",
    epilog="Example: qalora release base --adapter adapter --to gptq --to onnx --to gguf -o dist",
)
@click.argument("model")
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter to fold.")
@targets_option()
@output_option("The folder to write; it appears only when every gate has passed.")
@convention_option
@minima_option
@export_options
@verify_options
@checkpoint_format_option
@force_option
@dry_run_option
def command(
    model: str,
    adapter: Path | None,
    targets: tuple[str, ...],
    out: Path,
    convention: str | None,
    minima: str | None,
    allow_unproven: bool,
    checkpoint_format: str | None,
    force: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Fold an adapter into MODEL, export it, verify every artefact in its own runtime, and package the result.

    The folder holds the artefacts, the report, a model card and SHA256SUMS. When a gate fails nothing is left but the
    report, beside the folder's place; exit status 1.
    """
    from qalora.adapter import read_adapter
    from qalora.converters.plan import ExportOptions
    from qalora.release.package import plan_release, release

    options = ExportOptions(**export_settings(settings))
    checked = verify_settings(**settings)
    base = open_model(model, checkpoint_format)
    read = None if adapter is None else read_adapter(adapter, base, convention=convention)  # type: ignore[arg-type]
    jobs = plan_release(base, targets, out, options, adapter=read, minima=minima, force=force)  # type: ignore[arg-type]
    if dry_run:
        print_plans([job.plan for job in jobs], details=True)
        return
    total = sum(tensor.nbytes for job in jobs for tensor in job.plan.tensors)
    with progress_bar(total, "writing") as progress, verification_bar() as stage:
        done = release(
            base,
            jobs,
            out,
            adapter=read,
            force=force,
            allow_unproven=allow_unproven,
            progress=progress,
            stage=stage,
            minima=minima,
            **checked,
        )
    print_release(done)


def print_release(done: Release) -> None:
    """The plans in short, the proof, and where it all is."""
    from qalora.parity.report import render

    print_plans(done.plans, details=False)
    console = table_console()
    for part in render(done.report):
        console.print(part)
    console.print(f"written: {done.folder}", markup=False)
