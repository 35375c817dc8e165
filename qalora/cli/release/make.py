"""qalora release MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.card import card_options, card_settings
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
    sign_option,
    sign_password,
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

OWN = ("targets", "convention", "minima", "with_adapter")
PACKAGING = (
    "model",
    "adapter",
    "out",
    "allow_unproven",
    "checkpoint_format",
    "force",
    "dry_run",
    "sign_key",
    "delta_from",
    "repo",
    "upload",
    "private",
    "revision",
)
"""Settings that `release_options` does not take."""


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
@minima_option()
@export_options
@verify_options
@click.option("--with-adapter/--without-adapter", default=True, help="Whether the adapter lies beside it all.")
@card_options
@sign_option
@click.option(
    "--delta-from",
    type=click.Path(path_type=Path),
    metavar="BASE_RELEASE",
    help="Write DIST.delta too: what makes this release of that one.",
)
@click.option("--push-to", "repo", metavar="OWNER/NAME", help="Say what would be uploaded to this Hub repository.")
@click.option("--upload", is_flag=True, help="With --push-to: upload it.")
@click.option("--private", is_flag=True, help="With --push-to: a private repository, where it is made.")
@click.option("--revision", metavar="BRANCH", help="With --push-to: the branch; main by default.")
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
    sign_key: Path | None,
    delta_from: Path | None,
    repo: str | None,
    upload: bool,
    private: bool,
    revision: str | None,
    steps: Steps | None = None,
    **settings: Any,
) -> None:
    """What the command does; steps may know results of an earlier run."""
    from qalora.adapter import open_adapter, read_adapter
    from qalora.release.package import plan_release, preview, release

    options, memory = release_options(settings)
    _check_packaging(out, sign_key, delta_from, repo, upload=upload, force=force)
    if adapter is not None:
        open_adapter(adapter)  # what is wrong with it is to be known before a model is fetched
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
            sign_key=sign_key,
            password=sign_password(),
        )
    print_release(done)
    if delta_from is not None:
        _write_delta(delta_from, out, force=force)
    if repo is not None:
        _push(out, repo, upload=upload, private=private, revision=revision, allow_unproven=allow_unproven)


def _check_packaging(
    out: Path, sign_key: Path | None, delta_from: Path | None, repo: str | None, *, upload: bool, force: bool
) -> None:
    """Refuse before the long work what would be refused after it."""
    from qalora.errors import InputError
    from qalora.formats.output import check_output
    from qalora.release.checksums import SUMS

    check_output(out, force=force, names=[SUMS])

    if sign_key is not None:
        from qalora.release.signing import check_key

        check_key(sign_key, password=sign_password())
    if delta_from is not None:
        from qalora.release.delta import check_base

        check_base(delta_from, _delta_of(out), force=force)
    if upload and repo is None:
        raise InputError("--upload", expected="--push-to OWNER/NAME with it", got="none")
    if repo is not None:
        from qalora.release.push import check_repo

        check_repo(repo)


def _delta_of(out: Path) -> Path:
    return out.parent / f"{out.name}.delta"


def _write_delta(base: Path, out: Path, *, force: bool) -> None:
    from qalora.release.delta import write_delta

    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    with progress_bar(total, "delta") as progress:
        made = write_delta(base, out, _delta_of(out), force=force, progress=progress)
    click.echo(f"written: {made.folder}, {made.nbytes:,} bytes, {100 * made.ratio:.1f} % of the release")


def _push(out: Path, repo: str, *, upload: bool, private: bool, revision: str | None, allow_unproven: bool) -> None:
    from qalora.cli.release.push import print_push
    from qalora.release.push import plan_push, push

    plan = plan_push(out, repo, revision=revision, private=private, allow_unproven=allow_unproven)
    print_push(plan)
    click.echo(f"uploaded: {push(plan)}" if upload else "nothing was sent; --upload sends it")


def release_options(settings: dict[str, Any]) -> tuple[ReleaseOptions, int | None]:
    """What the command's settings say of the release, and the memory that runtimes may take."""
    from qalora.converters.plan import ExportOptions
    from qalora.release.options import ReleaseOptions

    left = dict(settings)
    own = {key: left.pop(key) for key in OWN} | card_settings(left)
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
