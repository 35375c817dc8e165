"""Every value of every option is checked before a model is opened, or fetched: a typing error costs no download."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from error_page import on_the_page
from qalora.cli import COMMANDS, main
from qalora.options import Option

MODEL = "nobody/nothing"
"""A model that is not there: whoever looks at it first says so."""

NEEDED = {
    "quantize": ["-o", "%out"],
    "train": ["--data", "%text", "-o", "%out"],
    "fold": ["%adapter", "-o", "%out"],
    "export": ["--to", "gguf", "-o", "%out"],
    "verify": ["%artifact"],
    "release": ["--to", "gguf", "-o", "%out"],
    "adapter convert": ["--to", "plain", "-o", "%out"],
    "inspect": [],
    "demo": ["-o", "%out"],
}

"""What each command wants beside the model."""

BESIDE = {
    ("quantize", "--budget"): ["--bits", "auto"],
    ("quantize", "--widths"): ["--bits", "auto", "--budget", "4"],
    ("quantize", "--damping"): ["--method", "gptq", "--calibration", "%text"],
    ("quantize", "--passes"): ["--method", "gptq", "--calibration", "%text"],
    ("train", "--budget"): ["--rank", "auto"],
}
"""What an option goes with."""

OTHER = {"adapter convert": ["%adapter", "--base", MODEL], "demo": ["--model", MODEL]}
"""How the model is given where it is no argument."""

ANY = {
    "name": "any text",
    "target_modules": "the model says which there are",
    "checkpoint_format": "a word, and the model says whether it has labels",
    "base_model": "any Hub id",
    "license": "any text",
    "license_link": "any text",
    "language": "any text",
    "datasets": "any text",
    "quantized_by": "any text",
    "revision": "any branch",
    "model": "the model",
    "base": "the model",
    "prompt": "any text",
    "public_key": "see below",
}
"""Options that have no wrong value, or none that is to be told without the model."""

WRONG = {
    "out": "%there",
    "files": "%text",
    "targets": "foo",
    "form": "foo",
    "allow_loss": "quality",
    "max_shard_size": "a few",
    "split_max_size": "0",
    "bits": "7",
    "group_size": "-32",
    "budget": "-1",
    "widths": "7",
    "damping": "2",
    "passes": "-1",
    "data": "%none.txt",
    "rank": "0",
    "alpha": "-1",
    "learning_rate": "2",
    "held_out": "2",
    "strength": "2",
    "device": "abacus",
    "repo": "no owner",
    "memory": "0",
}
"""A wrong value of options whose type does not tell one; % is a folder, see `place`."""


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(main)
    for name in COMMANDS:
        found = main.get_command(context, name)
        assert found is not None
        if isinstance(found, click.Group):
            yield from ((f"{name} {inner}", one) for inner, one in found.commands.items())
        else:
            yield name, found


def wrong_value(option: click.Option) -> str | None:
    """None where there is none."""
    kind, name = option.type, str(option.name)
    held: Option | None = getattr(option, "option", None)
    if name in WRONG:
        return WRONG[name]
    if option.is_flag or name in ANY:
        return None
    if held is not None and held.many is None and held.kind in (int, float):
        return str(held.low - 1) if held.low is not None else str(held.above)
    if isinstance(kind, click.Choice) or (held is not None and not held.free):
        return "abacus"
    if (held is not None and held.kind is Path) or name == "calibration":
        return "%none"
    if isinstance(kind, click.IntRange | click.FloatRange):
        assert kind.min is not None
        return str(kind.min if kind.min_open else kind.min - 1)
    if isinstance(kind, click.Path):
        return "%none"
    raise AssertionError(f"--{name}: say what is wrong for it, or that nothing is")


def cases() -> list[tuple[str, str, str]]:
    return [
        (name, max(param.opts, key=len), value)
        for name, command in commands()
        if name in NEEDED
        for param in command.params
        if isinstance(param, click.Option) and param.name != "model" and (value := wrong_value(param)) is not None
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's folder, an artefact, a text, and a folder that is there."""
    from qalora.adapter import write_adapter
    from qalora.converters import load
    from qalora.quantization import quantize
    from qalora.testing import random_adapter, tiny_llama

    root = tmp_path_factory.mktemp("first")
    base = quantize(load(tiny_llama(root / "artifact", config={"num_hidden_layers": 1})), group_size=32)
    write_adapter(random_adapter(base), root / "adapter")
    (root / "text").write_text("some words", encoding="utf-8")
    (root / "there").mkdir()
    (root / "there" / "letters").write_text("dear", encoding="utf-8")
    (root / "there" / "gguf").mkdir()
    (root / "there" / "gguf" / "letters").write_text("dear", encoding="utf-8")
    return root


def line_of(name: str, place: Path, more: list[str]) -> list[str]:
    words = [*name.split(), *OTHER.get(name, [MODEL]), *NEEDED[name], *more]
    return [word.replace("%", f"{place}/") for word in words]


@pytest.mark.parametrize(("name", "option", "value"), cases())
def test_a_wrong_value_is_found_before_the_model(name: str, option: str, value: str, place: Path) -> None:
    words = line_of(name, place, [*BESIDE.get((name, option), []), option, value.replace("%", f"{place}/")])
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert MODEL not in result.stderr.replace(" ".join(words), ""), result.stderr
    assert not (place / "out").exists()
    on_the_page(result.stderr.splitlines()[-1], place)


@pytest.mark.parametrize("name", NEEDED)
def test_right_values_lead_to_the_model(name: str, place: Path) -> None:
    """So that the test above looks at what it means to look at."""
    result = CliRunner().invoke(main, line_of(name, place, []))
    assert result.exit_code == 2
    assert MODEL in result.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--lora-slots %adapter", "--lora-slots: expected onnx among the formats, got gguf"),
        ("--adapter %there", "expected an adapter's folder"),
        ("--to gguf --to foo", "hqq, compressed-tensors, torchao, mnn, qalora, got 'foo'"),
        ("--allow-loss minima --allow-loss quality", "expected one of zeros"),
    ],
)
def test_what_does_not_go_together_too(line: str, said: str, place: Path) -> None:
    result = CliRunner().invoke(main, line_of("export", place, [*line.replace("%", f"{place}/").split()]))
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        "%there --base nobody/nothing",
        "%dist --base nobody/nothing --text %none",
        "%dist --base nobody/nothing --public-key %none",
        "%dist --base nobody/nothing --adapter %none",
        "%dist --base nobody/nothing --card-template %none",
    ],
)
def test_a_check_looks_at_its_files_first(line: str, place: Path) -> None:
    (place / "dist").mkdir(exist_ok=True)
    (place / "dist" / "SHA256SUMS").write_text("", encoding="utf-8")
    result = CliRunner().invoke(main, ["check", *line.replace("%", f"{place}/").split()])
    assert result.exit_code == 2
    assert MODEL not in result.stderr


@pytest.mark.parametrize("value", ["float16", "float32"])
@pytest.mark.parametrize("name", ["fold", "export", "verify", "release", "train"])
def test_minima_are_spelled_as_everywhere(name: str, value: str, place: Path) -> None:
    beside = ["--adapter", "%adapter"] if name in ("export", "release") else []
    result = CliRunner().invoke(main, line_of(name, place, [*beside, "--minima", value]))
    assert MODEL in result.stderr, result.stderr
