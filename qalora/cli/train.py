"""qalora train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qalora.cli.options import (
    MINIMA,
    checkpoint_format_option,
    force_option,
    json_flag,
    open_model,
    output_option,
    print_json,
)
from qalora.cli.progress import log_format_option, training_bar

if TYPE_CHECKING:
    from qalora.training.loop import StepReport

__all__ = ["command"]


@click.command("train", epilog="Example: qalora train base --data text.jsonl -o adapter --steps 200")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="A text file; JSONL with text, prompt and completion, or messages; or a dataset of the Hub.",
)
@output_option("The folder of the adapter; PEFT's files and qalora's record.")
@click.option("--rank", type=int, default=16, show_default=True)
@click.option("--alpha", type=float, help="alpha/rank scales the adapter, in the paper's sense; rank by default.")
@click.option(
    "--convention",
    type=click.Choice(["paper", "official", "peft"]),
    default="paper",
    show_default=True,
    help="What the files are written in; the training is the same.",
)
@click.option("--pool-size", type=click.IntRange(1), help="Columns that share an input; the group size by default.")
@click.option("--minima", type=click.Choice(["fp16", "float32"]), default="fp16", show_default=True)
@click.option(
    "--target-modules", multiple=True, metavar="NAME", help="q_proj, mlp.up_proj, ...; every linear layer by default."
)
@click.option("--steps", type=int, help="Optimizer steps; one pass over the data by default.")
@click.option("--batch-size", type=int, default=4, show_default=True)
@click.option("--gradient-accumulation", type=int, default=1, show_default=True)
@click.option("--sequence-length", type=int, default=128, show_default=True)
@click.option("--learning-rate", type=float, default=3e-3, show_default=True)
@click.option("--held-out", type=float, default=0.05, show_default=True, help="Share of the data kept for evaluation.")
@click.option("--evaluate-every", type=int, default=0, help="Steps between held-out losses, beside first and last.")
@click.option("--save-every", type=int, default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda.")
@checkpoint_format_option
@click.option("--resume", is_flag=True, help="Continue from the checkpoint beside DIR, to the same weights.")
@force_option
@json_flag
@log_format_option
def command(
    model: str,
    data: str,
    out: Path,
    rank: int,
    alpha: float | None,
    convention: str,
    pool_size: int | None,
    minima: str,
    target_modules: tuple[str, ...],
    steps: int | None,
    batch_size: int,
    gradient_accumulation: int,
    sequence_length: int,
    learning_rate: float,
    held_out: float,
    evaluate_every: int,
    save_every: int,
    seed: int,
    device: str,
    resume: bool,
    checkpoint_format: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Train a QA-LoRA adapter on MODEL, which holds integers, and write it to DIR.

    Each layer computes with the folded, rounded minima in training too: the trained model is the folded model, bit
    for bit.
    """
    from qalora.training import TrainOptions, train

    options = TrainOptions(
        data=data,
        out=out,
        rank=rank,
        alpha=alpha,
        convention=convention,  # type: ignore[arg-type]
        pool_size=pool_size,
        minima=MINIMA[minima],  # type: ignore[arg-type]
        target_modules=target_modules,
        steps=steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        held_out=held_out,
        evaluate_every=evaluate_every,
        save_every=save_every,
        seed=seed,
        device=device,
        resume=resume,
        force=force,
    )
    base = open_model(model, checkpoint_format)
    seen: list[StepReport] = []
    with training_bar() as show:

        def step(report: StepReport) -> None:
            seen.append(report)
            show(report)

        adapter = train(base, options, step)
    if not seen:
        return
    found = {"steps": seen[-1].steps, "loss": seen[-1].loss, "held_out_loss": seen[-1].held_out}
    if as_json:
        print_json({**found, "layers": len(adapter.layers), "adapter": str(out)})
    else:
        loss = seen[-1].held_out
        click.echo(f"held-out loss {loss:.4f} (perplexity {math.exp(loss):.2f}) after {seen[-1].steps} steps: {out}")
