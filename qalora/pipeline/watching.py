"""What a run says of itself while it goes on: functions that the command line gives. By default steps and notes go to
the logger "qalora" of the standard module, at INFO and WARNING, and nothing else is said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qalora.converters.plan import Progress
    from qalora.parity import ParityReport
    from qalora.releasing.package import Release
    from qalora.releasing.push import PushPlan
    from qalora.training.pace import Progress as Training

__all__ = ["Watch"]


_LOG = logging.getLogger("qalora")


def _nothing(*arguments: Any) -> None:
    """Say nothing."""


def _note(message: str) -> None:
    _LOG.warning("%s", message)


def _step(step: str, state: str, seconds: float | None) -> None:
    _LOG.info("%s: %s%s", step, state, "" if seconds is None else f", {seconds:.1f} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Each of the first four gives, for the time of a long step, the function that the step calls.

    writing       (bytes in all, what is done) -> called with a tensor's name and its bytes
    layers        (decoder layers) -> called after each
    training      called with each step's report
    verification  called with what is being done, and the share that is done
    note          called with what the user should know
    step          called with a step, "started", "reused", "goes on" or "finished", and its seconds where it is
    judged        called with the report of a verification
    done          called with a release that is there
    planned       called with what is going to be uploaded, or would be
    sent          called with where it is, None where nothing was sent
    """

    writing: Callable[[int, str], AbstractContextManager[Progress]] = lambda total, what: nullcontext(_nothing)
    layers: Callable[[int], AbstractContextManager[Callable[[], None]]] = lambda layers: nullcontext(_nothing)
    training: Callable[[], AbstractContextManager[Training]] = lambda: nullcontext(_nothing)
    verification: Callable[[], AbstractContextManager[Callable[[str, float], None]]] = lambda: nullcontext(_nothing)
    note: Callable[[str], None] = _note
    step: Callable[[str, str, float | None], None] = _step
    judged: Callable[[ParityReport], None] = _nothing
    done: Callable[[Release], None] = _nothing
    planned: Callable[[PushPlan], None] = _nothing
    sent: Callable[[str | None], None] = _nothing
