"""qalora export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qalora.cli.closing import print_dry, print_made, print_next
from qalora.cli.options import (
    Command,
    checkpoint_format_option,
    convention_option,
    dry_run_option,
    force_option,
    json_flag,
    open_model,
    options_of,
    output_option,
    print_json,
    print_plans,
    record_from,
)
from qalora.cli.progress import log_format_option, progress_bar
from qalora.options.engine import Sharing
from qalora.options.export import Export


@click.command(
    "export",
    cls=Command,
    example="qalora export folded --to gguf --to onnx -o dist",
)
@click.argument("model")
@output_option("Each format is written to DIR/<format>/.")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Fold this adapter first. GPTQ can keep it beside the base instead.",
)
@options_of(Export)
@options_of(Sharing)
@click.option(
    "--lora-slots",
    type=click.Path(path_type=Path),
    metavar="ADAPTER",
    help="ONNX: let the layers of this adapter take a LoRA at run time, see adapter convert --to onnx-adapter.",
)
@convention_option
@checkpoint_format_option
@force_option
@dry_run_option
@json_flag
@log_format_option
def command(
    model: str,
    out: Path,
    adapter: Path | None,
    lora_slots: Path | None,
    convention: Any,
    checkpoint_format: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write MODEL to DIR/<format>/ in one or more formats, with the same integer codes.

    If a format cannot hold the model exactly, the export is refused before anything is written, unless --allow-loss
    names the loss.
    """
    export, sharing = record_from(Export, settings), record_from(Sharing, settings)

    from qalora.adapter import open_adapter, read_adapter
    from qalora.converters.exports import check_fold, check_places, check_targets, export_jobs, run_jobs, writing
    from qalora.engines import engine_of

    if adapter is not None:
        open_adapter(adapter)  # what is wrong with it is to be known before a model is fetched
    check_fold(adapter, export.minima, convention)
    options = writing(export, lora_slots=() if lora_slots is None else open_adapter(lora_slots).pairs)
    check_targets(export.targets, options)
    if not dry_run:
        check_places(out, export.targets, force=force)
    base = open_model(model, checkpoint_format)
    read = None if adapter is None else read_adapter(adapter, base, convention=convention)
    jobs = export_jobs(base, export.targets, options, adapter=read, minima=export.minima)
    if not dry_run:
        total = sum(tensor.nbytes for job in jobs for tensor in job.plan.tensors)
        with engine_of(sharing) as engine, progress_bar(total, "writing") as progress:
            run_jobs(jobs, out, force=force, progress=progress, engine=engine)
    plans = [job.plan for job in jobs]
    if as_json:
        print_json([plan.to_json() for plan in plans])
    else:
        print_plans(plans, details=dry_run)
        if dry_run:
            print_dry()
            return
        places = [out / plan.target for plan in plans]
        print_made(*places)
        fold = () if adapter is None else ("--adapter", adapter)
        print_next(("qalora", "verify", model, *places, *fold))
