"""What a tokenizer does otherwise is told in a sentence; in every format; and by a runtime's own."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.tokenizer import load_tokenizer
from qalora.parity import verify
from qalora.parity.evidence import TokenizerFindings
from qalora.parity.tokenizer_texts import PASSAGE
from qalora.parity.tokenizers import TokenizerCheck
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


def wrong(found: TokenizerFindings | None) -> tuple[str, ...]:
    """What is the artefact's fault, where nothing is its runtime's limit."""
    assert found is not None and found.limits == ()
    return found.wrong


def swapped(content: dict) -> None:
    """Two letters change their ids."""
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]


def test_the_same_is_the_same(bytewise: Checkpoint, tmp_path: Path) -> None:
    assert wrong(TokenizerCheck(bytewise).compare(bytewise)) == ()
    again = edited(bytewise, tmp_path, "tokenizer.json", lambda content: None)  # other bytes, the same tokenizer
    assert again.files["tokenizer.json"].read_bytes() != bytewise.files["tokenizer.json"].read_bytes()
    assert wrong(TokenizerCheck(bytewise).compare(again)) == ()


def test_without_a_tokenizer_there_is_nothing_to_compare(bytewise: Checkpoint) -> None:
    bare = replace(bytewise, files={})
    assert TokenizerCheck(bytewise).compare(bare) is None
    assert TokenizerCheck(bare).compare(bytewise) is None
    assert TokenizerCheck(bare).compare_runtime(Own(lambda text: [])) is None


def test_other_ids(bytewise: Checkpoint, tmp_path: Path) -> None:
    found = wrong(TokenizerCheck(bytewise).compare(edited(bytewise, tmp_path, "tokenizer.json", swapped)))
    assert [sentence.split(" is ")[0] for sentence in found[1:]] == [
        f"token {PASSAGE.index('e')} of a text",
        "token 1 of a chat",
    ]
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

    found = wrong(TokenizerCheck(bytewise).compare(edited(bytewise, tmp_path, "tokenizer.json", prefixed)))
    assert [sentence.split(" is ")[0] for sentence in found] == [
        "token 0 of a text",
        "token 0 of a chat",
        "token 0 of '<end>' in a text",
    ]
    assert found[0].endswith("after ''")


def test_other_special_tokens_and_another_template(bytewise: Checkpoint, tmp_path: Path) -> None:
    def other(content: dict) -> None:
        content["eos_token"] = "a"

    found = wrong(TokenizerCheck(bytewise).compare(edited(bytewise, tmp_path, "tokenizer_config.json", other)))
    assert [sentence.split()[0] for sentence in found] == ["eos_token_id"]
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% for message in messages %}{{ message['role'] }}{% endfor %}", encoding="utf-8")
    changed = replace(bytewise, files={**bytewise.files, "chat_template.jinja": template})
    (sentence,) = wrong(TokenizerCheck(bytewise).compare(changed))
    assert sentence.startswith("the chat template differs from character 41 on: \"role'] }}")
    none = replace(
        bytewise, files={name: path for name, path in bytewise.files.items() if name != "chat_template.jinja"}
    )
    assert wrong(TokenizerCheck(bytewise).compare(none)) == ("it has no chat template",)
    assert wrong(TokenizerCheck(none).compare(bytewise)) == ("it has a chat template, and the reference none",)


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
    assert wrong(TokenizerCheck(model).compare(load(file))) == ()
    found = wrong(TokenizerCheck(model).compare(bare))
    assert found == ("it has no chat template", "it has no chat template 'tool_use'")
    found = wrong(TokenizerCheck(bare).compare(load(file)))
    has = "and the reference none"
    assert found == (f"it has a chat template, {has}", f"it has a chat template 'tool_use', {has}")
    (tmp_path / "other").mkdir()
    (sentence,) = wrong(TokenizerCheck(model).compare(edited(bare, tmp_path / "other", "tokenizer_config.json", other)))
    assert sentence == "the chat template 'tool_use' differs from character 0 on: 'no tools' instead of 'tools'"


@dataclass
class Own:
    """A runtime's own tokenizer that makes of a text what it is told."""

    make: Callable[[str], list[int]]
    follows: frozenset[str] = frozenset({"text", "chat", "token", "around"})

    def tokenize(self, text: str, *, special: bool = False, around: bool = False) -> list[int]:
        return self.make(text)


def test_a_runtimes_own_tokenizer(bytewise: Checkpoint) -> None:
    """It gets the same texts; what it does not follow is its limit, but for chats."""
    from qalora.converters.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(bytewise)

    def right(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def short(text: str) -> list[int]:
        return right(text)[:-1] if len(text) > 1 else right(text)

    check = TokenizerCheck(bytewise)
    assert wrong(check.compare_runtime(Own(right))) == ()
    found = wrong(check.compare_runtime(Own(short)))
    assert found[0].startswith(f"token {len(right(PASSAGE)) - 1} of a text is none instead of ")
    assert [sentence.partition(" of ")[2].partition(" is ")[0] for sentence in found] == [
        "a text",
        "a chat",
        "'<end>' in a text",
    ]
    limited = check.compare_runtime(Own(short, frozenset({"token"})))
    assert limited is not None
    assert (limited.wrong, limited.limits) == (found[1:], found[:1])
    ended = wrong(check.compare_runtime(Own(lambda text: [*right(text), 256] if text == "a" else right(text))))
    assert ended == ()  # nothing is known of a runtime that never shows a text without its end


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
    assert wrong(TokenizerCheck(model).compare(load(file))) == ()


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no chats') }}",
        "{% for m in messages %}",
        "{{ messages.a.b }}",
        "{% for n in range(99999) %}{% for n in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_writes_no_chat_is_said(template: str, bytewise: Checkpoint, tmp_path: Path) -> None:
    """Then no chat is compared, and the gate does not pass as if one were."""
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    model = replace(bytewise, files={**bytewise.files, "chat_template.jinja": tmp_path / "chat_template.jinja"})
    tokenizer = load_tokenizer(model)
    found = TokenizerCheck(model).compare_runtime(
        Own(lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    )
    assert found is not None and found.wrong == ()
    (sentence,) = found.limits
    assert sentence.startswith("no chat was compared, since the chat template writes none (")
