"""Added tokens and what stands around a text: the same in llama.cpp as in transformers, or refused by name."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.cutting import CUTS
from qalora.converters.exports import export
from qalora.converters.gguf.tokenizer import gguf_tokenizer
from qalora.converters.plan import ExportOptions
from qalora.converters.tokenizer import load_tokenizer
from qalora.demo import demo_text
from qalora.errors import FormatError, InputError
from qalora.formats.gguf import Value
from qalora.parity import verify
from qalora.parity.runtimes.llamacpp import LlamaCpp
from qalora.parity.tokenizer_texts import parts_of
from qalora.testing import byte_tokenizer, chat_layout, chat_model, random_model, small_tokenizer, tiny_llama

TEXT = (
    "a  b\n\n\tc 123456 3.14 na\u00efve \u65e5\u672c\u8a9e \U0001f642 don't I'LL WHO'S   \r\n x=1;// \u00c9T\u00c9s "
    "HelloWorld fooBAR \u0440\u0443\u0441/mod\n/x" + demo_text()[:3000]
)


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")


def flagged(folder: Path, flags: Mapping[str, Mapping[str, Any]]) -> Path:
    """Give added tokens other flags, by their texts; "" stands for all others."""
    added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    changed = [{**token, **flags.get(token["content"], flags.get("", {}))} for token in added]
    edit(folder, "tokenizer.json", added_tokens=changed)
    listed = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in changed}
    edit(folder, "tokenizer_config.json", added_tokens_decoder=listed)
    return folder


def gguf_file(model: Checkpoint, folder: Path, name: str | None = None) -> Path:
    export(model, ["gguf"], folder, ExportOptions(name=name))
    (path,) = (folder / "gguf").glob("*.gguf")
    return path


def assert_the_same_in_llama_cpp(model: Checkpoint, path: Path) -> None:
    """A passage, chats and every added token, in llama.cpp and converted back; and what is put around a text."""
    tokenizer, back = load_tokenizer(model), load_tokenizer(load(path))
    runtime = LlamaCpp(path, 1)
    for part in parts_of(tokenizer, model.tensors["model.embed_tokens.weight"].shape[0]):
        assert tuple(runtime.tokenize(part.text, special=part.kind != "text")) == part.ids, part.name
        assert tuple(back(part.text, add_special_tokens=False)["input_ids"]) == part.ids, part.name
    whole = tokenizer("Hi")["input_ids"]
    assert runtime.tokenize("Hi", around=True) == whole == back("Hi")["input_ids"]
    runtime.close()


PHI3 = {token: {"rstrip": False} for token in ("<unk>", "<s>", "<|endoftext|>")} | {"": {"rstrip": True}}
PLAIN = {"": {"rstrip": False, "lstrip": False}}


@pytest.mark.parametrize("name", ["mine", "Phi-3-mine"])
def test_white_space_behind_tokens_as_phi_3_drops_it(name: str, tmp_path: Path) -> None:
    """llama.cpp knows it by general.name alone, which says so where the model is called otherwise."""
    folder = chat_model(tmp_path / name, "phi3")
    model = random_model(load(folder))
    path = gguf_file(model, tmp_path / "out")
    metadata = load(path).gguf
    assert metadata is not None
    assert metadata.get("general.name") == ("mine-phi-3" if name == "mine" else name)
    assert_the_same_in_llama_cpp(model, path)
    other = random_model(load(flagged(chat_model(tmp_path / "plain", "phi3"), PLAIN)))
    plain = LlamaCpp(gguf_file(other, tmp_path / "plain-out"), 1)
    text = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert plain.tokenize(text, special=True) != load_tokenizer(model)(text, add_special_tokens=False)["input_ids"]
    plain.close()
    renamed = load(gguf_file(load(path), tmp_path / "renamed", name="Tiny Tim"))
    assert renamed.gguf is not None and renamed.gguf.get("general.name") == "Tiny Tim-phi-3"


def test_a_name_that_says_phi_3_drops_nothing_where_the_tokenizer_does_not(tmp_path: Path) -> None:
    """With such a name llama.cpp would drop white space, or not load a vocabulary without Phi-3's tokens at all."""
    for name, layout in (("Phi-3-plain", "phi3"), ("my-phi3-of-llama", "llama3")):
        model = random_model(load(flagged(chat_model(tmp_path / name, layout), PLAIN)))
        assert_the_same_in_llama_cpp(model, gguf_file(model, tmp_path / f"{name}-out"))


