"""Every command on a tiny model, from a float folder to a verified artefact; and what each prints for machines."""

import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from qalora.cli import COMMANDS, main
from qalora.converters import TARGETS, loras
from qalora.formats import output
from qalora.options.fields import readable
from qalora.options.words import LORA_FILES, LOSSES
from qalora.testing import byte_tokenizer, tiny_llama

SAID: dict[str, str] = {}
"""What each command of `place` printed, by its name."""


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    SAID.setdefault(str(words[0]), result.stdout)
    return result


def parsed(*words: object) -> Any:
    return json.loads(run(*words).stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float, base, adapter, folded, dist: each made by the command that makes it."""
    root = tmp_path_factory.mktemp("commands")
    tiny_llama(root / "float", tokenizer=byte_tokenizer())
    (root / "text.txt").write_text("A line of text to learn from, again and again. " * 60, encoding="utf-8")
    run("quantize", root / "float", "-o", root / "base")
    training = ("--max-steps", 3, "--rank", 2, "--max-length", 32, "--learning-rate", 0.01)
    run("train", root / "base", "--data", root / "text.txt", "-o", root / "adapter", *training)
    run("fold", root / "base", root / "adapter", "-o", root / "folded")
    run("export", root / "folded", "--to", "gguf", "--to", "onnx", "--to", "gptq", "-o", root / "dist")
    return root


def test_what_the_commands_left(place: Path) -> None:
    assert {path.name for path in (place / "dist").iterdir()} == {"gguf", "onnx", "gptq"}
    assert {path.name for path in place.iterdir()} == {"float", "text.txt", "base", "adapter", "folded", "dist"}


def test_export_of_the_adapter_is_export_of_the_folded_model(place: Path, tmp_path: Path) -> None:
    run("export", place / "base", "--adapter", place / "adapter", "--to", "onnx", "-o", tmp_path)
    for name in ("model.onnx", "portable/model.onnx", "portable/model.onnx.data"):
        assert (tmp_path / "onnx" / name).read_bytes() == (place / "dist" / "onnx" / name).read_bytes(), name


def test_force_replaces_and_only_then(place: Path, tmp_path: Path) -> None:
    words = ("quantize", place / "float", "-o", tmp_path / "base", "--bits", 3, "--group-size", "row")
    run(*words)
    before = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    assert CliRunner().invoke(main, [str(word) for word in words]).exit_code == 2
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == before
    run(*words, "--force")
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns > before


@pytest.mark.parametrize("target", ["gptq", "gguf", "onnx", "qalora"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(place: Path, tmp_path: Path, target: str) -> None:
    words = ("export", place / "folded", "--to", target, "-o", tmp_path / "out", "--dry-run")
    assert "q_proj" in run(*words).stdout
    (plan,) = parsed(*words, "--json")
    assert plan["target"] == target
    assert {tensor["name"] for tensor in plan["tensors"]} >= {"model.norm.weight"}
    assert all(tensor["loss"] is None for tensor in plan["tensors"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["quantize float", "fold base adapter", "export folded --to mlx --to qalora"])
def test_a_model_is_split_above_a_size(place: Path, tmp_path: Path, line: str) -> None:
    words = [place / word if (place / word).exists() else word for word in line.split()]
    for number, size in enumerate(("40kB", "0.04MB", "40000", "39.0625 KiB")):
        run(*words, "-o", tmp_path / str(number), "--max-shard-size", size)
    written = [
        {path.name: path.stat().st_size for path in (tmp_path / str(number)).rglob("*.*")} for number in range(4)
    ]
    assert "model.safetensors.index.json" in written[0]
    assert written[1:] == written[:1] * 3


def test_fold_as_json_has_a_proof_of_each_layer(place: Path, tmp_path: Path) -> None:
    found = parsed("fold", place / "base", place / "adapter", "-o", tmp_path / "out", "--json")
    assert len(found["layers"]) == 14
    assert all(layer["exact"] and layer["codes_differ"] == 0 for layer in found["layers"].values())


def test_train_as_json(place: Path, tmp_path: Path) -> None:
    words = ("train", place / "base", "--data", place / "text.txt", "-o", tmp_path / "a", "--max-steps", 2, "--json")
    found = parsed(*words, "--max-length", 32, "--target-modules", "q_proj")
    assert found["steps"] == 2
    assert found["layers"] == 2
    assert found["held_out_loss"] > 0


def test_train_says_when_bfloat16_is_slow(place: Path, tmp_path: Path, fast_bfloat16: bool | None) -> None:
    """As far as the processor's own flags tell; without the choice nothing is said."""
    words = ("train", place / "base", "--data", place / "text.txt", "-o", tmp_path / "a", "--max-steps", 1, "--force")
    words += ("--max-length", 32, "--target-modules", "q_proj", "--device", "cpu")
    told = "note: this cpu has no instructions for bfloat16, and float32 may be many times faster: --dtype auto\n"
    said = run(*words, "--dtype", "bfloat16").stderr
    assert fast_bfloat16 is None or (told in said) == (not fast_bfloat16)
    assert told not in run(*words, "--dtype", "auto").stderr


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("float", "huggingface"),
        ("base", "qalora"),
        ("dist/gptq", "gptq"),
        ("dist/onnx", "onnx"),
        ("dist/onnx/portable", "onnx"),
        ("adapter", "peft"),
    ],
)
def test_inspect_says_what_it_is(place: Path, name: str, layout: str) -> None:
    assert parsed("inspect", place / name, "--json")["layout"] == layout
    assert layout in run("inspect", place / name).stdout


