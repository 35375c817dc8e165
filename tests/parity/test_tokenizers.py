"""What a tokenizer does otherwise is told in a sentence; in every format; and by a runtime's own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.tokenizer import load_tokenizer
from qalora.parity import verify
from qalora.parity.tokenizers import PASSAGE, TokenizerCheck
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, tiny_llama, tiny_model


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny Llama whose tokens are bytes, with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    return load(tiny_llama(tmp_path_factory.mktemp("bytes"), tokenizer=tokenizer))


def edited(model: Checkpoint, folder: Path, name: str, change: Callable[[dict], None]) -> Checkpoint:
    """The model with one JSON file of its tokenizer changed."""
    content = json.loads(model.files[name].read_text(encoding="utf-8"))
    change(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return replace(model, files={**model.files, name: folder / name})


def swapped(content: dict) -> None:
    """Two letters change their ids."""
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]


def test_the_same_is_the_same(bytewise: Checkpoint, tmp_path: Path) -> None:
    assert TokenizerCheck(bytewise).compare(bytewise) == ()
    again = edited(bytewise, tmp_path, "tokenizer.json", lambda content: None)  # other bytes, the same tokenizer
    assert again.files["tokenizer.json"].read_bytes() != bytewise.files["tokenizer.json"].read_bytes()
    assert TokenizerCheck(bytewise).compare(again) == ()


def test_without_a_tokenizer_there_is_nothing_to_compare(bytewise: Checkpoint) -> None:
    bare = replace(bytewise, files={})
    assert TokenizerCheck(bytewise).compare(bare) is None
    assert TokenizerCheck(bare).compare(bytewise) is None
    assert TokenizerCheck(bare).compare_runtime(lambda text: []) is None


def test_other_ids(bytewise: Checkpoint, tmp_path: Path) -> None:
    found = TokenizerCheck(bytewise).compare(edited(bytewise, tmp_path, "tokenizer.json", swapped))
    assert found is not None and len(found) == 2
    vocabulary = json.loads(bytewise.files["tokenizer.json"].read_text("utf-8"))["model"]["vocab"]
    e, t = vocabulary["e"], vocabulary["t"]
    assert found[0] == f"2 tokens have other ids, such as 'e' is {t} instead of {e}"
    first = min(PASSAGE.index("e"), PASSAGE.index("t"))
    letter, mine = (("e", t), ("t", e))[PASSAGE[first] == "t"]
    other = "t" if letter == "e" else "e"
    assert found[1].startswith(f"token {first} of a text is {mine} ({other!r}) instead of {vocabulary[letter]}")


def test_other_cuts(bytewise: Checkpoint, tmp_path: Path) -> None:
    def prefixed(content: dict) -> None:
        content["pre_tokenizer"]["add_prefix_space"] = True

    (sentence, around) = TokenizerCheck(bytewise).compare(edited(bytewise, tmp_path, "tokenizer.json", prefixed)) or ()
    assert sentence.startswith("token 0 of a text is ") and sentence.endswith("after ''")
    assert around.startswith("'a' becomes [")


def test_other_special_tokens_and_another_template(bytewise: Checkpoint, tmp_path: Path) -> None:
    def other(content: dict) -> None:
        content["eos_token"] = "a"

    found = TokenizerCheck(bytewise).compare(edited(bytewise, tmp_path, "tokenizer_config.json", other))
    assert found is not None and [sentence.split()[0] for sentence in found] == ["eos_token_id"]
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% for message in messages %}{{ message['role'] }}{% endfor %}", encoding="utf-8")
    changed = replace(bytewise, files={**bytewise.files, "chat_template.jinja": template})
    (sentence,) = TokenizerCheck(bytewise).compare(changed) or ()
    assert sentence.startswith("the chat template differs from character 41 on: \"role'] }}")
    none = replace(
        bytewise, files={name: path for name, path in bytewise.files.items() if name != "chat_template.jinja"}
    )
    assert TokenizerCheck(bytewise).compare(none) == ("it has no chat template",)
    assert TokenizerCheck(none).compare(bytewise) == ("it has a chat template, and the reference none",)


def test_every_chat_template_is_compared(bytewise: Checkpoint, tmp_path: Path) -> None:
    """A list in tokenizer_config.json, as transformers 4 wrote several: the default one too, which GGUF had not."""

    def several(content: dict) -> None:
        content["chat_template"] = [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "tools"},
        ]

    def other(content: dict) -> None:
        content["chat_template"] = {"default": "plain", "tool_use": "no tools"}

    files = {name: path for name, path in bytewise.files.items() if name != "chat_template.jinja"}
    bare = replace(bytewise, files=files)
    model = quantize(edited(bare, tmp_path, "tokenizer_config.json", several), group_size=32)
    export(model, ["gguf"], tmp_path)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    assert TokenizerCheck(model).compare(load(file)) == ()
    found = TokenizerCheck(model).compare(bare)
    assert found == ("it has no chat template", "it has no chat template 'tool_use'")
    found = TokenizerCheck(bare).compare(load(file))
    has = "and the reference none"
    assert found == (f"it has a chat template, {has}", f"it has a chat template 'tool_use', {has}")
    (tmp_path / "other").mkdir()
    (sentence,) = TokenizerCheck(model).compare(edited(bare, tmp_path / "other", "tokenizer_config.json", other)) or ()
    assert sentence == "the chat template 'tool_use' differs from character 0 on: 'no tools' instead of 'tools'"


def test_a_runtimes_own_tokenizer(bytewise: Checkpoint) -> None:
    from qalora.converters.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(bytewise)

    def right(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    check = TokenizerCheck(bytewise)
    assert check.compare_runtime(right) == ()
    (sentence,) = check.compare_runtime(lambda text: right(text)[:-1]) or ()
    assert sentence.startswith(f"token {len(right(PASSAGE)) - 1} of a text is none instead of ")


def test_a_tokenizer_of_several_artefacts_is_opened_once(
    bytewise: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF file as the reference, and GGUF, GPTQ and ONNX of it: its metadata, and the files made of that."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    template = tmp_path / "chat_template.jinja"
    template.write_text("of this test", encoding="utf-8")  # so that no other test has converted it
    model = replace(bytewise, files={**bytewise.files, template.name: template})
    export(quantize(model, group_size=32), ["gguf"], tmp_path / "base")
    opened: list[str] = []
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        really = kind.from_pretrained.__func__

        def counted(cls, *args, really=really, kind=kind, **options):
            if kind is AutoTokenizer or "gguf_file" in options:
                opened.append("converted" if "gguf_file" in options else "opened")
            return really(cls, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(counted))
    (base,) = (tmp_path / "base" / "gguf").glob("*.gguf")
    made = ["gguf", "gptq", "onnx"]
    export(load(base), made, tmp_path)
    assert opened == ["converted"]
    report = verify(base, [tmp_path / name for name in made], level="weights")
    assert {gate.status for found in report.artifacts for gate in found.gates if gate.gate == "tokenizer"} == {"pass"}
    assert [found.kind for found in report.artifacts] == ["gguf", "gptq", "onnx", "onnx"]
    assert sorted(opened) == ["converted", "opened", "opened"]
    verify(base, [tmp_path / "gguf"], level="logits", max_tokens=8)  # the reference's, for the text and for llama.cpp
    assert sorted(opened) == ["converted", "opened", "opened", "opened"]


def test_ids_beyond_the_embedding_are_none_of_the_model_s(tmp_path: Path) -> None:
    """transformers' class for Qwen2 adds an end of text to a tokenizer that has none, behind the model's last row."""
    model = quantize(load(tiny_model(tmp_path / "model", "qwen2", tokenizer=byte_tokenizer())), group_size=32)
    assert max(load_tokenizer(model).get_vocab().values()) >= model.tensors["model.embed_tokens.weight"].shape[0]
    export(model, ["gguf"], tmp_path)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    assert TokenizerCheck(model).compare(load(file)) == ()
