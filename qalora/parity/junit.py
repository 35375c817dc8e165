"""The parity report as JUnit XML, which every pipeline shows: a suite for each artefact, a case for each gate.

A failed gate is a failure, one that is not proven an error; an ambiguous one passes, with its sentence as output. Times
are left out: a timing is no verdict, and the same report gives the same bytes.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, indent, tostring

from qalora.parity.gates import GateResult
from qalora.parity.report import ParityReport

__all__ = ["to_junit"]


def to_junit(report: ParityReport) -> str:
    """The XML text."""
    results = list(report.results())
    name = f"parity with {_plain(report.reference)}"
    root = Element("testsuites", {"name": name, **_counts([result for _, result in results])})
    for where in dict.fromkeys(where for where, _ in results):
        suite_results = [result for place, result in results if place == where]
        suite = SubElement(root, "testsuite", {"name": _plain(where), **_counts(suite_results)})
        for result in suite_results:
            _case(suite, where, result)
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _counts(results: list[GateResult]) -> dict[str, str]:
    return {
        "tests": str(len(results)),
        "failures": str(sum(result.status == "fail" for result in results)),
        "errors": str(sum(result.status == "not proven" for result in results)),
    }


def _case(suite: Element, where: str, result: GateResult) -> None:
    case = SubElement(suite, "testcase", classname=_plain(where), name=result.gate)
    sentence = _plain(f"{result.value} against a bound of {result.bound}. {result.detail}".strip())
    if result.status in ("fail", "not proven"):
        kind = "failure" if result.status == "fail" else "error"
        SubElement(case, kind, message=sentence).text = result.derivation
    else:
        SubElement(case, "system-out").text = f"{result.status}: {sentence}"


def _plain(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(char if char.isprintable() else " " for char in text)
