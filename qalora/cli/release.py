"""qalora release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.closing import nbytes_of, print_dry, print_next
from qalora.cli.options import (
    Command,
    checkpoint_format_option,
    convention_option,
    dry_run_option,
    force_option,
    json_flag,
    open_model,
    options_of,
    print_json,
    print_plans,
    record_from,
    table_console,
)
from qalora.cli.progress import log_format_option, watch
from qalora.options.export import Export
from qalora.options.fields import readable
from qalora.options.release import Package
from qalora.options.verify import Verify

if TYPE_CHECKING:
    from qalora.releasing.package import Release

__all__ = ["command", "print_release"]


@click.command(
    "release",
    cls=Command,
    example="qalora release base --adapter adapter --to gptq --to onnx --to gguf -o dist",
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

    The folder holds the artefacts, the report, a manifest, a model card and SHA256SUMS. If a gate fails, only the
    report is written, as DIR.report.json, and the exit status is 1. For a whole pipeline with training, see
    qalora run.
    """
    export, package, verify = (
        record_from(Export, settings),
        record_from(Package, settings),
        record_from(Verify, settings),
    )

    from qalora.pipeline.making import check_before_release, make_release, preview_release
    from qalora.pipeline.running import sign_password

    check_before_release(export, verify, package, adapter, convention, force=force, password=sign_password())
    base = open_model(model, checkpoint_format)
    if dry_run:
        plans = preview_release(base, adapter, export, verify, package, convention=convention, force=force)
        if as_json:
            print_json([plan.to_json() for plan in plans])
        else:
            print_plans(plans, details=True)
            print_dry()
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
    if as_json:
        print_json(done.report.to_json())
    else:
        print_release(done)
        print_next(("qalora", "check", done.folder, "--base", model))


def print_release(done: Release) -> None:
    """The plans in short, the proof, where it all is, and how large."""
    from qalora.parity.report import render

    print_plans(done.plans, details=False)
    console = table_console()
    for part in render(done.report):
        console.print(part)
    click.echo(f"written: {done.folder}, {readable(nbytes_of(done.folder))}")
