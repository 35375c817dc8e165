"""End tokens compared: what an artefact, and each runtime that runs it, ends a generation at, against the reference's.

Two sets are compared. What a file says is read back by the record that owns the fact, `qalora.converters.ends`; what
a runtime does, the runtime itself says once it has loaded the artefact. A runtime that ends at more by a rule of its
own, which no file can switch off, is told from a file that says so.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from qalora.checkpoint import Checkpoint
from qalora.converters import layout
from qalora.converters.ends import Ends, ends_of, in_words, token_texts
from qalora.converters.tokenizer import has_tokenizer
from qalora.errors import InputError

__all__ = ["EndDifferences", "EndsCheck", "RuntimeEnds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeEnds:
    """What a runtime ends at: `ids`, of which `own` are those that it ends at whatever an artefact says."""

    ids: frozenset[int]
    own: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class EndDifferences:
    """Tokens that differ, in words: `missing` ones of the reference, `extra` ones, and `own` ones of the runtime."""

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def faulty(self) -> bool:
        """Whether the artefact is to blame, and not its runtime alone."""
        return bool(self.missing or self.extra)

    def __str__(self) -> str:
        """A sentence."""
        parts = [f"it does not end at {', '.join(self.missing)}"] if self.missing else []
        parts += [f"it ends at {', '.join(self.extra)} too"] if self.extra else []
        parts += [f"the runtime ends at {', '.join(self.own)} too, whatever a file says"] if self.own else []
        return "; ".join(parts)


class EndsCheck:
    """The reference's end tokens, asked for when they are first needed."""

    def __init__(self, reference: Checkpoint) -> None:
        self._reference = reference
        self._ends: Ends | None = None

    def compare(self, artifact: Checkpoint) -> EndDifferences | None:
        """What an artefact says otherwise; None for a GGUF file without a vocabulary that says nothing."""
        try:
            artifact_ends = ends_of(artifact)
        except InputError as error:
            return EndDifferences(extra=(f"what is no token ({error})",))
        if layout(artifact.layout).tokenizer and not artifact_ends.ids and not has_tokenizer(artifact):
            return None
        return self._differences(RuntimeEnds(ids=frozenset(artifact_ends.ids), own=artifact_ends.added), artifact)

    def compare_runtime(self, runtime_ends: RuntimeEnds, artifact: Checkpoint | None = None) -> EndDifferences:
        """What a runtime does otherwise."""
        return self._differences(runtime_ends, self._reference if artifact is None else artifact)

    def _differences(self, runtime_ends: RuntimeEnds, artifact: Checkpoint) -> EndDifferences:
        if self._ends is None:
            self._ends = ends_of(self._reference)
        expected = frozenset(self._ends.ids)
        if runtime_ends.ids == expected:
            return EndDifferences()
        texts = {**token_texts(artifact), **token_texts(self._reference)}

        def words(ids: Collection[int]) -> tuple[str, ...]:
            return tuple(in_words([n], texts) for n in sorted(ids))

        more = runtime_ends.ids - expected
        return EndDifferences(
            missing=words(expected - runtime_ends.ids),
            extra=words(more - runtime_ends.own),
            own=words(more & runtime_ends.own),
        )
