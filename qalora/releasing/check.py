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

Each question is asked even where another one found something, so that all is told at once.
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
from qalora.releasing.findings import Finding, Stage
from qalora.releasing.integrity import check_files, check_sums_stage
from qalora.releasing.manifest import MANIFEST, read_manifest
from qalora.releasing.opening import open_all
from qalora.releasing.rederive import Inputs, make_again

__all__ = ["Checked", "check_is_release", "check_release"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Everything that was asked."""

    stages: tuple[Stage, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong, in the order of the questions."""
        return tuple(finding for stage in self.stages for finding in stage.findings)


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
    """Ask everything that can be asked of a release.

    base, adapter  what it was made of; with the base given, and the adapter if it has one, it is made again. The
                   release's own copy of the adapter stands in for one that is not given
    public_key     of the signature
    text, template what the report was measured on and the card made with, where they are not those of qalora

    Raises InputError for a folder that is no release, or an input that cannot be read. What is wrong with a release is
    no error but a finding.
    """
    check_is_release(folder)
    asked = _Asked(progress)
    sums = asked.ask("checksums", lambda: check_sums_stage(folder))
    manifest = asked.get("form", lambda: read_manifest(folder), MANIFEST)
    read = asked.get("form", lambda: read_report(folder), "report.json")
    _signature(asked, folder, public_key)
    if manifest is not None:
        asked.ask("files", lambda: check_files(folder, manifest))
        asked.ask("licences", lambda: check_licences(folder, manifest))
        asked.ask("provenance", lambda: check_provenance(folder, manifest))
    if manifest is not None and read is not None:
        content, report = read
        asked.ask("report", lambda: check_report(content, report, manifest))
        given = manifest.options.template is None or template is not None
        why = "" if given else "the card was made with a template: give it with `card_template`"
        asked.ask("card", lambda: check_card(folder, report, manifest, template), skipped=why)
        asked.ask("page and SBOM", lambda: check_pages(folder, report, manifest))
    damaged = any(_is_opened(folder / finding.where) for finding in sums)
    if open_artifacts:
        _opening(asked, folder, allow_unproven=allow_unproven, damaged=damaged)
    else:
        asked.ask("opening", list, skipped="not asked for")
    if manifest is None or read is None or base is None:
        asked.ask("made again", list, skipped="give `base`, and `adapter`, to compute every byte again")
    else:
        inputs = Inputs(base=base, adapter=adapter, text=text, template=template)
        asked.stages.append(make_again(folder, manifest, read[0], inputs, progress=progress))
    return Checked(stages=tuple(asked.stages))


class _Asked:
    """The questions that have been asked. What raises while one is asked is what is wrong."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.stages: list[Stage] = []
        self.progress = progress

    def ask(self, question: str, answer: Callable[[], Iterable[Finding]], *, skipped: str = "") -> Sequence[Finding]:
        """Add a stage, and give its findings."""
        findings: Sequence[Finding] = ()
        if not skipped:
            self.progress(question)
            try:
                findings = tuple(answer())
            except InputError as error:
                findings = (Finding(where=question, problem=str(error)),)
        self.stages.append(Stage(question=question, findings=tuple(findings), skipped=skipped))
        return findings

    def get(self, question: str, answer: Callable[[], T], where: str) -> T | None:
        """What `answer` gives; None, and a finding, where it raises."""
        try:
            return answer()
        except InputError as error:
            self.stages.append(Stage(question=question, findings=(Finding(where=where, problem=str(error)),)))
            return None


def _is_opened(path: Path) -> bool:
    """Whether a runtime would open a file, or look for files behind it, as behind a link."""
    return path.suffix in weight_suffixes() or path.is_symlink()


def _signature(asked: _Asked, folder: Path, public_key: Path | None) -> None:
    if public_key is None:
        signed = (folder / SIGNATURE).exists()
        why = "signed, and no `public_key` was given" if signed else "not signed"
        asked.ask("signature", list, skipped=why)
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

    asked.ask("signature", answer)


def _opening(asked: _Asked, folder: Path, *, allow_unproven: bool, damaged: bool) -> None:
    if damaged:
        asked.ask("opening", list, skipped="weights are not as listed, and are given to no runtime")
        return
    missing: list[tuple[str, str]] = []

    def answer() -> list[Finding]:
        findings, unproven = open_all(folder, progress=asked.progress)
        missing.extend(unproven)
        if not allow_unproven:
            findings += [Finding(where=where, problem=f"not opened: {why}") for where, why in unproven]
        return findings

    asked.ask("opening", answer)
    if missing and allow_unproven:
        notes = tuple(f"{where} was not opened: {why}" for where, why in missing)
        last = asked.stages[-1]
        asked.stages[-1] = Stage(question=last.question, findings=last.findings, notes=notes)
