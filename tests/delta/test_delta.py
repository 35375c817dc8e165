"""Deltas between releases of tiny models in every format: byte for byte, small, in part, and nothing left behind."""

import filecmp
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qalora.adapter import Adapter, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export_jobs, run_jobs
from qalora.converters.plan import ExportOptions
from qalora.delta import apply_delta, check_base, write_delta
from qalora.delta.records import Copy, Data, Patch, read_delta
from qalora.errors import InputError, OutputError
from qalora.formats.gguf import BLOCKS, read_header
from qalora.formats.output import write_json
from qalora.quantization import quantize
from qalora.releasing.checksums import check_sums, write_sums
from qalora.testing import byte_tokenizer, random_adapter, tiny_llama

TARGETS = ("gguf", "mlx", "qalora", "gptq", "onnx", "openvino", "transformersjs", "hqq")


def adapter_for(model: Checkpoint, seed: int) -> Adapter:
    return random_adapter(model, seed=seed, a_size=0.05)


def make_release(
    model: Checkpoint,
    folder: Path,
    seed: int | None = None,
    *,
    targets: tuple[str, ...] = TARGETS,
    **options: int | str,
) -> Path:
    """A folder as a release is, without the proof: artefacts, an adapter where there is one, a card, checksums."""
    adapter = None if seed is None else adapter_for(model, seed)
    settings = ExportOptions(allow_loss=frozenset({"minima", "zeros"}), **options)
    run_jobs(export_jobs(model, targets, settings, adapter=adapter), folder)
    if adapter is not None:
        write_adapter(adapter, folder / "adapter")
    (folder / "README.md").write_text(f"a model, {seed}\n", encoding="utf-8")
    write_json(folder / "report.json", {"passed": True, "figures": [seed or 0] * 3000})
    write_sums(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return quantize(load(tiny_llama(folder / "float", tokenizer=byte_tokenizer())), bits=4, group_size=32)


@pytest.fixture(scope="module")
def place(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, one and two: a base's release and two fine-tunes', of other names; one.delta over base."""
    root = tmp_path_factory.mktemp("releases")
    make_release(model, root / "base", name="Tiny")
    make_release(model, root / "one", 1, name="Tiny QALoRA")
    make_release(model, root / "two", 2, name="Tiny QALoRA two")
    write_delta(root / "base", root / "one", root / "one.delta")
    return root


def assert_same_folder(got: Path, expected: Path) -> None:
    names = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    assert {path.relative_to(got) for path in got.rglob("*") if path.is_file()} == names
    assert [str(name) for name in sorted(names) if not filecmp.cmp(got / name, expected / name, shallow=False)] == []


def apply(*words: object) -> Result:
    return CliRunner().invoke(main, ["delta", "apply", *(str(word) for word in words)])


def gguf_of(release: Path) -> Path:
    return next((release / "gguf").glob("*.gguf"))


def test_the_release_comes_back_byte_for_byte(place: Path, tmp_path: Path) -> None:
    done = apply_delta(place / "one.delta", place / "base", tmp_path / "out")
    assert_same_folder(tmp_path / "out", place / "one")
    check_sums(tmp_path / "out")
    assert done.nbytes == sum(path.stat().st_size for path in (place / "one").rglob("*") if path.is_file())


@pytest.mark.parametrize(("base", "release"), [("one", "two"), ("one", "base"), ("base", "base")])
def test_between_any_two_releases_of_a_base(place: Path, tmp_path: Path, base: str, release: str) -> None:
    written = write_delta(place / base, place / release, tmp_path / "delta")
    apply_delta(tmp_path / "delta", place / base, tmp_path / "out")
    assert_same_folder(tmp_path / "out", place / release)
    check_sums(tmp_path / "delta")
    assert written.nbytes == sum(path.stat().st_size for path in (tmp_path / "delta").iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_one_format_alone_is_smaller(place: Path, tmp_path: Path, target: str) -> None:
    """Apply from the base's sub-folder alone, given as itself; the delta is well below the format's size."""
    for name in ("base", "one"):
        shutil.copytree(place / name / target, tmp_path / name / target)
    written = write_delta(tmp_path / "base", tmp_path / "one", tmp_path / "delta")
    weights = [
        file for file in written.files if file.path.endswith((".gguf", ".safetensors", ".data", "_model.bin", "_data"))
    ]
    assert sum(file.packed for file in weights) < 0.4 * sum(file.nbytes for file in weights)
    apply_delta(tmp_path / "delta", tmp_path / "base" / target, tmp_path / "out", targets=[target])
    assert_same_folder(tmp_path / "out", tmp_path / "one")


def test_of_a_block_the_minimum_alone_is_shipped(place: Path) -> None:
    """What every operation of the GGUF does: a Q4_1 tensor that the fold touched is a patch of two bytes of twenty."""
    (file,) = (file for file in read_delta(place / "one.delta") if file.path.endswith(".gguf"))
    patches = [op for op in file.ops if isinstance(op, Patch)]
    tensors = [t for t in read_header(gguf_of(place / "one")).tensors.values() if t.type == "Q4_1"]
    assert {(op.block, op.columns) for op in patches} == {(BLOCKS["Q4_1"][2], ((2, 4),))}
    assert sum(op.nbytes for op in patches) == sum(tensor.nbytes for tensor in tensors)
    assert sum(op.nbytes for op in file.ops if isinstance(op, Data)) < 2000
    assert file.base is not None
    assert file.base.path != file.path
    assert any(isinstance(op, Copy) for op in file.ops)


def test_the_same_delta_twice(place: Path, tmp_path: Path) -> None:
    write_delta(place / "base", place / "one", tmp_path / "again")
    assert_same_folder(tmp_path / "again", place / "one.delta")


def test_every_key_of_the_format_is_documented(place: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "delta.md"
    text = page.read_text("utf-8")

    def keys(value: object) -> set[str]:
        if isinstance(value, dict):
            return {*value, *(key for item in value.values() for key in keys(item))}
        return {key for item in value for key in keys(item)} if isinstance(value, list) else set()

    found = keys(json.loads((place / "one.delta" / "delta.json").read_text("utf-8")))
    assert found >= {"schema", "ops", "columns", "packed"}
    assert {key for key in found if f"`{key}`" not in text} == set()


def test_models_in_several_files(model: Checkpoint, tmp_path: Path) -> None:
    for name, seed in (("base", None), ("one", 1)):
        targets = ("gguf", "mlx")
        make_release(model, tmp_path / name, seed, targets=targets, max_shard_size=40_000, split_max_size=40_000)
    assert len(list((tmp_path / "one" / "gguf").glob("*.gguf"))) > 1
    assert len(list((tmp_path / "one" / "mlx").glob("*.safetensors"))) > 1
    written = write_delta(tmp_path / "base", tmp_path / "one", tmp_path / "delta")
    large = [file for file in written.files if file.nbytes > 20_000 and file.path.startswith(("gguf/", "mlx/model"))]
    assert len(large) > 3
    assert all(file.base is not None for file in large)
    apply_delta(tmp_path / "delta", tmp_path / "base", tmp_path / "out")
    assert_same_folder(tmp_path / "out", tmp_path / "one")


def test_another_width_of_the_same_model(model: Checkpoint, tmp_path: Path) -> None:
    """Tensors of the same names and other sizes are shipped whole, and come back too."""
    other = quantize(load(tiny_llama(tmp_path / "float", tokenizer=byte_tokenizer())), bits=5, group_size=32)
    base = make_release(model, tmp_path / "base", targets=("gguf", "mlx"))
    release = make_release(other, tmp_path / "one", 1, targets=("gguf", "mlx"))
    write_delta(base, release, tmp_path / "delta")
    apply_delta(tmp_path / "delta", base, tmp_path / "out")
    assert_same_folder(tmp_path / "out", release)


def test_a_device_with_the_gguf_file_alone(place: Path, tmp_path: Path) -> None:
    held = tmp_path / "renamed.gguf"
    shutil.copyfile(gguf_of(place / "base"), held)
    result = apply(place / "one.delta", held, "-o", tmp_path / "out", "--to", "gguf")
    assert result.exit_code == 0, result.output
    assert_same_folder(tmp_path / "out" / "gguf", place / "one" / "gguf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gguf"]


def test_a_device_with_some_folders(place: Path, tmp_path: Path) -> None:
    for name in ("gguf", "mlx"):
        shutil.copytree(place / "base" / name, tmp_path / "held" / name)
    result = apply(place / "one.delta", tmp_path / "held", "-o", tmp_path / "out", "--to", "gguf", "--to", "mlx")
    assert result.exit_code == 0, result.output
    for name in ("gguf", "mlx"):
        assert_same_folder(tmp_path / "out" / name, place / "one" / name)
    with pytest.raises(InputError, match=r"got no such file; name the base release, or with `targets`"):
        apply_delta(place / "one.delta", tmp_path / "held", tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_folder_that_the_release_has_not(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`targets`: expected one of adapter, gguf, .*, got 'tflite'"):
        apply_delta(place / "one.delta", place / "base", tmp_path / "out", targets=["tflite"])


@pytest.mark.parametrize("change", ["another release", "a byte"])
def test_a_wrong_base_is_refused_before_anything_is_written(place: Path, tmp_path: Path, change: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    if change == "a byte":
        content = gguf_of(base).read_bytes()
        gguf_of(base).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        shutil.copyfile(gguf_of(place / "two"), gguf_of(base))
    with pytest.raises(InputError, match=r"base.gguf.*\.gguf: expected gguf/.* with sha256 \w{64}, got \w{64}; this"):
        apply_delta(place / "one.delta", base, tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_output_is_replaced_with_force_alone(place: Path, tmp_path: Path) -> None:
    words = [place / "one.delta", place / "base", "-o", tmp_path / "out", "--to", "gguf"]
    assert apply(*words).exit_code == 0
    with pytest.raises(OutputError, match="exists already"):
        apply_delta(place / "one.delta", place / "base", tmp_path / "out", targets=["gguf"])
    again = apply(*words)
    assert (again.exit_code, again.output.count("\n")) == (2, 1)
    assert apply(*words, "--force").exit_code == 0
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(OutputError, match="does not look like an earlier output"):
        apply_delta(place / "one.delta", place / "base", tmp_path / "letters", force=True)
    assert (tmp_path / "letters" / "to.txt").read_text("utf-8") == "dear"


def test_a_base_becomes_the_release_in_its_place(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "held")
    apply_delta(place / "one.delta", tmp_path / "held", tmp_path / "held", force=True)
    assert_same_folder(tmp_path / "held", place / "one")


def test_what_is_needed_is_never_overwritten(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "one.delta", tmp_path / "held" / "delta")
    shutil.copytree(place / "base", tmp_path / "held" / "base")
    shutil.copyfile(place / "base" / "README.md", tmp_path / "held" / "README.md")
    for delta, base in (
        (tmp_path / "held" / "delta", place / "base"),
        (place / "one.delta", tmp_path / "held" / "base"),
    ):
        with pytest.raises(OutputError, match="expected a place that does not hold"):
            apply_delta(delta, base, tmp_path / "held", force=True)


def test_what_is_no_base_is_refused_first(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the folder of the base release, got no folder"):
        check_base(tmp_path / "absent", tmp_path / "delta")
    with pytest.raises(OutputError, match="exists already"):
        check_base(place / "base", place / "one.delta")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("nothing alike", encoding="utf-8")
    with pytest.raises(InputError, match="expected a release of the same base model"):
        write_delta(tmp_path / "other", place / "one", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    with pytest.raises(OutputError, match="does not look like an earlier output"):
        write_delta(place / "base", place / "one", tmp_path / "other", force=True)
    write_delta(place / "base", place / "one", tmp_path / "delta")
    write_delta(place / "base", place / "two", tmp_path / "delta", force=True)
    apply_delta(tmp_path / "delta", place / "base", tmp_path / "out")
    assert_same_folder(tmp_path / "out", place / "two")


@pytest.mark.slow
def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    """The real model, its names and its tokenizer: less than a tenth of the file, and the same bytes."""
    model = load(str(smollm2))
    base = make_release(model, tmp_path / "base", targets=("gguf",), name="SmolLM2")
    small = adapter_for(model, 3)
    layers = {name: replace(layer, b=layer.b * 0.05) for name, layer in small.layers.items()}
    jobs = export_jobs(model, ["gguf"], ExportOptions(name="SmolLM2 QALoRA"), adapter=replace(small, layers=layers))
    run_jobs(jobs, tmp_path / "one")
    written = write_delta(base, tmp_path / "one", tmp_path / "delta")
    assert written.ratio < 0.07
    apply_delta(tmp_path / "delta", gguf_of(base), tmp_path / "out", targets=["gguf"])
    assert_same_folder(tmp_path / "out", tmp_path / "one")
