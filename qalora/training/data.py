"""Text to train on: documents from files or the Hub, tokens with a mask of what is to be learned, blocks of one length.

*.jsonl, *.json     a JSON object on each line, of one of three kinds, which may be mixed:
                      {"text": ...}                        all of it is learned
                      {"prompt": ..., "completion": ...}   the completion is learned
                      {"messages": [{"role", "content"}]}  the assistant's turns are learned, through the chat template
another file        UTF-8 text, one document
neither             the name of a dataset of the Hub, or name:configuration; its "train" split, rows as above

Documents follow one another, each closed by the end token, and are cut into blocks of equal length; what is left over
at the end is dropped. A token is learned when it is predicted: the first of a block is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.errors import InputError, MissingLibraryError
from qalora.formats.files import InputFile, may_be_of_the_hub, read_limited
from qalora.formats.json_text import parse_json
from qalora.training.loss import IGNORED

__all__ = ["Blocks", "Document", "check_data", "join_documents", "make_blocks", "may_be_a_dataset", "read_documents"]

LINE_BYTES = 64 << 20
TEXT_BYTES = 1 << 30
FILES = (".txt", ".text", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".zip", ".zst")
"""Ends of names that are files'. A dataset of the Hub may have a point in its name, as in owner/name-2.5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """text, and the spans of it that are learned (first character, one past the last); all of it if None."""

    text: str
    spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """tokens int64 [blocks, length]; targets int64 [blocks, length]: the next token, or IGNORED."""

    tokens: Tensor
    targets: Tensor

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
            Blocks(tokens=self.tokens[:cut], targets=self.targets[:cut]),
            Blocks(tokens=self.tokens[cut:], targets=self.targets[cut:]),
        )

    def digest(self) -> str:
        """SHA-256 of tokens and targets."""
        found = hashlib.sha256(self.tokens.numpy().tobytes())
        found.update(self.targets.numpy().tobytes())
        return found.hexdigest()


def check_data(data: str) -> None:
    """InputError for a folder, and for what is neither a file nor looks like a dataset of the Hub."""
    path = Path(data)
    if path.is_dir():
        raise InputError(data, expected="a text or JSONL file", got="a folder")
    if not path.exists() and not may_be_a_dataset(data):
        raise InputError(f"{data}: no such file")


def may_be_a_dataset(data: str) -> bool:
    """Whether it has the form of a Hub id, with or without :configuration, and does not end as files do."""
    return may_be_of_the_hub(data) and not data.endswith(FILES)


def read_documents(data: str, tokenizer: Any) -> Iterator[Document]:
    """Every document of a file or dataset; InputError names the line that is not as it should be."""
    check_data(data)
    path = Path(data)
    if not path.exists():
        rows: Iterable[tuple[str, Any]] = _hub_rows(data)
    elif path.suffix in (".jsonl", ".json"):
        rows = _lines(path)
    else:
        yield Document(text=_decoded(path, read_limited(path, TEXT_BYTES)))
        return
    for where, row in rows:
        yield _document(where, row, tokenizer)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with InputFile(path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            yield where, parse_json(_decoded(path, line), where, expected="a JSON object")


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}", expected="UTF-8 text", got=f"byte {data[error.start]:#x} in it") from error


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingLibraryError("datasets", f"{name}: no such file, and reading it from the Hub", "train") from error
    repo, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, configuration or None, split="train")
    except Exception as error:  # the library raises what it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name}: no such file, and not to be had from the Hub ({reason})") from error
    for number, row in enumerate(rows):
        yield f"{name}[{number}]", row


def _document(where: str, row: Any, tokenizer: Any) -> Document:
    if not isinstance(row, Mapping):
        raise InputError(where, expected="a JSON object", got=type(row).__name__)
    if "messages" in row:
        return _conversation(where, row["messages"], tokenizer)
    if "prompt" in row and "completion" in row:
        prompt, completion = _string(where, row, "prompt"), _string(where, row, "completion")
        return Document(text=prompt + completion, spans=((len(prompt), len(prompt) + len(completion)),))
    if "text" in row:
        return Document(text=_string(where, row, "text"))
    raise InputError(
        where,
        expected="the key text, the keys prompt and completion, or messages",
        got=", ".join(map(str, row)) or "none",
    )


