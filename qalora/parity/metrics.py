"""Metrics on logits: pure functions, all of them always computed; what is good enough is `qalora.parity.gates`' matter.

Logits are float32 [tokens, vocabulary]; `y` is what an artefact computed, `reference` what it should have. Everything
is first computed for each token, in tiles of rows and in float64, and then summarised, so that a long text needs no
more memory than a short one and a plot by token position needs no second pass.

    max, RMS       of |y - reference| over tokens x vocabulary
    NMSE           |y - reference|^2 / |reference|^2
    KL             sum_v p(v) (log p(v) - log q(v)), p = softmax(reference), q = softmax(y), in nats a token
    top-1          share of tokens at which both have the same largest logit
    top-5          mean share of the five largest logits that both have
    perplexity     exp of the mean of -log q(next token)
    lost           |y - adapted| / |adapted - base|, L2 over tokens x vocabulary; 0 = all of the adapter is
                   there, 1 = none
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qalora.errors import InputError

__all__ = ["LogitMetrics", "TokenMetrics", "concatenate", "lost", "squared_distance", "summarize", "token_metrics"]

TILE_LOGITS = 1 << 19
"""Logits that are compared at a time: 4 MiB in float64, about a core's cache; 32 MiB take three times as long."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenMetrics:
    """The metrics of each token, [tokens]: float64, `same_top1` bool.

    max, squared, norm   of y - reference: largest absolute value and sum of squares; sum of squares of the reference
    kl                   KL divergence in nats
    same_top1, top5      whether the largest logit is the same; share of the five largest that both have
    nll, reference_nll   -log probability of the next token, NaN where there is none
    width                [tokens], the size of the vocabulary
    """

    max: Tensor
    squared: Tensor
    norm: Tensor
    kl: Tensor
    same_top1: Tensor
    top5: Tensor
    nll: Tensor
    reference_nll: Tensor
    width: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitMetrics:
    """The metrics of the module's docstring, over all tokens; perplexities are NaN for a text of one token."""

    tokens: int
    max: float
    rms: float
    nmse: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    top5: float
    perplexity: float
    reference_perplexity: float


def token_metrics(y: Tensor, reference: Tensor, targets: Sequence[int]) -> TokenMetrics:
    """Compare logits [n, vocabulary]; `targets` are the tokens that follow, n or n - 1 of them.

    A NaN or Inf in `y` gives an infinite difference, so that no bound lets it pass. Raises InputError where the shapes
    differ.
    """
    if y.shape != reference.shape or y.ndim != 2:
        raise InputError("logits", expected=f"shape {list(reference.shape)}", got=f"{list(y.shape)}")
    following = torch.full((y.shape[0],), -1, dtype=torch.int64)
    following[: len(targets)] = torch.tensor(list(targets), dtype=torch.int64)[: y.shape[0]]
    return concatenate([_compare(y[rows], reference[rows], following[rows]) for rows in _row_tiles(y)])


def _compare(y: Tensor, reference: Tensor, targets: Tensor) -> TokenMetrics:
    finite = torch.isfinite(y).all(dim=1)
    a, b = torch.where(finite[:, None], y, 0.0).double(), reference.double()
    difference = (a - b).abs()
    log_q, log_p = torch.log_softmax(a, dim=1), torch.log_softmax(b, dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).clamp(min=0)
    largest = min(5, y.shape[1])
    top_a, top_b = a.topk(largest, dim=1).indices, b.topk(largest, dim=1).indices
    shared = (top_a[:, :, None] == top_b[:, None, :]).any(dim=2).double().mean(dim=1)
    return TokenMetrics(
        max=_or_inf(difference.amax(dim=1), finite),
        squared=_or_inf((difference * difference).sum(dim=1), finite),
        norm=(b * b).sum(dim=1),
        kl=_or_inf(kl, finite),
        same_top1=(a.argmax(dim=1) == b.argmax(dim=1)) & finite,
        top5=torch.where(finite, shared, 0.0),
        nll=_or_inf(_nll(log_q, targets), finite),
        reference_nll=_nll(log_p, targets),
        width=torch.full((y.shape[0],), float(y.shape[1]), dtype=torch.float64),
    )


def _or_inf(values: Tensor, finite: Tensor) -> Tensor:
    return torch.where(finite, values, math.inf)


def _nll(log_probability: Tensor, targets: Tensor) -> Tensor:
    target = log_probability.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets >= 0, -target, math.nan)


def concatenate(parts: Sequence[TokenMetrics]) -> TokenMetrics:
    """The tokens of all parts, one behind the other."""
    joined = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(TokenMetrics)}
    return TokenMetrics(**joined)


def summarize(tokens: TokenMetrics) -> LogitMetrics:
    """The metrics over all tokens."""
    squared = float(tokens.squared.sum())
    return LogitMetrics(
        tokens=tokens.max.numel(),
        max=float(tokens.max.max()),
        rms=math.sqrt(squared / float(tokens.width.sum())),
        nmse=squared / max(float(tokens.norm.sum()), math.ulp(0.0)),
        kl_mean=float(tokens.kl.mean()),
        kl_p99=_percentile(tokens.kl, 0.99),
        kl_max=float(tokens.kl.max()),
        top1=float(tokens.same_top1.double().mean()),
        top5=float(tokens.top5.mean()),
        perplexity=_perplexity(tokens.nll),
        reference_perplexity=_perplexity(tokens.reference_nll),
    )


def _percentile(values: Tensor, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    rank = max(1, math.ceil(share * values.numel()))
    return float(values.kthvalue(rank).values)


def _perplexity(nll: Tensor) -> float:
    known = nll[~nll.isnan()]
    if not known.numel():
        return math.nan
    mean = float(known.mean())
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) is beyond float64


def squared_distance(a: Tensor, b: Tensor) -> float:
    """Sum of (a - b)^2 over logits [tokens, vocabulary], in float64, infinite where one of them is not finite."""
    total = 0.0
    for rows in _row_tiles(a):
        difference = a[rows].double() - b[rows].double()
        total += float((difference * difference).sum())
    return total if math.isfinite(total) else math.inf


def lost(from_adapted: float, effect: float) -> float:
    """|y - adapted| / |adapted - base|, from the two sums of squares; infinite where the adapter does nothing."""
    if effect == 0:
        return 0.0 if from_adapted == 0 else math.inf
    return math.sqrt(from_adapted / effect)


def _row_tiles(logits: Tensor) -> Iterator[slice]:
    step = max(1, TILE_LOGITS // max(1, logits.shape[1]))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))
