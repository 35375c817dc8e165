"""Text to train on: documents from files or the Hub, tokens with a mask of what is to be learned, blocks of one length.

`qalora.training.sources` has which files there are, `qalora.training.rows` which rows, `qalora.training.chat` how a
conversation is written and what of it is learned.

Documents follow one another, each behind what the tokenizer puts in front of a text (BOS) and closed by the end token,
and are cut into blocks of equal length; what is left over at the end is dropped. A block that begins inside a document
begins with BOS too: a model that has always seen one is at a loss without it. A token is learned when it is predicted
from what stands before it in the data: the first of a block is not, nor is BOS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.converters.first_tokens import first_tokens
from qalora.errors import InputError
from qalora.formats.text import check_text
from qalora.training.chat import ChatTemplate
from qalora.training.documents import SHOWN, Account, Document, DocumentPreview
from qalora.training.loss import IGNORED
from qalora.training.rows import kind_of, plain_document, read_conversation
from qalora.training.sources import check_data, may_be_a_dataset, open_data

__all__ = [
    "READING",
    "Blocks",
    "Document",
    "check_data",
    "cut_tokens",
    "join_documents",
    "make_blocks",
    "may_be_a_dataset",
    "read_documents",
    "training_blocks",
]

READING = 3
"""The number of the way in which data become tokens: what was made of the same file in another way is not the same."""

LEAST = 1000
"""Tokens of which at least one is learned: with fewer, a training passes over its data and learns next to nothing."""

SHOWN_TOKENS = 200
"""Of the beginning and of the end of a run of tokens, in an account."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """tokens int64 [blocks, length]; targets int64 [blocks, length]: the next token, or IGNORED.

    account  of the data that they were cut from
    """

    tokens: Tensor
    targets: Tensor
    account: Account = field(default_factory=Account)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, index: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and targets of some blocks."""
        rows = torch.as_tensor(index)
        return self.tokens[rows], self.targets[rows]

    def split(self, held_out: float) -> tuple[Blocks, Blocks]:
        """(the blocks to train on, the last ones), at least one of each of two or more."""
        cut = max(1, len(self) - max(1, round(held_out * len(self))))
        return (
            Blocks(tokens=self.tokens[:cut], targets=self.targets[:cut], account=self.account),
            Blocks(tokens=self.tokens[cut:], targets=self.targets[cut:], account=self.account),
        )

    def digest(self) -> str:
        """SHA-256 of tokens and targets."""
        sha256 = hashlib.sha256(self.tokens.numpy().tobytes())
        sha256.update(self.targets.numpy().tobytes())
        return sha256.hexdigest()


def read_documents(data: str, tokenizer: Any, account: Account | None = None) -> Iterator[Document]:
    """Every document of a file or dataset; InputError names the line that is not as it should be.

    account  is told what the data was taken for, and what of it is left out
    """
    account = Account() if account is None else account
    source = open_data(data)
    account.source, account.form = data, source.form
    if source.note:
        account.note(source.note, data)
    if source.rows is None:
        check_text(source.text, data)
        yield Document(text=source.text, where=data)
        return
    chat = bool(getattr(tokenizer, "chat_template", None))
    template = ChatTemplate(tokenizer)
    for where, raw_row in source.rows:
        kind, row = kind_of(where, raw_row)
        account.rows[kind] += 1
        document = plain_document(where, kind, row, account, chat=chat)
        if document is not None:
            yield document
        else:
            template.check(where)
            yield from template.documents(read_conversation(where, kind, row, account), account)


def join_documents(
    documents: Iterable[Document], tokenizer: Any, account: Account | None = None
) -> tuple[list[int], list[bool]]:
    """(token ids of all documents, each behind the tokenizer's first tokens and closed by the end token, and whether
    each of them is learned).

    account  is told what is learned
    """
    tokens: list[int] = []
    learned: list[bool] = []
    first = first_tokens(tokenizer)
    for document in documents:
        ids, inside = _tokenized(document, tokenizer)
        if tuple(ids[: len(first)]) == first:  # the text has them itself, as chat templates write them
            inside[: len(first)] = [False] * len(first)
        else:
            ids, inside = [*first, *ids], [False] * len(first) + inside
        end = tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids, inside = [*ids, end], [*inside, document.closing and document.learns]
        tokens += ids
        learned += inside
        if account is not None and any(inside):
            _tell(account, document, ids, inside, tokenizer)
    return tokens, learned


