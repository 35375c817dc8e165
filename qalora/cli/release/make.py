"""qalora release MODEL."""

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
    epilog="Example: qalora release base --adapter adapter --to gptq --to onnx --to gguf -o dist\n\n"
    "Also: qalora release recipe.toml; qalora release --init, --check DIST, --apply DELTA BASE, --push-to REPO DIST; "
    "each has its own --help.",
)
@click.argument("model")
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter to fold.")
@targets_option()
@output_option("The folder to write; it appears only when every gate has passed.")
@convention_option
@minima_option
@export_options
@verify_options
@click.option("--with-adapter/--without-adapter", default=True, help="Whether the adapter lies beside it all.")
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
    with_adapter: bool,
    checkpoint_format: str | None,
    force: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Fold an adapter into MODEL, export it, verify every artefact in its own runtime, and package the result.

    The folder holds the artefacts, the report, a manifest, a model card and SHA256SUMS. When a gate fails nothing is
    left but the report, beside the folder's place; exit status 1.
    """
    from qalora.adapter import read_adapter
    from qalora.converters.plan import ExportOptions
    from qalora.release.options import ReleaseOptions
    from qalora.release.package import plan_release, preview, release

    export = ExportOptions(**export_settings(settings))
    checked = verify_settings(**settings)
    memory = checked.pop("memory")
    options = ReleaseOptions(
        targets=targets,
        export=export,
        convention=convention,  # type: ignore[arg-type]
        minima=minima,  # type: ignore[arg-type]
        with_adapter=with_adapter,
        prompts=tuple(checked.pop("prompts")),
        **checked,
    )
    base = open_model(model, checkpoint_format)
    read = None if adapter is None else read_adapter(adapter, base, convention=options.convention)
    if dry_run:
        print_plans(preview(base, options, out, adapter=read, force=force), details=True)
        return
    planned = plan_release(base, options, out, adapter=read, force=force)
    with progress_bar(planned.nbytes, "writing") as progress, verification_bar() as stage:
        done = release(
            planned,
            out,
            force=force,
            allow_unproven=allow_unproven,
            memory=memory,
            progress=progress,
            stage=stage,
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
