"""What `train` says of its data before it begins, and what it refuses to begin with."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qalora.cli import main
from qalora.errors import InputError
from qalora.testing import small_tokenizer, tiny_llama
from qalora.training.data import make_blocks, read_documents
from qalora.training.documents import Account

U, A = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}
LEARNED = "It is 4.<|im_end|>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("account")
    tiny_llama(root / "float", tokenizer=small_tokenizer(), config={"num_hidden_layers": 1})
    assert run("quantize", root / "float", "-o", root / "base").exit_code == 0
    rows = [{"messages": [U, A, U, A], "id": n} for n in range(20)] + [{"messages": [U, {**A, "weight": 0}]}]
    (root / "chat.txt").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def train(place: Path, out: Path, *words: object, data: str = "chat.txt") -> Result:
    fixed = ("--max-length", 32, "--max-steps", 1, "--rank", 2, "--target-modules", "q_proj")
    return run("train", place / "base", "--data", place / data, "-o", out, *fixed, *words)


def test_the_numbers_are_those_of_the_blocks(place: Path) -> None:
    tokenizer, account = small_tokenizer(), Account()
    blocks = make_blocks(read_documents(str(place / "chat.txt"), tokenizer, account), tokenizer, 32, account)
    assert (account.form, account.rows) == ("JSON lines", {"messages": 21})
    assert (account.turns, account.texts) == (40, 0)
    assert account.left_out == {"a flag says that it is not to be learned": 1}
    assert (account.sequences, account.length) == tuple(blocks.tokens.shape)
    assert account.learned == int((blocks.targets >= 0).sum())
    assert account.sequences - account.idle == len(blocks)
    assert list(account.unused) == ["id"]
    assert len(account.previews) == 3
    assert [text for on, text in account.previews[0].runs if on] == [LEARNED] * 2


def test_it_is_said_before_the_first_step_and_kept(place: Path, tmp_path: Path) -> None:
    result = train(place, tmp_path / "a")
    assert result.exit_code == 0, result.output
    said = result.stderr
    assert f"note: {place}/chat.txt: JSON lines; 21 rows of messages; 1 of them left out: a flag says" in said
    assert "note: learned: 40 turns; " in said
    assert f"note: the first piece that is learned: {LEARNED!r} after " in said
    assert f"{place}/chat.txt:1: keys of rows that are passed over: id" in said
    assert said.index("learned: 40 turns") < said.index("step 1 of 1")
    log = json.loads((tmp_path / "a" / "training.json").read_text("utf-8"))["data"]
    assert (log["form"], log["rows"], log["turns"]) == ("JSON lines", {"messages": 21}, 40)
    assert str(place) not in json.dumps(log)


def test_a_dry_run_shows_documents_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    result = train(place, tmp_path / "a", "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"\n{place}/chat.txt:1\n  seen     '<|im_start|>user\\nWhat is 2+2?<|im_end|>" in result.stdout
    assert result.stdout.count(f"\n  learned  {LEARNED!r}\n") == 6
    assert not list(tmp_path.iterdir())
    found = json.loads(train(place, tmp_path / "a", "--dry-run", "--json").stdout)
    assert found["turns"] == 40
    assert {"learned": True, "text": LEARNED} in found["documents"][0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, {**A, "weight": 0}]},
        {"messages": [U, {**A, "content": " "}]},
        {"prompt": "ask", "completion": ""},
        {"text": "words", "train": False},
    ],
)
def test_where_nothing_is_learned_nothing_is_trained(row: Any, place: Path, tmp_path: Path) -> None:
    (place / "none.jsonl").write_text((json.dumps(row) + "\n") * 50, encoding="utf-8")
    result = train(place, tmp_path / "a", data="none.jsonl")
    assert result.exit_code == 2
    assert "none.jsonl: expected completions or assistant turns to learn, got none" in result.stderr
    assert not list(tmp_path.iterdir())


def test_sequences_without_anything_to_learn_are_counted_and_left_out(tmp_path: Path) -> None:
    """A step on them would learn nothing, and have a loss of nothing."""
    tokenizer, account = small_tokenizer(), Account()
    row = {"prompt": "a long question " * 40, "completion": "yes"}
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    blocks = make_blocks(read_documents(str(tmp_path / "a.jsonl"), tokenizer, account), tokenizer, 16, account)
    assert len(blocks) == account.sequences - account.idle and account.idle > 0
    assert not (blocks.targets < 0).all(1).any()
    assert int((blocks.targets >= 0).sum()) == account.learned
    said = f"{account.idle} of these sequences have nothing to learn, and are left out"
    assert said in account.lines()


def test_where_almost_nothing_is_learned_nothing_is_trained(tmp_path: Path) -> None:
    """One answer of two tokens behind as much as a thousand times that."""
    tokenizer = small_tokenizer()
    for words, refused in ((300, False), (3000, True)):
        rows = [{"prompt": "1 " * words, "completion": "2"}] * 4
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        documents = list(read_documents(str(tmp_path / "a.jsonl"), tokenizer))
        if refused:
            with pytest.raises(InputError, match=r"learned: expected at least 1 in 1,000, got [4-8] of \d\d,\d\d\d"):
                make_blocks(documents, tokenizer, 32)
        else:
            assert make_blocks(documents, tokenizer, 32).account.learned in range(4, 9)


def test_an_account_of_the_calibration_is_said(place: Path, tmp_path: Path) -> None:
    words = ("--method", "gptq", "--calibration-length", 32, "--calibration-tokens", 64, "--dry-run")
    result = run("quantize", place / "float", "-o", tmp_path / "q", "--calibration", place / "chat.txt", *words)
    assert result.exit_code == 0, result.output
    assert "keys of rows that are passed over: id" in result.output.replace("\n", " ")


def test_a_row_in_the_middle_is_refused_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    (place / "wrong.jsonl").write_text('{"text": "words"}\n' * 9 + '{"body": "words"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"wrong.jsonl:10: expected the key text"):
        list(read_documents(str(place / "wrong.jsonl"), small_tokenizer()))
    assert train(place, tmp_path / "a", data="wrong.jsonl").exit_code == 2
    assert not list(tmp_path.iterdir())
