"""Do the parts of a release say the same: report, manifest, card, SBOM, page, licences, and the artefacts' metadata.

What was made from the report and the manifest is made again from them and compared, so that no figure in a card can be
other than the report's, whatever the checksums say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qalora.converters import target
from qalora.converters.plan import PROVENANCE
from qalora.errors import InputError, MissingLibraryError
from qalora.formats.files import contained, read_limited
from qalora.formats.json_text import read_json
from qalora.formats.output import text_bytes
from qalora.parity.html import to_html
from qalora.parity.reading import report_from_json
from qalora.parity.report import ParityReport
from qalora.releasing.card import card_text
from qalora.releasing.digests import file_digest
from qalora.releasing.findings import Finding
from qalora.releasing.manifest import MANIFEST, gate_entries, provenance
from qalora.releasing.package import CARD, LICENCES, PAGE, REPORT
from qalora.releasing.records import Manifest
from qalora.releasing.sbom import SBOM, sbom_bytes, validate_sbom

__all__ = ["check_card", "check_licences", "check_pages", "check_provenance", "check_report", "read_report"]

LIMIT = 256 << 20


def read_report(folder: Path) -> tuple[dict[str, Any], ParityReport]:
    """The report of a release, as JSON and as a record. FormatError names what has not its form."""
    content = read_json(contained(folder, REPORT), LIMIT, strict=True)
    return content, report_from_json(content, REPORT)


def check_report(content: Mapping[str, Any], report: ParityReport, manifest: Manifest) -> list[Finding]:
    """Its verdict is that of its gates, every gate's status that of its figures; the manifest says the same."""
    findings = []
    if content.get("passed") is not report.passed() or manifest.passed is not report.passed():
        findings.append(Finding(where=f"{REPORT}: passed", problem="its gates say otherwise"))
    for where, result in report.results():
        if result.status == "pass" and not _may_pass(result.value, result.bound, result.gate):
            problem = f"{result.value:g} with bound {result.bound:g} is no pass"
            findings.append(Finding(where=f"{REPORT}: {where}: {result.gate}", problem=problem))
    if gate_entries(report) != manifest.gates:
        findings.append(Finding(where=f"{MANIFEST}: gates", problem=f"not those of {REPORT}"))
    if not report.passed(allow_unproven=True):
        findings.append(Finding(where=REPORT, problem=f"a gate failed: {report.failure()}"))
    proven = {artifact.name.partition("/")[0] for artifact in report.artifacts}
    for artifact in manifest.artifacts:
        if artifact.folder not in proven:
            findings.append(Finding(where=artifact.folder, problem=f"{REPORT} says nothing of it"))
    return findings


def _may_pass(value: float | None, bound: float | None, gate: str) -> bool:
    """Whether a gate with these figures can have passed; six digits of each are known."""
    from qalora.parity.gates import GATES

    if value is None or bound is None:
        return True
    least = any(row.name == gate and row.at_least for row in GATES)
    slack = 1e-5 * max(abs(value), abs(bound))  # each has been rounded to six digits
    return value >= bound - slack if least else value <= bound + slack


def check_pages(folder: Path, report: ParityReport, manifest: Manifest) -> list[Finding]:
    """The HTML page and the SBOM are what report and manifest give."""
    makers: dict[str, Callable[[], bytes]] = {
        PAGE: lambda: text_bytes(to_html(report, speed=False)),
        SBOM: lambda: sbom_bytes(manifest),
    }
    problem = f"not what {REPORT} and {MANIFEST} give"
    findings = [Finding(where=name, problem=problem) for name, make in makers.items() if _differs(folder, name, make())]
    try:
        validate_sbom(sbom_bytes(manifest))
    except MissingLibraryError:
        pass  # it is the bytes that a release writes, which the tests hold against the schema
    except InputError as error:
        findings.append(Finding(where=SBOM, problem=str(error)))
    return findings


def check_card(folder: Path, report: ParityReport, manifest: Manifest, template: str | None) -> list[Finding]:
    """The card is what report and manifest give; the first line that is not is shown."""
    card = text_bytes(card_text(manifest, report, template=template)).decode("utf-8")
    path = contained(folder, CARD)
    if not path.is_file():
        return [Finding(where=CARD, problem="it is not there")]
    there = read_limited(path, LIMIT).decode("utf-8", errors="replace")
    lines, expected = there.split("\n"), card.split("\n")
    if lines == expected:
        return []
    pairs = zip_longest(lines, expected, fillvalue="")
    at, (line, other) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    problem = f"{line[:200]!r}, where {REPORT} and {MANIFEST} give {other[:200]!r}"
    return [Finding(where=f"{CARD}:{at}", problem=problem)]


def _differs(folder: Path, name: str, content: bytes) -> bool:
    path = contained(folder, name)
    return not path.is_file() or read_limited(path, LIMIT) != content


def check_licences(folder: Path, manifest: Manifest) -> list[Finding]:
    """Each licence that the manifest names is there, and is the base's."""
    findings = []
    for name in manifest.licences:
        path = contained(folder, name)
        if not path.is_file():
            findings.append(Finding(where=name, problem="the base's licence is not there"))
        elif manifest.base.files.get(name) != file_digest(path):
            findings.append(Finding(where=name, problem="not the base's licence"))
    left_out = {name for name in manifest.base.files if name in LICENCES} - {*manifest.licences}
    return findings + [Finding(where=name, problem=f"{MANIFEST} leaves it out") for name in sorted(left_out)]


def check_provenance(folder: Path, manifest: Manifest) -> list[Finding]:
    """Every GGUF, safetensors and ONNX file can be read, says where it comes from, and says what the manifest says."""
    expected = provenance(manifest.base.digest, None if manifest.adapter is None else manifest.adapter.digest)
    expected[f"{PROVENANCE}version"] = manifest.versions.get("qalora", "")
    findings = []
    for artifact in manifest.artifacts:
        for name in artifact.files:
            try:
                path = contained(folder, name)
                file_metadata = target(artifact.target).metadata_of(path) if path.is_file() else None
            except InputError as error:
                findings.append(Finding(where=name, problem=str(error)))
                continue
            if file_metadata is None:
                continue
            stored = {key: value for key, value in file_metadata.items() if key.startswith(PROVENANCE)}
            other = sorted(key for key in {*expected, *stored} if expected.get(key) != stored.get(key))
            if other:
                problem = (
                    f"{stored.get(other[0], 'nothing')!r:.90} where {MANIFEST} says {expected.get(other[0])!r:.90}"
                )
                findings.append(Finding(where=f"{name}: {other[0]}", problem=problem))
    return findings
