"""The documentation as tests read it: pages, their blocks of code, links, anchors and command lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[a-z]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code; `language` is empty for an indented one."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every block of a page, in order."""
    text = page.read_text("utf-8")
    fenced = list(_FENCE.finditer(text))
    bare = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    made = [
        Block(page=page, line=text[: one.start()].count("\n") + 2, language=one["language"], text=one["text"])
        for one in fenced
    ]
    made += [
        Block(page=page, line=bare[: one.start()].count("\n") + 1, language="", text=re.sub(r"(?m)^ {4}", "", one[0]))
        for one in _INDENTED.finditer(bare)
    ]
    return sorted(made, key=lambda block: block.line)


def prose(page: Path) -> str:
    """A page without its blocks and without code in backquotes."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    return re.sub(r"`[^`\n]+`", "", _INDENTED.sub("", text))


def quoted(page: Path) -> set[str]:
    """What stands in backquotes outside of blocks."""
    return set(re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text("utf-8"))))


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures, code left out."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What `#...` may name on a page: headings whose anchor is the same on GitHub and in the site."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    heads = [re.sub(r"[^\w\s-]", "", head).strip().lower() for head in _HEADING.findall(text)]
    return {head.replace(" ", "-") for head in heads if head.replace(" ", "-") == re.sub(r"[-\s]+", "-", head)}


def shell_lines(page: Path) -> list[str]:
    """Lines of `sh` blocks, without comments."""
    lines = [line for block in blocks(page) if block.language == "sh" for line in block.text.splitlines()]
    return [line for line in (re.sub(r"(^|\s+)# .*", "", line).strip() for line in lines) if line]
