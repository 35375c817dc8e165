"""What a check finds: the file, or the part of it, and what is wrong with it, in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Check", "Finding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`where` is a path in the release, with the tensor or key where there is one; `problem` what is wrong there."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check of a release.

    question  such as "checksums"
    findings  what is wrong
    skipped   why it did not run, or empty; a check that did not run proves nothing
    notes     what is not wrong, and should be known
    """

    question: str
    findings: tuple[Finding, ...] = ()
    skipped: str = ""
    notes: tuple[str, ...] = ()
