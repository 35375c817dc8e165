"""What the options of the card become, in a command that has them and nothing else."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from qalora.cli.card import card_options, card_settings
from qalora.release.options import CARD_KEYS


@click.command()
@card_options
def command(**settings: Any) -> None:
    click.echo(json.dumps(card_settings(settings)))
    assert not settings


def told(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_nothing_told() -> None:
    assert told() == {"card": {}, "template": None}


def test_everything_told(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("---\n{{ card_data }}\n---\n", encoding="utf-8")
    words = ["--base-model", "a/b", "--license", "mit", "--license-link", "https://x", "--quantized-by", "me"]
    words += ["--language", "en", "--language", "de", "--dataset", "c/d", "--card-template", str(tmp_path / "card.md")]
    found = told(*words)
    assert found["template"] == "---\n{{ card_data }}\n---\n"
    assert set(found["card"]) == set(CARD_KEYS)
    assert found["card"]["language"] == ["en", "de"] and found["card"]["datasets"] == ["c/d"]
    assert found["card"]["license"] == "mit"


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"x" * (1 << 21)], ids=["missing", "no UTF-8", "large"])
def test_templates_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "card.md"
    if content is not None:
        path.write_bytes(content)
    result = CliRunner().invoke(command, ["--card-template", str(path)])
    assert result.exit_code == 1
    assert "card.md" in str(result.exception)