@pytest.mark.parametrize(
    ("layout", "flags", "refusal"),
    [
        ("phi3", {**PHI3, "<|user|>": {"rstrip": False}}, r"rstrip of '<\|user\|>': expected none, or what Phi-3 has"),
        ("phi3", {**PLAIN, "<|end|>": {"rstrip": True}}, r"rstrip of '<\|end\|>': expected none, or what Phi-3 has"),
        ("llama3", {"<|end_header_id|>": {"rstrip": True}}, r"rstrip of '<\|end_header_id\|>'"),
        (
            "qwen3",
            {"<|im_start|>": {"lstrip": True}},
            r"lstrip of '<\|im_start\|>': expected none, as llama\.cpp has no",
        ),
        ("smollm2", {"<repo_name>": {"single_word": True}}, r"single_word of '<repo_name>'"),
        ("phi3", {"<|user|>": {"normalized": True}}, r"normalized of '<\|user\|>'"),
    ],
)
def test_a_flag_that_llama_cpp_does_not_have_is_refused(
    layout: str, flags: Mapping[str, Any], refusal: str, tmp_path: Path
) -> None:
    model = random_model(load(flagged(chat_model(tmp_path / "model", layout), flags)))
    with pytest.raises(InputError, match=refusal):
        export(model, ["gguf"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


KEPT: dict[str, tuple[Mapping[str, Any], str]] = {
    "phi4": (
        {},
        r"behind <\|endoftext\|>, <\|fim_prefix\|>, <\|im_start\|> and 3 more, and keeps .* before <\|endoftext\|>, ",
    ),
    "phi4-mini": ({}, r"behind <\|assistant\|>, <\|end\|>, <\|user\|> and 4 more: "),
    "llama3": ({"<|eot_id|>": {"rstrip": True}}, r"behind <\|eot_id\|>: "),
    "smollm3": ({"<|im_end|>": {"lstrip": True}}, r"before <\|im_end\|>: "),
    "phi3": (
        {"</s>": {"rstrip": False}, "<|placeholder1|>": {"rstrip": False}},
        r"llama\.cpp drops white space that the tokenizer keeps behind </s>, <\|placeholder1\|>: ",
    ),
}


@pytest.mark.parametrize("layout", KEPT)
def test_white_space_that_no_chat_has_is_kept_with_a_note(layout: str, tmp_path: Path) -> None:
    """Chats are the same; what the note says is so: a message that begins or ends with white space is not."""
    flags, words = KEPT[layout]
    model = random_model(load(flagged(chat_model(tmp_path / "model", layout), flags)))
    (plan,) = export(model, ["gguf"], tmp_path / "out")
    (note,) = [note for note in plan.notes if "white space" in note]
    assert re.search(words, note), note
    tokenizer, (path,) = load_tokenizer(model), (tmp_path / "out" / "gguf").glob("*.gguf")
    runtime = LlamaCpp(path, 1)

    def same(text: str) -> bool:
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        said = tokenizer.apply_chat_template([*chat, *chat], tokenize=False)
        ids: list[int] = tokenizer(said, add_special_tokens=False)["input_ids"]
        return runtime.tokenize(said, special=True) == ids

    assert same("It is. \n Is it?")
    assert same(" It is. \n") == (layout in ("llama3", "phi3")), "whose template trims, or whose tokens do"
    runtime.close()
    report = verify(model, [path], level="logits", max_tokens=8)
    assert report.passed()
    assert {result.status for _, result in report.results() if result.gate == "tokenizer"} == {"ambiguous"}


def test_white_space_is_not_kept_where_no_chat_is_known(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "model", "phi4-mini")
    edit(folder, "tokenizer_config.json", chat_template=None)
    with pytest.raises(InputError, match=r"rstrip of '<\|assistant\|>'"):
        export(random_model(load(folder)), ["gguf"], tmp_path / "out")


def test_runs_of_spaces_that_are_added_tokens(tmp_path: Path) -> None:
    """As Gemma has them: no text has their character, so that they are joined and never looked for."""
    model = random_model(load(chat_model(tmp_path / "model", "gemma2")))
    path = gguf_file(model, tmp_path / "out")
    tokenizer, runtime = load_tokenizer(model), LlamaCpp(path, 1)
    for length in range(1, 12):
        text = f"a{' ' * length}b\n{' ' * length}\n\n\n"
        assert runtime.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], length
    runtime.close()
    assert_the_same_in_llama_cpp(model, path)


def processor(*before: str, behind: tuple[str, ...] = ()) -> Any:
    """tokenizer.json's step that puts tokens of a byte tokenizer around a text."""
    ids = {"<end>": 256, "a": 64}
    special = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    last = [{"SpecialToken": {"id": token, "type_id": 0}} for token in behind]
    text = [*special, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    names = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in {*before, *behind}}
    return {"type": "TemplateProcessing", "single": text, "pair": text, "special_tokens": names}


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (processor(behind=("<end>",)), {}),
        (processor("<end>", behind=("<end>",)), {"bos_token": "<end>"}),
        (processor("<end>"), {"bos_token": "<end>", "add_bos_token": False}),
        (None, {"bos_token": "<end>", "add_bos_token": True, "add_eos_token": True}),
    ],
)
def test_what_stands_around_a_text(step: Any, settings: Any, tmp_path: Path) -> None:
    """By the post-processor, and by tokenizer_config.json where transformers' class listens to it."""
    folder = tiny_llama(tmp_path / "model", tokenizer=byte_tokenizer())
    edit(folder, "tokenizer.json", post_processor=step)
    edit(folder, "tokenizer_config.json", **settings)
    theirs = AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    adds = (theirs[0] == 256, theirs[-1] == 256)
    assert any(adds) or settings
    model = random_model(load(folder))
    path = gguf_file(model, tmp_path / "out")
    metadata = load(path).gguf
    assert metadata is not None
    assert tuple(metadata.get(f"tokenizer.ggml.add_{key}_token") for key in ("bos", "eos")) == adds
    assert_the_same_in_llama_cpp(model, path)