def test_inspect_of_gguf(place: Path) -> None:
    (path,) = (place / "dist" / "gguf").glob("*.gguf")
    found = parsed("inspect", path, "--json")
    assert found["layout"] == "gguf"
    kinds = [(kind["count"], kind["bits"], kind["group_size"], kind["zeros"]) for kind in found["tensors"]]
    assert (14, 4, 32, "real") in kinds
    assert "14 x 4 bits in groups of 32, real zero points" in run("inspect", path).stdout


@pytest.mark.parametrize("form", ["paper", "official", "peft", "plain"])
def test_an_adapter_goes_into_every_convention_and_back(place: Path, tmp_path: Path, form: str) -> None:
    run("adapter", "convert", place / "adapter", "--to", form, "-o", tmp_path / "there")
    found = parsed("inspect", tmp_path / "there", "--json")
    if form == "plain":
        assert found["layers"] == [{"count": 14, "rank": 2, "pool_size": 1}]
        return
    assert found["convention"] == form
    run("adapter", "convert", tmp_path / "there", "--to", "paper", "-o", tmp_path / "back")
    for model, adapter in (("a", place / "adapter"), ("b", tmp_path / "back")):
        run("fold", place / "base", adapter, "-o", tmp_path / model)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_verify_of_weights(place: Path, tmp_path: Path) -> None:
    words = ("verify", place / "base", place / "dist", "--adapter", place / "adapter", "--level", "weights")
    result = run(*words, "--report", tmp_path / "report.json")
    assert "gates: " in result.stdout
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert [artifact["weights"]["codes_differ"] for artifact in report["artifacts"]] == [0, 0, 0, 0]


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    text = run(name, "--help").stdout
    assert "Usage: " in text
    assert "Example: qalora" in text


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_help_begins_with_the_line_that_most_people_want(name: str) -> None:
    """Behind the first sentence, in one line, and the command takes it."""
    parts = run(name, "--help").stdout.split("\n\n")
    assert parts[1].strip().endswith(".")
    (example,) = parts[2].splitlines()
    assert takes(example.removeprefix("  Example: "))


def takes(line: str) -> bool:
    """Whether the command line takes a line, as far as that is to be told from its words."""
    words = shlex.split(line)
    assert words[0] == "qalora"
    command: click.Command | None = main
    with click.Context(main) as context:
        while isinstance(command, click.Group):
            words = words[1:]
            command = command.get_command(context, words[0])
        assert command is not None, line
        command.make_context(words[0], words[1:], parent=context)
    return True


def test_shell_completion_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", "qalora quantize --zer")
    monkeypatch.setenv("COMP_CWORD", "2")
    result = CliRunner().invoke(main, [], prog_name="qalora", env={"_QALORA_COMPLETE": "bash_complete"})
    assert result.stdout == "plain,--zeros\n"
    assert "_QALORA_COMPLETE=bash_source qalora" in run("--help").stdout


MADE = {
    "quantize": ["base"],
    "train": ["adapter"],
    "fold": ["folded"],
    "export": ["dist/gguf", "dist/onnx", "dist/gptq"],
}


@pytest.mark.parametrize("name", MADE)
def test_the_last_lines_say_what_was_made_and_what_to_run_next(place: Path, name: str) -> None:
    lines = SAID[name].splitlines()
    *_, last = lines
    written = [line for line in lines if line.startswith("written: ")]
    assert lines[-1 - len(written) : -1] == written
    sizes = {made: sum(f.stat().st_size for f in (place / made).rglob("*") if f.is_file()) for made in MADE[name]}
    for line, (made, size) in zip(written, sizes.items(), strict=True):
        assert line.startswith(f"written: {place / made}, {readable(size)}")
    assert takes(last.removeprefix("next: "))


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (76_349_000, "76.3 MB")]
)
def test_sizes_as_people_write_them(nbytes: int, text: str) -> None:
    assert readable(nbytes) == text


