"""A recipe's schema as people read it: a commented recipe to start from, and tables for the documentation.

In the commented recipe a line that begins with "# " is prose, and one that begins with "#" and no space a key or
section that may be used by removing the "#".
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence

from qalora.release.recipe import Key, Section

__all__ = ["commented_recipe", "schema_tables", "toml_value"]

HEAD = """\
# A recipe: qalora release recipe.toml
#
# Lines that begin with # and no space are keys and sections at their defaults, or with an example where there is none:
# remove the # to use them. Paths are relative to this file. `qalora release recipe.toml --dry-run` says what would be
# done.
"""


def toml_value(value: object) -> str:
    """A value as TOML writes it: text, a number, true or false, or a list of these."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(part) for part in value)}]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def commented_recipe(sections: Sequence[Section]) -> str:
    """A recipe with every section and key, its help, type and default; what is not required is commented out."""
    parts = [HEAD]
    for section in sections:
        used = not section.acts
        if section.name:
            parts.append(f"\n{_prose(section.help)}{'' if used else '#'}[{section.name}]\n")
        for key in section.keys:
            told = f"{key.help} {_kind(key)}".strip()
            parts.append(f"\n{_prose(told)}")
            parts.append(f"{'' if used and key.required else '#'}{key.name} = {toml_value(key.example)}\n")
    return "".join(parts)


def _prose(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, 110))


def _kind(key: Key) -> str:
    if key.required:
        return f"({key.expected}; required)"
    return f"({key.expected})" if key.default is None else f"({key.expected}; {toml_value(key.default)} by default)"


def schema_tables(sections: Sequence[Section]) -> str:
    """A table of keys for each section, as Markdown."""
    parts = []
    for section in sections:
        title = f"`[{section.name}]`" if section.name else "Before the first section"
        needed = " Required." if section.required else ""
        parts += [f"**{title}**" + (f" {section.help}{needed}" if section.help else ""), ""]
        parts += ["| key | value | default | |", "|---|---|---|---|"]
        for key in section.keys:
            default = "required" if key.required else "" if key.default is None else f"`{toml_value(key.default)}`"
            cells = (f"`{key.name}`", key.expected, default, key.help)
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("")
    return "\n".join(parts)
