"""A conversation through a tokenizer's chat template, which is a program out of an untrusted file.

transformers runs it in jinja2's sandbox, which keeps it from everything but its arguments, and lets it loop for as long
as it likes. Here it has SECONDS of a processor. In the main thread the system's timer stops it, which costs nothing; in
another thread, and where there is no such timer, every line of a template and every call looks at the clock, which
takes a rendering several times as long. No thread or process is started, so that none stays behind.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from qalora.converters.gguf.rendering import SECONDS
from qalora.errors import FormatError

__all__ = ["render_chat"]

TEMPLATE = "<template>"
"""The file name of what jinja2 compiles."""


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text of a conversation; raises what the template raises, which may be anything.

    options  of transformers' apply_chat_template

    FormatError for a template that takes more than SECONDS.
    """
    main = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    with _timed() if main else _traced():
        # in a batch of one: transformers refuses no messages at all otherwise
        (text,) = tokenizer.apply_chat_template([[dict(message) for message in messages]], tokenize=False, **options)
    return str(text)


def _too_long() -> FormatError:
    return FormatError("the chat template", expected="a text", got=f"none in {SECONDS} seconds of a processor")


@contextmanager
def _timed() -> Iterator[None]:
    """FormatError once this process has worked in here for SECONDS, by a timer whose earlier user gets it back."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _too_long()

    before = signal.signal(signal.SIGVTALRM, stop)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if before is None else before)


@contextmanager
def _traced() -> Iterator[None]:
    """FormatError once this thread has worked in here for SECONDS."""
    end = time.thread_time() + SECONDS

    def line(frame: FrameType, event: str, value: Any) -> Any:
        if time.thread_time() > end:
            raise _too_long()
        return line

    def call(frame: FrameType, event: str, value: Any) -> Any:
        line(frame, event, value)
        return line if frame.f_code.co_filename == TEMPLATE else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
