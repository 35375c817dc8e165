"""Who does work that comes in pieces: processes on this machine, or a Ray cluster.

A piece may be done twice, if the process that did it first dies; so doing it again has to give the same. Work and
pieces travel to other processes by cloudpickle: they come from this process, never from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

from qalora.options.engine import Sharing

__all__ = ["Engine", "Piece", "Result", "engine_of", "pieces_of", "spread"]

Piece = TypeVar("Piece")
Result = TypeVar("Result")

PIECES = 8
"""That each process gets, about: the last one to end is not waited for long."""

PIECE_BYTES = 256 << 20
"""Of a piece at most, where it is more than one tensor: what is lost where a process dies."""


class Engine(Protocol):
    """Does pieces of work in other processes."""

    jobs: int
    """How many at a time."""

    def map(self, work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Result]]:
        """Each piece with its result, in the order in which they end.

        Raises what `work` raises; EngineError where processes die again and again.
        """


@contextmanager
def engine_of(options: Sharing) -> Iterator[Engine | None]:
    """The engine of a user's choice; None where this process does the work itself."""
    if options.engine == "ray":
        from qalora.engines.ray import cluster

        with cluster(options.jobs) as engine:
            yield engine
    elif options.jobs is None or options.jobs == 1:
        yield None
    else:
        from qalora.engines.local import processes

        with processes(options.jobs) as engine:
            yield engine


def spread(
    engine: Engine, work: Callable[[tuple[str, ...]], Iterable[Result]], sizes: Mapping[str, int]
) -> Iterator[Result]:
    """Work on names, in other processes: what `work` gives of each piece, in the order in which they end.

    sizes  bytes of each name, in order
    """
    for _, results in engine.map(partial(_listed, work), pieces_of(sizes, engine.jobs)):
        yield from results


def _listed(work: Callable[[tuple[str, ...]], Iterable[Result]], names: tuple[str, ...]) -> list[Result]:
    return list(work(names))


def pieces_of(sizes: Mapping[str, int], jobs: int) -> list[tuple[str, ...]]:
    """Names in runs of about the same bytes.

    sizes  bytes of each name, in order
    """
    most = min(PIECE_BYTES, sum(sizes.values()) // (jobs * PIECES))
    pieces: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not pieces or filled + size > most:
            pieces.append([])
            filled = 0
        pieces[-1].append(name)
        filled += size
    return [tuple(names) for names in pieces]
