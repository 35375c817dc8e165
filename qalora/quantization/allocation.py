"""A width for each layer under one budget: the least sum of errors that fits, found by dynamic programming.

best[n][s] is the least sum of errors of the first n layers in s units of size; a layer of each width is tried on every
size. A unit is the greatest common divisor of all sizes, so that the result is the optimum; where that would make more
than MOST_UNITS units, a unit is larger and sizes are rounded up: the budget still holds, and what the rounding left of
it is spent on the wider widths that lower the error most for their size, as long as one fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from qalora.errors import InputError

__all__ = ["allocate"]

MOST_UNITS = 1 << 14


def allocate(
    sizes: Mapping[str, Mapping[int, int]], errors: Mapping[str, Mapping[int, float]], budget: int
) -> dict[str, int]:
    """The width of each layer.

    sizes   for each layer, its size at each width that it may have, in bits
    errors  for each layer, its error at the same widths
    budget  the sizes' sum at most; InputError where the smallest sizes are larger than that
    """
    favourite = {name: min(by_width, key=by_width.__getitem__) for name, by_width in errors.items()}
    if sum(sizes[name][bits] for name, bits in favourite.items()) <= budget:
        return favourite
    least = {name: min(size.values()) for name, size in sizes.items()}
    spare = budget - sum(least.values())
    if spare < 0:
        raise InputError("the budget", expected=f"{sum(least.values()):,} bits or more", got=f"{budget:,}")
    more = {name: {bits: size - least[name] for bits, size in by_width.items()} for name, by_width in sizes.items()}
    unit = max(
        1, math.gcd(*(size for by_width in more.values() for size in by_width.values())), -(-spare // MOST_UNITS)
    )
    units = spare // unit
    best, choices = np.zeros(units + 1), []
    for name, larger in more.items():
        widths = sorted(larger)
        tried = np.full((len(widths), units + 1), np.inf)
        for n, bits in enumerate(widths):
            cost = -(-larger[bits] // unit)
            if cost <= units:
                tried[n, cost:] = best[: units + 1 - cost] + errors[name][bits]
        choice = tried.argmin(axis=0)
        choices.append((name, widths, choice))
        best = tried[choice, np.arange(units + 1)]
    at, widths_of = units, {}
    for name, widths, choice in reversed(choices):
        bits = widths[choice[at]]
        widths_of[name] = bits
        at -= -(-more[name][bits] // unit)
    chosen_widths = {name: widths_of[name] for name in sizes}
    _spend(chosen_widths, sizes, errors, budget - sum(sizes[name][bits] for name, bits in chosen_widths.items()))
    return chosen_widths


def _spend(
    widths: dict[str, int],
    sizes: Mapping[str, Mapping[int, int]],
    errors: Mapping[str, Mapping[int, float]],
    left: int,
) -> None:
    """Raise widths while one that lowers the error fits into what is left, the one that lowers it most for its size."""
    while True:
        steps = [
            ((errors[name][now] - errors[name][bits]) / (sizes[name][bits] - sizes[name][now]), name, bits)
            for name, now in widths.items()
            for bits in sizes[name]
            if 0 < sizes[name][bits] - sizes[name][now] <= left and errors[name][bits] < errors[name][now]
        ]
        if not steps:
            return
        _, name, bits = max(steps)
        left -= sizes[name][bits] - sizes[name][widths[name]]
        widths[name] = bits
