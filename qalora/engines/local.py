"""Processes on this machine, by loky: an executor that sends closures, and notices a process that dies."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from typing import Any

from loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

from qalora.engines import Piece, Result
from qalora.errors import EngineError

__all__ = ["Processes"]

DEATHS = 3
"""Times that processes may die before the work is given up."""

WATCH_SECONDS = 0.2
"""How often a process looks whether the one that began it is alive."""


class Processes:
    """An engine of processes that live as long as a `map`, each with its share of the cores."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def map(self, work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Result]]:
        """See `qalora.engines.Engine`. The pieces of a process that dies are begun again."""
        left = dict(enumerate(pieces))
        for _ in range(DEATHS):
            try:
                yield from self._tried(work, left)
            except BrokenProcessPool as error:
                broken = error
            if not left:
                return
        raise EngineError(
            f"a process that shared the work died {DEATHS} times ({_first_line(broken)})",
            todo="give fewer `jobs`, as its memory may not have been enough",
        ) from broken

    def _tried(self, work: Callable[[Piece], Result], left: dict[int, Piece]) -> Iterator[tuple[Piece, Result]]:
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        arguments = (work, os.getpid(), threads)
        pool = ProcessPoolExecutor(min(self.jobs, len(left)), initializer=_begin, initargs=arguments)
        try:
            numbers = {pool.submit(_do, piece): number for number, piece in left.items()}
            for future in as_completed(numbers):
                result = future.result()
                yield left.pop(numbers[future]), result
        finally:
            pool.shutdown(wait=True, kill_workers=bool(left))


_work: Callable[[Any], Any] | None = None
"""What this process was begun for."""


def _begin(work: Callable[[Any], Any], parent: int, threads: int) -> None:
    global _work
    import torch

    _work = work
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent is dead: what it writes into may be another run's by then."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def _do(piece: Any) -> Any:
    if _work is None:
        raise TypeError("this process was begun without work")
    return _work(piece)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
