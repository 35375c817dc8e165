"""A folder of `compare_training.py`'s cells: what they share, and how each is measured.

Perplexity is always of the same held-out windows, in float32, as training is: it is what all processors multiply
alike. The rate, and the strength, a factor of what was learned, are chosen on validation windows, which are others.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from comparison_plan import Cell, Done, parse
from torch import Tensor, nn

from qalora.adapter import Adapter, read_adapter
from qalora.calibration import Calibration, calibration_windows
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.first_tokens import first_tokens
from qalora.converters.tokenizer import load_tokenizer
from qalora.converters.torch_module import build
from qalora.demo import smollm2_file
from qalora.errors import InputError
from qalora.training.data import Blocks, make_blocks, read_documents
from qalora.training.strength import best_of, try_strengths

TRAIN, WINDOWS, PROTOCOL = "train.txt", "windows.json", "protocol.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What all cells of a folder share; it stands in protocol.json, and other runs are refused there.

    model, text    files, or empty for SmolLM2-135M-Instruct and the language reference
    steps          of batch * length tokens: one pass over that much of the text's head
    held_out       tokens of what follows, in windows of `length`, spread over all of it
    validation     as many more, between those, to choose rates and strengths by
    calibration    tokens of what is trained on, in windows of `window`
    rank           of QA-LoRA; peer_rank of LoRA
    """

    model: str = ""
    text: str = ""
    steps: int = 61
    batch: int = 4
    length: int = 128
    held_out: int = 8192
    validation: int = 4096
    calibration: int = 4096
    window: int = 256
    group: int = 32
    rank: int = 15
    peer_rank: int = 8


def prepare(work: Path, protocol: Protocol) -> None:
    """Write protocol, the text to train on and the windows, once. InputError for a folder, or a cell in it, of another
    protocol or text.
    """
    stored = work / PROTOCOL
    if not stored.exists():
        cut(work, protocol)
    elif json.loads(stored.read_text("utf-8")) != asdict(protocol):
        raise InputError(f"{work}", expected="cells of the same protocol", got="another", todo="use another --work")
    shared = Work(work).shared
    for path in filter(lambda path: parse(path.stem), sorted(work.glob("*.json"))):
        cell = json.loads(path.read_text("utf-8"))
        if any(cell.get(name) != value for name, value in shared.items()):
            raise InputError(
                f"{path}", expected="a cell of the same protocol and text", got="another's", todo="use another --work"
            )


