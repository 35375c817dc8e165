"""Writing our own folder with a progress bar: what quantize and fold share."""

from __future__ import annotations

from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.cli.progress import progress_bar
from qalora.converters import native
from qalora.converters.plan import ExportOptions, Plan
from qalora.formats.output import check_output, new_folder

__all__ = ["write_native"]


def write_native(model: Checkpoint, out: Path, *, max_shard_size: int, force: bool, dry_run: bool) -> Plan:
    """Plan our own folder and, unless it is a dry run, write it to `out`; gives the plan."""
    plan = native.plan(model, ExportOptions(max_shard_size=max_shard_size))
    names = list(plan.files)
    check_output(out, force=force, names=names)
    if not dry_run:
        with (
            new_folder(out, force=force, names=names) as folder,
            progress_bar(sum(tensor.nbytes for tensor in plan.tensors), "writing") as progress,
        ):
            native.write(plan, model, folder, progress)
    return plan
