"""Docs that cannot rot: what they say of the report is what the report has, and the commands in them are commands."""

import re
import shlex
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import pytest

from pages import DOCS, PAGES, ROOT, anchors, blocks, links, quoted, shell_lines
from qalora.cli import COMMANDS, main
from qalora.converters import load
from qalora.formats.record_json import Key
from qalora.options.words import LOSSES
from qalora.parity import verify
from qalora.parity.gates import GATES
from qalora.quantization import quantize
from qalora.releasing.records import Manifest
from qalora.testing import tiny_llama


def keys_of(content: Any) -> set[str]:
    if isinstance(content, dict):
        return {*content, *(key for value in content.values() for key in keys_of(value))}
    return {key for item in content for key in keys_of(item)} if isinstance(content, list) else set()


def test_every_key_of_the_report_is_documented(tmp_path: Path) -> None:
    """Of a report in which nothing is null: another base's artefact, in a runtime that rounds nothing."""
    base = quantize(load(tiny_llama(tmp_path / "tiny")), group_size=32)
    other = tiny_llama(tmp_path / "other", seed=2)
    report = verify(base, [other], max_tokens=24, generate=2).to_json()
    words = quoted(ROOT / "docs" / "verify.md")
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
    words = quoted(ROOT / "docs" / "release.md")
    keys = record_keys(Manifest)
    assert {"schema", "group_size", "pool_size", "accuracy_level", "bytes", "at"} <= keys
    assert keys <= words


def commands() -> list[tuple[str, str]]:
    """Every command line of ours in the docs: in `sh` blocks, indented, and in workflows."""
    found = []
    for page in PAGES:
        lines = [line for line in shell_lines(page) if line.startswith("qalora ")]
        for line in page.read_text("utf-8").splitlines():
            match = re.search(r"(?:^    |- run: |- )(qalora [a-z].*)$", line)
            if match:
                lines.append(match.group(1).split("  #")[0].strip())
        found += [(page.name, line) for line in lines]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_anchor_of_the_docs_leads_somewhere(page: Path) -> None:
    """And pages below docs/ link to nothing outside, which a site would not have."""
    for target in links(page):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if page in DOCS:
            assert file.resolve().is_relative_to(ROOT / "docs"), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_the_site_has_every_page() -> None:
    """Each page is in the navigation once, and nothing else is."""
    shown = re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(shown) == [str(page.relative_to(ROOT / "docs")) for page in DOCS]


def test_links_and_anchors_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n\n## C, d - e\n\n[x](y.md#z) `[no](no.md)`\n\n```sh\n[no](no.md)\n```\n", "utf-8")
    assert links(page) == ["y.md#z"]
    assert anchors(page) == {"a-b"}  # GitHub has c-d---e, a site c-d-e


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_what_the_readme_shows_of_the_demo_is_what_the_demo_printed() -> None:
    (shown,) = [block for block in blocks(ROOT / "README.md") if block.language == "text"]
    printed = (ROOT / "docs" / "demo.md").read_text("utf-8")
    for line in shown.text.splitlines():
        assert line == "..." or f"\n    {line}\n" in printed


def test_every_loss_and_extra_is_documented() -> None:
    losses = set(re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "formats.md").read_text("utf-8"), re.MULTILINE))
    assert losses == set(LOSSES)
    extras = set(re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "install.md").read_text("utf-8"), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert extras | {"peft", "demo"} == set(project["optional-dependencies"])
