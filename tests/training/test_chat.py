"""Where an answer stands in what a chat template writes: its own tokens and the end of its turn, no more and no less.

Templates in the manner of those that models come with, written anew; each is tried where its marks are special tokens,
and where they are plain text.
"""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qalora.converters import chat_template
from qalora.errors import InputError
from qalora.testing import small_tokenizer
from qalora.training.data import join_documents, read_documents
from qalora.training.documents import Account, Document

MARKS = [
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]"),
]

HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
)
TEMPLATES = {
    "llama 3": HEADERS
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama 3, always asking": HEADERS + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "gemma 2": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "gemma 3": "{{ bos_token }}{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi 3": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "phi 3, first": "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}",
    "mistral 1": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token + ' ' }}{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}",
    "mistral 3": "{{ bos_token }}{% set start = 1 if messages[0].role == 'system' else 0 %}"
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages[start:] %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (messages[0].content + '\n\n' if start and m == users[-1] else '') }}"
    "{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
    "llama 2": "{% set start = 1 if messages[0].role == 'system' else 0 %}{% for m in messages[start:] %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{{ '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if start and loop.first else '' }}"
    "{{ m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}",
    "qwen 3": "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% set words = m.content.split('</think>') %}"
    "{% set thoughts = m.reasoning_content or words[0].replace('<think>', '').strip('\n') if words | length > 1 "
    "or m.reasoning_content else '' %}{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}{{ words[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "r1": "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
    "no marks": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}

S = {"role": "system", "content": "Be kind."}
TURNS = [
    {"role": "user", "content": " Good end? end "},
    {"role": "assistant", "content": "Good end "},
    {"role": "user", "content": "Bye\n\nGood end"},
    {"role": "assistant", "content": "See\n\n  you, end"},
]
EMPTY = "<think>\n\n</think>\n\n"

WRITTEN: dict[str, tuple[list[str], list[str]]] = {
    "llama 3": (["Good end<|eot_id|>", "See\n\n  you, end<|eot_id|>"],) * 2,
    "gemma 2": (["Good end<end_of_turn>", "See\n\n  you, end<end_of_turn>"], []),
    "gemma 3": (["Good end<end_of_turn>", "See\n\n  you, end<end_of_turn>"],) * 2,
    "phi 3": (["Good end <|end|>", "See\n\n  you, end<|end|>"],) * 2,
    "mistral 1": (["Good end <|im_end|>", "See\n\n  you, end<|im_end|>"], []),
    "mistral 3": ([" Good end<|im_end|>", " See\n\n  you, end<|im_end|>"],) * 2,
    "llama 2": ([" Good end <|im_end|>", " See\n\n  you, end <|im_end|>"],) * 2,
    "qwen 3": (["Good end <|im_end|>", f"{EMPTY}See\n\n  you, end<|im_end|>"],) * 2,
}
"""What is learned without a system message, and with one; nothing where the template refuses it."""


@cache
def _plain() -> Any:
    return small_tokenizer()


def tokenizer_of(name: str, *, special: bool = True) -> Any:
    made = deepcopy(_plain())
    made.chat_template = TEMPLATES[name]
    if special:
        made.add_special_tokens({"extra_special_tokens": MARKS})
    return made


def read(place: Path, tokenizer: Any, turns: list[Any]) -> tuple[list[Document], list[str], Account]:
    """The documents, and the runs of tokens that are learned."""
    account = Account()
    (place / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    documents = list(read_documents(str(place / "a.jsonl"), tokenizer, account))
    join_documents(documents, tokenizer, account)
    return documents, [text for preview in account.previews for on, text in preview.runs if on], account


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_answers_and_the_ends_of_their_turns(name: str, system: bool, special: bool, tmp_path: Path) -> None:
    tokenizer, wanted = tokenizer_of(name, special=special), WRITTEN[name][system]
    turns = [S, *TURNS] if system else TURNS
    if not wanted:
        with pytest.raises(InputError, match=r"a.jsonl:1: messages: expected what the chat template takes"):
            read(tmp_path, tokenizer, turns)
        return
    documents, found, _ = read(tmp_path, tokenizer, turns)
    if not special and "<|im_end|>" not in wanted[0]:  # the mark is no token: what ends a turn is all that follows it
        wanted = [f"{text}{'' if name == 'llama 3' else chr(10)}" for text in wanted]
        ends = [name == "phi 3", True]  # phi 3 writes the end token behind a last turn, others have it behind the text
        wanted = [f"{text}{'<|im_end|>' if end else ''}" for text, end in zip(wanted, ends, strict=True)]
    assert found == wanted
    assert system == any(S["content"] in document.text for document in documents)


def test_each_answer_is_learned_behind_what_the_model_will_be_asked_with(tmp_path: Path) -> None:
    """Where a template puts the system message before the last question, an earlier answer has it before its own."""
    documents, _, account = read(tmp_path, tokenizer_of("mistral 3"), [S, *TURNS])
    assert len(documents) == 2
    for document, n in zip(documents, (2, 4), strict=True):
        asked = tokenizer_of("mistral 3").apply_chat_template(
            [S, *TURNS][:n], tokenize=False, add_generation_prompt=True
        )
        assert document.spans is not None
        assert document.text[: document.spans[0][0]] == asked
        assert "Be kind." in asked
    assert any("a document of its own" in note for note in account.note_lines())


@pytest.mark.parametrize("thoughts", [{"content": "<think>\nHm.\n</think>\n\nGood end"}, {"reasoning_content": "Hm."}])
def test_thoughts_of_earlier_answers_are_learned_too(thoughts: Any, tmp_path: Path) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "Good end", **thoughts}, *TURNS[2:]]
    _, found, _ = read(tmp_path, tokenizer_of("qwen 3"), turns)
    assert found == ["<think>\nHm.\n</think>\n\nGood end<|im_end|>", f"{EMPTY}See\n\n  you, end<|im_end|>"]


