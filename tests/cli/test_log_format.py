"""--log-format json: every line of ours on stderr is one JSON object, and the last says how it ended."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qalora.cli import COMMANDS, main
from qalora.cli.progress import EVENTS
from qalora.testing import byte_tokenizer, tiny_llama


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def events(result: Result) -> list[dict[str, Any]]:
    """Every line: a library's own, such as a bar of transformers, would fail here."""
    return [json.loads(line) for line in result.stderr.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log")
    tiny_llama(root / "float", tokenizer=byte_tokenizer(), config={"num_hidden_layers": 1})
    (root / "text.txt").write_text("A line of text to learn from, again and again. " * 60, encoding="utf-8")
    assert run("quantize", root / "float", "-o", root / "base").exit_code == 0
    return root


def test_progress_of_every_kind(place: Path, tmp_path: Path) -> None:
    lines = {
        "writing": f"quantize {place}/float -o {tmp_path}/q",
        "training": f"train {place}/base --data {place}/text.txt -o {tmp_path}/a --max-steps 3 --max-length 32",
        "reading qalora": f"verify {place}/base {place}/base --level weights",
        "reading": f"inspect {place}/base",
    }
    for stage, line in lines.items():
        result = run(*line.split(), "--log-format", "json")
        assert result.exit_code == 0, result.output
        found = events(result)
        progress = [one for one in found if one["event"] == "progress"]
        assert progress
        assert all(0 <= one["share"] <= 1 for one in progress)
        assert any(one["stage"].startswith(stage.split()[0]) for one in progress), stage
        assert found[-1] == {"event": "done", "status": 0}
        assert {one["event"] for one in found} <= set(EVENTS)
        if stage == "training":
            assert [one["step"] for one in progress] == [0, 1, 2, 3]
            assert {"steps", "loss", "held_out", "tokens_per_second", "seconds_left"} <= set(progress[0])
        if stage == "writing":
            assert progress[-1]["bytes"] == progress[-1]["total"]


def test_gates_are_events(place: Path) -> None:
    result = run("verify", place / "float", place / "base", "--level", "weights", "--log-format=json")
    gates = [one for one in events(result) if one["event"] == "gate"]
    assert gates
    assert {one["status"] for one in gates} <= {"pass", "fail", "ambiguous", "not proven"}
    assert all({"at", "gate", "status", "value", "bound", "detail"} <= set(one) for one in gates)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("quantize {}/none/at/all -o {}/out", "no such file"),
        ("quantize {}/float -o {}/out --bits 7", "expected one of 2, 3"),
        ("quantize {}/float --bitts 3 -o {}/out", "--bitts"),
        ("quantize {}/float", "--output"),
        ("run {}/none.toml", "none.toml"),
        ("nothing", "nothing"),
    ],
)
def test_errors_are_events_and_statuses_stay(place: Path, line: str, words: str) -> None:
    arguments = line.replace("{}", str(place)).split()
    plain, logged = run(*arguments), run(*arguments, "--log-format", "json")
    assert plain.exit_code == logged.exit_code == 2
    (error,) = events(logged)
    assert (error["event"], error["status"]) == ("error", 2)
    assert words in error["message"]
    assert not plain.stderr.startswith("{")


def test_every_command_that_shows_progress_has_it() -> None:
    for name in set(COMMANDS) - {"adapter", "delta"}:
        command = main.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert "log_format" in {param.name for param in command.params}, name


def test_the_events_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert rows == EVENTS
