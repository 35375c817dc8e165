"""Tokenizers there and back: the very same tokens in transformers, in our GGUF files, and in llama.cpp."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qalora import export
from qalora.converters import load
from qalora.converters.gguf.tokenizer import gguf_tokenizer
from qalora.converters.tokenizer import KEPT, has_tokenizer, load_tokenizer, write_tokenizer
from qalora.demo import demo_text
from qalora.errors import FormatError, InputError
from qalora.formats.gguf import Value
from qalora.parity import verify
from qalora.parity.runtimes.llamacpp import LlamaCpp
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, random_model, tiny_llama

HARD = "a  b\n\n\tc 123456 3.14 naïve 日本語 🙂 <|im_start|>user don't I'LL   \r\n x=1;//"


def gguf_of(source: Path, folder: Path) -> Path:
    export(random_model(load(source)), "gguf", folder)
    (path,) = (folder / "gguf").glob("*.gguf")
    return path


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", ["tiny", "SmolLM2"])
def test_our_gguf_file_gives_llama_cpp_the_same_tokens(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Over 20,000 characters of English about Python, and what splits badly; of 512 tokens, and of 49,152."""
    if kind == "tiny":
        source = request.getfixturevalue("tiny")
    else:  # as transformers makes it of the GGUF file, which drops the rule for digits
        source = tiny_llama(tmp_path / "model", tokenizer=request.getfixturevalue("smollm2_tokenizer"))
    tokenizer = load_tokenizer(load(source))
    runtime = LlamaCpp(gguf_of(source, tmp_path), 1)
    for text in (HARD, demo_text()[:20_000]):
        assert runtime.tokenize(text) == plain(tokenizer, text)
    runtime.close()


@pytest.mark.slow
def test_the_gguf_base_gives_the_same_tokens_over_the_whole_text(smollm2: Path) -> None:
    tokenizer = load_tokenizer(load(smollm2))
    runtime = LlamaCpp(smollm2, 1)
    text = demo_text()
    tokens = runtime.tokenize(text)
    assert len(tokens) > 100_000
    assert tokens == plain(tokenizer, text)
    assert runtime.tokenize(HARD) == plain(tokenizer, HARD)
    runtime.close()


def test_from_files_to_gguf_and_back(tiny: Path, tmp_path: Path) -> None:
    before, after = load_tokenizer(load(tiny)), load_tokenizer(load(gguf_of(tiny, tmp_path)))
    for text in (HARD, demo_text()[:20_000]):
        assert plain(after, text) == plain(before, text)
    assert after.eos_token == before.eos_token
    assert after.chat_template == before.chat_template


SPACE = "\u2581"
LLAMA2 = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
SENTENCEPIECE: dict[str, tuple[Any, Any]] = {
    "llama 2, phi-3": (LLAMA2, None),
    "mistral": (None, {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}),
    "gemma": (
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    ),
}
"""Normalizer and pre-tokenizer of tokenizer.json."""


def sentencepiece_tokenizer(kind: str) -> Any:
    """A BPE over characters with 256 bytes to fall back to, trained on English about Python: what they become."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    made.train_from_iterator(demo_text()[:40_000].split("\n"), trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in bytes_]
    content["normalizer"], content["pre_tokenizer"] = SENTENCEPIECE[kind]
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_gives_llama_cpp_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Words, runs of spaces, characters of no token, which fall back to bytes; and back again by transformers."""
    tokenizer = sentencepiece_tokenizer(kind)
    folder = tiny_llama(tmp_path / "model", tokenizer=tokenizer)
    path = gguf_of(folder, tmp_path / "out")
    again = load_tokenizer(load(path))
    runtime = LlamaCpp(path, 1)
    for text in ("Hello there", "a  b\n\n\tc 3.14 naïve 日本語 🙂 don't", demo_text()[40_000:60_000]):
        assert runtime.tokenize(text) == plain(tokenizer, text)
        assert plain(again, text) == plain(tokenizer, text)
    runtime.close()


