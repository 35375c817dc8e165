"""qalora adapter convert."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from qalora.cli.closing import print_made, print_next
from qalora.cli.options import Command, Group, convention_option, force_option, output_option
from qalora.options.words import LORA_FILES, Convention

if TYPE_CHECKING:
    from qalora.adapter import Adapter
    from qalora.checkpoint import Checkpoint
    from qalora.converters.format import LoraFile


@click.group("adapter", cls=Group, example="qalora adapter convert adapter --to plain -o lora")
def command() -> None:
    """Convert adapters between conventions and formats, exactly."""


@command.command("convert", cls=Command, example="qalora adapter convert adapter --to plain -o lora")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice([*get_args(Convention), "plain", *LORA_FILES]),
    required=True,
    help="A QA-LoRA convention, plain (an ordinary LoRA), or the LoRA file of llama.cpp or ONNX Runtime.",
)
@click.option(
    "--model",
    "--base",
    "model",
    help="The base model. Needed for gguf-lora, and if the adapter does not record its pool size.",
)
@output_option("The folder to write, or for gguf-lora and onnx-adapter the file.")
@convention_option
@force_option
def convert(adapter: Path, form: str, model: str | None, out: Path, convention: str | None, force: bool) -> None:
    """Convert ADAPTER, a folder or a GGUF LoRA, into a form that changes the weights in exactly the same way.

    paper, official and peft differ in the adapter scale; the difference goes into alpha, layer by layer. plain is an
    ordinary LoRA that every runtime reads; it repeats the columns of A. gguf-lora is the plain LoRA as a file for
    llama-cli -m BASE.gguf --lora FILE. onnx-adapter is for a graph that was made by qalora export --to onnx
    --lora-slots ADAPTER.
    """
    from qalora.adapter import ADAPTER_FILES, open_adapter, read_adapter, to_plain_lora, write_adapter
    from qalora.adapter import convert as convert_adapter
    from qalora.converters import load, loras
    from qalora.errors import InputError
    from qalora.formats.output import check_apart, check_output, new_folder

    check_apart(out, adapter, *([] if model is None else [model]))
    check_output(out, force=force, names=ADAPTER_FILES)
    readable = {kind.suffix: kind for kind in loras().values() if kind.read is not None}
    source_kind = readable.get(adapter.suffix) if adapter.is_file() else None
    target_kind = loras().get(form)
    for kind, where in ((source_kind, f"{adapter}: "), (target_kind, "")):
        if model is None and kind is not None and kind.by_base:
            what = f"{where}{kind.kind} needs the base model, for names and row order"
            raise InputError(what, todo="give --base MODEL")
    if source_kind is None:
        open_adapter(adapter)  # what is wrong with it is to be known before a model is fetched
    base = None if model is None else load(model)
    check_apart(out, *([] if base is None else [base.path]))
    if source_kind is not None and source_kind.read is not None and base is not None:
        read = source_kind.read(adapter, base)
    else:
        read = read_adapter(adapter, base, convention=convention)  # type: ignore[arg-type]
    if target_kind is not None:
        click.echo(_write_file(target_kind, read, base, out, force=force))
        _close(out, form, model)
        return
    converted = to_plain_lora(read) if form == "plain" else convert_adapter(read, form)  # type: ignore[arg-type]
    with new_folder(out, force=force, names=ADAPTER_FILES) as folder:
        write_adapter(converted, folder)
    click.echo(_summary(read, converted, form))
    _close(out, form, model)


def _close(out: Path, form: str, model: str | None) -> None:
    base = model or "BASE"
    print_made(out)
    print_next(
        {
            "gguf-lora": ("llama-cli", "-m", "BASE.gguf", "--lora", out),
            "onnx-adapter": ("qalora", "export", base, "--to", "onnx", "--lora-slots", "ADAPTER", "-o", "dist"),
            "plain": ("qalora", "inspect", out, "--base", base),
        }.get(form, ("qalora", "fold", base, out, "-o", "folded"))
    )


def _write_file(kind: LoraFile, adapter: Adapter, base: Checkpoint | None, out: Path, *, force: bool) -> str:
    from qalora.formats.output import new_file

    with new_file(out, force=force) as path:
        rounded = kind.write(adapter, base, path)
    return f"{len(adapter.layers)} layers as {kind.kind}: {_exactness(len(rounded))}"


def _exactness(rounded: int) -> str:
    """What became of the scaling, where the file has no place for each layer's own."""
    return f"A of {rounded} layers times their scaling, rounded once to float32" if rounded else "exact"


def _summary(read: Adapter, result: Adapter, form: str) -> str:
    """What was written, in a sentence or two."""
    ranks = Counter(layer.rank for layer in result.layers.values())
    lines = [
        f"{len(result.layers)} layers, rank {', '.join(map(str, sorted(ranks)))}: "
        f"{read.convention} to {form}, dW the same in every bit"
    ]
    scalings = {layer.scaling for layer in result.layers.values()}
    if form == "official" and len(scalings) > 1:
        lines.append("note: its layers differ in alpha (alpha_pattern), which the official PEFT 0.4 does not read")
    return "\n".join(lines)
