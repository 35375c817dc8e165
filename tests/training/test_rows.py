"""Rows that people have: what is learned of each, and what is refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from qalora.errors import InputError
from qalora.testing import small_tokenizer
from qalora.training.data import join_documents, read_documents
from qalora.training.documents import Account, Document

U, A = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}
OFF = {"role": "assistant", "content": "It is 5."}

WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTOOLS ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% if documents %}{{ '<|im_start|>system\nDOCS ' + (documents | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% if brief %}{{ '<|im_start|>system\nBRIEF<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + (' ' + m['name'] if m['name'] else '') + '\n' }}"
    "{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ 'CALL ' + (call.function | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture(scope="module")
def with_tools() -> Any:
    made = small_tokenizer()
    made.chat_template = WITH_TOOLS
    return made


def read(place: Path, tokenizer: Any, *rows: Any) -> tuple[list[Document], Account]:
    account = Account()
    (place / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_documents(str(place / "a.jsonl"), tokenizer, account)), account


def learned(place: Path, tokenizer: Any, *rows: Any) -> list[str]:
    """The runs of tokens that are learned, as text."""
    documents, account = read(place, tokenizer, *rows)
    join_documents(documents, tokenizer, account)
    return [text for preview in account.previews for on, text in preview.runs if on]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{**U, "role": "human"}, {**A, "role": "gpt"}]},
        {"messages": [{**U, "role": "User"}, {**A, "role": "ASSISTANT"}]},
        {"messages": [{**U, "role": "prompter"}, {**A, "role": "model"}]},
        {"conversations": [{"from": "human", "value": U["content"]}, {"from": "gpt", "value": A["content"]}]},
        {"conversations": [U, A]},
        {"conversation": [{"from": "user", "value": U["content"]}, {"from": "bot", "value": A["content"]}]},
        {"instruction": U["content"], "input": "", "output": A["content"]},
        {"instruction": U["content"], "output": A["content"]},
        {"prompt": [U], "completion": [A]},
        {"messages": [U, {**A, "content": [{"type": "text", "text": A["content"]}]}]},
        {"messages": [U, A], "tools": None, "system": "", "weight": 1, "train": True},
    ],
)
def test_the_same_conversation_in_other_words(row: Any, tmp_path: Path, tokenizer: Any) -> None:
    (document,), _ = read(tmp_path, tokenizer, row)
    assert document.text == tokenizer.apply_chat_template([U, A], tokenize=False)
    assert learned(tmp_path, tokenizer, row) == ["It is 4.<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"system": "Be brief.", "conversations": [U, A]}, [{"role": "system", "content": "Be brief."}, U]),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "x"}, A]},
            [{"role": "system", "content": "S"}, {"role": "user", "content": "x"}],
        ),
        (
            {"instruction": "Add.", "input": "2 and 2", "output": A["content"], "system": "S"},
            [{"role": "system", "content": "S"}, {"role": "user", "content": "Add.\n\n2 and 2"}],
        ),
    ],
)
def test_what_stands_before_the_answer(row: Any, before: Any, tmp_path: Path, tokenizer: Any) -> None:
    (document,), _ = read(tmp_path, tokenizer, row)
    assert document.text == tokenizer.apply_chat_template([*before, A], tokenize=False)


def test_instructions_without_a_chat_template(tmp_path: Path) -> None:
    plain = small_tokenizer()
    plain.chat_template = None
    rows = [
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        {"instruction": "Sing.", "input": "", "output": "La"},
    ]
    (first, second), account = read(tmp_path, plain, *rows)
    assert first.text.endswith("### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n4")
    assert second.text.endswith("### Instruction:\nSing.\n\n### Response:\nLa")
    assert "### Input" not in second.text
    assert learned(tmp_path, plain, *rows) == ["4<|im_end|>", "La<|im_end|>"]
    assert any("Alpaca" in note for note in account.note_lines())
    with pytest.raises(InputError, match=r"a.jsonl:1: system: expected a tokenizer with a chat template"):
        read(tmp_path, plain, {"instruction": "a", "output": "b", "system": "S"})
    with pytest.raises(InputError, match=r"a.jsonl:1: messages: expected a tokenizer with a chat template"):
        read(tmp_path, plain, {"conversations": [U, A]})


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss": 0, "weight": 0.0}])
def test_a_turn_that_a_flag_leaves_out_is_seen_and_not_learned(off: Any, tmp_path: Path, tokenizer: Any) -> None:
    row = {"messages": [U, {**OFF, **off}, U, {**A, "weight": 1}]}
    (document,), _ = read(tmp_path, tokenizer, row)
    assert OFF["content"] in document.text
    assert learned(tmp_path, tokenizer, row) == ["It is 4.<|im_end|>"]
    assert learned(tmp_path, tokenizer, {"messages": [U, A, U, {**OFF, **off}]}) == ["It is 4.<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, A], "weight": 0},
        {"messages": [U, {**A, "train": False}]},
        {"prompt": "a", "completion": "b", "train": False},
        {"text": "words", "loss": 0},
        {"instruction": "a", "output": "b", "weight": 0},
    ],
)
def test_a_row_that_a_flag_leaves_out_is_counted(row: Any, tmp_path: Path, tokenizer: Any) -> None:
    documents, account = read(tmp_path, tokenizer, row)
    assert [document.learns for document in documents] == [False]
    assert account.left_out == {"a flag says that it is not to be learned": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": " \n"},
        {"instruction": "a", "output": ""},
        {"text": "  "},
        {"messages": [U, {**A, "content": ""}]},
    ],
)
def test_a_row_without_a_word_to_learn_is_counted(row: Any, tmp_path: Path, tokenizer: Any) -> None:
    documents, account = read(tmp_path, tokenizer, row)
    assert [document.learns for document in documents] == [False]
    assert account.left_out == {"nothing but white space would be learned": 1}


@pytest.mark.parametrize("form", [TOOLS, json.dumps(TOOLS)])
def test_tools_go_to_the_template(form: Any, tmp_path: Path, with_tools: Any) -> None:
    (document,), _ = read(tmp_path, with_tools, {"messages": [U, A], "tools": form})
    assert document.text == with_tools.apply_chat_template([U, A], tools=TOOLS, tokenize=False)
    assert 'TOOLS [{"type": "function"' in document.text
    assert learned(tmp_path, with_tools, {"messages": [U, A], "tools": form}) == ["It is 4.<|im_end|>"]


def test_calls_their_answers_and_other_settings_go_to_the_template(tmp_path: Path, with_tools: Any) -> None:
    """Arguments in a string, as OpenAI has them, are opened: a template would quote them a second time."""
    turns = [
        U,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "4"},
        A,
    ]
    row = {"messages": turns, "documents": [{"title": "T"}], "chat_template_kwargs": {"brief": True}}
    (document,), account = read(tmp_path, with_tools, row)
    for part in ('DOCS [{"title": "T"}]', "BRIEF", 'CALL {"name": "add", "arguments": {"a": 2}}', "tool add\n4"):
        assert part in document.text
    assert learned(tmp_path, with_tools, row) == [
        'CALL {"name": "add", "arguments": {"a": 2}}<|im_end|>',
        "It is 4.<|im_end|>",
    ]
    assert not account.note_lines()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [U, A], "tools": TOOLS}, "tools: expected a chat template that writes tools"),
        ({"messages": [U, A], "documents": [{"a": "b"}]}, "documents: expected a chat template that writes documents"),
        ({"messages": [U, {**A, "tool_calls": [CALL]}]}, r"messages\[1\]: tool_calls: expected a chat template that"),
        ({"messages": [U, {**A, "function_call": {"name": "f"}}]}, r"messages\[1\]: function_call: expected a chat"),
    ],
)
def test_what_the_template_leaves_out_is_refused(row: Any, words: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=rf"a.jsonl:2: {words}"):
        read(tmp_path, tokenizer, {"messages": [U, A]}, row)


def test_other_keys_of_messages_are_used_or_noted(tmp_path: Path, tokenizer: Any, with_tools: Any) -> None:
    row = {"messages": [{**U, "name": "Ann"}, {**A, "reasoning_content": "Easy."}]}
    (document,), account = read(tmp_path, with_tools, row)
    assert "user Ann\n" in document.text
    assert [note.rpartition(": ")[2] for note in account.note_lines()] == [
        "the chat template makes nothing of the key reasoning_content of a message"
    ]
    _, account = read(tmp_path, tokenizer, row, row)
    assert [note.rpartition("key ")[2] for note in account.note_lines()] == [
        "name of a message",
        "reasoning_content of a message",
    ]


def test_keys_that_are_passed_over_are_said_once(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"text": "a b", "id": 1, "url": "u"},
        {"messages": [U, A], "source": "s", "id": 2, "prompt": "What is 2+2?"},
    ]
    _, account = read(tmp_path, tokenizer, *rows)
    assert account.note_lines() == [f"{tmp_path}/a.jsonl:1: keys of rows that are passed over: id, url, source, prompt"]


REFUSED: dict[str, tuple[Any, str]] = {
    "an unknown role": (
        {"messages": [U, {**A, "role": "critic"}]},
        r"messages\[1\]: role: expected one of system, .*critic",
    ),
    "a role that is none": ({"messages": [{**U, "role": 3}, A]}, r"messages\[0\]: role: .* got 3"),
    "an unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "x"}, A]},
        r"conversations\[0\]: role: .*narrator",
    ),
    "no assistant": ({"messages": [U, U]}, "expected a turn of the assistant to learn, got turns of user alone"),
    "half a weight": (
        {"messages": [U, {**A, "weight": 0.5}]},
        r"messages\[1\]: weight: expected 0, 1, true or false, got 0.5",
    ),
    "a weight in words": ({"messages": [U, {**A, "train": "no"}]}, r"train: expected 0, 1, true or false, got 'no'"),
    "a row's loss": ({"text": "a", "loss": 2.31}, "loss: expected 0, 1, true or false, got 2.31"),
    "flags that differ": (
        {"messages": [U, {**A, "weight": 1, "train": False}]},
        "weight and train: expected flags that agree",
    ),
    "a user to learn": (
        {"messages": [{**U, "train": True}, A]},
        r"messages\[0\]: train: expected the assistant's turns",
    ),
    "parts of a turn": ({"messages": [U, {**A, "train_detail": []}]}, "train_detail: .* a flag that is not known"),
    "a mask": ({"text": "a", "loss_mask": [1]}, "loss_mask: .* a flag that is not known"),
    "a picture": (
        {"messages": [{**U, "content": [{"type": "image_url"}]}, A]},
        r"content: expected a string, or a list of one",
    ),
    "pictures": (
        {"messages": [U, A], "images": ["a.png"]},
        "images: expected nothing but what a row of messages may have",
    ),
    "a number": ({"messages": [U, {**A, "content": 4}]}, r"messages\[1\]: content: expected a string, got a number"),
    "nothing said": (
        {"messages": [U, {**A, "content": None, "name": "x"}]},
        "messages: expected a list of {role, content}",
    ),
    "a preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "expected the key text, .* got prompt, chosen, rejected",
    ),
    "a judged completion": ({"prompt": "a", "completion": "b", "label": False}, "label: expected none"),
    "a system nobody reads": (
        {"prompt": "a", "completion": "b", "system": "S"},
        "system: expected nothing but what a row of prompt and",
    ),
    "a history": ({"instruction": "a", "output": "b", "history": [["q", "a"]]}, "history: expected nothing but"),
    "a context": ({"text": "a", "question": "why?"}, "question: expected nothing but what a row of text may have"),
    "functions": ({"messages": [U, A], "functions": [{"name": "f"}]}, "functions: expected nothing but"),
    "two systems": (
        {"system": "S", "messages": [{"role": "system", "content": "T"}, U, A]},
        "system: expected one system message",
    ),
    "two conversations": (
        {"messages": [U, A], "conversations": [U, A]},
        "expected one conversation, got messages and conversations",
    ),
    "tools that are none": ({"messages": [U, A], "tools": "add"}, "tools: expected a list of objects"),
    "arguments that are none": (
        {"messages": [U, {**A, "tool_calls": [{"function": {"name": "f", "arguments": "a=2"}}]}]},
        "arguments: expected a JSON object",
    ),
    "a setting of ours": (
        {"messages": [U, A], "chat_template_kwargs": {"tokenize": True}},
        "expected a template's own names",
    ),
    "half a pair": ({"prompt": [U], "completion": "b"}, "prompt: expected a string, got a list"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_refused_by_name(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    row, words = REFUSED[kind]
    with pytest.raises(InputError, match=rf"a.jsonl:2.*{words}") as caught:
        read(tmp_path, tokenizer, {"text": "words"}, row)
    assert "\n" not in str(caught.value)
