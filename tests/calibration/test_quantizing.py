"""Whole models quantized with inputs: contracts, the same bits again, closer to the float model than without."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

import qalora
from folders import same_files
from qalora.calibration import Calibration, bits_per_weight, calibration_windows, choose_widths, quantize_calibrated
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.torch_module import build
from qalora.demo import demo_text
from qalora.errors import InputError
from qalora.parity import verify
from qalora.quantization import QuantizeOptions, quantize
from qalora.quantization.options import quantize_weight
from qalora.testing import assert_same_model, byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float: a tiny model of bytes; text.txt."""
    root = tmp_path_factory.mktemp("calibrated")
    tiny_llama(root / "float", tokenizer=byte_tokenizer())
    (root / "text.txt").write_text(demo_text()[:6000], encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def model(place: Path) -> Checkpoint:
    return load(place / "float")


@pytest.fixture(scope="module")
def windows(model: Checkpoint, place: Path) -> Tensor:
    return calibration_windows(model, Calibration(data=str(place / "text.txt"), tokens=1024, length=64))


@torch.no_grad()
def distance(model: Checkpoint, other: Checkpoint, windows: Tensor) -> float:
    """Mean squared difference of the logits."""
    return float((build(model)(input_ids=windows).logits - build(other)(input_ids=windows).logits).square().mean())


def test_windows_are_spread_over_the_text(model: Checkpoint, place: Path) -> None:
    text = (place / "text.txt").read_bytes()
    found = calibration_windows(model, Calibration(data=str(place / "text.txt"), tokens=300, length=100))
    assert [bytes(byte_tokenizer().decode(row.tolist()), "utf-8") for row in found] == [
        text[n * 2000 : n * 2000 + 100] for n in range(3)
    ]
    with pytest.raises(InputError, match="the model's context"):
        calibration_windows(model, Calibration(data=str(place / "text.txt"), length=1024))


def test_one_window_is_enough_and_nothing_has_to_be_learned(model: Checkpoint, tmp_path: Path) -> None:
    rows = tmp_path / "asked.jsonl"
    rows.write_text('{"prompt": "' + "Why? " * 30 + '", "completion": ""}\n', encoding="utf-8")
    assert calibration_windows(model, Calibration(data=str(rows), length=100)).shape == (1, 100)
    words = f"`calibration` {rows}: expected at least 200 tokens, a window, got 15[01]; give more text"
    with pytest.raises(InputError, match=words):
        calibration_windows(model, Calibration(data=str(rows), length=200))


def test_the_layer_at_fault_is_named(place: Path, tmp_path: Path, one_sentence: Callable[[Result], str]) -> None:
    shutil.copytree(place / "float", tmp_path / "float")
    (file,) = (tmp_path / "float").glob("*.safetensors")
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    words = ("--method", "gptq", "--calibration", place / "text.txt", "-o", tmp_path / "out")
    said = one_sentence(run("quantize", tmp_path / "float", *words))
    assert said.startswith(f"qalora: {name}: ")
    assert "layers.0" not in said


class _Left(Exception):
    """A run ended here."""


def test_a_run_that_was_left_goes_on_from_its_layers(
    model: Checkpoint, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, keep = QuantizeOptions(bits=3, method="gptq", group_size=16), tmp_path / "layers"
    whole, visited = quantize_calibrated(model, windows, chosen), list[int]()
    whole.tensors[model.linears[0]].load()

    def counted(*given: Any) -> Any:
        visited.append(1)
        return quantize_weight(*given)

    monkeypatch.setattr("qalora.calibration.quantizing.quantize_weight", counted)

    def tick() -> None:
        raise _Left

    def read(options: QuantizeOptions, tick: Callable[[], None] = lambda: None) -> Checkpoint:
        visited.clear()
        found = quantize_calibrated(model, windows, options, keep=keep, tick=tick)
        found.tensors[model.linears[0]].load()
        return found

    with pytest.raises(_Left):
        read(chosen, tick)
    assert len(visited) == 7  # the linear layers of the first of two decoder layers
    assert_same_model(read(chosen), whole)
    assert len(visited) == 7
    read(chosen)
    assert not visited
    data = bytearray(keep.read_bytes())
    data[-1] ^= 1  # in the last layer of all
    keep.write_bytes(data)
    assert_same_model(read(chosen), whole)
    assert len(visited) == 7
    read(QuantizeOptions(bits=4, method="gptq", group_size=16))
    assert len(visited) == 14


def test_searched_layers_are_kept_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("quantize", place / "float", "--method", "hqq")
    assert run(*words, "-o", tmp_path / "whole").exit_code == 0
    visited: list[int] = []

    def interrupted(*given: Any) -> Any:
        if len(visited) == 5:
            raise KeyboardInterrupt
        visited.append(1)
        return quantize_weight(*given)

    with monkeypatch.context() as patch:
        patch.setattr("qalora.quantization.model.quantize_weight", interrupted)
        left = run(*words, "-o", tmp_path / "out")
    assert left.exit_code == 1
    assert "the same command goes on from them" in left.stderr

    def counted(*given: Any) -> Any:
        visited.append(1)
        return quantize_weight(*given)

    with monkeypatch.context() as patch:
        patch.setattr("qalora.quantization.model.quantize_weight", counted)
        assert run(*words, "-o", tmp_path / "out").exit_code == 0
    assert len(visited) == 14  # each of the linear layers of two decoder layers once
    assert same_files(tmp_path / "out", tmp_path / "whole")
    assert not [*tmp_path.glob(".out*")]


def test_an_interrupt_says_how_to_go_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (place / "float", "--method", "gptq", "--calibration", place / "text.txt", "--calibration-tokens", 1024)
    assert run("quantize", *words, "-o", tmp_path / "whole").exit_code == 0

    def interrupted(layer: Any, *given: Any) -> Any:
        if len([*tmp_path.glob(".out.layers")]) and (tmp_path / ".out.layers").stat().st_size > 30_000:
            raise KeyboardInterrupt
        return quantize_weight(layer, *given)

    with monkeypatch.context() as patch:
        patch.setattr("qalora.calibration.quantizing.quantize_weight", interrupted)
        left = run("quantize", *words, "-o", tmp_path / "out")
    assert left.exit_code == 1
    assert f"the layers that are done are in {tmp_path / '.out.layers'}, and the same command goes on" in left.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"whole", ".out.layers"}
    assert run("quantize", *words, "-o", tmp_path / "out").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_what_a_run_leaves_in_the_folder_of_the_model_is_no_part_of_it(
    place: Path, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chosen = tmp_path / "float", QuantizeOptions(bits=4, method="gptq", group_size=16)
    shutil.copytree(place / "float", folder)
    keep = folder / ".base.layers"

    def read() -> None:
        model = load(folder)
        quantize_calibrated(model, windows, chosen, keep=keep).tensors[model.linears[0]].load()

    (folder / ".base.layers.lock").touch()
    read()
    monkeypatch.delattr("qalora.calibration.quantizing.quantize_weight")  # nothing is left to do
    read()


@pytest.mark.parametrize("bits", [2, 3])
def test_inputs_help(model: Checkpoint, windows: Tensor, bits: int) -> None:
    def error(**options: Any) -> float:
        chosen = QuantizeOptions(bits=bits, group_size=32, **options)
        return distance(model, quantize_calibrated(model, windows, chosen), windows)

    plain = distance(model, quantize(model, bits=bits), windows)
    assert error(fit_minima=True) < plain
    assert error(method="gptq", passes=0) < 0.8 * plain
    assert error(method="gptq", passes=2) < 0.8 * plain


def test_the_same_again_and_in_any_order(model: Checkpoint, windows: Tensor) -> None:
    chosen = QuantizeOptions(bits=3, method="gptq", group_size=16)
    one, two = (quantize_calibrated(model, windows, chosen) for _ in range(2))
    for name in reversed(model.linears):
        two.tensors[name].rows(1, 3)
    assert_same_model(one, two)
    whole = one.tensors[model.linears[3]].load_quantized()
    assert torch.equal(one.tensors[model.linears[3]].rows(4, 9).codes(), whole.codes()[4:9])  # type: ignore[union-attr]


def test_nothing_is_computed_before_a_weight_is_read(model: Checkpoint, windows: Tensor) -> None:
    ticks: list[int] = []
    found = quantize_calibrated(model, windows, QuantizeOptions(method="gptq"), tick=lambda: ticks.append(1))
    assert found.quantized
    assert ticks == []
    found.tensors[model.linears[-1]].rows(0, 1)
    found.tensors[model.linears[0]].rows(0, 1)
    assert len(ticks) == 2


def test_integers_want_requantize(model: Checkpoint, windows: Tensor) -> None:
    base = quantize(model, bits=8)
    with pytest.raises(InputError, match="`requantize`"):
        quantize_calibrated(base, windows, QuantizeOptions(method="gptq"))
    assert quantize_calibrated(base, windows, QuantizeOptions(bits=3, method="gptq"), requantize=True).quantized


@pytest.mark.parametrize("zeros", ["real", "integer", "symmetric"])
@pytest.mark.parametrize("budget", [3.3, 4.0, 5.5])
def test_mixed_widths_keep_the_budget_and_are_better(
    model: Checkpoint, windows: Tensor, zeros: Any, budget: float
) -> None:
    options = QuantizeOptions(zeros=zeros, method="hqq")
    found = choose_widths(model, windows, options, budget)
    mixed = quantize_calibrated(model, windows, found.options)
    assert bits_per_weight(mixed) == pytest.approx(found.bits_per_weight)
    assert found.bits_per_weight <= budget
    errors = {name: found.errors[name][chosen.bits] for name, chosen in found.options.items()}
    uniform = max(bits for bits in (2, 3, 4, 5) if bits_per_weight(quantize(model, bits=bits, zeros=zeros)) <= budget)
    assert sum(errors.values()) <= sum(found.errors[name][uniform] for name in errors)


def test_a_budget_below_the_narrowest_is_refused(model: Checkpoint, windows: Tensor) -> None:
    with pytest.raises(InputError, match=r"budget: expected 3 bits per weight or more, a number, got 2\.5"):
        choose_widths(model, windows, QuantizeOptions(), 2.5)


def test_from_python(place: Path) -> None:
    found = qalora.quantize(place / "float", calibration=place / "text.txt", method="gptq", bits=3, passes=0)
    assert found.quantized
    mixed = qalora.quantize(place / "float", calibration=place / "text.txt", budget=4.2)
    assert bits_per_weight(mixed) <= 4.2
    assert "bits per weight" in mixed.notes[-1]
    with pytest.raises(InputError, match="`bits` auto needs the layers' inputs"):
        qalora.quantize(place / "float", budget=4.0)


@pytest.mark.parametrize("target", ["gguf", "onnx", "mlx", "hqq"])
def test_mixed_widths_are_exported_exactly(model: Checkpoint, tmp_path: Path, target: str) -> None:
    widths = [(2, 3, 4)[n % 3] for n in range(len(model.linears))]
    options = {name: QuantizeOptions(bits=bits) for name, bits in zip(model.linears, widths, strict=True)}
    mixed = quantize_calibrated(model, torch.arange(32)[None], options)
    export(mixed, [target], tmp_path)
    assert verify(mixed, [tmp_path / target], level="weights").passed()


def test_gptq_folders_have_one_width(model: Checkpoint, tmp_path: Path) -> None:
    options = {name: QuantizeOptions(bits=3 + n % 2) for n, name in enumerate(model.linears)}
    with pytest.raises(InputError, match="gptq"):
        export(quantize_calibrated(model, torch.arange(32)[None], options), ["gptq"], tmp_path)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "gptq", "--bits", 3),
        ("--method", "gptq", "--zeros", "integer", "--act-order", "--passes", 0),
        ("--fit-minima", "--bits", 2),
        ("--method", "clip", "--group-size", "row"),
        ("--bits", "auto", "--budget", 3.6, "--method", "gptq", "--widths", 2, "--widths", 3),
    ],
)
def test_the_command(place: Path, tmp_path: Path, words: tuple[object, ...]) -> None:
    given = ("quantize", place / "float", *words, "--calibration", place / "text.txt", "--calibration-tokens", 512)
    for out in ("one", "two"):
        result = run(*given, "-o", tmp_path / out)
        assert result.exit_code == 0, result.output
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two
    found = load(tmp_path / "one")
    assert found.quantized
    if "auto" in words:
        assert bits_per_weight(found) <= 3.6
        assert len({lazy.spec.bits for lazy in found.tensors.values() if lazy.spec is not None}) > 1
    if "gptq" in words:
        assert not any(lazy.spec.act_order for lazy in found.tensors.values() if lazy.spec is not None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "gptq"), "--method gptq needs the layers' inputs on a text; give one: --calibration"),
        (("--calibration", "text.txt"), "--method rtn makes no use of --calibration"),
        (("--fit-minima",), "--fit-minima needs the layers' inputs"),
        (("--bits", "auto", "--budget", 4), "--bits auto needs the layers' inputs"),
        (("--bits", "auto"), "--bits auto and --budget go together"),
        (("--budget", 4), "--bits auto and --budget go together"),
        (("--widths", 4), "--widths goes with --bits auto"),
        (("--bits", "four"), "--bits: expected one of 2, 3, 4, 5, 6, 8, auto, got"),
        (("--bits", "\N{SUPERSCRIPT TWO}"), "--bits: expected one of 2, 3, 4, 5, 6, 8, auto, got"),
        (("--act-order",), "--act-order is for --method gptq, and the method is rtn"),
        (("--damping", 0.5), "--damping is for --method gptq"),
        (("--passes", 9), "--passes is for --method gptq"),
        (("--calibration-tokens", 99), "--calibration-tokens needs a text: give --calibration"),
        (
            ("--calibration-length", 99),
            "--calibration-length needs a text: give --calibration",
        ),
        (
            ("--bits", "auto", "--budget", "inf", "--calibration", "PLACE/text.txt"),
            "--budget: expected a number > 0, got inf",
        ),
        (("--bits", "7"), "bits: expected one of"),
        (("--method", "gptq", "--calibration", "nowhere.txt"), "no such file"),
        (("--fit-minima", "--zeros", "integer"), "real zero points"),
    ],
)
def test_bad_usage_is_one_sentence(
    place: Path, tmp_path: Path, words: tuple[object, ...], message: str, one_sentence: Callable[[Result], str]
) -> None:
    given = [str(word).replace("PLACE", str(place)) for word in words]
    result = run("quantize", place / "float", "-o", tmp_path / "out", *given)
    assert message in one_sentence(result)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def one_sentence() -> Callable[[Result], str]:
    """The error of a command that ended with status 2 and one line."""

    def sentence(result: Result) -> str:
        assert result.exit_code == 2, result.output
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, result.stderr
        return lines[0]

    return sentence
