"""qalora run recipe.toml on a tiny model: every option has its key, steps are reused, errors name their line."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from error_page import on_the_page
from qalora.cli import export, main, quantize, release, train, verify
from qalora.errors import InputError
from qalora.options.recipe import SECTIONS, Recipe
from qalora.pipeline.recipe import keys_of, read_recipe
from qalora.releasing.checksums import check_sums
from qalora.testing import byte_tokenizer, tiny_llama

RECIPE = """\
work = "work"

[base]
model = "float"

[quantize]
bits = 4

[train]
data = "text.txt"
rank = 2
max-steps = 4
max-length = 32
save-every = 1

[export]
to = ["gguf", "qalora"]

[verify]
max-tokens = 16
generate = 1

[release]
output = "dist"
"""
STEPS = ["quantize", "train", "export gguf", "export qalora", "verify", "release"]


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float, text.txt, recipe.toml, and what a first run left: work, dist."""
    root = tmp_path_factory.mktemp("recipe")
    tiny_llama(root / "float", tokenizer=byte_tokenizer(), config={"num_hidden_layers": 1})
    (root / "text.txt").write_text("A line of text to learn from, again and again. " * 60, encoding="utf-8")
    (root / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    result = run("run", root / "recipe.toml")
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it, which costs every file its inode and keeps its time."""
    shutil.copytree(made, tmp_path / "place", symlinks=True)
    return tmp_path / "place"


def events(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]


def states(result: Result) -> dict[str, object]:
    return {str(one["step"]): one["state"] for one in reversed(events(result)) if one["event"] == "step"}


def change(place: Path, *pairs: tuple[str, str]) -> None:
    text = (place / "recipe.toml").read_text("utf-8")
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    (place / "recipe.toml").write_text(text, encoding="utf-8")


CALLS = {"force", "dry_run", "as_json", "log_format", "resume", "jobs", "engine", "shard"}
"""Options that belong to a call, and are in no recipe."""


def test_every_option_has_its_key() -> None:
    """And every key its option, with the same help, but for what a recipe alone can say."""
    keys = {(section.name, key.flag): key for section in SECTIONS for key in keys_of(section)}
    homes = {
        quantize.command: ("quantize", "base"),
        train.command: ("train", "base"),
        export.command: ("export", "adapter", "base"),
        verify.command: ("verify", "export", "adapter", "base"),
        release.command: ("export", "verify", "release", "adapter", "base"),
    }
    found = set()
    for command, sections in homes.items():
        for param in command.params:
            if not isinstance(param, click.Option) or param.name in CALLS:
                continue
            name = {"--adapter": "path"}.get(max(param.opts, key=len), max(param.opts, key=len).removeprefix("--"))
            home = [section for section in sections if (section, name) in keys]
            of_files = name in ("output", "report", "lora-slots") and command is not release.command
            assert home or of_files, f"{command.name}: --{name}"
            found |= {(section, name) for section in home}
    alone = {("", "work"), ("", "keep"), ("base", "model"), ("delta", "base")}
    alone |= {("push", key.flag) for section in SECTIONS if section.name == "push" for key in keys_of(section)}
    assert set(keys) - found == alone


@pytest.mark.parametrize(
    ("section", "name", "value", "word"),
    [
        ("train", "strength", 0.85, 0.85),
        ("train", "strength", 1, 1.0),
        ("train", "strength", "auto", "auto"),
        ("train", "rank", 8, 8),
        ("quantize", "group-size", 64, 64),
        ("quantize", "group-size", "row", None),
        ("export", "max-shard-size", 5_000_000, 5_000_000),
        ("export", "max-shard-size", "5MB", 5_000_000),
    ],
)
def test_numbers_need_no_quotes(section: str, name: str, value: object, word: str) -> None:
    (key,) = [key for one in SECTIONS if one.name == section for key in keys_of(one) if key.flag == name]
    assert key.take(value) == word


@pytest.mark.parametrize("name", ["rank", "start"])
def test_a_fraction_is_no_integer_and_no_text(name: str) -> None:
    (key,) = [key for one in SECTIONS if one.name == "train" for key in keys_of(one) if key.flag == name]
    with pytest.raises(InputError, match=f"^{name}: expected "):
        key.take(0.5)


def test_every_key_has_its_help() -> None:
    assert [f"[{section.name}] {key.flag}" for section in SECTIONS for key in keys_of(section) if not key.help] == []


def test_what_a_run_left(made: Path) -> None:
    assert {path.name for path in (made / "dist").iterdir()} >= {"gguf", "qalora", "adapter", "SHA256SUMS"}
    check_sums(made / "dist")
    manifest = json.loads((made / "dist" / "manifest.json").read_text("utf-8"))
    assert manifest["name"] == "float"
    assert manifest["options"]["max_tokens"] == 16
    assert "work" not in (made / "dist" / "report.json").read_text("utf-8")


def test_the_same_release_as_by_the_commands(made: Path, tmp_path: Path) -> None:
    """The whole folder, byte for byte."""
    assert run("quantize", made / "float", "-o", tmp_path / "float").exit_code == 0
    words = ["--rank", 2, "--max-steps", 4, "--max-length", 32]
    assert run("train", tmp_path / "float", "--data", made / "text.txt", "-o", tmp_path / "a", *words).exit_code == 0
    words = ["--to", "gguf", "--to", "qalora", "--max-tokens", 16, "--generate", 1, "-o", tmp_path / "dist"]
    assert run("release", tmp_path / "float", "--adapter", tmp_path / "a", *words).exit_code == 0
    sums = [(root / "dist" / "SHA256SUMS").read_bytes() for root in (made, tmp_path)]
    assert sums[0] == sums[1]


def test_nothing_is_done_twice(place: Path) -> None:
    before = (place / "dist" / "SHA256SUMS").stat()
    (place / "recipe.toml").write_text(RECIPE.replace('"dist"', f'"{place / "dist"}"'), encoding="utf-8")
    result = run("run", place / "recipe.toml", "--log-format", "json", "--dry-run")
    assert states(result) == {**dict.fromkeys(STEPS, "reused"), "release": "to do"}  # another place: not what it made
    (place / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    assert run("run", place / "recipe.toml", "--force").exit_code == 0
    result = run("run", place / "recipe.toml")
    assert result.exit_code == 0
    assert "nothing has changed" in result.stdout
    result = run("run", place / "recipe.toml", "--dry-run", "--log-format", "json")
    assert states(result) == dict.fromkeys(STEPS, "reused")
    assert (place / "dist" / "SHA256SUMS").stat().st_size == before.st_size


CHANGES: list[tuple[str, str, set[str]]] = [
    ("bits = 4", "bits = 3", set(STEPS)),
    ("bits = 4", "bits = 3\nmethod = 'gptq'\ncalibration = 'text.txt'\ncalibration-length = 32", set(STEPS)),
    (
        "bits = 4",
        "bits = 'auto'\nbudget = 4\nwidths = [2, 3, 4]\ncalibration = 'text.txt'\ncalibration-length = 32",
        set(STEPS),
    ),
    ("rank = 2", "rank = 3", set(STEPS) - {"quantize"}),
    ("save-every = 1", "save_every = 2", {"release"}),
    ("[export]", "[export]\ngguf-form = 'wide'", {"export gguf", "release"}),
    ("[export]", "[export]\nmax-shard-size = '40kB'", {"export gguf", "export qalora", "verify", "release"}),
    ("max-tokens = 16", "max-tokens = 17", {"verify", "release"}),
    ("[release]", "[release]\nwith-adapter = false", {"release"}),
    ('["gguf", "qalora"]', '["qalora"]', {"verify", "release"}),
    ('"text.txt"', '"./text.txt"', {"release"}),
]


@pytest.mark.parametrize(("old", "new", "again"), CHANGES, ids=[new for _, new, _ in CHANGES])
def test_only_what_depends_on_a_change_is_done(place: Path, old: str, new: str, again: set[str]) -> None:
    change(place, (old, new))
    result = run("run", place / "recipe.toml", "--force", "--log-format", "json")
    assert result.exit_code == 0, result.output
    found = {step for step, state in states(result).items() if state == "started"}
    assert found == again & set(states(result))
    check_sums(place / "dist")


def test_a_name_counts(place: Path) -> None:
    (place / "float").rename(place / "other")
    change(place, ('"float"', '"other"'))
    result = run("run", place / "recipe.toml", "--force", "--log-format", "json")
    assert {step for step, state in states(result).items() if state == "reused"} == {"train"}
    assert json.loads((place / "dist" / "manifest.json").read_text("utf-8"))["name"] == "other"
    assert next((place / "dist" / "gguf").glob("*.gguf")).name.startswith("other")


def test_a_changed_file_counts_and_a_touched_one_does_not(place: Path) -> None:
    (place / "text.txt").touch()
    (place / "float" / "config.json").touch()
    dry = ("run", place / "recipe.toml", "--dry-run", "--log-format", "json")
    assert {state for step, state in states(run(*dry)).items() if step != "release"} == {"reused"}
    (place / "text.txt").write_text("Another text altogether. " * 90, encoding="utf-8")
    assert states(run(*dry)) == {**dict.fromkeys(STEPS, "to do"), "quantize": "reused"}


def test_an_edited_release_is_not_what_was_made(place: Path) -> None:
    assert run("run", place / "recipe.toml", "--force").exit_code == 0
    (place / "dist" / "README.md").write_text("other", encoding="utf-8")
    result = run("run", place / "recipe.toml")
    assert result.exit_code == 2
    assert "dist exists already; choose another place or give --force" in result.stderr
    assert run("run", place / "recipe.toml", "--force").exit_code == 0
    check_sums(place / "dist")


INTERRUPTED = "interrupted; finished steps are kept; run the same command again to continue"


def test_an_interrupted_training_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qalora.training import loop

    sums = (place / "dist" / "SHA256SUMS").read_bytes()
    shutil.rmtree(place / "work")
    write, saved = loop.write_state, []

    def stopping(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_state", stopping)
        result = run("run", place / "recipe.toml", "--force", "--log-format", "json")
    assert result.exit_code == 1
    assert events(result)[-1] == {"event": "error", "status": 1, "message": INTERRUPTED}
    dry = run("run", place / "recipe.toml", "--dry-run", "--force", "--log-format", "json")
    assert states(dry) == {**dict.fromkeys(STEPS, "to do"), "quantize": "reused", "train": "goes on"}
    result = run("run", place / "recipe.toml", "--force", "--log-format", "json")
    assert result.exit_code == 0, result.output
    assert [one["step"] for one in events(result) if one.get("stage") == "training"] == [3, 4]
    assert (place / "dist" / "SHA256SUMS").read_bytes() == sums
    assert not list((place / "work" / "train").rglob("*.checkpoint"))


def test_how_a_base_is_read_counts(made: Path, tmp_path: Path) -> None:
    """The same files give other weights under another label, in every export and proof."""
    assert run("quantize", made / "float", "-o", tmp_path / "q", "--zeros", "integer").exit_code == 0
    assert run("export", tmp_path / "q", "--to", "gptq", "-o", tmp_path).exit_code == 0
    lines = ["[base]", 'model = "gptq"', "[export]", 'to = ["qalora"]', "[verify]", 'level = "weights"', "[release]"]
    (tmp_path / "recipe.toml").write_text("\n".join([*lines, 'output = "dist"']), encoding="utf-8")
    assert run("run", tmp_path / "recipe.toml").exit_code == 0
    dry = ("run", tmp_path / "recipe.toml", "--dry-run", "--log-format", "json")
    assert set(states(run(*dry)).values()) == {"reused"}
    change(tmp_path, ('model = "gptq"', 'model = "gptq"\ncheckpoint-format = "gptq"'))
    assert set(states(run(*dry)).values()) == {"to do"}


def test_a_failed_gate_blocks_the_release_and_leaves_the_report(place: Path) -> None:
    shutil.rmtree(place / "dist")
    change(place, ("[verify]", "[verify]\nmemory = 0.000001"))
    for _ in range(2):  # what did not pass is verified again
        result = run("run", place / "recipe.toml", "--log-format", "json")
        assert result.exit_code == 1
        assert not (place / "dist").exists()
        assert json.loads((place / "dist.report.json").read_text("utf-8"))["passed"] is False
        assert states(result)["verify"] == "started"
        assert {"not proven"} <= {one["status"] for one in events(result) if one["event"] == "gate"}
        last = events(result)[-1]
        assert (last["event"], last["status"]) == ("error", 1)
        assert "was not written" in str(last["message"])
    change(place, ("memory = 0.000001", ""))
    assert run("run", place / "recipe.toml").exit_code == 0
    assert (place / "dist").is_dir()
    assert not (place / "dist.report.json").exists()


def test_a_given_adapter(place: Path) -> None:
    (adapter,) = (place / "work" / "train").glob("*/adapter")
    shutil.copytree(adapter, place / "adapter")
    text = re.sub(r"\[train\].*?\n\n", '[adapter]\npath = "adapter"\n\n', RECIPE, flags=re.DOTALL)
    (place / "recipe.toml").write_text(text, encoding="utf-8")
    result = run("run", place / "recipe.toml", "--force", "--log-format", "json")
    assert result.exit_code == 0, result.output
    assert states(result)["quantize"] == "reused"
    assert "train" not in states(result)
    (place / "adapter" / "adapter_model.safetensors").unlink()
    result = run("run", place / "recipe.toml", "--force")
    assert result.exit_code == 2


def test_a_dry_run_tells_sizes_and_times_and_writes_nothing(made: Path, place: Path) -> None:
    shutil.rmtree(place / "work")
    shutil.rmtree(place / "dist")
    before = sorted(place.rglob("*"))
    result = run("run", place / "recipe.toml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert sorted(place.rglob("*")) == before
    assert "time left: unknown" in result.stdout
    planned = events(run("run", place / "recipe.toml", "--dry-run", "--log-format", "json"))
    sizes = {one["step"]: one["bytes"] for one in planned if one["event"] == "step"}
    assert sizes["export gguf"] == sum(path.stat().st_size for path in (made / "dist" / "gguf").iterdir())
    assert isinstance(sizes["train"], int)
    change(made, ("max-tokens = 16", "max-tokens = 18"))
    try:
        result = run("run", made / "recipe.toml", "--dry-run")
        assert "time left: about" in result.stdout
        assert "dist exists already" in result.stderr
    finally:
        change(made, ("max-tokens = 18", "max-tokens = 16"))


WRONG: list[tuple[Callable[[str], str], str, str]] = [
    (
        lambda text: text.replace("rank = 2", 'rank = "many"'),
        "rank",
        "[train] rank: expected an integer >= 1, or auto, got",
    ),
    (
        lambda text: text.replace("rank = 2", "rank = 0"),
        "rank",
        "[train] rank: expected an integer >= 1, or auto, got",
    ),
    (lambda text: text.replace("rank = 2", "rank = true"), "rank", "expected an integer >= 1, or auto, got true"),
    (
        lambda text: text.replace("rank", "ranc"),
        "ranc",
        "expected a key of this section, got an unknown name; did you mea",
    ),
    (lambda text: text.replace("bits = 4", "bits = 7"), "bits", "[quantize] bits: expected one of 2, 3, 4, 5, 6, 8"),
    (lambda text: text.replace("bits = 4", "group-size = 48"), "group-size", "expected a divisor of in = 64, got 48"),
    (lambda text: text.replace("bits = 4", 'group-size = "x"'), "group-size", "expected an integer >= 1, or row"),
    (
        lambda text: text.replace("bits = 4", 'zeros = "no"'),
        "zeros",
        "expected one of real, integer, symmetric, ",
    ),
    (lambda text: text.replace("bits = 4", 'max-shard-size = "big"'), "max-shard", "expected a size such as 200MB"),
    (lambda text: text.replace('"gguf"', '"ggu"'), "to =", "[export] to: expected one of gptq, gguf"),
    (
        lambda text: text.replace('["gguf", "qalora"]', '["gguf", "qalora"]\nallow-loss = ["no"]'),
        "allow-loss",
        "expected one of zeros, minima, scales, eight-bit, residual, narrowing, embedding, got 'no'",
    ),
    (lambda text: text.replace('["gguf", "qalora"]', '"gguf"'), "to =", "expected a list, each text, got 'gguf'"),
    (lambda text: text.replace("bits = 4", "bits = 5").replace("qalora", "gptq"), "to =", "gptq at 5 bits"),
    (lambda text: text.replace("text.txt", "no.txt"), "data", "no.txt: no such file"),
    (lambda text: text.replace('"float"', '"./no"'), "model", "expected a folder or file that is there, or an id"),
    (lambda text: text.replace('"float"', r'"a\u0000b"'), "model", "expected text without the character 0"),
    (lambda text: text.replace('"float"', '"--help"'), "model", "no such file"),
    (lambda text: text.replace("generate = 1", "memory = inf"), "memory", "expected a number > 0, got inf"),
    (lambda text: text.replace("generate = 1", "memory = 0"), "memory", "expected a number > 0, got 0"),
    (lambda text: text.replace("generate = 1", 'text = "float"'), "text =", ""),
    (lambda text: text.replace('"work"', '"float"'), "work", "holds files that no recipe made"),
    (lambda text: text + '[adapter]\npath = "float"\n', "[adapter]", "expected [train] or [adapter], got both"),
    (lambda text: text.replace("[quantize]\nbits = 4", ""), "model", "holds no integers"),
    (lambda text: text.replace("max-steps = 4", 'target-modules = ["x"]'), "target-mod", "expected some of down_proj"),
    (lambda text: text.replace("output", "ouptut"), "ouptut", "did you mean output?"),
    (
        lambda text: text.replace('output = "dist"\n', ""),
        "[release]",
        "[release] output: expected a path, got n",
    ),
]


@pytest.mark.parametrize(("edit", "line", "words"), WRONG)
def test_an_error_names_its_line(place: Path, edit: Callable[[str], str], line: str, words: str) -> None:
    text = edit(RECIPE)
    assert text != RECIPE
    (place / "recipe.toml").write_text(text, encoding="utf-8")
    before = sorted(place.rglob("*"))
    result = run("run", place / "recipe.toml", "--force")
    assert result.exit_code == 2, result.output
    number = next(n for n, one in enumerate(text.splitlines(), 1) if line in one)
    said = result.stderr.strip().splitlines()[-1]
    assert said.startswith(f"qalora: {place / 'recipe.toml'}:{number}: ")
    assert words in said
    assert sorted(place.rglob("*")) == before, "nothing is left behind"
    on_the_page(said, place)


MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, len(RECIPE)), st.integers(0, 12), st.text(alphabet="[]{}=\"'#.,\n\\\0 -_1e\u0085ab", max_size=4)
    ),
    min_size=1,
    max_size=4,
)


@given(MUTATIONS)
def test_any_text_is_read_or_refused_with_its_line(tmp_path_factory: pytest.TempPathFactory, edits: Any) -> None:
    text = RECIPE
    for start, length, put in edits:
        text = text[:start] + put + text[start + length :]
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.toml").write_bytes(text.encode())
    try:
        _, found = read_recipe(folder / "any.toml")
    except InputError as error:
        assert re.match(rf"{re.escape(str(folder))}/any\.toml:\d+(:\d+)?: ", str(error))
        assert str(error).isprintable()
    else:
        assert isinstance(found, Recipe)


def test_init_writes_a_recipe_that_is_one(tmp_path: Path) -> None:
    assert run("init", tmp_path / "recipe.toml").exit_code == 0
    text = (tmp_path / "recipe.toml").read_text("utf-8")
    assert set(tomllib.loads(text)) == {"base", "export", "verify", "release"}
    (tmp_path / "base").mkdir()
    _, bare = read_recipe(tmp_path / "recipe.toml")
    assert (bare.quantize, bare.train, bare.adapter, bare.delta, bare.push) == (None,) * 5
    whole = tomllib.loads(re.sub(r"^#(?=[\w\[])", "", text, flags=re.MULTILINE))
    sections = {name: set(held) for name, held in whole.items() if isinstance(held, dict)}
    assert sections == {one.name: {key.flag for key in keys_of(one)} for one in SECTIONS if one.name}
    for section in SECTIONS:  # each value is one that its key takes
        for key in keys_of(section):
            key.take((whole[section.name] if section.name else whole)[key.flag])


def test_init_replaces_nothing_without_force(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("mine", encoding="utf-8")
    result = run("init", tmp_path / "mine.toml")
    assert result.exit_code == 2
    assert (tmp_path / "mine.toml").read_text("utf-8") == "mine"
    assert run("init", tmp_path / "mine.toml", "--force").exit_code == 0
    assert "[base]" in (tmp_path / "mine.toml").read_text("utf-8")
