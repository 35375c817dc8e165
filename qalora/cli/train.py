"""qalora train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.closing import print_dry, print_made, print_next
from qalora.cli.options import (
    Command,
    checkpoint_format_option,
    dry_run_option,
    json_flag,
    open_model,
    options_of,
    print_json,
    record_from,
)
from qalora.cli.progress import log_format_option, say, training_bar
from qalora.errors import QaloraError
from qalora.options.train import TrainOptions

if TYPE_CHECKING:
    from qalora.checkpoint import Checkpoint
    from qalora.training.distributed import Processes
    from qalora.training.documents import Account
    from qalora.training.pace import StepReport


@click.command("train", cls=Command, example="qalora train base --data text.jsonl -o adapter")
@click.argument("model")
@options_of(TrainOptions)
@checkpoint_format_option
@dry_run_option
@json_flag
@log_format_option
def command(model: str, checkpoint_format: str | None, dry_run: bool, as_json: bool, **settings: Any) -> None:
    """Train a QA-LoRA adapter on MODEL, a quantized model, and write it to DIR.

    Training computes with the folded and rounded minima, so the trained model is the folded model, bit for bit. With
    --dtype bfloat16 the steps also round the base's weights to bfloat16; held-out losses are those of the folded model
    in float32.

    Before the first step the command prints how it reads the data and how many tokens are learned. --dry-run also shows
    the first documents and what is learned of them, and writes nothing. After Ctrl-C, continue with --resume.
    """
    from qalora.converters import load
    from qalora.devices import find_device
    from qalora.training import check_before, train
    from qalora.training.compute import slowness
    from qalora.training.distributed import joined

    with joined(settings["device"] or "auto") as processes, _one_voice(processes):
        options = record_from(TrainOptions, settings)
        check_before(options)
        if not processes.first:
            train(load(model, checkpoint_format=checkpoint_format), options)
            click.get_current_context().exit()
        base = open_model(model, checkpoint_format)
        if dry_run:
            _show_data(base, options, as_json=as_json)
            return
        if slow := slowness(options.dtype, find_device(options.device)):
            say(slow)
        reports: list[StepReport] = []
        with training_bar() as show:

            def step(report: StepReport) -> None:
                reports.append(report)
                show(report)

            adapter = train(base, options, step, _tell)
    last = reports[-1]
    summary = {"steps": last.steps, "loss": last.loss, "held_out_loss": last.held_out, "strength": last.strength}
    if as_json:
        print_json({**summary, "layers": len(adapter.layers), "adapter": str(options.out)})
    else:
        loss, at = last.held_out, "" if last.strength == 1 else f" at strength {last.strength:g}"
        click.echo(f"held-out loss {loss:.4f} (perplexity {math.exp(loss):.2f}){at} after {last.steps} steps")
        print_made(options.out, note=f"{len(adapter.layers)} layers")
        print_next(("qalora", "release", model, "--adapter", options.out, "--to", "gguf", "-o", "dist"))


def _tell(account: Account) -> None:
    """What is learned, as notes."""
    for line in account.lines():
        say(line)


def _show_data(base: Checkpoint, options: TrainOptions, *, as_json: bool) -> None:
    """What would be learned, and the first documents; InputError as the training itself."""
    from qalora.adapter import ADAPTER_FILES
    from qalora.formats.output import check_output
    from qalora.training.plan import planned_data

    check_output(options.out, force=options.force, names=ADAPTER_FILES)
    account = planned_data(base, options)
    if as_json:
        runs = [[{"learned": on, "text": text} for on, text in preview.runs] for preview in account.previews]
        print_json({**account.to_json(), "documents": runs})
    else:
        for line in [*account.lines(), *account.pieces()]:
            click.echo(line)
        print_dry()


@contextmanager
def _one_voice(processes: Processes) -> Iterator[None]:
    """Of an error that ends all processes one of them speaks; the others leave quietly with its exit status."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, click.exceptions.Exit) or processes.size == 1 or processes.speaks():
            raise
        click.get_current_context().exit(2 if isinstance(error, QaloraError) else 1)
