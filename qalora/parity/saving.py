"""A report as a file: JSON, a page with plots, or JUnit XML, as its name ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qalora.errors import InputError
from qalora.formats.output import check_output, json_bytes, new_file, text_bytes
from qalora.parity.html import to_html
from qalora.parity.junit import to_junit
from qalora.parity.report import ParityReport

__all__ = ["check_files", "save_report"]

FORMS: dict[str, Callable[[ParityReport], bytes]] = {
    ".json": lambda report: json_bytes(report.to_json()),
    ".html": lambda report: text_bytes(to_html(report)),
    ".xml": lambda report: to_junit(report).encode(),
}


def check_files(files: Sequence[Path], *, force: bool) -> None:
    """InputError for a file whose name ends in none of the forms, OutputError for one that exists, without `force`."""
    for file in files:
        if file.suffix not in FORMS:
            raise InputError(
                f"{file}", expected=f"a name that ends in {', '.join(FORMS)}", got=file.suffix or "a name without one"
            )
        check_output(file, force=force)


def save_report(report: ParityReport, file: Path, *, force: bool = False) -> None:
    """Write a report to a file."""
    check_files([file], force=force)
    with new_file(file, force=force) as place:
        place.write_bytes(FORMS[file.suffix](report))