def _tokenized(document: Document, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens of a text, and whether each has a character of a span."""
    encoding = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=document.spans is not None)
    ids: list[int] = list(encoding["input_ids"])
    if document.spans is None:
        return ids, [True] * len(ids)
    inside, last = [], 0
    for start, stop in encoding["offset_mapping"]:
        start = min(start, last)  # a tokenizer may leave white space out of a token's place, and all of it
        inside.append(any(a < stop and b > start for a, b in document.spans))
        last = max(last, stop)
    return ids, inside


def _tell(account: Account, document: Document, ids: list[int], inside: list[bool], tokenizer: Any) -> None:
    account.texts += document.spans is None
    account.turns += len(document.spans or ())
    if len(account.previews) >= SHOWN:
        return
    edges = [0, *(n for n in range(1, len(ids)) if inside[n] != inside[n - 1]), len(ids)]

    def text(run: list[int]) -> str:
        parts = [run] if len(run) <= 2 * SHOWN_TOKENS else [run[:SHOWN_TOKENS], run[-SHOWN_TOKENS:]]
        return " ... ".join(str(tokenizer.decode(part)) for part in parts)

    runs = tuple((inside[a], text(ids[a:b])) for a, b in pairwise(edges))
    account.previews.append(DocumentPreview(where=document.where, runs=runs))


def cut_tokens(tokens: Sequence[int], first: tuple[int, ...], length: int) -> list[tuple[int, int]]:
    """(where it begins among `tokens`, how many of `first` it begins with) for each block of `length` that is full.

    first  stands before every block, of which it is a part, unless the block begins with it anyway
    """
    if len(first) >= length:
        raise InputError(field="max_length", expected=f"more than {len(first)}, the first tokens", got=str(length))
    places, at = [], 0
    while at < len(tokens):
        lead = 0 if tuple(tokens[at : at + len(first)]) == first else len(first)
        if at + length - lead > len(tokens):
            break
        places.append((at, lead))
        at += length - lead
    return places


def make_blocks(documents: Iterable[Document], tokenizer: Any, length: int, account: Account | None = None) -> Blocks:
    """Tokenize, join and cut. InputError where it does not make two blocks, or nothing, or almost nothing, is to
    be learned.

    Documents of which nothing is learned are left out, and so are blocks. account: is told what is learned
    """
    account = Account() if account is None else account
    unused = 0

    def learnable() -> Iterator[Document]:
        nonlocal unused
        for document in documents:
            unused += not document.learns
            if document.learns:
                yield document

    tokens, learned = join_documents(learnable(), tokenizer, account)
    if unused and not any(learned):
        raise InputError(account.source or "data", expected="completions or assistant turns to learn", got="none")
    first = first_tokens(tokenizer)
    places = cut_tokens(tokens, first, length)
    if len(places) < 2:
        raise InputError(
            "data",
            expected=f"at least {2 * length} tokens, a block to train on and one to hold out",
            got=f"{len(tokens)}",
            todo="give more text, or a smaller `max_length`",
        )
    ids_of = torch.tensor([[*first[:lead], *tokens[at : at + length - lead]] for at, lead in places])
    # behind first tokens that are none of the data's own, the next is not predicted from what stands before it
    is_learned = torch.tensor(
        [[False] * (lead + bool(lead)) + learned[at + bool(lead) : at + length - lead] for at, lead in places]
    )
    targets = torch.full_like(ids_of, IGNORED)
    targets[:, :-1] = torch.where(is_learned[:, 1:], ids_of[:, 1:], IGNORED)
    counts = (targets != IGNORED).sum(1)
    account.sequences, account.length, account.learned = len(places), length, int(counts.sum())
    account.idle = int((counts == 0).sum())
    if not account.learned:
        raise InputError(account.source or "data", expected="completions or assistant turns to learn", got="none")
    if account.learned * LEAST < account.tokens:
        raise InputError(
            f"{account.source or 'data'}: tokens that are learned",
            expected=f"at least 1 in {LEAST:,}",
            got=f"{account.learned:,} of {account.tokens:,}",
            todo="leave out rows, or parts of them, that are only seen",
        )
    return Blocks(tokens=ids_of[counts > 0], targets=targets[counts > 0], account=account)


def training_blocks(model: Checkpoint, data: str, length: int, held_out: float) -> tuple[Blocks, Blocks]:
    """(what a model is trained on, what is held out) of a file or dataset.

    InputError for a model without tokenizer, blocks longer than its context, and where one of the two has nothing to
    learn, beside what `read_documents` and `make_blocks` raise.
    """
    from qalora.converters.tokenizer import load_tokenizer

    context = model.config.get("max_position_embeddings")
    if isinstance(context, int) and length > context:
        raise InputError(field="max_length", expected=f"at most {context}, the model's context", got=str(length))
    tokenizer, account = load_tokenizer(model), Account()
    training, evaluation = make_blocks(read_documents(data, tokenizer, account), tokenizer, length, account).split(
        held_out
    )
    for part, name in ((training, "the part to train on"), (evaluation, "the held-out part")):
        if not bool((part.targets != IGNORED).any()):
            raise InputError(f"{data}: {name}", expected="something to learn", got="nothing")
    return training, evaluation
