"""What the options of the card become, in a command that has them and nothing else."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from qalora.cli.options import options_of, record_from
from qalora.formats.record_json import encode
from qalora.options import fields_of
from qalora.options.export import Export
from qalora.options.release import Card, Package
from qalora.options.verify import Verify
from qalora.releasing.options import ReleaseOptions


@click.command()
@options_of(Package, leave_out=["out"])
def command(**settings: Any) -> None:
    package = record_from(Package, settings, out="dist")
    assert not settings
    made = ReleaseOptions.of(Export(targets=("gguf",)), Verify(), package, None)
    click.echo(json.dumps({"card": encode(made.card), "template": made.template}))


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
    assert set(found["card"]) == {one.name for one in fields_of(Card)}
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