@pytest.mark.parametrize("dropped", [("add_bos_token",), ("add_bos_token", "bos_token_id")])
@pytest.mark.parametrize("layout", ["llama3.1", "mistral-nemo", "qwen2.5", "phi3", "gemma2"])
def test_what_a_file_does_not_say_is_llama_cpps_own(layout: str, dropped: tuple[str, ...], tmp_path: Path) -> None:
    """Files of Llama 3 were made without a word on BOS, which llama.cpp puts there by the name of the rule."""
    model = load(gguf_file(random_model(load(chat_model(tmp_path / "model", layout))), tmp_path / "whole"))
    assert model.gguf is not None
    names = {f"tokenizer.ggml.{key}" for key in dropped}
    entries = {key: value for key, value in model.gguf.entries.items() if key not in names}
    path = gguf_file(replace(model, gguf=replace(model.gguf, entries=entries)), tmp_path / "less")
    runtime = LlamaCpp(path, 1)
    assert load_tokenizer(load(path))("Hi there")["input_ids"] == runtime.tokenize(
        "Hi there", special=True, around=True
    )
    runtime.close()


def test_anything_else_around_a_text_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", tokenizer=byte_tokenizer())
    edit(folder, "tokenizer.json", post_processor=processor("<end>", "<end>"))
    edit(folder, "tokenizer_config.json", bos_token="<end>")
    with pytest.raises(
        InputError, match=r"puts nothing around a text but BOS.*got \[256, 256\] before and \[\] behind"
    ):
        gguf_tokenizer(load(folder))


@pytest.mark.parametrize("layout", ["llama3.1", "qwen2.5", "gemma2"])
def test_added_tokens_of_other_scripts(layout: str, tmp_path: Path) -> None:
    """As DeepSeek has them, with full-width bars and SentencePiece's space: whole in the file, and back from there."""
    folder = chat_model(tmp_path / "model", layout)
    names = {
        "llama3.1": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|python_tag|>"),
        "qwen2.5": ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<tool_call>"),
        "gemma2": ("<bos>", "<eos>", "<end_of_turn>", "<table>"),
    }[layout]
    others = (
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend of sentence\uff5c>",
        "[\u89d2\u8272]",
        "<\xe9\U0001f642>",
    )
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        content = path.read_text("utf-8")
        for name, other in zip(names, others, strict=True):
            content = content.replace(name, other)
        path.write_text(content, encoding="utf-8")
    model = random_model(load(folder))
    path = gguf_file(model, tmp_path / "out")
    assert_the_same_in_llama_cpp(model, path)
    back, theirs = load_tokenizer(load(path)), load_tokenizer(model)
    assert back.eos_token_id == theirs.eos_token_id
    assert len(back) <= model.tensors["model.embed_tokens.weight"].shape[0], "none is new"
    report = verify(model, [path], level="weights")
    assert report.passed(), report.failure()


def test_merges_that_are_ignored_or_not(tmp_path: Path) -> None:
    """Llama 3's rule has two names in llama.cpp; GPT-2's has only that which does not ignore them."""
    folder = chat_model(tmp_path / "model", "llama3")
    for flag, name in ((True, "llama-bpe"), (False, "smaug-bpe")):
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        edit(folder, "tokenizer.json", model={**content["model"], "ignore_merges": flag})
        model = random_model(load(folder))
        assert gguf_tokenizer(model)["tokenizer.ggml.pre"].value == name
        assert_the_same_in_llama_cpp(model, gguf_file(model, tmp_path / name))
    other = tiny_llama(tmp_path / "other", tokenizer=small_tokenizer())
    content = json.loads((other / "tokenizer.json").read_text("utf-8"))
    edit(other, "tokenizer.json", model={**content["model"], "ignore_merges": True})
    with pytest.raises(InputError, match=r"ignore_merges: expected false, as llama\.cpp has it .*, got true"):
        gguf_tokenizer(load(other))


