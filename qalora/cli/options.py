"""What several commands share: options as decorators, plans and JSON on stdout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qalora.cli.progress import say

if TYPE_CHECKING:
    from rich.console import Console

    from qalora.checkpoint import Checkpoint
    from qalora.converters.plan import Plan

__all__ = [
    "checkpoint_format_option",
    "convention_option",
    "dry_run_option",
    "export_options",
    "export_settings",
    "force_option",
    "json_flag",
    "max_shard_size_option",
    "minima_option",
    "open_model",
    "output_option",
    "print_json",
    "print_plans",
    "public_key_option",
    "sign_option",
    "sign_password",
    "table_console",
    "targets_option",
    "verify_options",
    "verify_settings",
]

F = TypeVar("F", bound=Callable[..., Any])

MINIMA = {"float16": "float16", "float32": "float32", "fp16": "float16", "fp32": "float32"}
"""What --minima takes, and what it means."""


def output_option(what: str) -> Callable[[F], F]:
    """-o/--output, required; `what` says what appears there."""
    return click.option(
        "-o", "--output", "out", required=True, type=click.Path(path_type=Path), metavar="DIR", help=what
    )


def force_option(function: F) -> F:
    """--force."""
    return click.option("--force", is_flag=True, help="Replace an earlier output.")(function)


def dry_run_option(function: F) -> F:
    """--dry-run."""
    return click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")(function)


def json_flag(function: F) -> F:
    """--json as a flag: machine-readable on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def targets_option(default: Sequence[str] = ()) -> Callable[[F], F]:
    """--to, repeatable; required where there is no default."""
    return click.option(
        "--to",
        "targets",
        multiple=True,
        required=not default,
        default=default or None,
        metavar="FORMAT",
        show_default=bool(default),
        callback=_targets,
        help="gptq, gguf, onnx, mlx, hqq, qalora (our own folder). Repeatable.",
    )


def _targets(context: click.Context, parameter: click.Parameter, value: Sequence[str]) -> tuple[str, ...]:
    """Formats that there are, before any model is opened."""
    from qalora.converters import TARGETS

    wrong = next((name for name in value if name not in TARGETS), None)
    if wrong is not None:
        raise click.BadParameter(f"expected one of {', '.join(TARGETS)}, got {wrong!r}", context, parameter)
    return tuple(value)


def minima_option(
    what: str = "What the folded minima are rounded to; what the adapter was trained with, or float16, by default.",
    *,
    default: str | None = None,
) -> Callable[[F], F]:
    """--minima, float16 or float32; None where it is not given and there is no default."""
    return click.option(
        "--minima",
        type=click.Choice(list(MINIMA)),
        default=default,
        show_default=default is not None,
        callback=lambda ctx, param, value: MINIMA.get(value),
        help=what,
    )


def convention_option(function: F) -> F:
    """--convention, None where it is not given."""
    return click.option(
        "--convention",
        type=click.Choice(["paper", "official", "peft"]),
        help="What the adapter's scaling means, where its file does not say.",
    )(function)


def checkpoint_format_option(function: F) -> F:
    """--checkpoint-format, for `open_model`."""
    return click.option(
        "--checkpoint-format",
        type=click.Choice(["gptq", "gptq_v2"]),
        help="What a GPTQ folder's zeros are stored as, where its label is wrong.",
    )(function)


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Bytes of 200MB, 5GB or 4GiB."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])(i?))?B?", value.strip(), re.IGNORECASE)
    size = 0
    if found is not None:
        power = " KMGT".index((found[2] or " ").upper())
        size = int(Decimal(found[1]) * (1024 if found[3] else 1000) ** power)
    if size < 1:
        raise click.BadParameter(f"expected a size such as 200MB, 5GB or 4GiB, got {value!r}", context, parameter)
    return size


def max_shard_size_option(function: F) -> F:
    """--max-shard-size, in bytes."""
    return click.option(
        "--max-shard-size",
        callback=_size,
        default="5GB",
        show_default=True,
        metavar="SIZE",
        help="safetensors: split a model that holds more into files of at most this, such as 200MB.",
    )(function)


def sign_option(function: F) -> F:
    """--sign, a private key in PEM; the password of an encrypted one is `sign_password`'s."""
    return click.option(
        "--sign",
        "sign_key",
        type=click.Path(path_type=Path),
        metavar="KEY",
        help="Write model.sig with this private key; the password of an encrypted one is in QALORA_SIGN_PASSWORD.",
    )(function)


def sign_password() -> str | None:
    """What QALORA_SIGN_PASSWORD holds, None where it is not set or empty."""
    return os.environ.get("QALORA_SIGN_PASSWORD") or None


def public_key_option(function: F) -> F:
    """--public-key, to check model.sig with."""
    return click.option(
        "--public-key", type=click.Path(path_type=Path), metavar="KEY", help="Check model.sig with this public key."
    )(function)


def open_model(model: str, checkpoint_format: str | None = None) -> Checkpoint:
    """Load a MODEL argument, and say on stderr what its reader noted, such as a label that may be wrong."""
    from qalora.converters import load

    found = load(model, checkpoint_format=checkpoint_format)
    for note in found.notes:
        say(note)
    return found