def opened_by_auto(model: Path, folder: Path) -> Any:
    """tokenizer.json as AutoTokenizer makes it of a GGUF file, by its own choice of a class."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(folder)
    return json.loads((folder / "tokenizer.json").read_text("utf-8"))


@pytest.mark.parametrize("kind", ["byte-level", *SENTENCEPIECE])
def test_the_class_that_converts_is_the_one_that_autotokenizer_chooses(kind: str, tiny: Path, tmp_path: Path) -> None:
    """From all of a file's metadata; ours has the rule for cutting text besides."""
    source = tiny if kind == "byte-level" else tiny_llama(tmp_path / "model", tokenizer=sentencepiece_tokenizer(kind))
    path = gguf_of(source, tmp_path / "out")
    theirs, model = opened_by_auto(path, tmp_path / "auto"), load(path)
    (tmp_path / "ours").mkdir()
    write_tokenizer(model, tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "tokenizer.json").read_text("utf-8"))
    assert {key for key in ours if ours[key] != theirs[key]} <= {"normalizer", "pre_tokenizer", "added_tokens"}
    settings = [json.loads((tmp_path / name / "tokenizer_config.json").read_text("utf-8")) for name in ("ours", "auto")]
    assert settings[0] == {key: value for key, value in settings[1].items() if "local" not in key} | {
        "add_bos_token": model.gguf is not None and bool(model.gguf.get("tokenizer.ggml.add_bos_token")),
        "add_eos_token": False,
    }


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each GGUF file that transformers converts from now on."""
    from transformers import PreTrainedTokenizerFast

    done: list[str] = []
    convert = PreTrainedTokenizerFast.from_pretrained.__func__

    def counted(cls: Any, *args: Any, **options: Any) -> Any:
        done.extend([options["gguf_file"]] if "gguf_file" in options else [])
        return convert(cls, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", classmethod(counted))
    return done


def named(folder: Path, template: str) -> Path:
    """A tiny model's GGUF file with a chat template of its own."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return gguf_of(tiny_llama(folder / "model", tokenizer=tokenizer), folder / "out")


def test_one_tokenizer_is_converted_once_and_each_caller_gets_its_own(tmp_path: Path, conversions: list[str]) -> None:
    """A copy of the file with another name in its metadata has the same tokenizer; what a caller changes stays its."""
    path = named(tmp_path, "of this test")
    first = load_tokenizer(load(path))
    first.add_tokens(["<mine>"])
    first.chat_template, first.eos_token = "mine", "a"
    model = load(path)
    assert model.gguf is not None
    again = load_tokenizer(replace(model, gguf=model.gguf.with_entries({"general.name": Value.text("another")})))
    assert (again.chat_template, again.eos_token, "<mine>" in again.get_vocab()) == ("of this test", "<end>", False)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tokenizer(model, tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert plain(load_tokenizer(model), HARD) == plain(again, HARD)
    assert len(conversions) == 1
    other = {"tokenizer.chat_template": Value.text("another")}
    assert load_tokenizer(replace(model, gguf=model.gguf.with_entries(other))).chat_template == "another"
    assert len(conversions) == 2


def test_the_latest_conversions_are_kept_and_no_more(tmp_path: Path, conversions: list[str]) -> None:
    models = [load(named(tmp_path / str(n), f"of this test, {n}")) for n in range(KEPT + 1)]
    for model in models:
        load_tokenizer(model)
    load_tokenizer(models[1])  # kept, and the latest now
    assert len(conversions) == KEPT + 1
    load_tokenizer(models[0])  # gone
    load_tokenizer(models[1])
    assert len(conversions) == KEPT + 2


def test_a_rule_that_is_not_known_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "[aeiou]"},
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"its rule for cutting text is none that llama\.cpp is known to have"):
        export(random_model(load(folder)), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_parts(folder: Path, **changes: Any) -> Path:
    """A tiny Llama whose tokenizer.json has other parts; those of its model under `model`."""
    tiny_llama(folder, tokenizer=byte_tokenizer())
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["model"].update(changes.pop("model", {}))
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return folder


NFC, LOWERCASE = {"type": "NFC"}, {"type": "Lowercase"}


@pytest.mark.parametrize("normalizer", [NFC, {"type": "Sequence", "normalizers": [NFC]}])
def test_composed_characters_are_what_llama_cpp_wants(normalizer: Any, tmp_path: Path) -> None:
    entries = gguf_tokenizer(load(with_parts(tmp_path / "model", normalizer=normalizer)))
    assert entries["tokenizer.ggml.pre"].value == "gpt-2"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"normalizer": LOWERCASE}, "normalizer: expected none, or NFC, .* got 'Lowercase'"),
        ({"normalizer": {"type": "Sequence", "normalizers": [NFC, LOWERCASE]}}, "got 'NFC, Lowercase'"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix: expected none, .* got '</w>'"),
        ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix: expected none, .* got '##'"),
    ],
)
def test_what_llama_cpp_does_to_no_text_is_refused(changes: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        gguf_tokenizer(load(with_parts(tmp_path / "model", **changes)))


@pytest.mark.parametrize("end", ["<|endoftext|>", "<end>"])
def test_a_tokenizer_in_two_files_is_converted(end: str, tmp_path: Path) -> None:
    """vocab.json and merges.txt, of GPT-2's class, which adds its own end of text, here behind the model's last row."""
    config = {"eos_token_id": 256, "vocab_size": 259}
    folder = tiny_llama(tmp_path / "model", tokenizer=byte_tokenizer(), config=config)
    pairs = {"t h": 257, "th e": 258}
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    vocabulary |= {pair.replace(" ", ""): n for pair, n in pairs.items()} | {end: 256}
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": end, "chat_template": PLAIN}), encoding="utf-8"
    )
    model = quantize(load(folder), group_size=32)
    assert has_tokenizer(model)
    tokenizer = load_tokenizer(model)
    assert tokenizer("the then")["input_ids"][0] == 258
    export(model, ["gguf", "mlx"], tmp_path)
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    entries = load(path).gguf
    assert entries is not None and entries.get("tokenizer.ggml.eos_token_id") == 256
    assert entries.get("tokenizer.chat_template") == PLAIN
    runtime = LlamaCpp(path, 1)
    assert runtime.tokenize("the then, there") == plain(tokenizer, "the then, there")
    runtime.close()
    report = verify(model, [path, tmp_path / "mlx"], level="weights")
    assert report.passed(), report.failure()
    assert all({gate.gate: gate.status for gate in each.gates}["tokenizer"] == "pass" for each in report.artifacts)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "BPE", "vocab": 3, "merges": []}}', "{}"])
