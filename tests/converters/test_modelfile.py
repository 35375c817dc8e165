"""Modelfiles: read by a parser and rendered by a renderer of Go templates that are this file's own, and compared with
what transformers makes of the same messages with the model's chat template."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.gguf import rendering
from qalora.converters.gguf.chat import turns_of
from qalora.converters.gguf.modelfile import modelfile
from qalora.demo import smollm2_file
from qalora.errors import FormatError
from qalora.formats.gguf import Metadata, Value, ValueType
from qalora.parity.artifacts import recognize
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, tiny_llama

Message = dict[str, str]


def chat(*contents: str, system: str | None = None) -> list[Message]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CHATS = [
    chat("Hi!"),
    chat("Hi!", "Hello, you.", "What is {{ this }}?"),
    chat("one", "two", "three", "four", 'a "fifth"\n\nline with \\n and é'),
]
WITH_SYSTEM = [chat("Hi!", system="Be brief."), chat("a", "b", "c", "d", "e", system="Be brief.\nAnd kind.")]


def commands(text: str) -> list[tuple[str, str]]:
    """Ollama's parser.go, without what it refuses: instruction, white space, a value, quoted or to the line's end."""
    found, at = [], 0
    while at < len(text):
        if text[at] in "\n \t":
            at += 1
        elif text[at] == "#":
            at = text.index("\n", at) + 1
        else:
            name = re.compile(r"[A-Za-z]+(?: stop)?").match(text, at)
            assert name is not None, text[at : at + 40]
            at = name.end() + 1
            quote = '"""' if text.startswith('"""', at) else '"' if text.startswith('"', at) else ""
            at += len(quote)
            end = next(
                place
                for place in range(at, len(text))
                if text.startswith(quote or "\n", place) and text[place + len(quote)] in " \t\n"
            )
            found.append((name[0], "".join(char for char in text[at:end] if char.isprintable() or char in "\n\t")))
            at = end + len(quote)
    return found


def value(expression: str, scope: dict[str, Any], dot: Any) -> Any:
    """An operand or a call of Go's text/template: fields, variables, strings, numbers, eq, and, not, len, slice."""
    words = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+', expression)

    def operand() -> Any:
        word = words.pop(0)
        if word == "(":
            found = call()
            assert words.pop(0) == ")"
            return found
        if word[0] == '"':
            return word[1:-1]
        if word.isdigit():
            return int(word)
        root, *fields = word.split(".")
        found = scope[root] if root else dot
        for field in fields:
            found = found[field]
        return found

    def call() -> Any:
        functions: dict[str, Callable[..., Any]] = {
            "eq": lambda a, b: a == b,
            "and": lambda a, b: a and b,
            "not": lambda a: not a,
            "len": len,
            "slice": lambda a, start: a[start:],
        }
        function = functions[words.pop(0)] if words[0] in functions else None
        found = []
        while words and words[0] != ")":
            found.append(operand())
        return function(*found) if function is not None else found[0]

    return call()


