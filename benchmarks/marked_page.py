"""Put a table into a page, between its markers."""

from __future__ import annotations

from pathlib import Path

__all__ = ["put"]


def put(page: Path, text: str, begin: str, end: str) -> None:
    """Replace what stands between two lines of a page. SystemExit where it does not have both, in this order."""
    before, _, rest = page.read_text("utf-8").partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
