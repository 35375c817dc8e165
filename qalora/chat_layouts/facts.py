"""What a layout of a chat model says, and what several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CHATML", "SPACE", "Facts"]

SPACE = "\u2581"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A layout in terms of tokens' texts.

    family          config.json's model_type
    cut             how text is cut: a key of CUTS, or one of SentencePiece's ways, PIECES
    rule            tokenizer.json's pre_tokenizer, where it is published in other words than CUTS has
    first, last     special tokens before and after the words; those of `plain` are added tokens that are not special
    bos, eos, pad   the tokenizer's own; begins: it puts BOS before every text
    right, left     tokens that drop white space behind them, and before them
    kind, adds      tokenizer_config.json: tokenizer_class, and whether it says add_bos_token
    apart           the chat template is a file of its own
    config, generation   the tokens of config.json and generation_config.json, by key without "_token_id"; None: no
                    such file
    rows            the rows of the embedding are a multiple of this
    settings        other keys of config.json
    more            other keys of tokenizer_config.json: further tokens of the tokenizer, and what its class is told
    """

    family: str
    cut: str
    template: str
    rule: Mapping[str, Any] | None = None
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    begins: bool = False
    right: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    kind: str = "PreTrainedTokenizerFast"
    adds: bool = False
    apart: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None
    rows: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
