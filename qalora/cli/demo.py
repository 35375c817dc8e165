"""qalora demo."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from qalora.cli.options import Command, force_option, output_option
from qalora.cli.progress import log_format_option, log_gates, progress_bar, training_bar, verification_bar
from qalora.cli.release import print_release
from qalora.formats.output import check_output

TARGETS = ("gptq", "onnx", "gguf")
HELD_OUT = "held-out.txt"


@click.command("demo", cls=Command, epilog="Example: qalora demo -o demo")
@output_option("The folder for text, adapter and release.")
@click.option(
    "--to",
    "targets",
    multiple=True,
    default=TARGETS,
    show_default=True,
    metavar="FORMAT",
    help="gptq, gguf, onnx, mlx, hqq, qalora (our own folder). Repeatable.",
)
@click.option("--model", help="Another model of integers, instead of SmolLM2-135M-Instruct.")
@click.option(
    "--max-steps", type=click.IntRange(1), default=60, show_default=True, help="Training steps of 4 x 128 tokens."
)
@force_option
@log_format_option
def command(out: Path, targets: tuple[str, ...], model: str | None, max_steps: int, force: bool) -> None:
    """The whole story on a real model: train on a text, fold, export to several formats, run each, prove.

    DIR gets text.txt (the language reference that every Python carries), held-out.txt (its end, which is not trained
    on), adapter/ and dist/.
    """
    from qalora.converters import load
    from qalora.converters.exports import check_targets
    from qalora.converters.plan import ExportOptions
    from qalora.demo import demo_text, smollm2_file
    from qalora.releasing.options import ReleaseOptions
    from qalora.releasing.package import plan_release, release
    from qalora.training import TrainOptions, train
    from qalora.training.loop import LOG

    check_targets(targets, ExportOptions())
    check_output(out, force=force, names=[HELD_OUT])
    base = load(model if model is not None else smollm2_file())
    out.mkdir(parents=True, exist_ok=True)
    text = demo_text()
    cut = int(len(text) * 0.95)
    (out / "text.txt").write_text(text[:cut], encoding="utf-8")
    (out / HELD_OUT).write_text(text[cut:], encoding="utf-8")
    click.echo(f"1. Train a QA-LoRA adapter on {base.path.name}: {max_steps} steps of 4 x 128 tokens")
    options = TrainOptions(data=str(out / "text.txt"), out=out / "adapter", max_steps=max_steps, force=force)
    with training_bar() as show:
        adapter = train(base, options, show)
    log = json.loads((out / "adapter" / LOG).read_text(encoding="utf-8"))
    before, after = (log["held_out"][n]["loss"] for n in (0, -1))
    click.echo(
        f"   held-out loss {before:.3f} -> {after:.3f}, perplexity {math.exp(before):.2f} -> {math.exp(after):.2f}"
    )
    click.echo(f"2. Fold it, export to {', '.join(targets)}, and run each in its own runtime")
    export = ExportOptions(name=f"{base.path.name.partition('.')[0]}-QALoRA")
    named = ReleaseOptions(targets=targets, export=export, text=text[cut:])
    planned = plan_release(base, named, out / "dist", adapter=adapter, force=force)
    with progress_bar(planned.nbytes, "writing") as progress, verification_bar() as stage:
        done = release(planned, out / "dist", force=force, progress=progress, stage=stage, judged=log_gates)
    print_release(done)
    for artifact in done.report.artifacts:
        for run in artifact.runs:
            for made in run.generations:
                click.echo(f"{run.kind:>18} continues: {made.text!r}")
    click.echo("3. Check it, and make every byte of it again, whenever you like:")
    click.echo(f"   qalora check {out / 'dist'} --base {base.path} --text {out / HELD_OUT}")
