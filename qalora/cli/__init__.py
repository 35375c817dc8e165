"""The command line. One thin module a command: it parses, calls the library, and prints.

A command's module is imported when the command runs, so that `qalora --help` needs neither torch nor transformers.
Errors are turned into one sentence and an exit status here, and nowhere else: 0 done, 1 not proven, 2 bad input.
"""

from __future__ import annotations

import importlib
import io
import logging
import sys
from typing import Any, NoReturn

import click

from qalora._version import __version__
from qalora.cli.closing import REMAINS
from qalora.cli.options import WithExample, spelling
from qalora.cli.progress import asks_for_json, json_log, log_event
from qalora.errors import ProofError, QaloraError, with_options

__all__ = ["main"]

_ARGUMENTS = "qalora.arguments"

COMMANDS = {
    "quantize": "Quantize a float model to integers in groups.",
    "train": "Train a QA-LoRA adapter on a quantized model.",
    "fold": "Fold an adapter into a quantized model; no code changes.",
    "export": "Write a model as GPTQ, ONNX, GGUF, MLX or HQQ.",
    "adapter": "Convert adapters between conventions and formats.",
    "verify": "Run artefacts in their own runtimes and compare them.",
    "inspect": "Show what a model, adapter or artefact is, and what is wrong with it.",
    "release": "Fold, export, verify and package, in one command.",
    "init": "Write a commented recipe for a whole pipeline.",
    "run": "Run a recipe; finished steps are reused.",
    "check": "Check a release; with the base model, byte for byte.",
    "delta": "Make and apply deltas between releases.",
    "push": "Upload a release to the Hub.",
    "demo": "Run the whole pipeline on a real model.",
}
"""Each command and its line in the overview; the module of the same name in this package holds it as `command`."""


class LazyGroup(WithExample, click.Group):
    """A group that imports a command's module when it runs, and turns errors into a sentence and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order in which a model goes through them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"qalora.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The overview, from COMMANDS: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments: a command whose own are wrong has not told its log format."""
        ctx.meta[_ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        for chatty in ("torchao", "torch.utils._pytree"):  # what optional libraries lack is no concern of the user's
            logging.getLogger(chatty).setLevel(logging.ERROR)
        if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be UTF-8; in JSON this is an escape
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            result = super().invoke(ctx)
        except QaloraError as error:
            _fail(ctx, error.spelled(spelling(ctx)), 1 if isinstance(error, ProofError) else 2)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            where = f"{error.filename}: " if error.filename else ""
            _fail(ctx, f"{where}{error.strerror or error}", 2)
        except click.UsageError as error:
            if not asks_for_json(ctx.meta[_ARGUMENTS]):
                raise
            log_event("error", status=error.exit_code, message=error.format_message())
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort) as error:
            if sys.stderr.isatty():
                click.echo(err=True)  # behind the terminal's ^C
            remains = REMAINS.get(ctx.invoked_subcommand or "", "nothing was written")
            _fail(ctx, with_options(str(error) or f"interrupted; {remains}", spelling(ctx)), 1)
        if json_log():
            log_event("done", status=0)
        return result


def _fail(ctx: click.Context, message: str, status: int) -> NoReturn:
    """Say what was wrong, and leave."""
    if json_log():
        log_event("error", status=status, message=message)
    else:
        click.echo(f"qalora: {message}", err=True)
    ctx.exit(status)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    example="qalora release base --adapter adapter --to gguf -o dist",
    epilog="MODEL is a model folder (of floats, or of integers in many formats), a GGUF or ONNX file, or a Hub id.\n\n"
    "Exit status: 0 done, 1 not proven, 2 bad usage or input.\n\n"
    'For bash completion put eval "$(_QALORA_COMPLETE=bash_source qalora)" into ~/.bashrc. zsh_source and '
    "fish_source are for zsh and fish.",
)
@click.version_option(__version__, prog_name="qalora")
def main() -> None:
    """Fold QA-LoRA adapters exactly into integer weights, export the model, and prove that it behaves the same."""
