"""Docs that cannot rot: what they say of the report is what the report has, and the commands in them are commands."""

import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import pytest

from qalora.cli import COMMANDS, main
from qalora.converters import load
from qalora.formats.record_json import Key
from qalora.parity import verify
from qalora.parity.gates import GATES
from qalora.quantization import quantize
from qalora.releasing.records import Manifest
from qalora.testing import tiny_llama

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def keys_of(content: Any) -> set[str]:
    if isinstance(content, dict):
        return {*content, *(key for value in content.values() for key in keys_of(value))}
    return {key for item in content for key in keys_of(item)} if isinstance(content, list) else set()


def test_every_key_of_the_report_is_documented(tmp_path: Path) -> None:
    """Of a report in which nothing is null: another base's artefact, in a runtime that rounds nothing."""
    base = quantize(load(tiny_llama(tmp_path / "tiny")), group_size=32)
    other = tiny_llama(tmp_path / "other", seed=2)
    report = verify(base, [other], max_tokens=24, generate=2).to_json()
    text = (ROOT / "docs" / "verify.md").read_text("utf-8")
    words = set(re.findall(r"`([^`]+)`", text))
    modules = set(report["artifacts"][0]["adapter_lost_by_layer"])
    assert keys_of(report) - modules <= words
    assert {gate.name for gate in GATES} <= words


def record_keys(kind: Any) -> set[str]:
    """The keys in JSON of every record that a type is made of."""
    inner = set[str]().union(*map(record_keys, get_args(kind)))
    if not isinstance(kind, type) or not is_dataclass(kind):
        return inner
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        marks = [mark.name for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Key)]
        inner |= {*(marks or [field.name]), *record_keys(hint)}
    return inner


def test_every_key_of_the_manifest_is_documented() -> None:
    """And every digest that a tensor of a base has."""
    words = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "release.md").read_text("utf-8")))
    keys = record_keys(Manifest)
    assert {"schema", "group_size", "pool_size", "accuracy_level", "bytes", "at"} <= keys
    assert keys <= words


def commands() -> list[tuple[str, str]]:
    """Every command line of ours in the docs."""
    found = []
    for page in PAGES:
        for line in page.read_text("utf-8").splitlines():
            match = re.search(r"(?:^    |- run: |- )(qalora [a-z].*)$", line)
            if match:
                found.append((page.name, match.group(1).split("  #")[0].strip()))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_in_the_docs_parses(page: str, line: str) -> None:
    """Known command, known options: files need not exist, and a synopsis stands for what it names."""
    words = shlex.split(re.sub(r"\.\.\.", "", re.sub(r"\[(--[a-z-]+) [A-Z]+\]", r"\1 X", line)))
    context = click.Context(main)
    assert words[1] in COMMANDS
    command = main.get_command(context, words[1])
    arguments = words[2:]
    if isinstance(command, click.Group):
        command, arguments = command.get_command(context, arguments[0]), arguments[1:]
    assert command is not None
    command.make_context(words[1], arguments, resilient_parsing=False)


def test_the_docs_name_files_that_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
