"""Copies of another file's bytes, wherever they are: what a changed name or an added entry leaves of a header.

As rsync does it, with one side cut into chunks and the other searched at every byte, but with a hash that numpy
computes at all places at once: a polynomial modulo 2^64 with an odd base, whose inverse moves every window to the same
power. A hit is compared before it is believed.

    A. Tridgell, P. Mackerras: The rsync algorithm, TR-CS-96-05, 1996
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qalora.delta.coding import Bytes

__all__ = ["CHUNK", "MAX_MATCHED", "find_copies"]

CHUNK = 128
"""Bytes of a chunk, so the shortest copy; any that are twice as long are found."""

MAX_MATCHED = 64 << 20
"""Bytes that are searched at most, on either side: memory and time stay bounded."""

_WINDOW = 1 << 20
_BASE = 0x9E3779B97F4A7C15

_Hashes = NDArray[np.uint64]


def _powers(base: int, count: int) -> _Hashes:
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _rolling(data: Bytes) -> _Hashes:
    """The hash of each CHUNK bytes of `data` [n], at every byte: [n - CHUNK + 1]."""
    terms = (data.astype(np.uint64) + np.uint64(1)) * _powers(_BASE, len(data))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)))
    return (sums[CHUNK:] - sums[:-CHUNK]) * _powers(pow(_BASE, -1, 1 << 64), len(data) - CHUNK + 1)


def _chunks(old: Bytes) -> tuple[_Hashes, NDArray[np.int64]]:
    """The hashes of the chunks of `old`, sorted, and where each stands; the first of equal ones first."""
    hashes = [_rolling(old[at : at + _WINDOW])[::CHUNK] for at in range(0, len(old), _WINDOW) if len(old) - at >= CHUNK]
    all_hashes = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    order = np.argsort(all_hashes, kind="stable")
    return all_hashes[order], order.astype(np.int64) * CHUNK


def find_copies(old: Bytes, new: Bytes) -> Iterator[tuple[int, int, int]]:
    """(place in `new`, place in `old`, bytes) of what `new` [n] has from `old` [m]: ascending, none overlapping."""
    hashes, places = _chunks(old)
    done = 0
    for at in range(0, len(new) if len(hashes) else 0, _WINDOW):
        window = new[at : at + _WINDOW + CHUNK - 1]
        if len(window) < CHUNK:
            return
        rolled = _rolling(window)
        index = np.minimum(np.searchsorted(hashes, rolled), len(hashes) - 1)
        hits = np.flatnonzero(hashes[index] == rolled)
        turn = int(np.searchsorted(hits, done - at))
        while turn < len(hits):
            here, there = at + int(hits[turn]), int(places[index[hits[turn]]])
            turn += 1
            if here < done or not np.array_equal(new[here : here + CHUNK], old[there : there + CHUNK]):
                continue
            back = _equal(new[done:here][::-1], old[:there][::-1])
            ahead = CHUNK + _equal(new[here + CHUNK :], old[there + CHUNK :])
            yield here - back, there - back, back + ahead
            done = here + ahead
            turn = int(np.searchsorted(hits, done - at))


def _equal(one: Bytes, other: Bytes) -> int:
    """How many bytes two runs begin alike."""
    count, step = min(len(one), len(other)), 256
    at = 0
    while at < count:
        stop = min(at + step, count)
        differ = one[at:stop] != other[at:stop]
        if differ.any():
            return at + int(differ.argmax())
        at, step = stop, min(2 * step, 1 << 20)
    return count
