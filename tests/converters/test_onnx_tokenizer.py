"""The tokenizer of an ONNX folder in onnxruntime-genai: chats, as transformers writes and cuts them."""

import json
from pathlib import Path
from typing import Any

import pytest

from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.tokenizer import load_tokenizer
from qalora.errors import FormatError, InputError
from qalora.parity.runtimes import open_runtime
from qalora.testing import byte_tokenizer, chat_layout, chat_model, random_model, tiny_llama

MESSAGES = [{"role": "user", "content": "Hi there"}]
ONE, OTHER = "one: {{ messages[0]['content'] }}", "other: {{ messages[0]['content'] }}"

SAID: dict[str, tuple[Any, dict[str, str]]] = {
    "text": (ONE, {}),
    "list": ([{"name": "default", "template": ONE}, {"name": "tool use", "template": OTHER}], {}),
    "dict": ({"default": ONE, "rag": OTHER}, {}),
    "a file beside another text": (OTHER, {"chat_template.jinja": ONE}),
    "a file beside null": (None, {"chat_template.jinja": ONE}),
    "files": (..., {"chat_template.jinja": ONE, "additional_chat_templates/rag.jinja": OTHER}),
}
"""chat_template of tokenizer_config.json, and files."""


def model_with(folder: Path, said: Any, files: dict[str, str]) -> Path:
    tiny_llama(folder, tokenizer=byte_tokenizer())
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) | ({} if said is ... else {"chat_template": said})
    path.write_text(json.dumps(settings), encoding="utf-8")
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", SAID)
def test_it_writes_chats_with_the_template_that_transformers_takes(kind: str, tmp_path: Path) -> None:
    import onnxruntime_genai

    model = random_model(load(model_with(tmp_path / "model", *SAID[kind])))
    (plan,) = export(model, ["onnx"], tmp_path)
    theirs, folder = load_tokenizer(model), tmp_path / "onnx"
    assert load_tokenizer(load(folder)).chat_template == theirs.chat_template
    own = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
    text = own.apply_chat_template(messages=json.dumps(MESSAGES), add_generation_prompt=False)
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False) == "one: Hi there"
    written = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert written == set(plan.files)
    sizes = {name: size for name, size in plan.files.items() if size is not None}
    assert sizes == {name: (folder / name).stat().st_size for name in sizes}


@pytest.mark.parametrize("name", ["../../away", "a/b", "", ".hidden"])
def test_a_name_that_is_no_files_is_refused(name: str, tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model", {"default": ONE, name: OTHER}, {})
    with pytest.raises(InputError, match="chat_template: expected names of letters, digits"):
        export(random_model(load(folder)), ["onnx"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_it_does_not_take_is_a_sentence(tmp_path: Path) -> None:
    export(random_model(load(model_with(tmp_path / "model", ONE, {}))), ["onnx"], tmp_path)
    path = tmp_path / "onnx" / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) | {"chat_template": [1]}
    path.write_text(json.dumps(settings), encoding="utf-8")
    runtime = open_runtime("onnxruntime-genai", tmp_path / "onnx")
    assert runtime.words is not None
    with pytest.raises(FormatError, match=r"onnxruntime-genai does not take its tokenizer \(.*must be string"):
        runtime.words.tokenize("a")
    runtime.close()


@pytest.mark.parametrize(("scheme", "template"), [("first", True), ("first", False), ("never", True), ("never", False)])
def test_spaces_before_parts_of_a_text(scheme: str, template: bool, tmp_path: Path) -> None:
    """Mistral's: none in a chat, which begins with a token. The library puts one before each part where it is told so,
    and so it is where a text without chats needs one.
    """
    layout = chat_layout("mistral")
    if not template:
        layout.tokenizer.chat_template = None
    folder = chat_model(tmp_path / "model", layout)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["pre_tokenizer"]["prepend_scheme"] = scheme
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    model, bare = random_model(load(folder)), template or scheme == "never"
    (plan,) = export(model, ["onnx"], tmp_path)
    assert any("decoder in other words" in note for note in plan.notes) == bare
    same = (tmp_path / "onnx" / "tokenizer.json").read_bytes() == model.files["tokenizer.json"].read_bytes()
    assert same is not bare
    tokenizer, written = load_tokenizer(model), load_tokenizer(load(tmp_path / "onnx"))
    runtime = open_runtime("onnxruntime-genai", tmp_path / "onnx")
    chat, plain = "<s>[INST] Hi there[/INST] Yes.\n  No.</s>", "Hi there"
    text = chat if bare else plain
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert runtime.words is not None and runtime.words.tokenize(text) == ids
    runtime.close()
    for text in (chat, plain, "  two\n  lines"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert written(text, add_special_tokens=False)["input_ids"] == ids
        assert written.decode(ids) == tokenizer.decode(ids)


def test_a_rule_in_words_that_it_does_not_take(tmp_path: Path) -> None:
    r"""Seed-OSS's, which has \p{N}{1} for \p{N}: the folder says the same in words that the library knows, and so does
    one that comes from a GGUF file.
    """
    model = random_model(load(chat_model(tmp_path / "model", "seed-oss")))
    (plan,) = export(model, ["onnx"], tmp_path / "first")
    assert any("its rule for cutting text in other words" in note for note in plan.notes)
    export(model, ["gguf"], tmp_path)
    export(load(next((tmp_path / "gguf").glob("*.gguf"))), ["onnx"], tmp_path / "second")
    tokenizer = load_tokenizer(model)
    chat = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    texts = (chat, "Don't  stop: 1234 na\u00efve \u65e5\u672c\u8a9e\n\n x = 1;// \U0001f642 ...\r\n")
    for folder in (tmp_path / "first" / "onnx", tmp_path / "second" / "onnx"):
        written, runtime = load_tokenizer(load(folder)), open_runtime("onnxruntime-genai", folder)
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert written(text, add_special_tokens=False)["input_ids"] == ids
            assert runtime.words is not None and runtime.words.tokenize(text) == ids
        runtime.close()