def go(template: str, messages: list[Message]) -> str:
    """A Go template as Ollama executes it: .System and .Messages at the top, $ the top."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    top = {"System": system, "Messages": turns}
    pieces = re.split(r"\{\{(.*?)\}\}", template)
    tokens = [(n % 2 == 1, piece.strip() if n % 2 else piece) for n, piece in enumerate(pieces)]
    assert not any(action and "-" in piece[:1] + piece[-1:] for action, piece in tokens), "no trim markers here"
    out: list[str] = []
    run(tokens, 0, {"$": top}, top, out, live=True)
    return "".join(out)


def run(tokens: list[tuple[bool, str]], at: int, scope: dict[str, Any], dot: Any, out: list[str], live: bool) -> int:
    """Run until the end of a block; gives the place of what ends it."""
    while at < len(tokens):
        action, text = tokens[at]
        if not action:
            out.extend([text] if live else [])
        elif text == "end" or text.startswith("else"):
            return at
        elif text.startswith("if "):
            at = branch(tokens, at, text[3:], scope, dot, out, live)
        elif text.startswith("range "):
            at = repeat(tokens, at, text[6:], scope, dot, out, live)
        elif assigned := re.match(r"(\$\w*) :?= (.*)", text):
            scope.update({assigned[1]: value(assigned[2], scope, dot)} if live else {})
        else:
            out.extend([str(value(text, scope, dot))] if live else [])
        at += 1
    return at


def branch(
    tokens: list[tuple[bool, str]],
    at: int,
    condition: str,
    scope: dict[str, Any],
    dot: Any,
    out: list[str],
    live: bool,
) -> int:
    taken = False
    while True:
        chosen = live and not taken and (not condition or bool(value(condition, scope, dot)))
        at = run(tokens, at + 1, scope, dot, out, chosen)
        taken = taken or chosen
        if tokens[at][1] == "end":
            return at
        condition = tokens[at][1].removeprefix("else").strip().removeprefix("if ")


def repeat(
    tokens: list[tuple[bool, str]], at: int, over: str, scope: dict[str, Any], dot: Any, out: list[str], live: bool
) -> int:
    names, _, expression = over.rpartition(":=")
    variables = [name.strip() for name in names.split(",")] if names else []
    items = value(expression, scope, dot) if live else []
    end = run(tokens, at + 1, dict(scope), None, [], live=False)
    for n, item in enumerate(items):
        scope.update(dict(zip(variables, (n, item), strict=False)))
        run(tokens, at + 1, scope, item, out, live)
    return end


def tokens_of(*tokens: str, bos: bool = False) -> dict[str, Value]:
    """Metadata of a vocabulary of control tokens, of which the first is BOS and the second EOS."""
    return {
        "tokenizer.ggml.tokens": Value(type=ValueType.ARRAY, element=ValueType.STRING, value=tokens),
        "tokenizer.ggml.token_type": Value(type=ValueType.ARRAY, element=ValueType.INT32, value=(3,) * len(tokens)),
        "tokenizer.ggml.bos_token_id": Value.uint32(0),
        "tokenizer.ggml.eos_token_id": Value.uint32(1),
        "tokenizer.ggml.add_bos_token": Value(type=ValueType.BOOL, value=bos),
    }


def made(template: str, *tokens: str, bos: bool = False) -> tuple[str, list[tuple[str, str]]]:
    entries = {
        "tokenizer.chat_template": Value.text(template),
        **tokens_of(*tokens, bos=bos),
    }
    text = modelfile(Metadata(entries=entries), ["m.gguf"])
    return text, commands(text)


def jinja(template: str, messages: list[Message], bos: str, eos: str) -> str:
    timeless = template.replace("strftime_now is defined", "false")
    rendered, _ = render_jinja_template(
        [messages], chat_template=timeless, add_generation_prompt=True, bos_token=bos, eos_token=eos
    )
    return str(rendered[0])


def check(template: str, tokens: tuple[str, ...], *, bos: bool, chats: list[list[Message]]) -> list[tuple[str, str]]:
    """Hold the Go template against the Jinja template in every chat; SYSTEM is what Ollama puts where there is none."""
    _, found = made(template, *tokens, bos=bos)
    given = dict(found)
    assert "TEMPLATE" in given
    for messages in chats:
        default = [{"role": "system", "content": given["SYSTEM"]}] if "SYSTEM" in given else []
        asked = messages if messages[0]["role"] == "system" else [*default, *messages]
        expected = jinja(template, messages, tokens[0], tokens[1])
        assert go(given["TEMPLATE"], asked) == (expected.removeprefix(tokens[0]) if bos else expected)
    return found


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% set sys = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
    "{% set sys = messages[0].content %}{% set rest = messages[1:] %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: '}}"
    "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}"
    "{{ '\n\n' + sys + '<|eot_id|>' }}"
    "{% for m in rest %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}"
)
GEMMA3 = (
    "{{ bos_token }}{% set first = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% endif %}{% for m in rest %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '')"
    " + (m.content | trim) + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA2 = GEMMA3.replace(
    "{% set first = messages[0].content + '\n\n' %}", "{{ raise_exception('System role not supported') }}"
)
LLAMA2 = (
    "{% set first = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
    "{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% set last = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
    "{% set last = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (last if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (GEMMA3, "<end_of_turn>"),
        (LLAMA2, "</s>"),
        (MISTRAL, "</s>"),
        (PHI3, "<|end|>"),
    ],
    ids=["chatml", "llama3", "gemma3", "llama2", "mistral", "phi3"],
)
def test_known_turns(template: str, end: str, bos: bool) -> None:
    found = check(template, ("<s>", "</s>", end), bos=bos, chats=[*CHATS, *WITH_SYSTEM])
    assert [stop for name, stop in found if name == "PARAMETER stop"] == list(dict.fromkeys(["</s>", end]))
    assert found[0] == ("FROM", "./m.gguf")


def test_a_template_that_refuses_system_messages() -> None:
    found = check(GEMMA2, ("<bos>", "<eos>"), bos=True, chats=CHATS)
    assert "SYSTEM" not in dict(found)
    text, _ = made(GEMMA2, "<bos>", "<eos>", bos=True)
    assert "takes no system message" in text


def test_smollm2() -> None:
    """A default system message becomes SYSTEM; BOS, which opens every message here, stays with the messages."""
    metadata = load(smollm2_file()).gguf
    assert metadata is not None
    found = commands(modelfile(metadata, ["m.gguf"]))
    given = dict(found)
    assert given["SYSTEM"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    template = metadata.get("tokenizer.chat_template")
    for messages in [*CHATS, *WITH_SYSTEM]:
        asked = messages if messages[0]["role"] == "system" else [*chat(system=given["SYSTEM"]), *messages]
        assert go(given["TEMPLATE"], asked) == jinja(template, messages, "<|im_start|>", "<|im_end|>")
    assert ("PARAMETER stop", "<|im_end|>") in found


def unknown() -> Iterator[tuple[str, str]]:
    yield "numbered", "{% for m in messages %}{{ loop.index ~ m.role ~ ':' ~ m.content ~ '\n' }}{% endfor %}"
    yield "upper case", CHATML.replace("m.content", "m.content | upper")
    yield "JSON", CHATML.replace("m.content", "(m.content | tojson)")
    yield "only the last", "{{ '<u>' + messages[-1].content + '</u>' }}"
    yield "twice", CHATML.replace("m.content", "m.content + m.content")
    yield "no Jinja", "{% for m in messages %}"
    yield "raises", "{{ raise_exception('no') }}"
    yield "the system message at the end", MISTRAL.replace("'[INST] ' + (last", "'[INST] ' + m.content + (last")
    yield "forever", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + CHATML
    yield "all memory", "{% set a = 'x' * 99999999999 %}" + CHATML
    yield "escapes", "{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML
    yield "does not print", CHATML.replace("<|im_end|>", "<|im\u200bend|>")
    yield "quotes", CHATML.replace("<|im_end|>", '""" \nFROM ./other.gguf\n')