def _string(where: str, row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise InputError(f"{where}: {key}", expected="a string", got=type(row[key]).__name__)
    return str(row[key])


def _conversation(where: str, messages: Any, tokenizer: Any) -> Document:
    good = isinstance(messages, list) and bool(messages)
    if not good or not all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in messages):
        raise InputError(f"{where}: messages", expected="a list of {role, content}", got=repr(messages)[:60])
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where}: messages",
            expected="a tokenizer with a chat template",
            got="one without",
            todo="use text, or prompt and completion",
        )

    def render(turns: list[Any], *, ask: bool = False) -> str:
        try:
            text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # a template is a program; it raises what it likes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{where}: messages", expected="what the chat template takes", got=reason) from error
        return text

    whole, spans = render(messages), []
    for n, turn in enumerate(messages):
        if turn["role"] == "assistant":
            before, after = render(messages[:n], ask=True) if n else "", render(messages[: n + 1])
            stop = _end_of_turn(whole, before, after, str(turn["content"]).strip())
            if stop is None:
                raise InputError(
                    f"{where}: messages",
                    expected="a chat template that writes a turn in the same way whatever follows",
                    got="one that does not",
                    todo="use prompt and completion",
                )
            spans.append((len(before), stop))
    return Document(text=whole, spans=tuple(spans))


def _end_of_turn(whole: str, before: str, after: str, content: str) -> int | None:
    """Where in a conversation the turn ends that begins after `before`; None where that is not to be told.

    after  the conversation as far as that turn. A template may write a last turn in another way than an earlier one, as
           Qwen3's does, which gives the last thoughts: then what follows the turn's content has to be the same
    """
    if not (whole.startswith(before) and after.startswith(before)):
        return None
    if whole.startswith(after):
        return len(after)
    tail = after[after.rfind(content) + len(content) :] if content in after[len(before) :] else None
    at = whole.find(content, len(before))
    if tail is None or at != len(before) or not whole.startswith(tail, at + len(content)):
        return None
    return at + len(content) + len(tail)


def join_documents(documents: Iterable[Document], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """(token ids of all documents, each closed by the end token, and whether each of them is learned)."""
    tokens: list[int] = []
    learned: list[bool] = []
    for document in documents:
        found = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=document.spans is not None)
        ids: list[int] = found["input_ids"]
        tokens += ids
        if document.spans is None:
            learned += [True] * len(ids)
        else:
            inside = [any(a < stop and b > start for a, b in document.spans) for start, stop in found["offset_mapping"]]
            learned += inside
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
            learned.append(True)
    return tokens, learned


def make_blocks(documents: Iterable[Document], tokenizer: Any, length: int) -> Blocks:
    """Tokenize, join and cut. InputError where it does not make two blocks, or nothing is to be learned."""
    tokens, learned = join_documents(documents, tokenizer)
    count = len(tokens) // length
    if count < 2:
        raise InputError(
            "data",
            expected=f"at least {2 * length} tokens, a block to train on and one to hold out",
            got=f"{len(tokens)}",
            todo="give more text, or a smaller --sequence-length",
        )
    ids_of = torch.tensor(tokens[: count * length]).view(count, length)
    kept = torch.tensor(learned[: count * length]).view(count, length)
    targets = torch.full_like(ids_of, IGNORED)
    targets[:, :-1] = torch.where(kept[:, 1:], ids_of[:, 1:], IGNORED)
    if not bool((targets != IGNORED).any()):
        raise InputError("data", expected="completions or assistant turns to learn", got="none")
    return Blocks(tokens=ids_of, targets=targets)
