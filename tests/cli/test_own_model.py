"""With one's own model: each command's last line is the next command, from a model to a release, for three inputs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from qalora.cli import main
from qalora.testing import small_tokenizer, tiny_llama

SMALL = {
    "train": "--max-steps 2 --rank 2 --max-length 32",
    "release": "--max-tokens 32 --generate 4",
    "verify": "--max-tokens 32 --generate 4",
}
"""What keeps a command short here."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float, gptq with an adapter of PEFT's form, and model.gguf."""
    root = tmp_path_factory.mktemp("own")
    tiny_llama(root / "float", tokenizer=small_tokenizer())
    rows = [{"text": f"Line {n}: a line of text to learn from, again and again."} for n in range(60)]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        do("quantize float -o whole --zeros integer")
        do("train whole --data text.jsonl -o trained")
        do("adapter convert trained --to peft -o adapter")
        do("export whole --to gptq -o made")
        do("quantize float -o real")
        do("export real --to gguf -o made")
    (root / "made" / "gptq").rename(root / "gptq")
    next((root / "made" / "gguf").iterdir()).rename(root / "model.gguf")
    return root


def do(line: str) -> str:
    """Run a line; the last of what it prints."""
    words = shlex.split(line)
    result = CliRunner().invoke(main, [*words, *SMALL.get(words[0], "").split()])
    assert result.exit_code == 0, f"{line}: {result.output} {result.exception!r}"
    return result.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "commands"),
    [
        ("inspect float", ["quantize", "train", "release", "check"]),
        ("inspect adapter --base gptq", ["fold", "export", "verify", "release"]),
        ("inspect model.gguf", ["train", "release", "check"]),
    ],
)
def test_the_last_lines_lead_to_a_release(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, commands: list[str]
) -> None:
    for path in models.iterdir():
        if path.name not in ("whole", "real", "trained", "made") and (path.name != "adapter" or "adapter" in first):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    last, seen = do(first), []
    for command in commands:
        assert last.startswith(f"next: qalora {command} ")
        line = last.removeprefix("next: qalora ")
        if command == "release" and (tmp_path / "dist").exists():  # where the formats went that were compared
            line = line.replace("-o dist", "-o release")
        last = do(line)
        seen.append(command)
    assert seen == commands
    assert last.startswith(("next: qalora push dist ", "next: qalora check "))
