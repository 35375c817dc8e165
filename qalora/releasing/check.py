"""Check a release: is it whole, is it what it says it is, does it open, and can it be made again.

    form         manifest.json and report.json have their forms
    checksums    SHA256SUMS lists every file, and each is as listed
    signature    model.sig is by the key that was given
    files        the artefacts' files, and every tensor's bytes, are those of the manifest
    report       its verdict follows from its figures
    rendered     card, page and SBOM are what report and manifest give
    licences     those of the base are there
    provenance   every artefact's own metadata names the same base and adapter
    opening      every artefact opens in its runtime, in a fresh process, and gives finite logits
    made again   with base and adapter: every byte is computed again, and the report measured again

Each question is asked even if an earlier one found something, so that one run lists everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qalora.checkpoint import Checkpoint
from qalora.converters import weight_suffixes
from qalora.errors import InputError
from qalora.releasing.checksums import SIGNATURE, SUMS
from qalora.releasing.consistency import (
    check_card,
    check_licences,
    check_pages,
    check_provenance,
    check_report,
    read_report,
)
from qalora.releasing.findings import Check, Finding
from qalora.releasing.integrity import check_checksums, check_files
from qalora.releasing.manifest import MANIFEST, read_manifest
from qalora.releasing.opening import open_all
from qalora.releasing.rederive import Inputs, make_again

__all__ = ["Checked", "check_is_release", "check_release"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The result of every check."""

    checks: tuple[Check, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong, in the order of the questions."""
        return tuple(finding for check in self.checks for finding in check.findings)


def check_is_release(folder: Path) -> None:
    """InputError for a folder that has nothing of a release."""
    if not (folder / SUMS).is_file() and not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}", expected=f"a release, with {SUMS} and {MANIFEST}", got="neither of them")


def check_release(
    folder: Path,
    *,
    base: Checkpoint | None = None,
    adapter: Path | None = None,
    public_key: Path | None = None,
    text: str | None = None,
    template: str | None = None,
    open_artifacts: bool = True,
    allow_unproven: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Checked:
    """Run every check of a release that can be run.

    base, adapter  what it was made of; with the base given, and the adapter if it has one, it is made again. The
                   release's own copy of the adapter stands in for one that is not given
    public_key     of the signature
    text, template what the report was measured on and the card made with, where they are not those of qalora

    Raises InputError for a folder that is no release, or an input that cannot be read. What is wrong with a release is
    no error but a finding.
    """
    check_is_release(folder)
    checks = _Checks(progress)
    sums = checks.ask("checksums", lambda: check_checksums(folder))
    manifest = checks.get("form", lambda: read_manifest(folder), MANIFEST)
    read = checks.get("form", lambda: read_report(folder), "report.json")
    _signature(checks, folder, public_key)
    if manifest is not None:
        checks.ask("files", lambda: check_files(folder, manifest))
        checks.ask("licences", lambda: check_licences(folder, manifest))
        checks.ask("provenance", lambda: check_provenance(folder, manifest))
    if manifest is not None and read is not None:
        content, report = read
        checks.ask("report", lambda: check_report(content, report, manifest))
        same_template = manifest.options.template is None or template is not None
        why = "" if same_template else "the card was made with a template: give it with `card_template`"
        checks.ask("card", lambda: check_card(folder, report, manifest, template), skipped=why)
        checks.ask("page and SBOM", lambda: check_pages(folder, report, manifest))
    damaged = any(_is_opened(folder / finding.where) for finding in sums)
    if open_artifacts:
        _opening(checks, folder, allow_unproven=allow_unproven, damaged=damaged)
    else:
        checks.ask("opening", list, skipped="not asked for")
    if manifest is None or read is None or base is None:
        checks.ask("made again", list, skipped="give `base`, and `adapter`, to compute every byte again")
    else:
        inputs = Inputs(base=base, adapter=adapter, text=text, template=template)
        checks.results.append(make_again(folder, manifest, read[0], inputs, progress=progress))
    return Checked(checks=tuple(checks.results))


class _Checks:
    """Runs checks one after another and keeps their results. What a check raises is a finding."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.results: list[Check] = []
        self.progress = progress

    def ask(self, question: str, answer: Callable[[], Iterable[Finding]], *, skipped: str = "") -> Sequence[Finding]:
        """Run a check, and give its findings."""
        findings: Sequence[Finding] = ()
        if not skipped:
            self.progress(question)
            try:
                findings = tuple(answer())
            except InputError as error:
                findings = (Finding(where=question, problem=str(error)),)
        self.results.append(Check(question=question, findings=tuple(findings), skipped=skipped))
        return findings

    def get(self, question: str, answer: Callable[[], T], where: str) -> T | None:
        """What `answer` gives; None, and a finding, where it raises."""
        try:
            return answer()
        except InputError as error:
            self.results.append(Check(question=question, findings=(Finding(where=where, problem=str(error)),)))
            return None


def _is_opened(path: Path) -> bool:
    """Whether a runtime would open a file, or look for files behind it, as behind a link."""
    try:
        return path.suffix in weight_suffixes() or path.is_symlink()
    except OSError:  # a name that no file can have
        return False


def _signature(checks: _Checks, folder: Path, public_key: Path | None) -> None:
    if public_key is None:
        signed = (folder / SIGNATURE).exists()
        why = "signed, and no `public_key` was given" if signed else "not signed"
        checks.ask("signature", list, skipped=why)
        return

    def answer() -> list[Finding]:
        from qalora.releasing.signing import verify_signature

        if not (folder / SIGNATURE).is_file():
            return [Finding(where=SIGNATURE, problem="it is not there, and a public key was given")]
        try:
            verify_signature(folder, public_key)
        except InputError as error:
            return [Finding(where=SIGNATURE, problem=str(error))]
        return []

    checks.ask("signature", answer)


def _opening(checks: _Checks, folder: Path, *, allow_unproven: bool, damaged: bool) -> None:
    if damaged:
        checks.ask("opening", list, skipped="weights are not as listed, and are given to no runtime")
        return
    missing: list[tuple[str, str]] = []

    def answer() -> list[Finding]:
        findings, unproven = open_all(folder, progress=checks.progress)
        missing.extend(unproven)
        if not allow_unproven:
            findings += [Finding(where=where, problem=f"not opened: {why}") for where, why in unproven]
        return findings

    checks.ask("opening", answer)
    if missing and allow_unproven:
        notes = tuple(f"{where} was not opened: {why}" for where, why in missing)
        last = checks.results[-1]
        checks.results[-1] = Check(question=last.question, findings=last.findings, notes=notes)
