"""Greedy generation, for runtimes that give logits and keep a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["greedy"]


def greedy(step: Callable[[list[int], int], Tensor], prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The tokens of the largest logits, one step after another.

    step  given new tokens and how many came before them, logits [tokens, vocabulary], or of the last of them at least
    """
    tokens: list[int] = []
    ids, before = list(prompt), 0
    while len(tokens) < max_tokens:
        tokens.append(int(step(ids, before)[-1].argmax()))
        before += len(ids)
        ids = tokens[-1:]
    return tokens
