#!/usr/bin/env python
"""Write docs/reference: a page of every command, and a page of every public name in Python.

python tools/reference_docs.py
"""

from __future__ import annotations

import html
import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import click

import qalora
from qalora.cli import COMMANDS, main
from qalora.options import Options, fields_of

FOLDER = Path(__file__).parent.parent / "docs" / "reference"

CLI_HEAD = """# Commands

This page is made from the commands themselves, by `python tools/reference_docs.py`. `qalora COMMAND --help` prints the
same text.

Exit status: 0 done, 1 not proven or interrupted, 2 bad usage or input.

To complete commands and options with the Tab key, put one line into the start file of your shell:

```sh
eval "$(_QALORA_COMPLETE=bash_source qalora)"    # ~/.bashrc
eval "$(_QALORA_COMPLETE=zsh_source qalora)"     # ~/.zshrc
_QALORA_COMPLETE=fish_source qalora | source     # ~/.config/fish/completions/qalora.fish
```
"""

API_HEAD = """# Python

This page is made from the code, by `python tools/reference_docs.py`. Everything on it is in the module `qalora`.
"""


def escaped(text: str) -> str:
    """Text that Markdown takes as it is: no tag, no end of a cell; what stands in backquotes is code."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*").replace("|", "&#124;") for part in parts[::2]]
    parts[1::2] = map(code, parts[1::2])
    return "".join(parts)


def code(text: str) -> str:
    """Code in a line: in backquotes, or, since a | would end a cell, as HTML."""
    return f"`{text}`" if "|" not in text else f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def prose(text: str) -> list[str]:
    """Paragraphs of a docstring or a help text as blocks of Markdown: code, tables of arguments, sentences."""
    parts: list[str] = []
    for part in re.split(r"\n[ \t]*\n", inspect.cleandoc(text)):
        if parts and part.startswith("    ") and parts[-1].startswith("    "):
            parts[-1] += f"\n\n{part}"
        else:
            parts.append(part)
    return [_paragraph(part) for part in parts if part.strip()]


def _paragraph(part: str) -> str:
    if part.startswith("\b"):
        return fenced(part.lstrip("\b\n"), "text")
    if part.startswith("    "):
        return fenced(inspect.cleandoc(part), "python" if re.search(r"\w\(|import ", part) else "text")
    if part.startswith("Example: "):
        return fenced(" ".join(part.removeprefix("Example: ").split()), "sh")
    rows = _arguments(part.splitlines())
    if rows:
        return table(("argument", ""), [(f"`{name}`".replace(", ", "`, `"), escaped(text)) for name, text in rows])
    return escaped(" ".join(part.split())) + "\n"


def _arguments(lines: list[str]) -> list[tuple[str, str]]:
    """Lines `name  what it is`, two spaces or more between, with lines that go on; none if the first is not one."""
    rows: list[tuple[str, str]] = []
    for line in lines:
        match = re.match(r"([a-z_](?:[\w, ]*?\w)?)\s{2,}(\S.*)", line)
        if match:
            rows.append((match[1], match[2]))
        elif not rows:
            return []
        else:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
    return rows


def fenced(text: str, language: str) -> str:
    """A block of code."""
    return f"```{language}\n{text.rstrip()}\n```\n"


def cli_page() -> str:
    """Every command, in the order of the overview."""
    context = click.Context(main, info_name="qalora")
    overview = table(("command", ""), [(f"[`{n}`](#qalora-{n})", escaped(text)) for n, text in COMMANDS.items()])
    blocks = [CLI_HEAD, overview]
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        blocks += _command(command, click.Context(command, parent=context, info_name=name))
    return "\n".join(blocks)


def _command(command: click.Command, context: click.Context) -> list[str]:
    level = "##" if isinstance(context.parent and context.parent.command, click.Group) else "#"
    level += "#" * (context.command_path.count(" ") - 1)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    blocks = [f"{level} {context.command_path}\n", *prose(command.help or ""), fenced(usage, "text")]
    rows: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is not None and isinstance(param, click.Option) and "--help" not in param.opts:
            rows[bool(getattr(getattr(param, "option", None), "expert", False))].append(_option(*record))
    for expert, title in ((False, "option"), (True, "option for experts")):
        if rows[expert]:
            blocks.append(table((title, "default", ""), rows[expert]))
    blocks += prose(command.epilog or "")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            blocks += _command(inner, click.Context(inner, parent=context, info_name=name))
    return blocks


def _option(names: str, text: str) -> tuple[str, ...]:
    """A row: how it is spelled, its default, what it is for."""
    match = re.fullmatch(r"(.*?)\s*\[((?:default|required|env var|x)[^\[\]]*)\]", text, re.DOTALL)
    text, extra = (match[1], match[2]) if match else (text, "")
    default = re.sub(r"default: (.+)", lambda match: code(match[1]), extra.split("; ")[0])
    return (code(names), default, escaped(text))


def api_page() -> str:
    """Every public name: functions, records, errors."""
    public = {name: getattr(qalora, name) for name in qalora.__all__ if name[0].isalpha()}
    errors = {n: thing for n, thing in public.items() if isinstance(thing, type) and issubclass(thing, Exception)}
    functions = {name: thing for name, thing in public.items() if inspect.isfunction(thing)}
    rest = {name: thing for name, thing in public.items() if name not in errors and name not in functions}
    blocks = [API_HEAD, *prose(qalora.__doc__ or "")]
    for title, things in (("Functions", functions), ("Records", rest), ("Errors", errors)):
        blocks.append(f"## {title}\n")
        for name, thing in things.items():
            blocks += _function(name, thing) if inspect.isfunction(thing) else _class(name, thing)
    return "\n".join(blocks)


def _function(name: str, function: Any) -> list[str]:
    return [f"### {name}\n", fenced(_signature(f"qalora.{name}", function), "python"), *prose(function.__doc__ or "")]


def _signature(name: str, function: Any, *, bound: bool = False) -> str:
    """The call, with types as the code writes them; one argument a line where it is long."""
    signature = inspect.signature(function)
    given = list(signature.parameters.values())[1 if bound else 0 :]
    words, starred = [], False
    for one in given:
        if one.kind is one.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        words.append(_argument(one))
    result = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(words)}){result}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){result}"


def _argument(one: inspect.Parameter) -> str:
    kind = "" if one.annotation is one.empty else f": {one.annotation}"
    if one.default is one.empty:
        return f"{one.name}{kind}"
    value = "..." if callable(one.default) else repr(one.default)  # a function's repr has an address
    return f"{one.name}{kind} = {value}"


def _class(name: str, kind: Any) -> list[str]:
    blocks = [f"### {name}\n"]
    if not isinstance(kind, type):
        return [*blocks, fenced(f"{name} = {kind}", "python")]
    blocks += prose(kind.__doc__ or "")
    if issubclass(kind, Options):
        blocks.append(table(("field", "default", ""), [_choice(kind, one) for one in fields_of(kind)]))
    elif is_dataclass(kind):
        rows = [(f"`{f.name}`", code(str(f.type)), _default(f)) for f in fields(kind)]
        blocks.append(table(("field", "type", "default"), [row for row in rows if not row[0].startswith("`_")]))
    for key, value in vars(kind).items():
        if not key.startswith("_") and getattr(value, "__doc__", None):
            blocks += _member(f"{name}.{key}", value)
    return blocks


def _choice(record: type, option: Any) -> tuple[str, ...]:
    default = "required" if option.required else f"`{getattr(option.default, 'value', option.default)!r}`"
    if option.default in ((), frozenset()):
        default = "none"
    return (f"`{option.name}`", default, escaped(option.help))


def _default(field: Any) -> str:
    if field.default is not MISSING:
        return "`...`" if callable(field.default) else f"`{field.default!r}`"
    return "required" if field.default_factory is MISSING else f"`{field.default_factory.__name__}()`"


def _member(name: str, value: Any) -> list[str]:
    if isinstance(value, property):
        return [f"**`{name}`**\n", *prose(value.__doc__ or "")]
    function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    if not inspect.isfunction(function):
        return []
    call = _signature(name, function, bound=not isinstance(value, staticmethod))
    return [f"**`{name}`**\n", fenced(call, "python"), *prose(value.__doc__ or "")]


def pages() -> dict[Path, str]:
    """What belongs into each file."""
    return {FOLDER / "cli.md": cli_page(), FOLDER / "api.md": api_page()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
