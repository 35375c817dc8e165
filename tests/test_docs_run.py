"""What README, docs and docstrings tell to run is run: on tiny models that lie where the examples name them."""

import ast
import doctest
import importlib
import json
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from pages import DOCS, ROOT, Block, blocks, shell_lines
from qalora.cli import main
from qalora.demo import demo_text
from qalora.testing import small_tokenizer, tiny_llama

README = ROOT / "README.md"
SOURCES = sorted((ROOT / "qalora").rglob("*.py"))
SETUP = (r"git clone <this repository>", r"cd qalora", r"python3 -m venv \.venv", r"\. \.venv/bin/activate")
"""What README has a newcomer do before; CI does it on a clean clone, by tools/test."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples start from: a float model under its Hub id, texts, rows."""
    place = tmp_path_factory.mktemp("inputs")
    tiny_llama(place / "HuggingFaceTB" / "SmolLM2-135M", tokenizer=small_tokenizer())
    text = demo_text()
    (place / "text.txt").write_text(text[:60_000], encoding="utf-8")
    rows = [json.dumps({"text": text[at : at + 2000]}) for at in range(0, 20_000, 2000)]
    (place / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return place


def fresh(inputs: Path, place: Path) -> Path:
    """A folder that has those inputs, and nothing else."""
    place.mkdir(parents=True, exist_ok=True)
    for entry in inputs.iterdir():
        (place / entry.name).symlink_to(entry)
    return place


def command(line: str) -> None:
    """Run a line of ours here."""
    result = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
    assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.fixture(scope="module")
def world(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every command of the README ran, in its order, and the one that makes `folded`."""
    place = fresh(inputs, tmp_path_factory.mktemp("world") / "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for line in shell_lines(README):
            for part in line.split(" && "):
                if part.startswith("qalora "):
                    command(part)
        command("qalora fold base adapter -o folded")
    return place


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_readme_runs(world: Path) -> None:
    made = {"base", "adapter", "dist", "dist-edge", "report.json"}
    assert made <= {path.name for path in world.iterdir()}
    assert {path.name for path in (world / "dist").iterdir()} >= {"gptq", "onnx", "gguf", "report.json", "SHA256SUMS"}
    assert json.loads((world / "report.json").read_text("utf-8"))["passed"] is True


def test_every_other_command_of_the_readme_is_setting_up_or_a_script_of_ours() -> None:
    """No line is left over. tools/test is CI itself; what tools/demo runs is run in tests/release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    seen = set()
    for part in (part for line in shell_lines(README) for part in line.split(" && ")):
        if part.startswith("qalora "):
            continue
        if install := re.fullmatch(r"pip install -c (\S+) '\.\[([\w,-]+)\]'", part):
            assert (ROOT / install[1]).exists()
            assert set(install[2].split(",")) <= set(project["optional-dependencies"])
        elif part.startswith("./tools/"):
            assert (ROOT / part).stat().st_mode & 0o111, part
            seen.add(part)
        else:
            assert any(re.fullmatch(pattern, part) for pattern in SETUP), part
    assert seen == {"./tools/demo"}
    assert re.search(r"^qalora demo -o ", (ROOT / "tools" / "demo").read_text("utf-8"), re.MULTILINE)
    assert "tools/test" in (ROOT / ".ci" / "run").read_text("utf-8")


def docstring_blocks() -> list[Block]:
    """Indented Python in docstrings of the package."""
    made = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
            for found in re.findall(r"(?:^    .*\n|^\n)+", f"{text or ''}\n", re.MULTILINE):
                code = textwrap.dedent(found).strip()
                if re.match(r"(import|from) \w", code):
                    made.append(Block(page=path, line=getattr(node, "lineno", 1), language="python", text=code))
    return made


def examples() -> list[Block]:
    """Every block of Python in README, docs and docstrings; signatures of the reference are none."""
    pages = [README, *(page for page in DOCS if page.parent.name != "reference")]
    shown = [block for page in pages for block in blocks(page)]
    return [*(block for block in shown if block.language == "python"), *docstring_blocks()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", examples(), ids=lambda block: block.place)
def test_every_example_in_python_runs(
    block: Block, inputs: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that quantizes has the inputs alone, another one what the README's commands made. Its tests are run too."""
    place = fresh(inputs if "quantize(" in block.text else world, tmp_path / "here")
    monkeypatch.chdir(place)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(block.text, block.place, "exec"), names)  # noqa: S102 - our own documentation
    for name, thing in names.items():
        if name.startswith("test_") and callable(thing):
            thing()


def test_there_are_examples() -> None:
    pages = {block.place.partition(":")[0] for block in examples()}
    assert pages >= {"README.md", "docs/guides/parity.md", "docs/transformers.md", "qalora/__init__.py"}


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if ">>> " in path.read_text("utf-8")], ids=lambda path: path.name
)
def test_every_doctest_holds(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0
