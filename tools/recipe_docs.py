#!/usr/bin/env python
"""Write the part of docs/recipe.md that comes from the code: every section and key of a recipe.

python tools/recipe_docs.py
"""

from __future__ import annotations

from pathlib import Path

from qalora.pipeline.recipe_text import calls, schema_tables

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"


def generated() -> dict[str, str]:
    """What stands between the markers of each name."""
    flags = [*calls(), "--dry-run", "--json", "--log-format"]
    return {"schema": schema_tables(), "calls": ", ".join(f"`{flag}`" for flag in dict.fromkeys(flags)) + ".\n"}


def written(text: str) -> str:
    """The page with everything generated put in."""
    for name, content in generated().items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{content}{end}{tail}"
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), encoding="utf-8")
