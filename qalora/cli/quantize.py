"""qalora quantize."""

from __future__ import annotations

from collections.abc import Callable
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
from qalora.cli.progress import layers_bar, log_format_option
from qalora.errors import InputError

if TYPE_CHECKING:
    from qalora.checkpoint import Checkpoint
    from qalora.quantization import QuantizeOptions

__all__ = ["command", "quantized_model"]


@click.command(
    "quantize",
    epilog="Example: qalora quantize HuggingFaceTB/SmolLM2-135M -o base --bits 4 --group-size 32",
)
@click.argument("model")
@output_option("The folder to write.")
@click.option("--bits", default="4", show_default=True, help="2, 3, 4, 5, 6, 8, or `auto` for widths by --budget.")
@click.option(
    "--budget",
    type=click.FloatRange(0, min_open=True),
    metavar="BITS",
    help="--bits auto: bits per weight of the linear layers at most, scale and min counted.",
)
@click.option("--widths", type=int, multiple=True, metavar="BITS", help="--bits auto: one to choose from. Repeatable.")
@click.option("--group-size", default="32", show_default=True, help="Columns that share a scale, or `row`.")
@click.option(
    "--zeros",
    type=click.Choice(["real", "integer", "symmetric"]),
    default="real",
    show_default=True,
    help="Real zero points, whole ones, or the middle one everywhere.",
)
@click.option(
    "--method",
    type=click.Choice(["rtn", "clip", "hqq", "gptq"]),
    default="rtn",
    show_default=True,
    help="Rounding to nearest; searched clipping; searched scale and min; GPTQ, which wants --calibration.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A text to compute the layers' inputs on; a text file, or rows as `train` takes them.",
)
@click.option("--calibration-tokens", type=click.IntRange(1), default=8192, show_default=True, help="Of that text.")
@click.option("--sequence-length", type=click.IntRange(2), default=256, show_default=True, help="Of the calibration.")
@click.option("--fit-minima", is_flag=True, help="Fit the minima to the layers' inputs; wants --calibration.")
@click.option("--act-order", is_flag=True, help="gptq: the columns that matter most first; groups stay as they are.")
@click.option("--damping", type=float, default=0.01, show_default=True, help="gptq: added to the inputs' moments.")
@click.option("--passes", type=int, default=2, show_default=True, help="gptq: further passes over all codes.")
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

    With real zero points scale and minimum are chosen among the values that float16 holds, so that every later export
    that takes the width holds the result exactly. With --calibration, a text like what the model will be used for, each
    layer is quantized on the inputs that the quantized layers before it give.
    """
    from qalora.cli.writing import write_native
    from qalora.formats.output import check_apart, check_output, check_writable

    check_apart(out, model)
    check_output(out, force=force, names=["config.json"])
    _options(settings)
    source = open_model(model, checkpoint_format)
    check_apart(out, source.path)
    if not dry_run:
        check_writable(out)
    with layers_bar(int(source.config.get("num_hidden_layers") or 1)) as tick:
        quantized = quantized_model(source, tick=tick, **settings)
        if settings["calibration"] is not None and not dry_run:
            # this does the work; `rows` would name this tensor where another is at fault
            quantized.tensors[quantized.linears[0]].read(0, 1)
    plan = write_native(quantized, out, max_shard_size=max_shard_size, force=force, dry_run=dry_run)
    if as_json:
        print_json(plan.to_json())
    else:
        print_plans([plan], details=dry_run)


def quantized_model(model: Checkpoint, *, tick: Callable[[], None] = lambda: None, **settings: Any) -> Checkpoint:
    """The model that the command's settings make of one; nothing is read yet, unless widths are to be chosen.

    tick  called after each decoder layer, where inputs are computed
    """
    from dataclasses import asdict

    from qalora.calibration import WIDTHS, Calibration, quantize_on_text
    from qalora.quantization import quantize

    chosen, automatic = _options(settings)
    text = settings["calibration"]
    if text is None:
        return quantize(model, requantize=settings["requantize"], **asdict(chosen))
    return quantize_on_text(
        model,
        Calibration(data=str(text), tokens=settings["calibration_tokens"], length=settings["sequence_length"]),
        chosen,
        budget=settings["budget"] if automatic else None,
        widths=sorted(settings["widths"]) or WIDTHS,
        requantize=settings["requantize"],
        tick=tick,
    )


def _options(settings: dict[str, Any]) -> tuple[QuantizeOptions, bool]:
    """The options, and whether each layer's width is to be chosen; InputError for what does not go together."""
    from qalora.calibration import Calibration
    from qalora.quantization import QuantizeOptions
    from qalora.tensor import BITS
    from qalora.training.data import check_data

    bits, size, automatic = settings["bits"], settings["group_size"], settings["bits"] == "auto"
    if not automatic and not bits.isdecimal():
        raise InputError("--bits", expected="a whole number or `auto`", got=repr(bits))
    if size != "row" and not size.isdecimal():
        raise InputError("--group-size", expected="a whole number or `row`", got=repr(size))
    if settings["calibration"] is not None:
        check_data(str(settings["calibration"]))
    wrong = next((width for width in settings["widths"] if width not in BITS), None)
    if wrong is not None:
        raise InputError("--widths", expected=f"some of {', '.join(map(str, BITS))}", got=str(wrong))
    if automatic != (settings["budget"] is not None):
        raise InputError("--bits auto and --budget go together, and one is missing")
    if settings["widths"] and not automatic:
        raise InputError("--widths goes with --bits auto")
    keys = ("zeros", "method", "fit_minima", "act_order", "damping", "passes")
    chosen = QuantizeOptions(
        bits=4 if automatic else int(bits),
        group_size=None if size == "row" else int(size),
        **{key: settings[key] for key in keys},
    )
    chosen.check_use(text=settings["calibration"] is not None, automatic=automatic)
    ours = Calibration(data="")
    for key, default in (("calibration_tokens", ours.tokens), ("sequence_length", ours.length)):
        if settings["calibration"] is None and settings[key] != default:
            raise InputError(f"--{key.replace('_', '-')} is of the text that --calibration gives, and there is none")
    return chosen, automatic
