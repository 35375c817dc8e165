"""docs/errors.md: every sentence that the tests of bad input see, once, by what the tests are about.

`python tools/error_docs.py` runs those tests and writes the page from what they see. In any other run each sentence has
to be on the page already.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
COLLECTED = "QALORA_COLLECTED_ERRORS"
"""Names the folder that sentences are collected in, while the page is made."""

SECTIONS = {
    "test_bad_input.py": "Command lines and artefacts",
    "test_checked_first.py::test_a_wrong_value_is_found_before_the_model": "Options, before a model is opened",
    "test_bad_models.py": "Models",
    "test_bad_adapters.py": "Adapters",
    "test_recipe.py::test_an_error_names_its_line": "Recipes",
}
"""The files, or tests, of tests/cli that see sentences, and their headings."""

_HEAD = """# Errors

Each error is one sentence: what is wrong, what was expected, what was found instead, and what to do. The exit status is
2, and nothing half-written is left behind. The sentences below are those that the tests of bad input see; they are
collected by `python tools/error_docs.py`. File names are those of the tests; `N` stands for a number of four digits or
more.
"""

_SHAPES = (
    (re.compile(r"\.out\.\w+"), "out"),  # a temporary name
    (re.compile(r"\b[0-9a-f]{64}\b"), "SHA256"),
    (re.compile(r"\d{4,}|\d{1,3}(,\d{3})+"), "N"),
)


def on_the_page(sentence: str, place: Path) -> None:
    """A sentence that a test saw, whose files are below `place`, is on the page."""
    for folder in (f"{place}/in/", f"{place}/"):
        sentence = sentence.replace(folder, "")
    sentence = re.sub("^(qalora|Error): ", "", sentence)
    for pattern, name in _SHAPES:
        sentence = pattern.sub(name, sentence)
    if COLLECTED in os.environ:
        now = os.environ["PYTEST_CURRENT_TEST"]
        section = next(title for tests, title in SECTIONS.items() if f"tests/cli/{tests}" in now)
        text = json.dumps([section, sentence])
        name = hashlib.sha256(text.encode()).hexdigest()
        (Path(os.environ[COLLECTED]) / name).write_text(text, encoding="utf-8")  # small, as some tests limit files
    else:
        assert f"* {_escaped(sentence)}" in PAGE.read_text("utf-8").splitlines(), "run python tools/error_docs.py"


def page(collected: Iterable[tuple[str, str]]) -> str:
    """The page of (section, sentence) pairs: each sentence once, under the first heading that has it."""
    sections: Mapping[str, set[str]] = {title: set() for title in SECTIONS.values()}
    for title, sentence in collected:
        sections[title].add(sentence)
    parts, before = [_HEAD], set[str]()
    for title, sentences in sections.items():
        lines = [f"* {_escaped(sentence)}" for sentence in sorted(sentences - before)]
        before |= sentences
        parts.append("\n".join([f"## {title}", "", *lines, ""]))
    return "\n".join(parts)


def _escaped(sentence: str) -> str:
    """The sentence as Markdown has it."""
    return re.sub(r"([*_<>\[\]`|\\])", r"\\\1", sentence)
