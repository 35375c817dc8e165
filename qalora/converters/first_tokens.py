"""What a tokenizer puts in front of every text: BOS for Llama 3, Gemma and Mistral, nothing for Qwen and SmolLM."""

from __future__ import annotations

from typing import Any

__all__ = ["first_tokens"]

PROBE = "a"


def first_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Token ids that stand before those of a text where the tokenizer is asked for special tokens, as runtimes ask it.

    tokenizer  transformers' class. A model that saw BOS before every text it learned from is at a loss without it:
               Gemma's perplexity is 10^9 times as high.
    """
    alone = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(PROBE)["input_ids"])
    for at in range(len(whole) - len(alone) + 1):
        if alone and whole[at : at + len(alone)] == alone:
            return tuple(whole[:at])
    return ()
