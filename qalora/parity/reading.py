"""A report from its JSON: the inverse of `ParityReport.to_json`, for pages and cards that are made of it again.

The JSON is of six digits and lists some differing tensors only, and has no speed where it was left out; so has the
report that is read. It comes from outside: a value of another kind than the record's is a FormatError with its place.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from qalora.errors import FormatError, shown
from qalora.formats.record_json import decode
from qalora.parity.findings import TensorDifference
from qalora.parity.report import SCHEMA, ParityReport

__all__ = ["report_from_json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """What was computed on."""

    source: str | None
    tokens: int
    windows: int


def report_from_json(content: Any, where: str) -> ParityReport:
    """The report; `where` is the file that errors name. Raises FormatError for another schema or another form."""
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(content, dict) or schema != SCHEMA:
        raise FormatError(f"{where}: schema", expected=SCHEMA, got=shown(schema), todo="update qalora")
    fields = {key: value for key, value in content.items() if key not in ("schema", "passed")}
    text = decode(_Text, fields.get("text"), f"{where}: text")
    fields |= {"text": text.source, "tokens": text.tokens, "windows": text.windows}
    if isinstance(fields.get("noise"), dict):
        fields["noise"] = {key: value for key, value in fields["noise"].items() if key != "bound"}
    if isinstance(fields.get("artifacts"), list):
        fields["artifacts"] = [_parted(artifact) for artifact in fields["artifacts"]]
    return decode(ParityReport, fields, where)


def _parted(artifact: Any) -> Any:
    """An artefact whose weights, which hold the fields of two records, are those two again."""
    if not isinstance(artifact, dict) or not isinstance(artifact.get("weights"), dict):
        return artifact  # refused where it is read
    weights = {key: value for key, value in artifact["weights"].items() if key != "differing_tensors"}
    names = {field.name for field in fields(TensorDifference)}
    total = {key: weights.pop(key) for key in names & weights.keys()}
    return {**artifact, "weights": {**weights, "total": {"name": "total", **total}}}
