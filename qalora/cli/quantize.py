"""qalora quantize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.options import (
    checkpoint_format_option,
    dry_run_option,
    force_option,
    json_flag,
    max_shard_size_option,
    open_model,
    output_option,
    print_json,
    print_plans,
)
from qalora.cli.progress import log_format_option
from qalora.errors import InputError

if TYPE_CHECKING:
    from qalora.checkpoint import Checkpoint
    from qalora.quantization.rounding import Zeros

__all__ = ["command", "quantized_model"]


@click.command(
    "quantize",
    epilog="Example: qalora quantize HuggingFaceTB/SmolLM2-135M -o base --bits 4 --group-size 32",
)
@click.argument("model")
@output_option("The folder to write.")
@click.option("--bits", type=int, default=4, show_default=True, help="2, 3, 4, 5, 6 or 8.")
@click.option("--group-size", default="32", show_default=True, help="Columns that share a scale, or `row`.")
@click.option(
    "--zeros",
    type=click.Choice(["real", "integer", "symmetric"]),
    default="real",
    show_default=True,
    help="Real zero points, whole ones, or the middle one everywhere.",
)
@click.option("--method", type=click.Choice(["rtn"]), default="rtn", show_default=True, help="Rounding to nearest.")
@click.option("--requantize", is_flag=True, help="Round a model that holds integers already.")
@max_shard_size_option
@checkpoint_format_option
@force_option
@dry_run_option
@json_flag
@log_format_option
def command(
    model: str,
    out: Path,
    max_shard_size: int,
    checkpoint_format: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Round the linear weights of MODEL to integer groups and write a qalora folder.

    Scale and minimum are chosen among the values that float16 holds before the codes are, so that every later export
    holds the result exactly.
    """
    from qalora.cli.writing import write_native

    quantized = quantized_model(open_model(model, checkpoint_format), **settings)
    plan = write_native(quantized, out, max_shard_size=max_shard_size, force=force, dry_run=dry_run)
    if as_json:
        print_json(plan.to_json())
    else:
        print_plans([plan], details=dry_run)


def quantized_model(
    model: Checkpoint, *, bits: int, group_size: str, zeros: Zeros, method: str, requantize: bool
) -> Checkpoint:
    """The model that the command's settings make of one; nothing is read yet."""
    from qalora.quantization import quantize

    if group_size != "row" and not group_size.isdigit():
        raise InputError("--group-size", expected="a whole number or `row`", got=repr(group_size))
    size = None if group_size == "row" else int(group_size)
    return quantize(model, bits=bits, group_size=size, zeros=zeros, requantize=requantize)
