"""A report from its JSON: the inverse of `ParityReport.to_json`, for pages and cards that are made of it again.

The JSON is of six digits and lists some differing tensors only, and has no speed where it was left out; so has the
report that is read. It comes from outside: a value of another kind than the record's is a FormatError with its place.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from qalora.errors import FormatError
from qalora.parity.findings import TensorDifference
from qalora.parity.gates import GateResult
from qalora.parity.noise import Noise
from qalora.parity.report import (
    SCHEMA,
    AdapterSummary,
    ArtifactReport,
    ParityReport,
    RunReport,
)
from qalora.parity.weights import WeightMetrics

__all__ = ["record_from_json", "report_from_json"]

T = typing.TypeVar("T")


def report_from_json(content: Any, where: str) -> ParityReport:
    """The report; `where` is the file that errors name. Raises FormatError for another schema or another form."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise FormatError(f"{where}: schema", expected=SCHEMA, got="another", todo="update qalora")
    reader = _Reader(where)
    text = reader.mapping(content.get("text"), "text")
    noise = content.get("noise")
    if isinstance(noise, dict):
        noise = {key: value for key, value in noise.items() if key != "bound"}
    return ParityReport(
        reference=reader.value(str, content.get("reference"), "reference"),
        level=reader.value(str, content.get("level"), "level"),
        text=reader.value(str | None, text.get("source"), "text.source"),
        tokens=reader.value(int, text.get("tokens"), "text.tokens"),
        windows=reader.value(int, text.get("windows"), "text.windows"),
        adapter=reader.value(AdapterSummary | None, content.get("adapter"), "adapter"),
        noise=reader.value(Noise | None, noise, "noise"),
        gates=reader.value(tuple[GateResult, ...], content.get("gates"), "gates"),
        artifacts=tuple(
            reader.artifact(artifact, f"artifacts[{n}]")
            for n, artifact in enumerate(reader.listed(content.get("artifacts"), "artifacts"))
        ),
        reference_runs=reader.value(tuple[RunReport, ...], content.get("reference_runs", []), "reference_runs"),
        comparison=reader.value(RunReport | None, content.get("comparison"), "comparison"),
    )


def record_from_json(kind: type[T], content: Any, where: str) -> T:
    """A record of a report as `dataclasses.asdict` and json made it, every number whole. Raises as above."""
    return typing.cast(T, _Reader(where).value(kind, content, kind.__name__))


class _Reader:
    """Values of records from JSON, by the records' own types."""

    def __init__(self, where: str) -> None:
        self.where = where

    def artifact(self, content: Any, path: str) -> ArtifactReport:
        """An artefact, whose weights hold the fields of two records."""
        found = dict(self.mapping(content, path))
        weights = self.mapping(found.pop("weights", None), f"{path}.weights")
        own = {field.name for field in fields(WeightMetrics)}
        totals = {field.name for field in fields(TensorDifference)}
        parts = {key: value for key, value in weights.items() if key in own}
        parts["total"] = {"name": "total", **{key: value for key, value in weights.items() if key in totals}}
        found["weights"] = parts
        found["layers"] = found.pop("adapter_lost_by_layer", {})
        return typing.cast(ArtifactReport, self.value(ArtifactReport, found, path))

    def value(self, kind: Any, content: Any, path: str) -> Any:
        """One value of a type: a record, a tuple, a mapping, an optional one, a literal, or a plain one."""
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin in (types.UnionType, typing.Union):
            wanted = next(one for one in inner if one is not type(None))
            return None if content is None else self.value(wanted, content, path)
        if origin is tuple:
            return self._tuple(inner, content, path)
        if origin is typing.Literal:
            return content if content in inner else self._refuse(path, " or ".join(map(str, inner)), content)
        if origin is not None and issubclass(origin, Mapping):
            items = self.mapping(content, path).items()
            return {key: self.value(inner[1], item, f"{path}.{key:.60}") for key, item in items}
        return self._record(kind, content, path) if is_dataclass(kind) else self._plain(kind, content, path)

    def _plain(self, kind: Any, content: Any, path: str) -> Any:
        if kind is float:
            if content is None:
                return math.nan  # what is not finite is null in the JSON
            return float(content) if _is_number(content) else self._refuse(path, "a number", content)
        fits = isinstance(content, kind) and (kind is not int or not isinstance(content, bool))
        return content if fits else self._refuse(path, kind.__name__, content)

    def _tuple(self, inner: tuple[Any, ...], content: Any, path: str) -> tuple[Any, ...]:
        items = self.listed(content, path)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(self.value(inner[0], item, f"{path}[{n}]") for n, item in enumerate(items))
        if len(items) != len(inner):
            self._refuse(path, f"{len(inner)} values", f"{len(items)}")
        return tuple(self.value(one, item, path) for one, item in zip(inner, items, strict=True))

    def _record(self, kind: Any, content: Any, path: str) -> Any:
        found = self.mapping(content, path)
        hints = _hints(kind)
        for key in sorted(set(found) - set(hints)):
            self._refuse(f"{path}.{key:.60}", "no such key", found[key])
        for field in fields(kind):
            if field.name not in found and field.default is MISSING and field.default_factory is MISSING:
                self._refuse(f"{path}.{field.name}", "this key", "none")
        return kind(**{key: self.value(hints[key], item, f"{path}.{key}") for key, item in found.items()})

    def mapping(self, content: Any, path: str) -> Mapping[str, Any]:
        """An object."""
        return content if isinstance(content, dict) else self._refuse(path, "an object", content)

    def listed(self, content: Any, path: str) -> list[Any]:
        """A list."""
        return content if isinstance(content, list) else self._refuse(path, "a list", content)

    def _refuse(self, path: str, expected: str, content: Any) -> Any:
        raise FormatError(f"{self.where}: {path}", expected=expected, got=f"{content!r:.60}")


def _is_number(content: Any) -> bool:
    return isinstance(content, int | float) and not isinstance(content, bool)


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a record's fields; what its module imports for type checkers alone is looked up here."""
    from qalora.parity.runtimes import RuntimeInfo

    return typing.get_type_hints(kind, localns={"Mapping": Mapping, "RuntimeInfo": RuntimeInfo})
