"""Ctrl-C and SIGTERM wait for the end of the step under way, so that a run can be left with nothing lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "deferred"]

ORDINARY: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
"""The signals that wait, and the handlers that are replaced for it: one that a program set for itself stays."""


class Interrupted(KeyboardInterrupt):
    """A run was left on request; says how to go on."""


@contextmanager
def deferred(enabled: bool) -> Iterator[Callable[[], bool]]:
    """Let a first signal wait while the block runs; gives the function that says whether one came.

    A second signal has its ordinary effect at once. A signal that came, and after which the block still ended well,
    raises Interrupted then. Nothing is done where it is not `enabled`, nor outside the main thread.
    """
    came: list[int] = []
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    replaced = {number: handler for number, handler in ORDINARY.items() if signal.getsignal(number) == handler}

    def restore() -> None:
        for number, handler in replaced.items():
            signal.signal(number, handler)

    def wait(number: int, frame: FrameType | None) -> None:
        came.append(number)
        restore()

    for number in replaced:
        signal.signal(number, wait)
    try:
        yield lambda: bool(came)
    finally:
        restore()
    if came:
        raise Interrupted("interrupted, when everything was done already")
