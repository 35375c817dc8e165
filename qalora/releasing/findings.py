"""What a check finds: the file, or the part of it, and what is wrong with it, in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding", "Stage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`where` is a path in the release, with the tensor or key where there is one; `problem` what is wrong there."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One question that a check asks.

    question  such as "checksums"
    findings  what is wrong
    skipped   why it was not asked, or empty; a question that was not asked proves nothing
    notes     what is not wrong, and should be known
    """

    question: str
    findings: tuple[Finding, ...] = ()
    skipped: str = ""
    notes: tuple[str, ...] = ()
