"""What a run says of itself after each step: losses, how fast it is, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Pace", "Progress", "StepReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Where a run is: step of steps, the loss of the step, the latest held-out loss.

    tokens_per_second  of the steps of this run so far, without held-out losses
    seconds_left       of the steps and held-out losses that are left, if they go on like those before
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


class Pace:
    """Seconds that steps and held-out losses took in this run."""

    def __init__(self) -> None:
        self._seconds = {"step": 0.0, "evaluation": 0.0}
        self._times = {"step": 0, "evaluation": 0}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count what is done within, a "step" or an "evaluation"."""
        started = time.monotonic()
        yield
        self._seconds[what] += time.monotonic() - started
        self._times[what] += 1

    def left(self, steps: int, evaluations: int) -> float:
        """Seconds that so many more will take; one evaluation is taken for a step where there was none."""
        step = self._mean("step", 0.0)
        return steps * step + evaluations * self._mean("evaluation", step)

    def speed(self, tokens: int) -> float:
        """Tokens a second, of so many a step; 0 before the first."""
        step = self._mean("step", 0.0)
        return tokens / step if step else 0.0

    def _mean(self, what: str, otherwise: float) -> float:
        return self._seconds[what] / self._times[what] if self._times[what] else otherwise
