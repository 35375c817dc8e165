"""A recipe's schema as people read it: a commented recipe to start from, and tables for the documentation.

In the commented recipe a line that begins with "# " is prose, and one that begins with "#" and no space a key or
section that may be used by removing the "#".
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from qalora.errors import with_options
from qalora.options import Option, fields_of, plain
from qalora.options.recipe import SECTIONS
from qalora.pipeline.recipe import keys_of

__all__ = ["calls", "commented_recipe", "schema_tables", "toml_value"]

HEAD = """\
# A recipe: qalora run recipe.toml
#
# Lines that begin with # and no space are keys and sections at their defaults, or with an example where there is none:
# remove the # to use them. Paths are relative to this file. `qalora run recipe.toml --dry-run` says what would be
# done.
"""


def toml_value(value: object) -> str:
    """A value as TOML writes it: text, a number, true or false, or a list of these."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(part) for part in value)}]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def commented_recipe() -> str:
    """A recipe with every section and key, its help, type and default; what is not required is commented out."""
    parts = [HEAD]
    for section in SECTIONS:
        used = not section.acts
        if section.name:
            parts.append(f"\n{_prose(section.help)}{'' if used else '#'}[{section.name}]\n")
        for key in keys_of(section):
            told = f"{_help(key)} {_kind(key)}".strip()
            parts.append(f"\n{_prose(told)}")
            parts.append(f"{'' if used and key.required else '#'}{key.flag} = {toml_value(_example(key))}\n")
    return "".join(parts)


def schema_tables() -> str:
    """A table of keys for each section, as Markdown."""
    parts = []
    for section in SECTIONS:
        title = f"`[{section.name}]`" if section.name else "Before the first section"
        needed = " Required." if section.required else ""
        parts += [f"**{title}**" + (f" {section.help}{needed}" if section.help else ""), ""]
        parts += ["| key | value | default | |", "|---|---|---|---|"]
        for key in keys_of(section):
            default = _default(key)
            shown = "required" if key.required else "" if default is None else f"`{toml_value(default)}`"
            cells = (f"`{key.flag}`", _expected(key), shown, _help(key))
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("")
    return "\n".join(parts)


def calls() -> list[str]:
    """The options of records that are in no recipe, as flags."""
    names = [option.flag for section in SECTIONS for option in fields_of(section.record) if option.call]
    return [f"--{name}" for name in dict.fromkeys(names)]


def _prose(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, 110))


def _help(key: Option) -> str:
    """With other options as the keys that they are."""
    keys = {option.name: option.flag for section in SECTIONS for option in fields_of(section.record)}
    return with_options(key.help, lambda name: keys.get(name, name))


def _kind(key: Option) -> str:
    default = _default(key)
    if key.required:
        return f"({_expected(key)}; required)"
    return f"({_expected(key)})" if default is None else f"({_expected(key)}; {toml_value(default)} by default)"


def _expected(key: Option) -> str:
    return f"a list, each {key.expected}" if key.many is not None else key.expected


def _default(key: Option) -> Any:
    return None if key.required or key.default in ((), frozenset()) else plain(key.default)


def _example(key: Option) -> Any:
    shown = key.example if key.example is not None else _default(key)
    if shown is None:
        shown = _of_kind(key)
    return [shown] if key.many is not None else shown


def _of_kind(key: Option) -> Any:
    if key.words and not key.free:
        return key.words[0]
    numbers: dict[type, Any] = {int: int(key.low or 1), float: 1.0, bool: False, Path: "FILE"}
    return numbers.get(key.kind, "...")
