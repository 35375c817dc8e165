"""The text that layers' inputs are computed on, and whole models quantized on a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qalora.calibration.quantizing import quantize_calibrated
from qalora.calibration.widths import WIDTHS, choose_widths
from qalora.checkpoint import Checkpoint
from qalora.converters.first_tokens import first_tokens
from qalora.devices import CPU
from qalora.engines import Engine
from qalora.errors import InputError, about
from qalora.quantization.model import plan_specs
from qalora.quantization.options import QuantizeOptions
from qalora.training.data import cut_tokens, join_documents, read_documents
from qalora.training.documents import Account

__all__ = ["LENGTH", "TOKENS", "Calibration", "calibration_windows", "quantize_on_text"]

TOKENS, LENGTH = 8192, 256
"""Tokens of a calibration, and of each of its windows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """data: a text or JSONL file, or a dataset of the Hub; tokens of it, in windows of `length`."""

    data: str
    tokens: int = TOKENS
    length: int = LENGTH


def calibration_windows(model: Checkpoint, text: Calibration, account: Account | None = None) -> Tensor:
    """int64 [windows, length]: token ids, `tokens` of them or as many as there are, spread over the whole text.

    Each window begins with what the tokenizer puts in front of a text (BOS). What a row marks as not to be learned is
    seen as well. account: is told what the data was taken for. InputError for data that makes no window or is not as
    `qalora.training.data` says, for a model without tokenizer, and for windows that are longer than its context.
    """
    from qalora.converters.tokenizer import load_tokenizer

    context = model.config.get("max_position_embeddings")
    if isinstance(context, int) and text.length > context:
        expected = f"at most {context}, the model's context"
        raise InputError(field="calibration_length", expected=expected, got=str(text.length))
    tokenizer = load_tokenizer(model)
    first = first_tokens(tokenizer)
    with about("calibration"):
        ids, _ = join_documents(read_documents(text.data, tokenizer, account), tokenizer)
    places = cut_tokens(ids, first, text.length)
    if not places:
        raise InputError(
            f"`calibration` {text.data}",
            field="calibration",
            expected=f"at least {text.length} tokens, a window",
            got=f"{len(ids)}",
            todo="give more text, or a smaller `calibration_length`",
        )
    count = min(len(places), max(1, text.tokens // text.length))
    spread = [places[n * len(places) // count] for n in range(count)]
    return torch.tensor([[*first[:lead], *ids[at : at + text.length - lead]] for at, lead in spread])


def quantize_on_text(
    model: Checkpoint,
    text: Calibration,
    options: QuantizeOptions,
    *,
    budget: float | None = None,
    widths: Sequence[int] = WIDTHS,
    requantize: bool = False,
    keep: Path | None = None,
    device: torch.device = CPU,
    tick: Callable[[], None] = lambda: None,
    engine: Engine | None = None,
) -> Checkpoint:
    """The model with its linear weights quantized on the inputs that its layers see on a text.

    budget  None for options.bits everywhere; else bits per weight at most, the width of each layer one of `widths`
    keep    as in `quantize_calibrated`
    device  where the layers are computed and quantized, one at a time
    tick    called after each decoder layer, of both rounds where widths are chosen
    engine  as in `quantize_calibrated`

    The widths are chosen here and now; the rest is done when the first weight is read: see `quantize_calibrated`.
    """
    plan_specs(model, dict.fromkeys(model.linears, options), requantize=requantize)
    account = Account()
    windows = calibration_windows(model, text, account)
    notes = (*model.notes, *account.note_lines())
    if budget is None:
        return replace(
            quantize_calibrated(
                model, windows, options, requantize=requantize, keep=keep, device=device, tick=tick, engine=engine
            ),
            notes=notes,
        )
    choice = choose_widths(model, windows, options, budget, widths=widths, device=device, tick=tick)
    counts = sorted(Counter(each.bits for each in choice.options.values()).items())
    layer_counts = ", ".join(f"{count} layers of {bits} bits" for bits, count in counts)
    quantized = quantize_calibrated(
        model, windows, choice.options, requantize=requantize, keep=keep, device=device, tick=tick, engine=engine
    )
    return replace(quantized, notes=(*notes, f"{layer_counts}: {choice.bits_per_weight:.4g} bits per weight"))
