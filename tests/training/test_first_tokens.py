"""What a tokenizer puts in front of every text stands there in training, in calibration and in what is verified."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora.calibration import Calibration, calibration_windows
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.first_tokens import first_tokens
from qalora.errors import InputError
from qalora.parity.text import make_inputs
from qalora.quantization.model import quantize
from qalora.testing import byte_tokenizer, tiny_llama
from qalora.training import TrainOptions, train
from qalora.training.data import join_documents, make_blocks, read_documents
from qalora.training.loss import IGNORED

TEMPLATE = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '<end>' }}{% endfor %}"
CHAT = "{{ bos_token }}" + TEMPLATE + "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"


def with_first(*names: str) -> Any:
    """A tokenizer of bytes that begins every text with tokens of these names."""
    from tokenizers.processors import TemplateProcessing

    made = byte_tokenizer()
    if names:
        made.add_special_tokens({"bos_token": names[0], "extra_special_tokens": list(names[1:])})
        special = [(name, made.convert_tokens_to_ids(name)) for name in names]
        single = f"{' '.join(names)} $A"
        made.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return made


@pytest.fixture(scope="module")
def begun() -> Any:
    return with_first("<s>")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, begun: Any) -> Path:
    """float: a tiny model whose tokenizer begins texts with <s>; text.txt."""
    root = tmp_path_factory.mktemp("begun")
    tiny_llama(root / "float", tokenizer=begun, config={"num_hidden_layers": 1, "bos_token_id": 5})
    (root / "text.txt").write_text("Words to read, one after another. " * 60, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def model(place: Path) -> Checkpoint:
    return load(place / "float")


def test_they_are_the_tokenizer_s_own() -> None:
    for names in ((), ("<s>",), ("<s>", "<lang>")):
        made = with_first(*names)
        assert first_tokens(made) == tuple(made.convert_tokens_to_ids(name) for name in names)
        assert tuple(made("b")["input_ids"][: len(names)]) == first_tokens(made)


def test_every_document_begins_with_them_once(begun: Any, tmp_path: Path) -> None:
    """Not twice where a chat template or the text itself writes them; and they are not learned."""
    rows = [
        {"text": "plain"},
        {"text": "<s>marked"},
        {"prompt": "ask", "completion": "say"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (bos,) = first_tokens(begun)
    for template in (CHAT, CHAT.removeprefix("{{ bos_token }}")):
        begun.chat_template = template
        tokens, learned = join_documents(read_documents(str(tmp_path / "a.jsonl"), begun), begun)
        parts = begun.decode(tokens).split("<s>")
        assert parts == ["", "plain<end>", "marked<end>", "asksay<end>", "[user]u<end>[assistant]a<end>"]
        assert not any(on for token, on in zip(tokens, learned, strict=True) if token == bos)


@pytest.mark.parametrize("names", [(), ("<s>",), ("<s>", "<lang>")])
def test_blocks_begin_with_them_and_lose_no_token(names: tuple[str, ...], tmp_path: Path) -> None:
    """Behind those that a block gets of its own, nothing is learned that the data have behind something else."""
    made, length = with_first(*names), 16
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefghij"}\n{"text": "klmnopqrstuvwxyz"}\n' * 8, encoding="utf-8")
    tokens, _ = join_documents(read_documents(str(tmp_path / "a.jsonl"), made), made)
    blocks = make_blocks(read_documents(str(tmp_path / "a.jsonl"), made), made, length)
    first, at = first_tokens(made), 0
    for row, targets in zip(blocks.tokens.tolist(), blocks.targets.tolist(), strict=True):
        assert tuple(row[: len(first)]) == first
        own = tuple(tokens[at : at + len(first)]) != first
        stream = row[len(first) :] if own else row
        assert tokens[at : at + len(stream)] == stream
        assert targets[-1] == IGNORED
        for place, target in enumerate(targets[:-1]):
            added = own and place + 1 <= len(first)
            assert target == (IGNORED if added or row[place + 1] in first else row[place + 1])
        at += len(stream)
    assert len(tokens) - at < length


def test_a_block_has_room_for_more_than_them(begun: Any, place: Path) -> None:
    with pytest.raises(InputError, match="max_length: expected more than 2"):
        make_blocks(read_documents(str(place / "text.txt"), begun), with_first("<s>", "<lang>"), 2)


def test_calibration_and_verification_have_them(model: Checkpoint, place: Path, begun: Any) -> None:
    first = first_tokens(begun)
    windows = calibration_windows(model, Calibration(data=str(place / "text.txt"), tokens=256, length=32))
    assert windows.shape == (8, 32)
    assert {tuple(row[: len(first)].tolist()) for row in windows} == {first}
    assert int((windows == first[0]).sum()) == len(windows)
    work = make_inputs(model, begun, text="Some words. " * 100, tokens=None, prompts=["Say"], max_tokens=512)
    assert {row[: len(first)] for row in work.windows} == {first}, "and not the config's, which is another"
    assert begun.decode(work.prompts[0]) == "<s>Say"


def test_a_run_of_other_tokens_is_not_resumed(model: Checkpoint, place: Path, tmp_path: Path) -> None:
    """The same file, model and options, read in another way, as an earlier version did: the tokens are not the same."""
    from qalora.training.pace import StepReport

    base = quantize(model, bits=4, group_size=32)
    (tmp_path / "other").mkdir()
    plain = with_first()
    plain.add_special_tokens({"bos_token": "<s>"})
    tiny_llama(tmp_path / "other", tokenizer=plain, config={"num_hidden_layers": 1, "bos_token_id": 5})
    other = quantize(load(tmp_path / "other"), bits=4, group_size=32)
    for path in base.linears:
        assert torch.equal(base.tensors[path].load_quantized().packed, other.tensors[path].load_quantized().packed)

    def interrupt(report: StepReport) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"max_steps": 3, "rank": 2, "max_length": 16, "save_every": 1, "batch_size": 1}
    chosen = TrainOptions(data=str(place / "text.txt"), out=tmp_path / "a", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(other, chosen, interrupt)
    with pytest.raises(InputError, match=r"data_sha256: expected .* it is another run's"):
        train(base, TrainOptions(data=str(place / "text.txt"), out=tmp_path / "a", resume=True, **settings))
