"""What a tokenizer puts around every text: BOS before it for Llama 3, Gemma, Mistral, nothing for Qwen and SmolLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["PROBE", "around", "first_tokens", "tokens_around"]

PROBE = "a"


def first_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Token ids that stand before those of a text where the tokenizer is asked for special tokens, as runtimes ask it.

    tokenizer  transformers' class. A model that saw BOS before every text it learned from is at a loss without it:
               Gemma's perplexity is 10^9 times as high.
    """
    return tokens_around(tokenizer)[0]


def tokens_around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those that stand before a text's own, and behind them."""
    return around(tokenizer(PROBE, add_special_tokens=False)["input_ids"], tokenizer(PROBE)["input_ids"])


def around(bare: Sequence[int], whole: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands in `whole` before the ids of `bare`, and behind them; nothing where they are not in it."""
    alone, ids = tuple(bare), tuple(whole)
    for at in range(len(ids) - len(alone) + 1):
        if alone and ids[at : at + len(alone)] == alone:
            return ids[:at], ids[at + len(alone) :]
    return (), ()
