"""qalora release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.options import (
    Command,
    checkpoint_format_option,
    chosen,
    convention_option,
    dry_run_option,
    force_option,
    json_flag,
    open_model,
    options_of,
    print_json,
    print_plans,
    table_console,
)
from qalora.cli.progress import log_format_option, watch
from qalora.options.export import Export
from qalora.options.release import Package
from qalora.options.verify import Verify

if TYPE_CHECKING:
    from qalora.releasing.package import Release

__all__ = ["command", "print_release"]


@click.command(
    "release",
    cls=Command,
    epilog="Example: qalora release base --adapter adapter --to gptq --to onnx --to gguf -o dist",
)
@click.argument("model")
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter to fold.")
@options_of(Export)
@options_of(Package)
@options_of(Verify)
@convention_option
@checkpoint_format_option
@force_option
@dry_run_option
@json_flag
@log_format_option
def command(
    model: str,
    adapter: Path | None,
    convention: Any,
    checkpoint_format: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Fold an adapter into MODEL, export it, verify every artefact in its own runtime, and package the result.

    The folder holds the artefacts, the report, a manifest, a model card and SHA256SUMS. When a gate fails nothing is
    left but the report, beside the folder's place; exit status 1. A whole pipeline, training included, is `qalora run`.
    """
    export, package, verify = chosen(Export, settings), chosen(Package, settings), chosen(Verify, settings)

    from qalora.pipeline.making import check_before_release, make_release, preview_release
    from qalora.pipeline.running import sign_password

    check_before_release(export, verify, package, adapter, convention, force=force, password=sign_password())
    base = open_model(model, checkpoint_format)
    if dry_run:
        plans = preview_release(base, adapter, export, verify, package, convention=convention, force=force)
        print_json([plan.to_json() for plan in plans]) if as_json else print_plans(plans, details=True)
        return
    done = make_release(
        base,
        adapter,
        export,
        verify,
        package,
        convention=convention,
        force=force,
        password=sign_password(),
        watch=watch(),
    )
    print_json(done.report.to_json()) if as_json else print_release(done)


def print_release(done: Release) -> None:
    """The plans in short, the proof, and where it all is."""
    from qalora.parity.report import render

    print_plans(done.plans, details=False)
    console = table_console()
    for part in render(done.report):
        console.print(part)
    console.print(f"written: {done.folder}", markup=False)