@pytest.mark.parametrize("template", [pytest.param(text, id=name) for name, text in unknown()])
def test_what_is_not_recognised_is_left_to_ollama(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, found = made(template, "<s>", "</s>")
    assert [name for name, _ in found] == ["FROM", "PARAMETER stop"]
    assert "# The chat template of the file is none" in text


def test_texts_with_braces_and_percent_signs() -> None:
    template = (
        "{% for m in messages %}{{ '{{ .' + m.role + ' %s\n' + m.content + '}}\n' }}{% endfor %}"
        "{{ '{{ .assistant %s\n' if add_generation_prompt }}"
    )
    check(template, ("<s>", "</s>"), bos=False, chats=[*CHATS, *WITH_SYSTEM])


@pytest.mark.parametrize("token", ['a"b', "two\nlines", "", "x" * 200, "\u200b"])
def test_end_tokens_that_cannot_be_said(token: str) -> None:
    _, found = made(CHATML, "<s>", token)
    assert "PARAMETER stop" not in dict(found)


def test_no_template_at_all() -> None:
    text = modelfile(Metadata(entries=tokens_of("<s>", "</s>")), ["m.gguf"])
    assert commands(text) == [("FROM", "./m.gguf"), ("PARAMETER stop", "</s>")]
    assert "has no chat template" in text


@pytest.mark.parametrize("key", ["tokens", "token_type"])
@pytest.mark.parametrize("value", [Value.uint32(5), Value.text("abc")])
def test_a_vocabulary_that_is_no_list(key: str, value: Value) -> None:
    template = Value.text(CHATML)
    entries = {**tokens_of("<s>", "<|im_end|>"), "tokenizer.chat_template": template, f"tokenizer.ggml.{key}": value}
    with pytest.raises(FormatError, match=f"tokenizer.ggml.{key}: expected a list, got "):
        modelfile(Metadata(entries=entries), ["m.gguf"])


def test_the_child_gives_nothing_long() -> None:
    job = {"template": "{{ 'x' * 99999 }}", "tokens": {}, "chats": [{"messages": []}]}
    assert rendering.render(job) == [None]
    assert turns_of("x" * 100_000, bos="", eos="", adds_bos=False) is None


def test_it_lies_beside_the_file_and_disturbs_nobody(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "float", tokenizer=byte_tokenizer())
    model = quantize(load(tmp_path / "float"), bits=4, group_size=32)
    (plan,) = export(model, ["gguf"], tmp_path)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    recipe = tmp_path / "gguf" / "Modelfile"
    assert plan.files == {file.name: file.stat().st_size, "Modelfile": recipe.stat().st_size}
    assert commands(recipe.read_text("utf-8")) == [("FROM", f"./{file.name}"), ("PARAMETER stop", "<end>")]
    assert [artifact.path for artifact in recognize([tmp_path / "gguf"])] == [file]
