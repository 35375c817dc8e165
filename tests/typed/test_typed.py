"""py.typed is kept from outside: a program of a user, checked by mypy and pyright at their strictest."""

import ast
import inspect
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qalora
from qalora.options import fields_of
from qalora.options.export import Export, Writing
from qalora.options.quantize import Quantize
from qalora.options.train import TrainOptions
from qalora.options.verify import Verify
from qalora.parity.verify import verify

PROGRAM = Path(__file__).parent / "program.py"
ROOT = Path(qalora.__file__).parent.parent


def test_the_program_uses_every_public_name() -> None:
    used = {node.attr for node in ast.walk(ast.parse(PROGRAM.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
    assert set(qalora.__all__) - used == {"__version__"}


def pyright(folder: Path, program: str) -> list[str]:
    """What pyright at its strictest says of a program in a folder of its own; it finds the package on Python's path."""
    (folder / "program.py").write_text(program, encoding="utf-8")
    config = {"include": ["program.py"], "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    return [one["message"] for one in found["generalDiagnostics"]]


def test_pyright(tmp_path: Path) -> None:
    assert pyright(tmp_path, PROGRAM.read_text("utf-8")) == []


def test_pyright_sees_what_is_wrong(tmp_path: Path) -> None:
    """So that no message means something."""
    lines = ["qalora.fold(1, 2)", "qalora.quantize('m', bitz=3)", "qalora.load('m').tensorz"]
    said = pyright(tmp_path, "import qalora\n" + "".join(f"x{n} = {line}\n" for n, line in enumerate(lines)))
    assert len(said) >= len(lines)


def test_mypy_looks_at_it_too() -> None:
    """With the package itself, where tools/test calls it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]
    assert settings["strict"] is True
    assert PROGRAM.relative_to(ROOT).as_posix() in settings["files"]


def keywords(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {one.name: one.default for one in parameters}


@pytest.mark.parametrize(
    ("function", "record", "beside"),
    [
        (qalora.quantize, Quantize, {"max_shard_size", "bits"}),
        (qalora.train, TrainOptions, set()),
        (qalora.export, Writing, set()),
        (qalora.export, Export, set()),
        (verify, Verify, {"prompt", "prompts", "allow_unproven", "text", "memory"}),
    ],
)
def test_keywords_are_the_fields_of_the_record(function: object, record: type, beside: set[str]) -> None:
    """With the same defaults, but for a required one, and for those that are something else in Python."""
    shown = keywords(function)
    for option in fields_of(record):
        if option.name in beside:
            continue
        assert option.name in shown, option.name
        if not option.required:
            default = shown[option.name]
            assert (default or None) == (option.default or None), option.name


def test_the_functions_at_the_top_are_those_below() -> None:
    """`qalora.verify` passes on what `qalora.parity.verify` takes, which is given an engine made of `jobs`."""
    assert keywords(qalora.verify).keys() == {*keywords(verify), "jobs"}
