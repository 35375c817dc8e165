"""qalora train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.options import (
    checkpoint_format_option,
    dry_run_option,
    force_option,
    json_flag,
    minima_option,
    open_model,
    output_option,
    print_json,
)
from qalora.cli.progress import log_format_option, say, training_bar
from qalora.errors import QaloraError

if TYPE_CHECKING:
    from qalora.checkpoint import Checkpoint
    from qalora.training import TrainOptions
    from qalora.training.distributed import Processes
    from qalora.training.documents import Account
    from qalora.training.loop import StepReport

__all__ = ["command", "train_options"]


@click.command("train", epilog="Example: qalora train base --data text.jsonl -o adapter --steps 200")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="A text file; rows in JSON with text, prompt and completion, instruction and output, messages or "
    "conversations; or a dataset of the Hub.",
)
@output_option("The folder of the adapter; PEFT's files and qalora's record.")
@click.option(
    "--rank",
    default="16",
    show_default=True,
    callback=lambda context, option, value: _rank(value),
    help="Rank of the adapter; `auto` finds each layer's own, by --budget.",
)
@click.option(
    "--budget",
    type=click.IntRange(1),
    metavar="N",
    help="--rank auto: numbers in A and B of all layers at most; what a rank of 16 takes by default.",
)
@click.option(
    "--start",
    type=click.Choice(["gradient", "uniform"]),
    default="gradient",
    show_default=True,
    help="A's first rows: main directions of the first sequences' gradient, or LoRA's.",
)
@click.option("--alpha", type=float, help="alpha/rank scales the adapter, in the paper's sense; rank by default.")
@click.option(
    "--convention",
    type=click.Choice(["paper", "official", "peft"]),
    default="paper",
    show_default=True,
    help="What the files are written in; the training is the same.",
)
@click.option("--pool-size", type=click.IntRange(1), help="Columns that share an input; the group size by default.")
@minima_option("What the folded minima are rounded to, in training and in the fold.", default="float16")
@click.option(
    "--target-modules", multiple=True, metavar="NAME", help="q_proj, mlp.up_proj, ...; every linear layer by default."
)
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps; one pass over the data by default.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Sequences of a forward.")
@click.option(
    "--gradient-accumulation", type=click.IntRange(1), default=1, show_default=True, help="Forwards that make a step."
)
@click.option("--sequence-length", type=click.IntRange(2), default=128, show_default=True, help="Tokens of a sequence.")
@click.option("--learning-rate", type=float, default=3e-3, show_default=True, help="AdamW's highest.")
@click.option("--held-out", type=float, default=0.05, show_default=True, help="Share of the data kept for evaluation.")
@click.option(
    "--strength",
    default="1",
    show_default=True,
    metavar="FACTOR|auto",
    callback=lambda context, option, value: _strength(value),
    help="A factor of what was learned, applied at the end; `auto` takes 1, 0.85, 0.7 or 0.55 by the held-out loss.",
)
@click.option(
    "--evaluate-every", type=click.IntRange(0), default=0, help="Steps between held-out losses, beside first and last."
)
@click.option("--save-every", type=click.IntRange(0), default=100, show_default=True, help="Steps between checkpoints.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Decides the adapter's start and the order of the data.",
)
@click.option("--device", default="auto", show_default=True, help="Where to compute: cpu, cuda; auto takes a GPU.")
@click.option(
    "--compute",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What layers multiply; auto is bfloat16 where the device is faster with it.",
)
@click.option(
    "--weights",
    type=click.Choice(["kept", "packed"]),
    default="kept",
    show_default=True,
    help="With bfloat16: the base's weights kept in it, or unpacked at each use, slower in less memory.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, a third more work, the same adapter.")
@checkpoint_format_option
@click.option("--resume", is_flag=True, help="Continue from the checkpoint beside DIR, to the same weights.")
@force_option
@dry_run_option
@json_flag
@log_format_option
def command(
    model: str, out: Path, checkpoint_format: str | None, dry_run: bool, as_json: bool, **settings: Any
) -> None:
    """Train a QA-LoRA adapter on MODEL, which holds integers, and write it to DIR.

    Each layer computes with the folded, rounded minima in training too: the trained model is the folded model, bit
    for bit. With --compute bfloat16 the steps round the base's weights to bfloat16, beside what the fold adds to them;
    held-out losses are those of the folded model in float32.

    What the data was taken for and how much of it is learned is said before the first step; --dry-run shows the first
    documents as they are learned, and writes nothing.
    """
    from qalora.converters import load
    from qalora.training import check_before, train
    from qalora.training.compute import find_device, slowness
    from qalora.training.distributed import joined

    with joined(settings["device"]) as processes, _one_voice(processes):
        options = train_options(out=out, **settings)
        check_before(options)
        if not processes.first:
            train(load(model, checkpoint_format=checkpoint_format), options)
            click.get_current_context().exit()
        base = open_model(model, checkpoint_format)
        if dry_run:
            _show_data(base, options, as_json=as_json)
            return
        if slow := slowness(options.compute, find_device(options.device)):
            say(slow)
        seen: list[StepReport] = []
        with training_bar() as show:

            def step(report: StepReport) -> None:
                seen.append(report)
                show(report)

            adapter = train(base, options, step, _tell)
    last = seen[-1]
    found = {"steps": last.steps, "loss": last.loss, "held_out_loss": last.held_out, "strength": last.strength}
    if as_json:
        print_json({**found, "layers": len(adapter.layers), "adapter": str(out)})
    else:
        loss, at = last.held_out, "" if last.strength == 1 else f" at strength {last.strength:g}"
        click.echo(f"held-out loss {loss:.4f} (perplexity {math.exp(loss):.2f}){at} after {last.steps} steps: {out}")


def _tell(account: Account) -> None:
    """What is learned, as notes."""
    for line in account.lines():
        say(line)


def _show_data(base: Checkpoint, options: TrainOptions, *, as_json: bool) -> None:
    """What would be learned, and the first documents; InputError as the training itself."""
    from qalora.adapter import ADAPTER_FILES
    from qalora.formats.output import check_output
    from qalora.training.loop import planned_data

    check_output(options.out, force=options.force, names=ADAPTER_FILES)
    account = planned_data(base, options)
    if as_json:
        runs = [[{"learned": on, "text": text} for on, text in shown.runs] for shown in account.shown]
        print_json({**account.to_json(), "documents": runs})
    else:
        for line in [*account.lines(), *account.pieces()]:
            click.echo(line)


@contextmanager
def _one_voice(processes: Processes) -> Iterator[None]:
    """Of an error that ends all processes one of them speaks; the others leave quietly with its exit status."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, click.exceptions.Exit) or processes.size == 1 or processes.speaks():
            raise
        click.get_current_context().exit(2 if isinstance(error, QaloraError) else 1)


def _strength(value: str) -> float | str:
    if value == "auto":
        return value
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"expected a number above 0, at most 1, or `auto`, got {value!r}") from None


def _rank(value: str) -> int | str:
    if value == "auto":
        return value
    if not value.isdecimal() or not 1 <= int(value) < 1 << 31:
        raise click.BadParameter(f"expected an integer >= 1 or `auto`, got {value!r}")
    return int(value)


def train_options(**settings: Any) -> TrainOptions:
    """What the command's settings say of the training."""
    from qalora.training import TrainOptions

    return TrainOptions(**settings)
