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
    table_console,
    targets_option,
    verify_options,
    verify_settings,
)
from qalora.cli.progress import log_format_option, log_gates, progress_bar, verification_bar

if TYPE_CHECKING:
    from qalora.release.options import ReleaseOptions
    from qalora.release.package import Release, Steps

__all__ = ["command", "make", "print_release", "release_options"]


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
@log_format_option
def command(**settings: Any) -> None:
    """Fold an adapter into MODEL, export it, verify every artefact in its own runtime, and package the result.

    The folder holds the artefacts, the report, a manifest, a model card and SHA256SUMS. When a gate fails nothing is
    left but the report, beside the folder's place; exit status 1.
    """
    make(**settings)


def make(
    *,
    model: str,
    adapter: Path | None,
    out: Path,
    allow_unproven: bool,
    checkpoint_format: str | None,
    force: bool,
    dry_run: bool,
    steps: Steps | None = None,
    **settings: Any,
) -> None:
    """What the command does; steps may know results of an earlier run."""
    from qalora.adapter import read_adapter
    from qalora.release.package import plan_release, preview, release

    options, memory = release_options(settings)
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
            judged=log_gates,
            steps=steps,
        )
    print_release(done)


def release_options(settings: dict[str, Any]) -> tuple[ReleaseOptions, int | None]:
    """What the command's settings say of the release, and the memory that runtimes may take."""
    from qalora.converters.plan import ExportOptions
    from qalora.release.options import ReleaseOptions

    left = dict(settings)
    own = {key: left.pop(key) for key in ("targets", "convention", "minima", "with_adapter")}
    export = ExportOptions(**export_settings(left))
    checked = verify_settings(**left)
    memory: int | None = checked.pop("memory")
    prompts = tuple(checked.pop("prompts"))
    return ReleaseOptions(export=export, prompts=prompts, **own, **checked), memory


def print_release(done: Release) -> None:
    """The plans in short, the proof, and where it all is."""
    from qalora.parity.report import render

    print_plans(done.plans, details=False)
    console = table_console()
    for part in render(done.report):
        console.print(part)
    console.print(f"written: {done.folder}", markup=False)
