"""Work beside the caller's: while it reads one tensor, those before it are packed and written.

Torch, numpy and files let go of Python's lock, so that two threads of one process keep two cores at work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec

__all__ = ["IN_FLIGHT", "JOB_BYTES", "Workers"]

IN_FLIGHT = 2
"""Jobs that are begun and not ended: with what the caller holds, a bound of the memory."""

JOB_BYTES = 8 << 20
"""Of the rows that a job gets, as float32, where a tensor comes by rows."""

Arguments = ParamSpec("Arguments")


class Workers:
    """A context manager that does jobs in threads, at most IN_FLIGHT at a time, and has done all when it ends.

    The first job that fails, in the order in which they came, is what the caller sees: from a later `do`, or at the
    end, in the place of an error of its own, which comes of later work. An interrupt waits for the jobs that run.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="qalora-worker")
        self._jobs: deque[Future[object]] = deque()

    def do(self, job: Callable[Arguments, object], *args: Arguments.args, **options: Arguments.kwargs) -> None:
        """Begin a job as soon as there is room. Its arguments are its own from now on."""
        self.wait(IN_FLIGHT - 1)
        self._jobs.append(self._pool.submit(job, *args, **options))

    def wait(self, most: int) -> None:
        """Wait until at most so many jobs are not done; of large jobs, fewer are to be in memory."""
        while len(self._jobs) > most:
            self._jobs.popleft().result()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None or issubclass(kind, Exception):
                while self._jobs:
                    self._jobs.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
