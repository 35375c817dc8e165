"""Tensors of the base that an adapter brings whole, or some rows of: PEFT's modules_to_save, trained tokens, biases.

    modules_to_save           a copy of the module is trained: its tensors take the base's place. Where the output layer
                              is the embedding, a copy of one leaves the other as it was, so that the two part, unless
                              ensure_weight_tying is set
    trainable_token_indices   rows of an embedding, which take those of the base; an output layer that is the embedding
                              follows
    save_embedding_layers     embedding and output layer of a model with another vocabulary; tied ones stay tied
    bias "all", "lora_only"   the base's biases

Where the embedding has another number of rows, that is the vocabulary's size, and the tokenizer is the one that lies in
the adapter's folder. What the base holds in integers is not replaced: that is refused by name.

Source: PEFT 0.21.2, utils/other.py: ModulesToSaveWrapper, set_additional_trainable_modules; utils/save_and_load.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.adapter.records import Adapter
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.errors import AdapterError
from qalora.tensor import GroupQuantTensor

__all__ = ["TOKENIZER", "Rows", "SavedTensors", "carry", "check_plain"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer; where an adapter brings one, it is taken whole, and none of the base's."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Some rows of a tensor: their numbers, each once, and their values [rows, columns]."""

    indices: tuple[int, ...]
    values: LazyTensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedTensors:
    """What an adapter brings beside A and B.

    whole    tensors that take the place of the base's, by transformers' names
    rows     rows that do
    copies   of `whole`: those that PEFT trains as copies, which part a tied embedding from its output layer
    files    of the tokenizer, in the adapter's folder
    config   the keys of adapter_config.json that say so, as they are
    """

    whole: Mapping[str, LazyTensor]
    rows: Mapping[str, Rows] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    files: Mapping[str, Path] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that is changed."""
        return (*self.whole, *self.rows)


def carry(model: Checkpoint, adapter: Adapter | None) -> Checkpoint:
    """The model with the tensors that an adapter brings in their places; its A and B are not folded here.

    AdapterError for a tensor that the model does not have, has in another shape or in integers, for rows that it does
    not have, and for a vocabulary of another size that embedding, output layer and tokenizer do not agree on.
    """
    saved = None if adapter is None else adapter.saved
    if saved is None or not saved.names:
        return model
    tensors = dict(model.tensors)
    for name in (EMBEDDING, HEAD):  # of a tied model each by itself, until it is known whether they stay one
        tensors.setdefault(name, tensors[EMBEDDING])
    for name in saved.names:
        _check_place(model, name, whole=name in saved.whole)
    tensors |= {name: replace(lazy, name=name) for name, lazy in saved.whole.items()}
    tensors |= {name: _with_rows(replace(tensors[name], name=name), rows) for name, rows in saved.rows.items()}
    tied = model.tied and _stays_tied(saved)
    _check_shapes(model, tensors, saved, tied=tied)
    if tied:
        source = next((name for name in (EMBEDDING, HEAD) if name in saved.names), EMBEDDING)
        tensors[EMBEDDING] = replace(tensors[source], name=EMBEDDING)
        del tensors[HEAD]
    elif model.tied:
        tensors[HEAD] = replace(tensors[HEAD], name=HEAD)
    carried = replace(model, tensors=tensors)
    if model.tied and not tied:
        carried = replace(carried, config={**carried.config, "tie_word_embeddings": False})
    return _with_vocabulary(model, carried, saved)


def check_plain(adapter: Adapter, what: str) -> None:
    """AdapterError for an adapter that brings tensors of the base, where `what` has a place for A and B alone."""
    if adapter.saved is not None and adapter.saved.names:
        raise AdapterError(
            f"{what} holds A and B alone, and this adapter brings {', '.join(adapter.saved.names[:3])} too",
            todo="export it with its base: qalora export BASE --adapter ADAPTER",
        )


def _check_place(model: Checkpoint, name: str, *, whole: bool) -> None:
    there = model.tensors.get(EMBEDDING if name == HEAD and model.tied else name)
    if there is None:
        raise AdapterError(
            f"the adapter has {name}, and {model.path} does not", todo="the adapter belongs to a different model"
        )
    new = whole and name == HEAD and model.tied  # which takes the place of nothing
    if there.spec is not None and not new:
        raise AdapterError(
            f"the adapter brings {name} in floats, and {model.path} holds it in {there.spec.bits}-bit integers, which "
            "floats do not replace here",
            todo="use a base whose embedding and output layer are floats, as qalora quantize writes it",
        )


def _check_shapes(model: Checkpoint, tensors: Mapping[str, LazyTensor], saved: SavedTensors, *, tied: bool) -> None:
    """Shapes as the base has them, but for the vocabulary, which embedding and output layer share."""
    for name in saved.whole:
        was = model.tensors.get(name, model.tensors[EMBEDDING]).shape
        got = tensors[name].shape
        free = 1 if name in (EMBEDDING, HEAD) else 0
        if got[free:] != was[free:] or len(got) != len(was):
            raise AdapterError(f"the adapter's {name}", expected=f"shape {list(was)}", got=str(list(got)))
    if tensors[EMBEDDING].shape[0] != tensors[HEAD].shape[0] and not tied:
        raise AdapterError(
            f"the adapter's {EMBEDDING} and {HEAD}",
            expected="one vocabulary",
            got=f"{tensors[EMBEDDING].shape[0]} and {tensors[HEAD].shape[0]} rows",
            todo="save both with the adapter: modules_to_save, or save_embedding_layers=True",
        )


def _with_rows(lazy: LazyTensor, rows: Rows) -> LazyTensor:
    """The tensor with rows in their places, in the wider dtype of the two."""
    values = rows.values
    if len(lazy.shape) != 2 or values.shape != (len(rows.indices), lazy.shape[1]):
        expected = f"{len(rows.indices)} rows of {list(lazy.shape[1:])}"
        raise AdapterError(f"the adapter's rows of {lazy.name}", expected=expected, got=str(list(values.shape)))
    if min(rows.indices) < 0 or max(rows.indices) >= lazy.shape[0]:
        raise AdapterError(
            f"the adapter's rows of {lazy.name}",
            expected=f"numbers in 0..{lazy.shape[0] - 1}",
            got=f"{min(rows.indices)}..{max(rows.indices)}",
            todo="give the base that the tokens were added to",
        )
    if lazy.dtype is None or values.dtype is None:
        raise TypeError(f"{lazy.name}: expected floats")
    dtype, place = torch.promote_types(lazy.dtype, values.dtype), torch.tensor(rows.indices)

    def read(start: int, stop: int) -> Tensor:
        start, stop, _ = slice(start, stop).indices(lazy.shape[0])
        base = lazy.read(start, stop)
        if isinstance(base, GroupQuantTensor):
            raise TypeError(f"{lazy.name}: expected floats")
        here = (place >= start) & (place < stop)
        rows = base.to(dtype)
        rows[place[here] - start] = values.load_float().to(dtype)[here]
        return rows

    return replace(lazy, dtype=dtype, read=read)


def _stays_tied(saved: SavedTensors) -> bool:
    """Whether the output layer of a tied model is its embedding still."""
    if EMBEDDING in saved.rows and HEAD in saved.rows:
        return saved.rows[EMBEDDING].indices == saved.rows[HEAD].indices and _same(
            saved.rows[EMBEDDING].values, saved.rows[HEAD].values
        )
    if HEAD in saved.rows:
        return False
    if saved.config.get("ensure_weight_tying"):
        return True
    if EMBEDDING in saved.whole and HEAD in saved.whole:
        return _same(saved.whole[EMBEDDING], saved.whole[HEAD])
    return not ({EMBEDDING, HEAD} & saved.copies)


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two float tensors hold the same values."""
    if one.shape != other.shape:
        return False
    for start, tile in one.float_tiles():
        if not torch.equal(tile.float(), _floats(other, start, start + tile.shape[0])):
            return False
    return True


