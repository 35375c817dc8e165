"""Every `qalora.X` that the docs name exists: a function, a record, a module, or a key that files of ours have."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import transformers  # noqa: F401 - before our own module that registers with it

import qalora
from qalora.converters.gguf.hyperparameters import CONFIG, MODEL_TYPE
from qalora.converters.plan import PROVENANCE
from qalora.converters.specs import TENSORS
from qalora.formats.gguf_ends import MARK

ROOT = Path(qalora.__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "qalora").rglob("*.py"))

KEYS = {TENSORS, MARK, PROVENANCE.rstrip("."), MODEL_TYPE, CONFIG}
"""What stands in files of ours."""

NAME = re.compile(r"(?<![\w./@:-])qalora(?:\.[A-Za-z_]\w*)+")
SCHEMA = re.compile(r"qalora\.[a-z]+/\d")
FILES = re.compile(r"qalora\.(?:toml|py|md|json)\b")


def found(name: str) -> Any:
    """What a dotted name is, as far as a module of it can be imported and attributes looked up."""
    parts, at = name.split("."), 1
    thing: Any = qalora
    for at, part in enumerate(parts[1:], start=1):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            thing = importlib.import_module(".".join(parts[: at + 1]))
    return thing


def names(path: Path) -> set[str]:
    text = FILES.sub("", SCHEMA.sub("", path.read_text("utf-8")))
    return {name for name in NAME.findall(text) if name not in KEYS}


def exists(name: str) -> bool:
    try:
        found(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_docs_name_exists(page: Path) -> None:
    assert {name for name in names(page) if not exists(name)} == set()


def test_what_docstrings_name_exists() -> None:
    """In backquotes, in the package itself."""
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name in re.findall(r"`(qalora(?:\.[A-Za-z_]\w*)+)`", path.read_text("utf-8"))
        if name not in KEYS and not exists(name)
    }
    assert wrong == set()


def test_a_name_that_is_none() -> None:
    assert exists("qalora.TrainOptions")
    assert exists("qalora.parity.verify")
    assert not exists("qalora.TrainSettings")
    assert not exists("qalora.parity.abacus")


def test_the_functions_that_the_readme_lists() -> None:
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    listed = re.search(r"In Python: ([^.]*(?:\.\w[^.]*)*)\. ", text)
    assert listed is not None
    shown = {name.removeprefix("qalora.") for name in re.findall(r"`([\w.]+)`", listed[1])}
    assert shown == {name for name in qalora.__all__ if name[0].islower()}
