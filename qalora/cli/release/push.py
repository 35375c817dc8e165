"""qalora release --push-to REPO DIST."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qalora.cli.progress import log_format_option

if TYPE_CHECKING:
    from qalora.release.push import PushPlan

__all__ = ["command", "print_push"]


@click.command("release --push-to OWNER/NAME", epilog="Example: qalora release --push-to me/tiny-QALoRA dist --upload")
@click.option("--push-to", "repo", required=True, metavar="OWNER/NAME", help="The repository on the Hub.")
@click.argument("dist", type=click.Path(path_type=Path))
@click.option("--upload", is_flag=True, help="Do it. Without this, what would be done is printed, and nothing is sent.")
@click.option("--private", is_flag=True, help="Make the repository a private one, where it is made.")
@click.option("--revision", metavar="BRANCH", help="The branch, made if it is not there; main by default.")
@click.option("--replace", is_flag=True, help="Delete files of the repository that the release has not.")
@click.option("--allow-unproven", is_flag=True, help="Upload it even where report.json has not passed.")
@log_format_option
def command(
    repo: str, dist: Path, upload: bool, private: bool, revision: str | None, replace: bool, allow_unproven: bool
) -> None:
    """Upload the release DIST to the Hub, as it is; without --upload only say what would be sent, and what opens it.

    Its checksums are checked first, and every file of the repository is compared with it afterwards. The token is the
    one of `hf auth login`, or HF_TOKEN.
    """
    from qalora.release.push import plan_push, push

    plan = plan_push(dist, repo, revision=revision, private=private, replace=replace, allow_unproven=allow_unproven)
    print_push(plan)
    if not upload:
        click.echo("nothing was sent; --upload sends it")
        return
    click.echo(f"uploaded: {push(plan)}")


def print_push(plan: PushPlan) -> None:
    """The repository, each file with its size, and what opens each sub-folder."""
    from qalora.release.push import openings

    kind = "private, if it is made" if plan.private else "public, if it is made"
    click.echo(f"repository: {plan.repo} ({kind}), branch {plan.revision}")
    for name, size in plan.files:
        click.echo(f"{size:>16,}  {name}")
    click.echo(f"{plan.nbytes:>16,}  bytes in {len(plan.files)} files")
    if plan.replace:
        click.echo("other files of the repository are deleted")
    for top, line in openings(plan):
        click.echo(f"{top}/ opens by: {line}")