def _floats(lazy: LazyTensor, start: int, stop: int) -> Tensor:
    rows = lazy.rows(start, stop)
    return rows.dequantize() if isinstance(rows, GroupQuantTensor) else rows.float()


def _with_vocabulary(model: Checkpoint, carried: Checkpoint, saved: SavedTensors) -> Checkpoint:
    """The size of the vocabulary, and the tokenizer that goes with it."""
    before, after = (one.tensors[EMBEDDING].shape[0] for one in (model, carried))
    trained = {EMBEDDING, HEAD} & set(saved.names)
    if trained and saved.files:
        files = {name: path for name, path in carried.files.items() if not _of_a_tokenizer(name)}
        note = "the tokenizer is the adapter's, which brings embeddings of its own"
        notes = (*carried.notes, note)
        carried = replace(carried, files={**files, **saved.files}, gguf=None, notes=notes)
    elif (after > before and any(map(_of_a_tokenizer, model.files))) or (after != before and model.gguf is not None):
        raise AdapterError(
            f"the adapter's {EMBEDDING} has {after} rows and the base's has {before}, so the tokens differ",
            expected="the new tokenizer in the adapter's folder",
            got="no tokenizer there",
            todo="save it there: tokenizer.save_pretrained(ADAPTER)",
        )
    return carried if after == before else replace(carried, config={**carried.config, "vocab_size": after})


def _of_a_tokenizer(name: str) -> bool:
    return name in TOKENIZER or name.startswith("additional_chat_templates/")
