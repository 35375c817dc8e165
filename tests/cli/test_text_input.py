"""Text that is not UTF-8, wherever a command takes text: one sentence, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.tokenizer import load_tokenizer
from qalora.errors import FormatError
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, tiny_llama

TEMPLATE = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float and qalora, a model with a chat template; gguf; bad.txt, whose third line is not UTF-8; half.jsonl."""
    root = tmp_path_factory.mktemp("text")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_llama(root / "float", tokenizer=tokenizer, config={"num_hidden_layers": 1})
    export(quantize(load(root / "float"), bits=4, group_size=32), ["qalora", "gguf"], root)
    (root / "bad.txt").write_bytes(b"Some words.\nAnd more.\nCaf\xe9.\n" * 40)
    (root / "half.jsonl").write_text('{"text": "words"}\n\n{"text": "cut \\ud83d"}\n', encoding="utf-8")
    (root / "bad.toml").write_bytes(b"# a recipe\n\nwork = 'caf\xe9'\n")
    (root / "half.toml").write_bytes(b'# a recipe\n\nwork = "\\ud83d"\n')
    return root


def run(place: Path, line: str, *more: str) -> Result:
    words = [word.replace("@", f"{place}/") for word in line.split()]
    return CliRunner().invoke(main, [*words, *more])


BAD, HALF = (
    "bad.txt:3: expected UTF-8 text, got the byte 0xe9; save it as UTF-8",
    "expected text that UTF-8 can hold, got half of a character (\\ud83d)",
)

FILES = {
    "train @qalora --data @bad.txt -o %": BAD,
    "train @qalora --data @half.jsonl -o %": f"half.jsonl:3: {HALF}",
    "quantize @float --method gptq --calibration @bad.txt -o %": BAD,
    "quantize @float --method gptq --calibration @half.jsonl -o %": f"half.jsonl:3: {HALF}",
    "verify @qalora @gguf --text @bad.txt": BAD,
    "verify @qalora @gguf --prompts @bad.txt": BAD,
    "release @qalora --to qalora --text @bad.txt -o %": BAD,
    "release @qalora --to qalora --card-template @bad.txt -o %": BAD,
    "check @gguf --text @bad.txt": BAD,
    "check @gguf --card-template @bad.txt": BAD,
    "run @bad.toml": "bad.toml:3: expected UTF-8 text, got the byte 0xe9",
    "run @half.toml": "half.toml:3",
}


@pytest.mark.parametrize("line", FILES)
def test_files_are_named_with_the_line(line: str, place: Path, tmp_path: Path) -> None:
    line = line.replace("%", f"{tmp_path}/out")
    plain, logged = run(place, line), run(place, line, "--log-format", "json")
    wanted = FILES[line.replace(f"{tmp_path}/out", "%")]
    assert plain.exit_code == logged.exit_code == 2, plain.output
    (said,) = [text for text in plain.stderr.splitlines() if text.startswith("qalora: ")]
    assert wanted in said
    error = json.loads(logged.stderr.splitlines()[-1])
    assert (error["event"], error["status"], error["message"]) == ("error", 2, said.removeprefix("qalora: "))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", ["caf\udce9", "cut \ud83d"])
def test_prompts_of_a_command_line(prompt: str, place: Path, tmp_path: Path) -> None:
    for line in ("verify @qalora @gguf", f"release @qalora --to qalora -o {tmp_path}/out"):
        result = run(place, line, "--prompt", prompt, "--log-format", "json")
        assert result.exit_code == 2
        assert "--prompt: expected text that UTF-8 can hold" in json.loads(result.stderr.splitlines()[-1])["message"]
    assert not list(tmp_path.iterdir())


def test_a_chat_template_is_named(place: Path, tmp_path: Path) -> None:
    """Its file with the line; or its model, where JSON holds half of a character."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    folder = tiny_llama(tmp_path / "model", tokenizer=tokenizer, config={"num_hidden_layers": 1})
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    file.write_bytes(b"{# words #}\n\xff" + TEMPLATE.encode())
    with pytest.raises(FormatError, match=r"chat_template.jinja:2: expected UTF-8 text, got the byte 0xff"):
        load_tokenizer(load(folder))
    model = quantize(load(folder), bits=4, group_size=32)
    with pytest.raises(FormatError, match=r"^[^ ]*chat_template.jinja:2: expected UTF-8 text, got the byte 0xff"):
        export(model, ["gguf"], tmp_path / "out")
    file.unlink()
    settings.write_text(json.dumps({**json.loads(settings.read_text("utf-8")), "chat_template": "a\ud83d"}), "utf-8")
    with pytest.raises(FormatError, match=r"model: its chat template: expected text that UTF-8 can hold"):
        load_tokenizer(load(folder))
    with pytest.raises(FormatError, match=r"model: its chat template: expected text that UTF-8 can hold"):
        export(quantize(load(folder), bits=4, group_size=32), ["gguf"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_s_files_are_named_with_the_line(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", tokenizer=byte_tokenizer(), config={"num_hidden_layers": 1})
    for name in ("tokenizer_config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:1] + b"\n\xff" + content[1:])
        with pytest.raises(FormatError, match=rf"{name}:2: expected UTF-8 text, got the byte 0xff"):
            load_tokenizer(load(folder))
        (folder / name).write_bytes(content)


def test_logs_are_utf_8_and_json_whatever_a_path_is(tmp_path: Path) -> None:
    """In a process of its own, whose arguments are bytes; strict readers take no escape of half a character."""
    name = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    command = [
        sys.executable,
        "-m",
        "qalora",
        "train",
        str(tmp_path),
        "--data",
        name,
        "-o",
        b"out\xff",
        "--log-format=json",
    ]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.decode("utf-8").splitlines() if line.startswith("{")]
    assert json.loads(lines[-1])["event"] == "error"
    assert not re.search(r"(?<!\\)\\ud[89a-f]", lines[-1])
