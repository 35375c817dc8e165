"""Widths under a budget, against every choice there is."""

import itertools
import random

import pytest

from qalora.errors import InputError
from qalora.quantization import allocation
from qalora.quantization.allocation import allocate


def case(seed: int) -> tuple[dict[str, dict[int, int]], dict[str, dict[int, float]]]:
    """Five layers, three widths, sizes with a common divisor, errors that fall but not evenly."""
    rng = random.Random(seed)
    sizes, errors = {}, {}
    for n in range(5):
        count = 64 * rng.randint(1, 9)
        sizes[f"l{n}"] = {bits: count * bits + count // 2 for bits in (2, 3, 4)}
        falling = sorted((rng.random() for _ in range(3)), reverse=True)
        errors[f"l{n}"] = dict(zip((2, 3, 4), falling, strict=True))
    return sizes, errors


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.83, 1.0, 3.0])
def test_it_is_the_best_that_fits(seed: int, share: float) -> None:
    sizes, errors = case(seed)
    least, most = (sum(pick(found.values()) for found in sizes.values()) for pick in (min, max))
    budget = int(least + share * (most - least))
    found = allocate(sizes, errors, budget)
    assert sum(sizes[name][bits] for name, bits in found.items()) <= budget
    best = min(
        sum(errors[name][bits] for name, bits in zip(sizes, chosen, strict=True))
        for chosen in itertools.product((2, 3, 4), repeat=5)
        if sum(sizes[name][bits] for name, bits in zip(sizes, chosen, strict=True)) <= budget
    )
    assert sum(errors[name][bits] for name, bits in found.items()) == pytest.approx(best, rel=1e-12)


def test_coarse_units_keep_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, errors = case(1)
    monkeypatch.setattr(allocation, "MOST_UNITS", 10)
    budget = sum(found[3] for found in sizes.values())
    found = allocate(sizes, errors, budget)
    assert sum(sizes[name][bits] for name, bits in found.items()) <= budget
    left = budget - sum(sizes[name][bits] for name, bits in found.items())
    steps = [
        sizes[name][bits] - sizes[name][now]
        for name, now in found.items()
        for bits in (3, 4)
        if bits > now and errors[name][bits] < errors[name][now]
    ]
    assert 0 <= left < min(steps), "nothing that would help fits into what is left"


def test_a_budget_for_everything_is_used_whatever_the_units(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, errors = case(1)
    monkeypatch.setattr(allocation, "MOST_UNITS", 10)
    budget = sum(found[4] for found in sizes.values())
    assert set(allocate(sizes, errors, budget).values()) == {4}


def test_too_small_a_budget_is_refused() -> None:
    sizes, errors = case(2)
    with pytest.raises(InputError, match="the budget: expected"):
        allocate(sizes, errors, sum(found[2] for found in sizes.values()) - 1)
