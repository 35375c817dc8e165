"""qalora demo."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from qalora.cli.options import Command, force_option, output_option
from qalora.cli.progress import log_format_option, log_gates, progress_bar, training_bar, verification_bar
from qalora.cli.release import print_release
from qalora.errors import MissingLibraryError
from qalora.formats.output import check_output
from qalora.options.words import TARGETS as FORMATS

TARGETS = ("gptq", "onnx", "openvino", "gguf")
QUICK = ("gguf",)
STEPS, FEW = 32, 8
HELD_OUT = "held-out.txt"


@click.command("demo", cls=Command, example="qalora demo -o demo")
@output_option("The folder for text, adapter and release.")
@click.option(
    "--to",
    "targets",
    multiple=True,
    metavar="FORMAT",
    help=f"{', '.join(FORMATS)}. Repeatable; {', '.join(TARGETS)} by default.",
)
@click.option("--quick", is_flag=True, help="Only GGUF, with few training steps. Takes a minute or two.")
@click.option("--model", help="Use this quantized model instead of SmolLM2-135M-Instruct.")
@click.option(
    "--max-steps", type=click.IntRange(1), help=f"Training steps of 4 x 128 tokens; {STEPS}, or {FEW} with --quick."
)
@force_option
@log_format_option
def command(
    out: Path, targets: tuple[str, ...], quick: bool, model: str | None, max_steps: int | None, force: bool
) -> None:
    """Run the whole pipeline on a real model: train on a text, fold, export to several formats, and verify each.

    DIR gets text.txt (Python's language reference, which comes with Python), held-out.txt (its end, which is not
    trained on), adapter/ and dist/; with transformersjs also chat/, a page for a browser.
    """
    from qalora.converters import load
    from qalora.converters.exports import check_targets
    from qalora.converters.plan import ExportOptions
    from qalora.demo import demo_text, smollm2_file
    from qalora.releasing.options import ReleaseOptions
    from qalora.releasing.package import plan_release, release
    from qalora.training import TrainOptions, train
    from qalora.training.loop import LOG

    targets = targets or (QUICK if quick else TARGETS)
    max_steps = max_steps or (FEW if quick else STEPS)
    check_targets(targets, ExportOptions())
    check_output(out, force=force, names=[HELD_OUT])
    base = load(model if model is not None else smollm2_file())
    out.mkdir(parents=True, exist_ok=True)
    text = demo_text()
    cut = int(len(text) * 0.95)
    (out / "text.txt").write_text(text[:cut], encoding="utf-8")
    (out / HELD_OUT).write_text(text[cut:], encoding="utf-8")
    click.echo(f"1. Train a QA-LoRA adapter on {base.path.name}: {max_steps} steps of 4 x 128 tokens")
    options = TrainOptions(
        data=str(out / "text.txt"),
        out=out / "adapter",
        max_steps=max_steps,
        dtype="auto",
        held_out=0.02,
        force=force,
    )
    with training_bar() as show:
        adapter = train(base, options, show)
    log = json.loads((out / "adapter" / LOG).read_text(encoding="utf-8"))
    before, after = (log["held_out"][n]["loss"] for n in (0, -1))
    perplexities = f"perplexity {math.exp(before):.2f} -> {math.exp(after):.2f}"
    click.echo(f"   held-out loss {before:.3f} -> {after:.3f}, {perplexities}, on {log['held_out_tokens']} tokens")
    click.echo(f"2. Fold it, export to {', '.join(targets)}, and run each in its own runtime")
    export = ExportOptions(name=f"{base.path.name.partition('.')[0]}-QALoRA")
    release_options = ReleaseOptions(targets=targets, export=export, text=text[cut:])
    planned = plan_release(base, release_options, out / "dist", adapter=adapter, force=force)
    with progress_bar(planned.nbytes, "writing") as progress, verification_bar() as stage:
        done = release(planned, out / "dist", force=force, progress=progress, stage=stage, judged=log_gates)
    print_release(done)
    for artifact in done.report.artifacts:
        for run in artifact.runs:
            for generation in run.generations:
                click.echo(f"{run.kind:>18} continues: {generation.text!r}")
    click.echo(f"3. Look at it: {out / 'dist' / 'report.html'} is the proof as a page, with plots")
    if "transformersjs" in targets:
        _write_page(out, export.name, force=force)
    click.echo("4. Check it, and make every byte of it again, whenever you like:")
    click.echo(f"   qalora check {out / 'dist'} --base {base.path} --text {out / HELD_OUT}")
    click.echo("5. Your own model, on your own text:")
    click.echo("   qalora quantize MODEL -o base --bits 4")
    click.echo("   qalora train base --data text.jsonl -o adapter")
    click.echo(f"   qalora release base --adapter adapter {' '.join(f'--to {name}' for name in targets)} -o dist")


def _write_page(out: Path, name: str | None, *, force: bool) -> None:
    """A page that chats with the model, where Node has what runs in it."""
    from qalora.browser import write_page

    try:
        write_page(out / "chat", out / "dist" / "transformersjs", name or "the model", force=force)
    except MissingLibraryError as error:
        click.echo(f"   {error}")
    else:
        click.echo(f"   Chat with it in a browser: python {out / 'chat' / 'serve.py'}")
