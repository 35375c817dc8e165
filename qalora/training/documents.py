"""What is read of data, a document at a time, and the account that is kept of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Account", "Document", "DocumentPreview"]

SHOWN = 3
"""Documents whose pieces an account keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """text, and the spans of it that are learned (first character, one past the last); all of it if None.

    closing  whether the end token behind it is learned: a chat template ends a turn itself
    where    the file and line it comes from
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    closing: bool = True
    where: str = field(default="", compare=False)

    @property
    def learns(self) -> bool:
        """Whether any of it is learned."""
        return bool(self.text) and not self.text.isspace() if self.spans is None else bool(self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentPreview:
    """A document as it is learned: its tokens as text, in runs that are learned and runs that are only seen."""

    where: str
    runs: tuple[tuple[bool, str], ...]


@dataclass(slots=True, kw_only=True)
class Account:
    """What data was taken for, and what of it is learned; `read_documents` and `make_blocks` fill it.

    source      the file, or the dataset's name
    form        what it is by its content: JSON lines, a JSON list, plain text, a dataset
    rows        rows of each kind
    left_out    rows of which nothing is learned, by the reason
    unused      keys of rows that are passed over, with the first place of each
    notes       what else the user should know, with the first place of each
    texts       documents that are learned whole
    turns       answers and completions that are learned
    sequences   of `length` tokens each; `idle` of them have nothing to learn and are left out
    learned     tokens that are learned
    previews    the first documents, as they are learned
    """

    source: str = ""
    form: str = ""
    rows: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    unused: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    texts: int = 0
    turns: int = 0
    sequences: int = 0
    length: int = 0
    idle: int = 0
    learned: int = 0
    previews: list[DocumentPreview] = field(default_factory=list)

    def note(self, text: str, where: str) -> None:
        """Keep what the user should know, and where it was first so."""
        self.notes.setdefault(text, where)

    def note_lines(self) -> list[str]:
        """The notes, each with the place where it was first so, and the keys that are passed over."""
        lines = [f"{where}: {text}" for text, where in self.notes.items()]
        if self.unused:
            names = ", ".join(self.unused)
            lines.append(f"{next(iter(self.unused.values()))}: keys of rows that are passed over: {names}")
        return lines

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * self.length

    def lines(self) -> list[str]:
        """What is learned, in sentences."""
        kinds = ", ".join(f"{count:,} rows of {kind}" for kind, count in self.rows.items())
        parts = [self.form, *([kinds] if kinds else [])]
        parts += [f"{count:,} of them left out: {reason}" for reason, count in self.left_out.items()]
        learned = [f"{self.texts:,} whole {'text' if self.texts == 1 else 'texts'}"] if self.texts else []
        learned += [f"{self.turns:,} turns"] if self.turns else []
        share = 100 * self.learned / max(1, self.tokens)
        sentences = [
            f"{self.source}: {'; '.join(parts)}",
            f"learned: {', '.join(learned)}; {self.learned:,} of {self.tokens:,} tokens ({share:.1f} %), "
            f"in {self.sequences:,} sequences of {self.length:,}",
        ]
        if self.idle:
            sentences.append(f"{self.idle:,} of these sequences have nothing to learn, and are left out")
        piece = next(((preview, n) for preview in self.previews for n, (on, _) in enumerate(preview.runs) if on), None)
        if piece is not None:
            preview, n = piece
            before = f" after {_short(preview.runs[n - 1][1], end=True)}" if n else ""
            sentences.append(f"the first piece that is learned: {_short(preview.runs[n][1])}{before}")
        return [*sentences, *self.note_lines()]

    def pieces(self) -> list[str]:
        """The first documents, a line for each run of tokens."""
        lines = []
        for preview in self.previews:
            lines.append(preview.where or self.source)
            lines += [f"  {'learned' if on else 'seen   '}  {_short(text, 600)}" for on, text in preview.runs]
        return lines

    def to_json(self) -> dict[str, Any]:
        """For a log: without places."""
        return {
            "form": self.form,
            "rows": dict(self.rows),
            "left_out": dict(self.left_out),
            "texts": self.texts,
            "turns": self.turns,
            "sequences": self.sequences,
            "idle_sequences": self.idle,
            "learned_tokens": self.learned,
            "unused_keys": list(self.unused),
            "notes": list(self.notes),
        }


def _short(text: str, most: int = 80, *, end: bool = False) -> str:
    """A text as Python writes it, cut to its beginning or its end."""
    if len(text) <= most:
        return repr(text)
    return f"...{text[-most:]!r}" if end else f"{text[:most]!r}..."
