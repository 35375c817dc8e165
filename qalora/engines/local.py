"""Processes on this machine, by loky: an executor that sends closures, and notices a process that dies."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
from loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

from qalora.engines import Piece, Result
from qalora.errors import EngineError, first_line

__all__ = ["Processes", "processes"]

DEATHS = 3
"""Times that processes may die before the work is given up."""

WATCH_SECONDS = 0.2
"""How often a process looks whether the one that began it is alive."""


@contextmanager
def processes(jobs: int) -> Iterator[Processes]:
    """An engine of processes that begin with the first work, each with its share of the cores, and end with this."""
    with tempfile.TemporaryDirectory(prefix="qalora-jobs-") as folder:
        engine = Processes(jobs, Path(folder))
        try:
            yield engine
        finally:
            engine.end()


class Processes:
    """An engine of processes. What work needs lies in a file of `folder`, which each of them reads once."""

    def __init__(self, jobs: int, folder: Path) -> None:
        self.jobs = jobs
        self._folder = folder
        self._count = 0
        self._pool: ProcessPoolExecutor | None = None

    def map(self, work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Result]]:
        """See `qalora.engines.Engine`. The pieces of a process that dies are begun again."""
        left = dict(enumerate(pieces))
        self._count += 1
        file = self._folder / f"{self._count}.work"
        file.write_bytes(cloudpickle.dumps(work))
        deaths = 0
        while left:
            try:
                yield from self._tried(file, left)
            except BrokenProcessPool as error:
                deaths += 1
                self.end()
                if deaths == DEATHS:
                    raise EngineError(
                        f"a process that shared the work died {DEATHS} times ({first_line(error)})",
                        todo="give fewer `jobs`, as its memory may not have been enough",
                    ) from error
        file.unlink()

    def _tried(self, file: Path, left: dict[int, Piece]) -> Iterator[tuple[Piece, Result]]:
        if self._pool is None:
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            self._pool = ProcessPoolExecutor(self.jobs, initializer=_begin, initargs=(os.getpid(), threads))
        numbers = {self._pool.submit(_do, file, piece): number for number, piece in left.items()}
        try:
            for future in as_completed(numbers):
                result = future.result()
                yield left.pop(numbers[future]), result
        finally:
            if left:
                self.end()

    def end(self) -> None:
        """End the processes, whatever they do."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, kill_workers=True)
            self._pool = None


_kept: tuple[Path, Callable[[Any], Any]] | None = None
"""The last work that this process did, and the file that it came from."""


def _begin(parent: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent is dead: what it writes into may be another run's by then."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def _do(file: Path, piece: Any) -> Any:
    global _kept
    if _kept is None or _kept[0] != file:
        _kept = None  # before the next is read
        _kept = file, cloudpickle.loads(file.read_bytes())  # of the process that began this one
    return _kept[1](piece)