def cut(work: Path, protocol: Protocol) -> None:
    """Cut the text into what is trained on and windows, which begin with the tokenizer's first tokens, as blocks do."""
    work.mkdir(parents=True, exist_ok=True)
    text = Path(protocol.text).read_text("utf-8") if protocol.text else shuffled_topics()
    tokenizer = load_tokenizer(load(protocol.model or smollm2_file()))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places, first = found["input_ids"], found["offset_mapping"], first_tokens(tokenizer)
    own = protocol.length - len(first)  # tokens of the text in a block
    # a block more than is trained on, for the held-out part that `train` wants, and half of one that is dropped
    head = (protocol.steps * protocol.batch + 1) * own + protocol.length // 2
    rest = [[*first, *ids[at : at + own]] for at in range(head, len(ids) - own + 1, own)]
    wanted = (protocol.held_out + protocol.validation) // protocol.length
    if len(rest) < wanted:
        expected = f"{head + protocol.held_out + protocol.validation} tokens"
        raise InputError("text", expected=expected, got=f"{len(ids)}")
    (work / TRAIN).write_text(text[: places[head][0]], encoding="utf-8")
    spread = [rest[k * len(rest) // wanted] for k in range(wanted)]
    held, between = shared_out(spread, protocol.validation // protocol.length)
    write_whole(work / WINDOWS, {"held_out": held, "validation": between})
    write_whole(work / PROTOCOL, asdict(protocol))


def shared_out(windows: list[list[int]], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """(the others, `count` windows spread over all)."""
    chosen = {(2 * k + 1) * len(windows) // (2 * count) for k in range(count)}
    return [w for n, w in enumerate(windows) if n not in chosen], [w for n, w in enumerate(windows) if n in chosen]


def shuffled_topics() -> str:
    """The language reference with its topics in an order of chance: in their own, which is the alphabet's, what is held
    out would be of other subjects than what is trained on.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(0).shuffle(names)
    return "\n\n".join(topics[name] for name in names)


def write_whole(path: Path, content: object) -> None:
    """Write JSON so that the file is there as a whole or not at all."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


class Work:
    """A folder of cells, opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.protocol = Protocol(**json.loads((folder / PROTOCOL).read_text("utf-8")))
        windows = json.loads((folder / WINDOWS).read_text("utf-8"))
        self.held, self.validation = (torch.tensor(windows[name]) for name in ("held_out", "validation"))

    @property
    def shared(self) -> dict[str, Any]:
        """What stands in every cell: the protocol, and a digest of the text, which differs between Pythons."""
        found = hashlib.sha256((self.folder / TRAIN).read_bytes() + (self.folder / WINDOWS).read_bytes())
        return {"protocol": asdict(self.protocol), "text_sha256": found.hexdigest()}

    def float_model(self) -> Checkpoint:
        """The model before anything."""
        return load(self.protocol.model or smollm2_file())

    def base(self, cell: Cell) -> Checkpoint:
        """The integers that a cell trains on."""
        return load(self.folder / "bases" / cell.base)

    def calibration(self, model: Checkpoint) -> Tensor:
        """int64 [windows, tokens] of the text that is trained on."""
        chosen, text = self.protocol, str(self.folder / TRAIN)
        return calibration_windows(model, Calibration(data=text, tokens=chosen.calibration, length=chosen.window))

    def blocks(self, model: Checkpoint) -> Blocks:
        """What is trained on, as `train` cuts it."""
        tokenizer = load_tokenizer(model)
        documents = read_documents(str(self.folder / TRAIN), tokenizer)
        return make_blocks(documents, tokenizer, self.protocol.length).split(self.share)[0]

    @property
    def share(self) -> float:
        """The share of the text that makes one block held out."""
        return 0.5 / (self.protocol.steps * self.protocol.batch + 1)

    def adapter(self, name: str) -> Path:
        """Where a cell's adapter lies."""
        return self.folder / "adapters" / name

    def perplexity(self, model: Any, windows: Tensor | None = None) -> float | None:
        """exp of the mean loss over every token but the first of each window, of a module or a Checkpoint; held-out
        windows are what is measured.
        """
        module = build(model) if isinstance(model, Checkpoint) else model
        chosen = self.held if windows is None else windows
        return perplexity_of(lambda rows: module(input_ids=rows, use_cache=False).logits, chosen)

    def at_its_strength(self, model: Callable[[float], Any]) -> dict[str, Any]:
        """What is stored of a training, given the model at each strength: the strength that validation prefers, and
        held-out perplexity with it, and at full strength.
        """

        def at(strength: float) -> float:
            found = self.perplexity(model(strength), self.validation)
            return math.inf if found is None else found

        tried = try_strengths(at(1.0), at)
        best, validation = best_of(tried)
        if not math.isfinite(validation):
            return {"perplexity": None, "failed": "the loss is no number"}
        full = self.perplexity(model(1.0))
        return {
            "perplexity": full if best == 1 else self.perplexity(model(best)),
            "full": full,
            "strength": best,
            "validation": validation,
            "strengths": {f"{strength:g}": value for strength, value in tried if math.isfinite(value)},
        }

    def strengthened(self, name: str, base: Checkpoint, done: Done) -> Adapter:
        """A trained cell's adapter at its strength."""
        return scaled(read_adapter(self.adapter(name), base), done[name]["strength"])


@torch.no_grad()
def perplexity_of(logits: Callable[[Tensor], Tensor], windows: Tensor, batch: int = 4) -> float | None:
    """exp of the mean loss; logits gives float32 [batch, tokens, vocabulary]. None where that is no number."""
    total = 0.0
    for rows in torch.split(windows, batch):
        found = logits(rows)[:, :-1].flatten(0, 1)
        total += nn.functional.cross_entropy(found, rows[:, 1:].flatten(), reduction="sum").item()
    mean = total / (windows.numel() - len(windows))
    return math.exp(mean) if mean < 700 else None


def scaled(adapter: Adapter, strength: float) -> Adapter:
    """The adapter, times a factor."""
    layers = {path: replace(layer, factor=layer.factor * strength) for path, layer in adapter.layers.items()}
    return replace(adapter, layers=layers)
