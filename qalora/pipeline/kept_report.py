"""A parity report that is kept between runs: its records as JSON, every number whole, and back.

Not the report that is shipped, whose numbers are rounded. Only what this module wrote is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qalora.errors import InputError
from qalora.formats.json_text import read_json
from qalora.formats.output import json_bytes
from qalora.formats.record_json import decode, encode

if TYPE_CHECKING:
    from qalora.parity import ParityReport

__all__ = ["kept_report", "report_bytes"]

LIMIT = 1 << 30


def report_bytes(report: ParityReport) -> bytes:
    """The report as JSON; NaN and Infinity as Python writes them."""
    return json_bytes(encode(report))


def kept_report(path: Path) -> ParityReport | None:
    """The report that `report_bytes` was made of; None for anything else."""
    from qalora.parity import ParityReport

    try:
        return decode(ParityReport, read_json(path, LIMIT), str(path))
    except InputError:
        return None