def test_a_damaged_tokenizer_is_one_sentence(tiny: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer"):
        export(random_model(load(folder)), "gguf", tmp_path / "out")


PLAIN, TOOLS = "{{ messages[0]['content'] }}", "tools: {{ messages[0]['content'] }}"


def with_templates(folder: Path, how: str) -> Path:
    """A tiny Llama with a default chat template and one for tools, as transformers has kept such."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": PLAIN, "tool use": TOOLS}
    tiny_llama(folder, tokenizer=tokenizer)
    if how != "files":
        (folder / "chat_template.jinja").unlink()
        shutil.rmtree(folder / "additional_chat_templates")
        found = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        templates: Any = {"default": PLAIN, "tool use": TOOLS}
        if how == "list":
            templates = [{"name": name, "template": text} for name, text in templates.items()]
        found["chat_template"] = templates
        (folder / "tokenizer_config.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


@pytest.mark.parametrize("how", ["files", "list", "dict"])
def test_several_chat_templates_go_everywhere(how: str, tmp_path: Path) -> None:
    """GGUF's keys are gguf-py's, which take no spaces; and back again from there."""
    model = quantize(load(with_templates(tmp_path / "model", how)), group_size=32)
    assert load_tokenizer(model).chat_template == {"default": PLAIN, "tool use": TOOLS}
    export(model, ["qalora", "gptq", "gguf", "mlx", "hqq", "onnx", "openvino", "transformersjs"], tmp_path)
    for form in ("qalora", "gptq", "mlx", "hqq", "onnx", "openvino", "transformersjs"):
        artifact = load(tmp_path / form)
        assert load_tokenizer(artifact).chat_template == {"default": PLAIN, "tool use": TOOLS}
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    back = load(path)
    assert back.gguf is not None
    assert back.gguf.get("tokenizer.chat_template") == PLAIN
    assert back.gguf.get("tokenizer.chat_template.tool_use") == TOOLS
    assert list(back.gguf.get("tokenizer.chat_templates")) == ["tool_use"]
    assert load_tokenizer(back).chat_template == {"default": PLAIN, "tool_use": TOOLS}
    (plan,) = export(back, ["mlx"], tmp_path / "again")
    folder = tmp_path / "again" / "mlx"
    written = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert written == set(plan.files) and "additional_chat_templates/tool_use.jinja" in written


def test_the_keys_of_several_chat_templates_are_those_of_gguf_py(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_chat_template([{"name": "default", "template": PLAIN}, {"name": "tool use", "template": TOOLS}])
    theirs = {key: value.value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}
    ours = gguf_tokenizer(load(with_templates(tmp_path / "model", "files")))
    mine = {key: value.value for key, value in ours.items() if key.startswith("tokenizer.chat")}
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in mine.items()} == theirs


@pytest.mark.parametrize(
    ("template", "got"),
    [
        (5, "a number"),
        ([5], "a number"),
        ([{"name": "default"}], "null"),
        ({"default": 5}, "a number"),
        ([{"name": "a-b", "template": "x"}, {"name": "a b", "template": "y"}], "two that are a_b there"),
    ],
)
def test_chat_templates_that_are_none(template: Any, got: str, tmp_path: Path) -> None:
    folder = with_templates(tmp_path / "model", "list")
    (folder / "tokenizer_config.json").write_text(settings(chat_template=template), encoding="utf-8")
    with pytest.raises(InputError, match=rf"tokenizer_config\.json: chat_template: expected .*, got {got}"):
        gguf_tokenizer(load(folder))


def settings(**changes: Any) -> str:
    return json.dumps({"tokenizer_class": "TokenizersBackend", "eos_token": "<end>", **changes})


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{}", "KeyError: 'added_tokens'"),
        ("tokenizer.json", "not json", "JSONDecodeError: Expecting value: line 1 column 1"),
        ("tokenizer_config.json", "[]", "AttributeError: 'list' object"),
        ("tokenizer_config.json", settings(eos_token=5), "TypeError: Special token eos_token has to be"),
        ("tokenizer_config.json", settings(model_max_length="x"), "TypeError: '>' not supported"),
        (
            "tokenizer_config.json",
            settings(tokenizer_class="Z", auto_map={"AutoTokenizer": ["me--z.Z", None]}),
            "it is made by code of its own, which is not run here",
        ),
        ("special_tokens_map.json", "[1,", "JSONDecodeError: Expecting value: line 1 column 4"),
    ],
)
def test_what_transformers_does_not_take_is_one_sentence(name: str, content: str, reason: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", tokenizer=byte_tokenizer())
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError) as caught:
        load_tokenizer(load(folder))
    assert str(caught.value).startswith(f"{folder}: its tokenizer cannot be loaded ({reason}")
    assert "\n" not in str(caught.value) and "/tmp/tmp" not in str(caught.value)


def test_a_licence_that_is_not_utf_8_is_none_of_the_tokenizer(tmp_path: Path) -> None:
    """It travels along with the tokenizer's files, and is not read with them."""
    folder = tiny_llama(tmp_path / "model", tokenizer=byte_tokenizer())
    (folder / "LICENSE.txt").write_bytes("\u00a9 somebody".encode("latin-1"))
    model = load(folder)
    assert "LICENSE.txt" in model.files
    assert load_tokenizer(model)("a")["input_ids"]


def test_a_model_without_one(tiny_untied: Path) -> None:
    model = load(tiny_untied)
    assert not has_tokenizer(model)
    with pytest.raises(InputError, match=r"no tokenizer; put tokenizer\.json beside"):
        load_tokenizer(model)


@pytest.mark.parametrize("target", ["gguf", "onnx", "gptq", "mlx", "hqq", "qalora"])
def test_a_tokenizer_made_by_code_of_its_own_is_left_out_with_a_note(target: str, tmp_path: Path) -> None:
    """Hunyuan 7B's: tokenizer_config.json names a class in Python beside it, and there is no file that is read."""
    folder = tiny_llama(tmp_path / "model")
    settings = {"tokenizer_class": "HYTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_hy.HYTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "hy.tiktoken").write_text("IQ== 0\n", encoding="utf-8")
    (plan,) = export(random_model(load(folder)), [target], tmp_path)
    assert (
        "model: there is a tokenizer_config.json, and no tokenizer.json beside it: what is exported has no tokenizer"
        in plan.notes
    )