def test_templates_that_always_ask(tmp_path: Path) -> None:
    """A special token ends the turn, or nothing tells where the next question begins."""
    for name, mark in (("llama 3, always asking", "<|eot_id|>"), ("phi 3, first", "<|end|>")):
        documents, found, _ = read(tmp_path, tokenizer_of(name), TURNS)
        assert [text.rstrip() for text in found] == [
            f"{turn['content'].rstrip()}{' ' * (mark == '<|end|>' and n == 0)}{mark}"
            for n, turn in enumerate(TURNS[1::2])
        ]
        assert documents[-1].text.rstrip().endswith(mark), "no question without an answer behind it"
        with pytest.raises(InputError, match="got one that always adds it; use prompt and completion"):
            read(tmp_path, tokenizer_of(name, special=False), TURNS)


def test_where_nothing_ends_a_turn_the_end_token_does(tmp_path: Path) -> None:
    documents, found, _ = read(tmp_path, tokenizer_of("no marks"), TURNS)
    assert found == ["Good end \n", "See\n\n  you, end\n<|im_end|>"]
    assert [document.closing for document in documents] == [True]
    assert [document.closing for document in read(tmp_path, tokenizer_of("gemma 3"), TURNS)[0]] == [False]


@pytest.mark.parametrize(
    ("name", "turns", "words"),
    [
        (
            "r1",
            TURNS,
            r"messages\[1\]: expected a chat template whose generation prompt .* got one that ends it with '<think>",
        ),
        ("phi 3, first", [S, *TURNS], r"messages\[0\]: expected a chat template that writes a turn of the role system"),
        ("gemma 2", TURNS[1:], r"messages\[0\]: expected a question before the first answer"),
    ],
)
def test_what_would_be_learned_otherwise_than_it_is_asked_for(
    name: str, turns: list[Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"a.jsonl:1: {words}"):
        read(tmp_path, tokenizer_of(name), turns)


@pytest.mark.parametrize("thread", ["main", "another"])
@pytest.mark.parametrize(
    "template",
    [
        "{% for n in range(99999) %}{% for n in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(60) }}",
    ],
)
def test_a_template_without_an_end_is_stopped(
    template: str, thread: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is a processor's, so that a busy machine makes no other result; and the timer is nobody's afterwards."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template

    def refused() -> str:
        with pytest.raises(InputError) as caught:
            read(tmp_path, tokenizer, TURNS)
        return str(caught.value)

    with ThreadPoolExecutor(1) as pool:
        sentence = refused() if thread == "main" else pool.submit(refused).result()
    assert sentence.endswith("the chat template: expected a text, got none in 0.5 seconds of a processor")
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_template_that_leaves_out_a_part_of_an_answer(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama 3")
    for cut in ("m.content[:4]", "m.content.split('</think>')[-1]", "m.content | upper", "m.content | e"):
        tokenizer.chat_template = TEMPLATES["llama 3"].replace("m.content | trim", cut)
        turns = [TURNS[0], {"role": "assistant", "content": "<think>Hm.</think>Good & end"}]
        with pytest.raises(InputError, match=r"messages\[1\]: expected a chat template that writes a whole answer"):
            read(tmp_path, tokenizer, turns)


def test_a_greeting_that_is_only_seen(tmp_path: Path) -> None:
    """An answer that nobody asked for is learned where the template asks for one, and may be left out elsewhere."""
    greeting = {"role": "assistant", "content": "Welcome."}
    _, found, _ = read(tmp_path, tokenizer_of("llama 3"), [greeting, *TURNS[:2]])
    assert found == ["Welcome.<|eot_id|>", "Good end<|eot_id|>"]
    _, found, _ = read(tmp_path, tokenizer_of("gemma 2"), [{**greeting, "train": False}, *TURNS[:2]])
    assert found == ["Good end<end_of_turn>"]


def test_white_space_in_an_answer_is_learned_where_a_tokenizer_gives_it_no_place(tmp_path: Path) -> None:
    """GPT-2's and Llama 3's tokenizers trim the places of tokens, and a token of spaces alone has none left."""
    from tokenizers.processors import ByteLevel

    tokenizer = deepcopy(_plain())
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    code = "if x:\n        return y   \n\n    z"
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Code:\n", "completion": code}) + "\n", encoding="utf-8")
    account = Account()
    join_documents(read_documents(str(tmp_path / "a.jsonl"), tokenizer), tokenizer, account)
    assert [text for on, text in account.previews[0].runs if on] == [code + "<|im_end|>"]
