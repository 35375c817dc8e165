"""A recipe's sections and keys, derived from the options of the commands whose work it does; nothing is listed twice.

[base]      the model, and how it is read
[quantize]  options of `qalora quantize`
[train]     options of `qalora train`
[adapter]   an adapter that is there already
[export]    options that `qalora release` shares with `qalora export`
[verify]    options that `qalora release` shares with `qalora verify`
[release]   the other options of `qalora release`

A key is an option's long name; Click's own types and callbacks check its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from qalora.cli import export, quantize, train, verify
from qalora.cli.release import make
from qalora.formats.files import may_be_of_the_hub
from qalora.release.recipe import Key, Section
from qalora.release.recipe_text import toml_value

__all__ = ["CALLS", "LEFT_OUT", "arguments", "sections"]

CALLS = {
    "out": "results of steps go into the work folder; where the release goes is in [release]",
    "force": "what a run may do, not what it makes",
    "dry_run": "what a run does, not what it makes",
    "resume": "a recipe goes on by itself",
    "as_json": "how a command prints",
    "log_format": "how a command prints",
}
"""Options that belong to a call, by their names in Python, and why no recipe has them."""

LEFT_OUT = frozenset(CALLS)
_TOP = (
    Key(
        name="work",
        help="The folder for results of steps, made where it is absent. It may be removed at any time.",
        expected="a path in quotes",
        check=lambda value: _text(value),
        example=".qalora",
        default=".qalora",
    ),
    Key(
        name="keep",
        help="Keep results that the last run of no recipe used; otherwise they are removed at the end of a run.",
        expected="true or false",
        check=lambda value: _flag(value),
        example=False,
        default=False,
    ),
)


def sections(folder: Path) -> list[Section]:
    """Every section; relative paths are taken from `folder`."""
    shared, verified = _names(export.command), _names(verify.command)
    release: dict[str, list[click.Option]] = {name: [] for name in ("export", "verify", "release")}
    for option in _options(make.command):
        if option.name in ("adapter", "convention", "checkpoint_format"):
            continue  # [adapter] and [base]
        if option.name != "out" and option.name in LEFT_OUT:
            continue
        where = "export" if option.name in shared - LEFT_OUT else "verify" if option.name in verified else "release"
        release[where].append(option)
    by_name = {option.name: option for option in _options(make.command)}

    def keys(command: click.Command) -> list[click.Option]:
        return [one for one in _options(command) if one.name not in {*LEFT_OUT, "checkpoint_format"}]

    def made(command: click.Command, options: Iterable[click.Option]) -> tuple[Key, ...]:
        return tuple(_key(command, option, folder) for option in options)

    adapter = _key(make.command, by_name["adapter"], folder, name="path", required=True)
    return [
        Section(name="", help="", keys=_TOP),
        Section(
            name="base",
            help="The model that everything starts from.",
            keys=(_model(folder), *made(make.command, [by_name["checkpoint_format"]])),
            required=True,
            command="qalora release",
        ),
        Section(
            name="quantize",
            help="Round a float base to integers. Leave it out where the base holds integers.",
            keys=made(quantize.command, keys(quantize.command)),
            acts=True,
            command="qalora quantize",
        ),
        Section(
            name="train",
            help="Train an adapter. Leave it out where there is one, or none is wanted.",
            keys=made(train.command, keys(train.command)),
            acts=True,
            command="qalora train",
        ),
        Section(
            name="adapter",
            help="An adapter that is there already, instead of [train].",
            keys=(adapter, *made(make.command, [by_name["convention"]])),
            acts=True,
            command="qalora release",
        ),
        Section(
            name="export",
            help="The formats, and how the weights are written in them.",
            keys=made(make.command, release["export"]),
            required=True,
            command="qalora release",
        ),
        Section(
            name="verify",
            help="What the gates are judged on.",
            keys=made(make.command, release["verify"]),
            command="qalora release",
        ),
        Section(
            name="release",
            help="The folder that is released.",
            keys=made(make.command, release["release"]),
            required=True,
            command="qalora release",
        ),
    ]


def arguments(command: click.Command, values: Mapping[str, Any]) -> list[str]:
    """The options of a command line that say what a section does; a value is never taken for an option."""
    found = []
    options = {_long(option): option for option in _options(command)}
    for name, value in values.items():
        option = options[name]
        if isinstance(value, bool):
            spelled = option.opts if value else option.secondary_opts
            found += [max(spelled, key=len)] if spelled else []
        else:
            found += [f"--{name}={one}" for one in (value if isinstance(value, list) else [value])]
    return found


def _options(command: click.Command) -> list[click.Option]:
    return [param for param in command.params if isinstance(param, click.Option)]


def _names(command: click.Command) -> set[str]:
    return {str(option.name) for option in _options(command)}


def _long(option: click.Option) -> str:
    return max(option.opts, key=len).removeprefix("--")


def _key(
    command: click.Command, option: click.Option, folder: Path, *, name: str | None = None, required: bool = False
) -> Key:
    """One option as a key; text, paths and `multiple` ones as lists."""
    context = click.Context(command)
    one = _one(option, folder)

    def check(value: Any) -> Any:
        if option.multiple and not isinstance(value, list):
            raise ValueError
        made = [one(part) for part in value] if option.multiple else one(value)
        try:
            option.process_value(context, made)
        except click.BadParameter as error:
            said = error.message
            raise ValueError(said if said.startswith("expected ") else "") from error
        return made

    default = option.get_default(context)
    given = default if isinstance(default, int | float | str) else None
    example = given if given is not None else _example(option)
    return Key(
        name=name or _long(option),
        help=(option.help or "").removesuffix(" Repeatable."),
        expected="a list of " + _expected(option).replace("text ", "texts ") if option.multiple else _expected(option),
        check=check,
        example=[example] if option.multiple else example,
        default=given,
        required=required or option.required,
    )


def _model(folder: Path) -> Key:
    def check(value: Any) -> str:
        text = _text(value)
        if (folder / text).exists():
            return str(folder / text)
        if not may_be_of_the_hub(text):
            raise ValueError("a folder or file that is there, or an id of the Hub")
        return text

    told = "A Hugging Face, GPTQ or qalora folder, a GGUF file, or a Hub id."
    return Key(
        name="model", help=told, expected="a path or Hub id in quotes", check=check, example="base", required=True
    )


def _one(option: click.Option, folder: Path) -> Callable[[Any], Any]:
    """The check of one value, before Click's own: TOML's type, and where a path is."""
    kind = option.type
    if option.is_flag:
        return _flag
    if isinstance(kind, click.types.IntParamType):
        return _integer
    if isinstance(kind, click.types.FloatParamType):
        return _number
    if isinstance(kind, click.Path):
        return lambda value: _path(value, folder, here=option.name != "out")
    if option.name == "data":
        return lambda value: _data(value, folder)
    return _text_kind(option)[1]


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 1 << 63:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    if "\0" in value:
        raise ValueError("text without the character 0")
    return value


def _text_or_integer(value: Any) -> str:
    """`group-size = 32` as well as "row", `max-shard-size = 5000000` as well as "5MB"."""
    return str(_integer(value)) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _text_or_number(value: Any) -> str:
    """`strength = 0.85` as well as "auto"."""
    return str(_number(value)) if isinstance(value, float) else _text_or_integer(value)


def _path(value: Any, folder: Path, *, here: bool) -> str:
    path = folder / _text(value)
    if here and not path.exists():
        raise ValueError("the path of something that is there")
    return str(path)


def _data(value: Any, folder: Path) -> str:
    """A file, or a dataset of the Hub."""
    from qalora.training.data import may_be_a_dataset

    text = _text(value)
    path = folder / text
    if path.is_file():
        return str(path)
    if path.exists() or not may_be_a_dataset(text):
        raise ValueError("a file that is there, or a dataset of the Hub")
    return text


def _expected(option: click.Option) -> str:
    kind = option.type
    if option.is_flag:
        return "true or false"
    if isinstance(kind, click.types.IntRange | click.types.FloatRange):
        noun = "an integer" if isinstance(kind, click.types.IntRange) else "a number"
        unit = f" of {option.metavar}" if option.metavar else ""
        if kind.min is not None and kind.max is not None and not (kind.min_open or kind.max_open):
            return f"{noun}{unit} from {kind.min} to {kind.max}"
        low = "" if kind.min is None else f" {'>' if kind.min_open else '>='} {kind.min}"
        high = "" if kind.max is None else f" {'<' if kind.max_open else '<='} {kind.max}"
        return f"{noun}{unit}{low}{' and' if low and high else ''}{high}"
    if isinstance(kind, click.types.IntParamType):
        return "an integer"
    if isinstance(kind, click.types.FloatParamType):
        return "a number"
    if isinstance(kind, click.Choice):
        return f"one of {', '.join(toml_value(choice) for choice in kind.choices)}"
    if isinstance(kind, click.Path):
        return "a path in quotes"
    return _text_kind(option)[0]


def _text_kind(option: click.Option) -> tuple[str, Callable[[Any], str]]:
    """What is expected of an option of text, and its check: a factor, a group size or bytes may be a number instead."""
    if str(option.metavar).startswith("FACTOR"):
        return "a number, or text in quotes", _text_or_number
    if option.metavar == "SIZE" or (isinstance(option.default, str) and option.default.isdigit()):
        return "an integer, or text in quotes", _text_or_integer
    return "text in quotes", _text


def _example(option: click.Option) -> Any:
    kind = option.type
    if option.is_flag:
        return False
    if isinstance(kind, click.Choice):
        return str(kind.choices[0])
    if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
        low = getattr(kind, "min", None)
        return 1 if low is None or low < 1 else low
    shown = {"targets": "gguf", "out": "dist", "data": "text.jsonl", "target_modules": "q_proj", "allow_loss": "minima"}
    shown |= {"split_max_size": "4GB"}
    return shown.get(str(option.name), "FILE" if isinstance(kind, click.Path) else "...")
