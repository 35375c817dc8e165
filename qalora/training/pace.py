"""What a run says of itself: losses, how fast it is, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Pace", "Progress", "StepReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Where a run is: step of steps, the loss of the step, the latest held-out loss.

    step               0 while the start and the first held-out loss are computed; loss, and held_out at first, are NaN
    tokens_per_second  of everything that was trained on in this run so far, without held-out losses
    seconds_left       of what is left, the start and held-out losses too, if it goes on as before
    strength           the factor of what was learned that is kept, in the last report; its held-out loss is at that
                       strength
    note               what the user should know: that a checkpoint could not be written, and why
    """

    step: int
    steps: int
    loss: float
    held_out: float
    tokens_per_second: float
    seconds_left: float = 0.0
    strength: float = 1.0
    note: str = ""


Progress = Callable[[StepReport], None]

FORWARD = 1 / 3
"""What a sequence takes without a backward, by its matrix products: before the first held-out loss was measured."""


class Pace:
    """How long sequences take that are trained on, and those of held-out losses.

    training, evaluation  sequences that are left
    """

    def __init__(self) -> None:
        self.training = self.evaluation = 0
        self._seconds, self._sequences = [0.0, 0.0], [0, 0]
        self._since = time.monotonic()

    def begin(self) -> None:
        """What is done from now on is counted."""
        self._since = time.monotonic()

    def trained(self, sequences: int) -> None:
        """So many were trained on since the last call."""
        self.training -= sequences
        self._count(0, sequences)

    def evaluated(self, sequences: int) -> None:
        """A held-out loss was computed of so many since the last call."""
        self.evaluation -= sequences
        self._count(1, sequences)

    def _count(self, kind: int, sequences: int) -> None:
        now = time.monotonic()
        self._seconds[kind] += now - self._since
        self._sequences[kind] += sequences
        self._since = now

    @property
    def left(self) -> float:
        """Seconds of what is left."""
        training, evaluation = (
            seconds / sequences if sequences else 0.0
            for seconds, sequences in zip(self._seconds, self._sequences, strict=True)
        )
        evaluation = evaluation or FORWARD * training
        training = training or evaluation / FORWARD
        return max(0, self.training) * training + max(0, self.evaluation) * evaluation

    def speed(self, tokens: int) -> float:
        """Tokens a second that were trained on, of so many a sequence; 0 before the first."""
        return tokens * self._sequences[0] / self._seconds[0] if self._seconds[0] else 0.0