@pytest.mark.parametrize(
    ("words", "following"),
    [
        (("inspect", "float"), "qalora quantize"),
        (("inspect", "base"), "qalora train"),
        (("inspect", "adapter", "--base", "base"), "qalora fold"),
        (("inspect", "dist"), "qalora verify"),
        (("verify", "base", "dist/gptq", "--adapter", "adapter", "--level", "weights"), "qalora release"),
        (("quantize", "float", "-o", "OUT"), "qalora train"),
        (("init", "OUT"), "qalora run"),
        (("adapter", "convert", "adapter", "--to", "peft", "-o", "OUT"), "qalora fold"),
        (("adapter", "convert", "adapter", "--to", "onnx-adapter", "--base", "base", "-o", "OUT"), "qalora export"),
        (("release", "base", "--adapter", "adapter", "--to", "qalora", "-o", "OUT"), "qalora check"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else "",
)
def test_what_to_run_next_is_a_line_that_the_command_takes(
    place: Path, tmp_path: Path, words: tuple[str, ...], following: str
) -> None:
    filled = [
        tmp_path / "out" if word == "OUT" else place / word if (place / word).exists() else word for word in words[1:]
    ]
    last = run(words[0], *filled).stdout.splitlines()[-1]
    assert last.startswith(f"next: {following} ")
    assert takes(last.removeprefix("next: "))


def test_ctrl_c_says_what_remains(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal arrives when all is written, and nothing of it is in its place yet."""
    replace = output._replace_folder

    def interrupted(work: Path, path: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        replace(work, path)

    monkeypatch.setattr(output, "_replace_folder", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without one
    try:
        result = CliRunner().invoke(main, ["quantize", str(place / "float"), "-o", str(tmp_path / "base")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "qalora: interrupted; nothing was written"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_first_page_has_twenty_options_at_most(name: str) -> None:
    """And the rest stand under a heading of their own, if there are any."""
    text = run(name, "--help").stdout
    first = text.partition("\nOptions:\n")[2].partition("\nOptions for experts:\n")[0]
    assert len(re.findall(r"^  (?:-o, )?--", first, re.MULTILINE)) <= 20


@pytest.mark.parametrize("name", ["make", "apply"])
def test_a_delta_has_its_help(name: str) -> None:
    assert f"Example: qalora delta {name}" in run("delta", name, "--help").stdout


def test_formats_and_losses_are_named_by_the_help() -> None:
    words = re.split(r"[\s,.:|\[\]]+", run("export", "--help").stdout)
    assert {*TARGETS, *LOSSES} <= set(words)


def test_files_of_adapters_are_named_as_the_formats_have_them() -> None:
    assert tuple(loras()) == LORA_FILES
    assert all(name in run("adapter", "convert", "--help").output for name in LORA_FILES)


def test_the_overview_names_every_command() -> None:
    text = run("--help").stdout
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "Exit status: 0 done, 1 not proven, 2 bad usage or input." in " ".join(text.split())


@pytest.fixture(scope="module")
def unlabelled(place: Path) -> Path:
    """A GPTQ folder with asymmetric zero points that names nobody who wrote it, so that its label may be wrong."""
    root = place.parent / "unlabelled"
    run("quantize", place / "float", "-o", root / "base", "--zeros", "integer")
    run("export", root / "base", "--to", "gptq", "-o", root)
    for name in ("config.json", "quantize_config.json"):
        config = json.loads((root / "gptq" / name).read_text("utf-8"))
        config.get("quantization_config", config).pop("meta")
        (root / "gptq" / name).write_text(json.dumps(config), encoding="utf-8")
    return root / "gptq"


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "MODEL", "--requantize", "--dry-run", "-o", "OUT"),
        ("train", "MODEL", "--data", "TEXT", "--max-steps", 1, "--rank", 1, "--max-length", 8, "-o", "OUT"),
        ("fold", "MODEL", "ADAPTER", "--dry-run", "-o", "OUT"),
        ("export", "MODEL", "--to", "gptq", "--dry-run", "-o", "OUT"),
        ("release", "MODEL", "--to", "gptq", "--dry-run", "-o", "OUT"),
        ("verify", "MODEL", "MODEL", "--level", "weights"),
    ],
    ids=lambda words: words[0],
)
def test_a_label_that_may_be_wrong_is_said_and_can_be_overridden(
    place: Path, unlabelled: Path, tmp_path: Path, words: tuple[object, ...]
) -> None:
    places = {"MODEL": unlabelled, "OUT": tmp_path / "out", "ADAPTER": place / "adapter", "TEXT": place / "text.txt"}
    filled = [places.get(str(word), word) for word in words]
    warning = "has asymmetric zero points, stored as its label says: gptq_v2"
    assert warning in run(*filled).stderr
    assert (
        warning
        not in run(*filled, "--checkpoint-format", "gptq_v2", *(["--force"] if words[0] == "train" else [])).stderr
    )
