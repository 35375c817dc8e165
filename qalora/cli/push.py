"""qalora push."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.options import Command, options_of, record_from
from qalora.cli.progress import log_format_option
from qalora.options import fields_of
from qalora.options.recipe import Push

if TYPE_CHECKING:
    from qalora.releasing.push import PushPlan

__all__ = ["command", "print_push"]


@click.command("push", cls=Command, example="qalora push dist me/tiny-QALoRA --upload")
@click.argument("dist", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@options_of(Push, leave_out=["repo"])
@click.option("--allow-unproven", is_flag=True, help="Upload even if the report has not passed.")
@log_format_option
def command(dist: Path, repo: str, allow_unproven: bool, **settings: Any) -> None:
    """Upload the release DIST to the Hub. Without --upload, print what would be sent and how it is opened.

    The checksums are checked first, and every file of the repository is compared with the release afterwards. The
    token is the one of `hf auth login`, or HF_TOKEN.
    """
    options = record_from(Push, settings, repo=repo)

    from qalora.releasing.push import plan_push, push

    settings_of_push = {one.name: getattr(options, one.name) for one in fields_of(Push) if one.name != "upload"}
    plan = plan_push(dist, **settings_of_push, allow_unproven=allow_unproven)
    print_push(plan)
    print_sent(push(plan) if options.upload else None)


def print_push(plan: PushPlan) -> None:
    """The repository, each file with its size, and what opens each sub-folder."""
    from qalora.releasing.push import openings

    kind = "private, if it is made" if plan.private else "public, if it is made"
    click.echo(f"repository: {plan.repo} ({kind}), branch {plan.revision}")
    for name, size in plan.files:
        click.echo(f"{size:>16,}  {name}")
    click.echo(f"{plan.nbytes:>16,}  bytes in {len(plan.files)} files")
    if plan.replace:
        click.echo("other files of the repository are deleted")
    for top, line in openings(plan):
        click.echo(f"{top}/ opens by: {line}")


def print_sent(url: str | None) -> None:
    """Where it is now, if anything was sent."""
    click.echo("nothing was sent; --upload sends it" if url is None else f"uploaded: {url}")
