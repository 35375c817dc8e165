"""qalora quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qalora.cli.closing import print_dry, print_made, print_next
from qalora.cli.options import (
    Command,
    checkpoint_format_option,
    dry_run_option,
    force_option,
    json_flag,
    options_of,
    output_option,
    print_json,
    print_plans,
    record_from,
)
from qalora.cli.progress import log_format_option, watch
from qalora.options.engine import Sharing
from qalora.options.quantize import Quantize


@click.command(
    "quantize",
    cls=Command,
    example="qalora quantize HuggingFaceTB/SmolLM2-135M -o base",
)
@click.argument("model")
@output_option("The folder to write.")
@options_of(Quantize)
@options_of(Sharing)
@checkpoint_format_option
@force_option
@dry_run_option
@json_flag
@log_format_option
def command(
    model: str,
    out: Path,
    checkpoint_format: Any,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Quantize the linear weights of MODEL to integers in groups and write a qalora folder.

    Scales and minima are float16 values, so a later export is exact if its format has the width. With --calibration,
    a text like those that the model will see, each layer is quantized on the inputs that it gets from the quantized
    layers before it. Use it at 3 bits and fewer.
    """
    options, sharing = record_from(Quantize, settings), record_from(Sharing, settings)

    from qalora.engines import engine_of
    from qalora.pipeline.making import make_base

    with engine_of(Sharing() if dry_run else sharing) as engine:
        form = checkpoint_format
        plan = make_base(model, options, out, form=form, force=force, dry_run=dry_run, watch=watch(), engine=engine)
    if as_json:
        print_json(plan.to_json())
    else:
        print_plans([plan], details=dry_run)
        if dry_run:
            print_dry()
            return
        print_made(out)
        print_next(("qalora", "train", out, "--data", "text.jsonl", "-o", "adapter"))