def export_options(function: F) -> F:
    """The options that ExportOptions holds, beside the adapter."""
    decorators = (
        click.option("--name", help="The model's name in file names and metadata."),
        click.option(
            "--allow-loss",
            multiple=True,
            metavar="LOSS",
            help="Accept a loss by name: zeros, minima, scales, eight-bit, residual, narrowing. Repeatable.",
        ),
        click.option(
            "--gptq-form",
            type=click.Choice(["auto", "nearest", "eight-bit", "round"]),
            default="auto",
            show_default=True,
            help="How GPTQ holds real zero points.",
        ),
        click.option(
            "--gguf-form",
            type=click.Choice(["auto", "wide"]),
            default="auto",
            show_default=True,
            help="wide: integer zero points exactly, in Q8_0.",
        ),
        click.option(
            "--accuracy-level",
            type=click.IntRange(0, 4),
            default=0,
            show_default=True,
            help="ONNX Runtime's MatMulNBits: 4 computes with int8 activations, faster and less exact.",
        ),
        click.option(
            "--onnx-embedding",
            type=click.Choice(["float32", "quantized"]),
            default="float32",
            show_default=True,
            help="quantized: the codes of a tied embedding; smaller, faster steps, slower prompts.",
        ),
        max_shard_size_option,
        click.option(
            "--split-max-size",
            callback=_size,
            metavar="SIZE",
            help="GGUF: split it into files of at most this, as gguf-split does; llama.cpp is given the first.",
        ),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def export_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Take what `export_options` added out of a command's settings: arguments for ExportOptions."""
    keys = ("name", "gptq_form", "gguf_form", "accuracy_level", "onnx_embedding", "max_shard_size", "split_max_size")
    return {"allow_loss": frozenset(settings.pop("allow_loss")), **{key: settings.pop(key) for key in keys}}


def verify_options(function: F) -> F:
    """What `verify` and `release` compute on; `verify_settings` makes arguments of all but --allow-unproven."""
    decorators = (
        click.option("--text", type=click.Path(path_type=Path), help="A text file to compute on; else a built-in one."),
        click.option(
            "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Tokens of the text."
        ),
        click.option("--prompt", multiple=True, help="What to continue greedily. Repeatable."),
        click.option("--prompts", type=click.Path(path_type=Path), help="A text file with a prompt on each line."),
        click.option(
            "--generate", type=click.IntRange(1), default=24, show_default=True, help="Tokens to continue by."
        ),
        click.option(
            "--threads",
            type=click.IntRange(1),
            help="Threads of each runtime; those of torch (OMP_NUM_THREADS) otherwise.",
        ),
        click.option(
            "--memory",
            type=click.FloatRange(0, min_open=True),
            metavar="GB",
            help="What a runtime may take; by default what the system has to give.",
        ),
        click.option(
            "--dynamic-int8", is_flag=True, help="Compare with PyTorch's dynamic INT8 of the same model too, unjudged."
        ),
        click.option("--allow-unproven", is_flag=True, help="Exit 0 even where a runtime is not installed."),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def verify_settings(
    *,
    text: Path | None,
    max_tokens: int,
    prompt: tuple[str, ...],
    prompts: Path | None,
    generate: int,
    threads: int | None,
    memory: float | None,
    dynamic_int8: bool,
) -> dict[str, Any]:
    """Arguments for `qalora.parity.verify`."""
    from qalora.parity.text import read_text

    lines = [] if prompts is None else [line for line in read_text(prompts).splitlines() if line.strip()]
    return {
        "text": None if text is None else read_text(text),
        "max_tokens": max_tokens,
        "prompts": [*prompt, *lines],
        "generate": generate,
        "threads": threads,
        "memory": None if memory is None else int(memory * 1e9),
        "dynamic_int8": dynamic_int8,
    }


def print_json(content: object) -> None:
    """Machine-readable output: sorted keys, on stdout."""
    click.echo(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False))


def table_console() -> Console:
    """A console for tables on stdout, wide enough for them where it is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=170)


def print_plans(plans: Sequence[Plan], *, details: bool) -> None:
    """A table for each plan: carriers with counts and bytes; every tensor where `details` is set."""
    from rich.table import Table

    console = table_console()
    for plan in plans:
        table = Table(title=f"{plan.target}: {plan.nbytes:,} bytes", title_justify="left")
        for column in ("tensor" if details else "tensors", "carrier", "file", "bytes", "exact"):
            table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
        for row in _plan_rows(plan, details):
            table.add_row(*row)
        console.print(table)
        for note in plan.notes:
            console.print(f"  note: {note}", markup=False)


def _plan_rows(plan: Plan, details: bool) -> list[tuple[str, str, str, str, str]]:
    def exact(loss: object) -> str:
        return "yes" if loss is None else str(getattr(loss, "size", loss))

    if details:
        return [(t.name, t.carrier, f"{t.file} @ {t.offset}", f"{t.nbytes:,}", exact(t.loss)) for t in plan.tensors]
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for tensor in plan.tensors:
        kinds.setdefault((tensor.carrier, tensor.file, exact(tensor.loss)), []).append(tensor.nbytes)
    return [(str(len(sizes)), carrier, file, f"{sum(sizes):,}", loss) for (carrier, file, loss), sizes in kinds.items()]