@pytest.fixture(scope="module")
def cut_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cuts")
    return gguf_file(random_model(load(tiny_llama(root / "model", tokenizer=small_tokenizer(size=700)))), root)


def renamed(path: Path, pre: str, folder: Path) -> Path:
    """The file with another name for its rule."""
    model = load(path)
    assert model.gguf is not None
    return gguf_file(replace(model, gguf=model.gguf.with_entries({"tokenizer.ggml.pre": Value.text(pre)})), folder)


@pytest.mark.parametrize("rule", CUTS)
def test_every_name_of_a_rule_is_llama_cpps(rule: str, cut_file: Path, tmp_path: Path) -> None:
    for name in (rule, *CUTS[rule].also):
        path = renamed(cut_file, name, tmp_path / name)
        runtime = LlamaCpp(path, 1)
        found = runtime.tokenize(TEXT)
        runtime.close()
        assert load_tokenizer(load(path))(TEXT, add_special_tokens=False)["input_ids"] == found, name


@pytest.mark.parametrize(
    ("layout", "pre"),
    [
        ("olmo2", "smaug-bpe"),
        ("granite3", "smollm"),
        ("granite4", "smaug-bpe"),
        ("seed-oss", "seed-coder"),
        ("hunyuan", "deepseek-v3"),
        ("ernie4.5", "default"),
        ("glm4", "smaug-bpe"),
        ("exaone4", "gpt-2"),
        ("ministral3", "tekken"),
    ],
)
def test_rules_of_the_later_families_in_the_words_of_their_files(layout: str, pre: str, tmp_path: Path) -> None:
    """Under a name of the rule in llama.cpp, whose tokens are the same; the first name that it has for it."""
    model = random_model(load(chat_model(tmp_path / "model", layout)))
    path = gguf_file(model, tmp_path / "out")
    metadata = load(path).gguf
    assert metadata is not None and metadata.get("tokenizer.ggml.pre") == pre
    assert_the_same_in_llama_cpp(model, path)
    text = TEXT + "    \n\n  x\r\n\r\n ... \u304b\u30ab\u6f22\ud55c e\u0301 #define @user.name (one)\n;;\n"
    runtime = LlamaCpp(path, 1)
    assert runtime.tokenize(text) == load_tokenizer(model)(text, add_special_tokens=False)["input_ids"]
    runtime.close()


@pytest.mark.parametrize("pre", ["deepseek-llm", "default", "falcon"])
def test_a_rule_that_is_not_known_is_carried_and_never_converted(pre: str, cut_file: Path, tmp_path: Path) -> None:
    model = load(renamed(cut_file, pre, tmp_path / "source"))
    for target in ("onnx", "openvino", "transformersjs", "mlx", "gptq", "hqq", "qalora"):
        with pytest.raises(FormatError, match=rf"tokenizer\.ggml\.pre: expected a rule .* here: .*, got '{pre}'"):
            export(model, [target], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    path = gguf_file(model, tmp_path / "again")
    report = verify(model, [path], level="logits", max_tokens=24)
    assert report.passed(), report.failure()
    assert report.text == "random tokens, since its rule for cutting text is not known here"


def test_a_chat_template_with_other_line_ends_is_the_same(tmp_path: Path) -> None:
    """transformers reads a file's lines, and Jinja ends them its own way, whatever the file has."""
    lines = "{% for m in messages %}\r\n{{ m['content'] }}\r\n{% endfor %}"
    folder = tiny_llama(tmp_path / "model", tokenizer=byte_tokenizer())
    (folder / "chat_template.jinja").write_bytes(lines.encode())
    model = random_model(load(folder))
    path = gguf_file(model, tmp_path / "out")
    metadata = load(path).gguf
    assert metadata is not None and metadata.get("tokenizer.chat_template") == lines.replace("\r\n", "\n")
    export(model, ["mlx"], tmp_path)
    assert (tmp_path / "mlx" / "chat_template.jinja").read_bytes() == lines.encode()
    report = verify(model, [path, tmp_path / "mlx"], level="weights")
    assert report.passed(), report.failure()


def test_added_tokens_of_a_file_are_those_that_llama_cpp_looks_for(tmp_path: Path) -> None:
    """Special ones, those of users, and none else; they come back with these parts."""
    layout = chat_layout("qwen3")
    model = random_model(load(chat_model(tmp_path / "model", layout)))
    back = load_tokenizer(load(gguf_file(model, tmp_path / "out")))
    mine, theirs = (one.added_tokens_decoder for one in (back, layout.tokenizer))
    assert {n: token.content for n, token in mine.items()} == {n: token.content for n, token in theirs.items()}
    assert mine[layout.token("<|im_end|>")].special
    assert_the_same_in_llama_cpp(model, tmp_path / "out" / "gguf" / next((tmp_path / "out" / "gguf").iterdir()).name)
