"""What is read, and what of it is learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora.errors import InputError
from qalora.training.data import Document, check_data, make_blocks, read_documents
from qalora.training.loss import IGNORED


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def learned(document: Document, tokenizer: Any) -> str:
    """The text of the tokens that are targets, in one block that holds the document twice."""
    length = len(tokenizer(document.text)["input_ids"]) + 1
    blocks = make_blocks([document, document], tokenizer, length)
    targets = blocks.targets[1]
    return str(tokenizer.decode(targets[targets != IGNORED]))


def test_text_is_learned_whole(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Ünïcode, and a second\nline.", encoding="utf-8")
    (document,) = read_documents(str(path), smollm2_tokenizer)
    assert document == Document(text="Ünïcode, and a second\nline.")
    blocks = make_blocks([document] * 8, smollm2_tokenizer, 8)
    assert torch.equal(blocks.targets[:, :-1], blocks.tokens[:, 1:])
    assert bool((blocks.targets[:, -1] == IGNORED).all())


def test_of_a_prompt_the_completion_is_learned(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    data = write(tmp_path / "a.jsonl", {"prompt": "What is 2 + 2?", "completion": " It is four."})
    (document,) = read_documents(data, smollm2_tokenizer)
    assert learned(document, smollm2_tokenizer) == " It is four." + smollm2_tokenizer.eos_token


def test_of_a_conversation_the_assistant_is_learned(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "Bye!"},
        {"role": "assistant", "content": "See you."},
    ]
    (document,) = read_documents(write(tmp_path / "a.jsonl", {"messages": turns}), smollm2_tokenizer)
    text = learned(document, smollm2_tokenizer)
    assert "Good day.<|im_end|>" in text
    assert "See you.<|im_end|>" in text
    assert "Hello" not in text
    assert "Bye" not in text
    assert "user" not in text


THINKING = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""As Qwen3's: only an answer to the last question is given (empty) thoughts."""


def test_a_template_that_writes_earlier_turns_in_another_way(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    from copy import copy

    tokenizer = copy(smollm2_tokenizer)
    tokenizer.chat_template = THINKING
    turns = [
        {"role": "user", "content": "Day or good?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nGood day."},
        {"role": "user", "content": "Good day. Bye!"},
        {"role": "assistant", "content": "Good day."},
    ]
    plain = [turns[0], {"role": "assistant", "content": "Good day."}, *turns[2:]]
    (document,) = read_documents(write(tmp_path / "a.jsonl", {"messages": plain}), tokenizer)
    assert document.text.count("<think>") == 1
    assert document.spans is not None
    spans = [document.text[a:b] for a, b in document.spans]
    assert spans == ["Good day.<|im_end|>", "<think>\n\n</think>\n\nGood day.<|im_end|>"]
    with pytest.raises(InputError, match=r"a.jsonl:1: messages\[1\]: .* use prompt and completion"):
        list(read_documents(write(tmp_path / "a.jsonl", {"messages": turns}), tokenizer))


def test_rows_of_all_kinds_mix_and_empty_lines_are_skipped(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"prompt": "two", "completion": "three", "id": 7}\n', encoding="utf-8")
    assert [document.text for document in read_documents(str(path), smollm2_tokenizer)] == ["one", "twothree"]


BAD: dict[str, tuple[bytes, str]] = {
    "no JSON": (b'{"text": "a"}\n{"text": \n', r"a.jsonl:2: expected a JSON object"),
    "a list": (b"[1]\n", r"a.jsonl:1: expected a JSON object, got a list"),
    "other keys": (b'{"body": "x"}\n', r"a.jsonl:1: expected the key text, .* got body"),
    "a number": (b'{"text": 3}\n', r"a.jsonl:1: text: expected a string, got a number"),
    "no turns": (b'{"messages": []}\n', r"a.jsonl:1: messages: expected a list of"),
    "turns without role": (b'{"messages": [{"content": "x"}]}\n', r"a.jsonl:1: messages: expected a list of"),
    "no UTF-8": (b'{"text": "\xff"}\n', r"a.jsonl:1: expected UTF-8 text, got the byte 0xff"),
    "deep": (b"[" * 100_000, r"a.jsonl:1: expected a JSON object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_named_by_line(kind: str, tmp_path: Path, smollm2_tokenizer: Any) -> None:
    content, words = BAD[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=words):
        list(read_documents(str(tmp_path / "a.jsonl"), smollm2_tokenizer))


def test_no_chat_template(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    from copy import copy

    plain = copy(smollm2_tokenizer)
    plain.chat_template = None
    data = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(InputError, match="chat template"):
        list(read_documents(data, plain))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (Document(text="short"), "at least 64 tokens"),
        (Document(text="nothing to learn here " * 40, spans=()), "completions or assistant turns"),
    ],
)
def test_data_that_makes_no_blocks(document: Document, words: str, smollm2_tokenizer: Any) -> None:
    tokenizer = smollm2_tokenizer
    with pytest.raises(InputError, match=words):
        make_blocks([document], _without_end(tokenizer), 32)


def _without_end(tokenizer: Any) -> Any:
    from copy import copy

    plain = copy(tokenizer)
    plain.eos_token = None
    return plain


def test_the_end_is_held_out(smollm2_tokenizer: Any) -> None:
    blocks = make_blocks([Document(text="word " * 1000)], smollm2_tokenizer, 10)
    kept, held = blocks.split(0.1)
    assert (len(kept), len(held)) == (90, 10)
    assert torch.equal(torch.cat([kept.tokens, held.tokens]), blocks.tokens)
    assert len(blocks.split(0.0001)[1]) == 1
    few = make_blocks([Document(text="word " * 30)], smollm2_tokenizer, 10)
    assert [len(part) for part in few.split(0.9)] == [1, len(few) - 1], "something is left to train on"


@pytest.mark.parametrize(
    "name",
    ["imdb", "teknium/OpenHermes-2.5", "wikimedia/wikipedia:20231101.en", "allenai/c4:en.noblocklist", "a/b.v2:plain"],
)
def test_names_of_the_hub(name: str) -> None:
    check_data(name)


@pytest.mark.parametrize("name", ["none.txt", "data/none.jsonl", "./none", "~/none", "/none", "a/b/c", "none.parquet"])
def test_files_that_are_not_there(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: no such file$"):
        check_data(name)
