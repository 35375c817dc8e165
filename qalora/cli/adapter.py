"""qalora adapter convert."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qalora.cli.options import convention_option, force_option, output_option

if TYPE_CHECKING:
    from qalora.adapter import Adapter


@click.group("adapter", epilog="Example: qalora adapter convert adapter --to plain -o lora")
def command() -> None:
    """Rewrite adapters from one convention or format into another, exactly."""


@command.command("convert", epilog="Example: qalora adapter convert adapter --to plain -o lora")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice(["paper", "official", "peft", "plain"]),
    required=True,
    help="A QA-LoRA convention, or an ordinary LoRA that every runtime reads.",
)
@click.option("--model", help="The model it belongs to: checked against it, and where the pool size is not recorded.")
@output_option("The folder to write.")
@convention_option
@force_option
def convert(adapter: Path, form: str, model: str | None, out: Path, convention: str | None, force: bool) -> None:
    """Write ADAPTER in another convention: the same change of the weights, no value of A or B rounded.

    The constant between conventions goes into alpha, layer by layer. A plain LoRA repeats the columns of A.
    """
    from qalora.adapter import ADAPTER_FILES, read_adapter, to_plain_lora, write_adapter
    from qalora.adapter import convert as convert_adapter
    from qalora.converters import load
    from qalora.formats.output import check_output, new_folder

    check_output(out, force=force, names=ADAPTER_FILES)
    base = None if model is None else load(model)
    read = read_adapter(adapter, base, convention=convention)  # type: ignore[arg-type]
    written = to_plain_lora(read) if form == "plain" else convert_adapter(read, form)  # type: ignore[arg-type]
    with new_folder(out, force=force, names=ADAPTER_FILES) as folder:
        write_adapter(written, folder)
    click.echo(_summary(read, written, form))


def _summary(read: Adapter, written: Adapter, form: str) -> str:
    """What was written, in a sentence or two."""
    ranks = Counter(layer.rank for layer in written.layers.values())
    lines = [
        f"{len(written.layers)} layers, rank {', '.join(map(str, sorted(ranks)))}: "
        f"{read.convention} to {form}, dW the same in every bit"
    ]
    scalings = {layer.scaling for layer in written.layers.values()}
    if form == "official" and len(scalings) > 1:
        lines.append("note: its layers differ in alpha (alpha_pattern), which the official PEFT 0.4 does not read")
    return "\n".join(lines)
