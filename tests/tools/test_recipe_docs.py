"""docs/recipe.md and docs/pipelines.md: what is generated is current, and what is shown is valid."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from qalora.pipeline.recipe import read_recipe

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "recipe_docs.py"
PIPELINES = (ROOT / "docs" / "pipelines.md").read_text("utf-8")


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_what_is_generated_is_current() -> None:
    spec = importlib.util.spec_from_file_location("recipe_docs", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.PAGE.read_text("utf-8")
    assert tool.written(text) == text, "run python tools/recipe_docs.py"
    assert "| `rank` |" in text


def test_the_recipe_that_is_shown_is_one(tmp_path: Path) -> None:
    (shown,) = fenced((ROOT / "docs" / "recipe.md").read_text("utf-8"), "toml")
    for name in ("train.jsonl", "held-out.txt"):
        (tmp_path / name).touch()
    (tmp_path / "recipe.toml").write_text(shown, encoding="utf-8")
    _, found = read_recipe(tmp_path / "recipe.toml")
    assert found.train is not None
    assert found.train.rank == 16
    assert found.quantize is not None
    assert (found.adapter, found.delta, found.push) == (None, None, None)


def test_the_workflows_are_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    github, gitlab = (yaml.safe_load(text) for text in fenced(PIPELINES, "yaml"))
    steps = github["jobs"]["release"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert "qalora run recipe.toml --log-format json" in [step.get("run") for step in steps]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+(/[\w-]+)?@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert gitlab["release"]["script"][-1] == "qalora run recipe.toml --log-format json"
    cached = {step["uses"]: step for step in steps if step.get("uses", "").startswith("actions/cache/")}
    assert {step["with"]["path"] for step in cached.values()} == {".qalora"} == set(gitlab["release"]["cache"]["paths"])
    assert cached["actions/cache/save@v4"]["if"] == "always()"  # a failed gate is what it is for
    assert gitlab["release"]["cache"]["when"] == "always"
    for job in (github["jobs"]["release"]["env"], gitlab["release"]["variables"]):
        assert set(job) == {"QALORA"}


def test_the_container_file() -> None:
    text = (ROOT / "docs" / "Containerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    for word, rest in lines:
        if word == "COPY":
            assert all((ROOT / name).exists() for name in rest.split()[:-1]), rest
    said = dict(lines)
    assert said["FROM"] == "python:3.11-slim"
    assert said["USER"] not in ("root", "0")
    assert [word for word, _ in lines][-1] == "CMD"
    words = [word.strip(',"[]') for word in shlex.split(said["ENTRYPOINT"] + " " + said["CMD"])]
    assert words == ["qalora", "run", "recipe.toml"]
