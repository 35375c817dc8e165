"""Metrics against slow loops in plain Python."""

import math

import pytest
import torch

from qalora.errors import InputError
from qalora.parity import metrics
from qalora.parity.metrics import concatenate, lost, squared_distance, summarize, token_metrics


def softmax(row: list[float]) -> list[float]:
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / sum(powers) for power in powers]


def by_hand(y: list[list[float]], reference: list[list[float]], targets: list[int]) -> dict[str, float]:
    differences = [abs(a - b) for row, other in zip(y, reference, strict=True) for a, b in zip(row, other, strict=True)]
    divergences, same, shared, nll, reference_nll = [], [], [], [], []
    for n, (row, other) in enumerate(zip(y, reference, strict=True)):
        q, p = softmax(row), softmax(other)
        divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        order_y = sorted(range(len(row)), key=lambda v: -row[v])
        order_r = sorted(range(len(row)), key=lambda v: -other[v])
        same.append(order_y[0] == order_r[0])
        shared.append(len(set(order_y[:5]) & set(order_r[:5])) / 5)
        if n < len(targets):
            nll.append(-math.log(q[targets[n]]))
            reference_nll.append(-math.log(p[targets[n]]))
    squares = sum(d * d for d in differences)
    return {
        "tokens": len(y),
        "max": max(differences),
        "rms": math.sqrt(squares / len(differences)),
        "nmse": squares / sum(value * value for row in reference for value in row),
        "kl_mean": sum(divergences) / len(divergences),
        "kl_p99": sorted(divergences)[math.ceil(0.99 * len(divergences)) - 1],
        "kl_max": max(divergences),
        "top1": sum(same) / len(same),
        "top5": sum(shared) / len(shared),
        "perplexity": math.exp(sum(nll) / len(nll)),
        "reference_perplexity": math.exp(sum(reference_nll) / len(reference_nll)),
    }


@pytest.mark.parametrize("tile", [1, 37 * 3, 1 << 22])
@pytest.mark.parametrize("size", [0.01, 1.0])
def test_all_metrics_are_those_of_a_slow_loop(monkeypatch: pytest.MonkeyPatch, tile: int, size: float) -> None:
    monkeypatch.setattr(metrics, "TILE_LOGITS", tile)
    rng = torch.Generator().manual_seed(3)
    reference = 3 * torch.randn(11, 37, generator=rng)
    y = reference + size * torch.randn(11, 37, generator=rng)
    targets = torch.randint(0, 37, (10,), generator=rng).tolist()
    found = summarize(token_metrics(y, reference, targets))
    for name, expected in by_hand(y.tolist(), reference.tolist(), targets).items():
        # float64 sums of 407 terms in another order: 5e-14; KL near 1e-5 is made of terms that cancel
        assert getattr(found, name) == pytest.approx(expected, rel=1e-9, abs=1e-12), name


def test_equal_logits_differ_in_nothing() -> None:
    logits = torch.randn(4, 9)
    found = summarize(token_metrics(logits, logits, [1, 2, 3]))
    assert (found.max, found.rms, found.nmse, found.kl_max) == (0.0, 0.0, 0.0, 0.0)
    assert (found.top1, found.top5) == (1.0, 1.0)
    assert found.perplexity == found.reference_perplexity


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_far(value: float) -> None:
    reference = torch.randn(4, 9)
    y = reference.clone()
    y[2, 5] = value
    found = summarize(token_metrics(y, reference, [1, 2, 3]))
    assert found.max == found.rms == found.nmse == found.kl_max == math.inf
    assert found.top1 == 0.75


def test_windows_join_to_the_whole() -> None:
    reference, y = torch.randn(7, 9), torch.randn(7, 9)
    whole = summarize(token_metrics(y, reference, [1] * 7))
    parts = [token_metrics(y[rows], reference[rows], [1] * 7) for rows in (slice(0, 3), slice(3, 7))]
    assert summarize(concatenate(parts)) == whole


def test_a_single_token_has_no_perplexity() -> None:
    logits = torch.randn(1, 9)
    assert math.isnan(summarize(token_metrics(logits, logits, [])).perplexity)


def test_a_small_vocabulary_is_all_top_five() -> None:
    assert summarize(token_metrics(torch.randn(3, 4), torch.randn(3, 4), [])).top5 == 1.0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"logits: expected shape \[3, 9\], got \[3, 8\]"):
        token_metrics(torch.randn(3, 8), torch.randn(3, 9), [])


def test_lost_is_0_with_all_of_the_adapter_and_1_without() -> None:
    base, adapted = torch.randn(5, 9), torch.randn(5, 9)
    effect = squared_distance(adapted, base)
    assert lost(squared_distance(adapted, adapted), effect) == 0.0
    assert lost(squared_distance(base, adapted), effect) == 1.0
    half = (base + adapted) / 2
    assert lost(squared_distance(half, adapted), effect) == pytest.approx(0.5, rel=1e-6)  # the mean is float32: 2^-24
    assert lost(0.0, 0.0) == 0.0
    assert lost(1.0, 0.0) == math.inf
