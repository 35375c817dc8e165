"""Artefacts are recognised by what they are, alone or in folders of them."""

import json
from pathlib import Path

import pytest

from qalora.errors import InputError
from qalora.parity import verify
from qalora.parity.artifacts import recognize


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    """A release folder with one of each; headers only, since recognising reads no more."""
    root = tmp_path / "dist"
    for folder in ("gptq", "gguf", "hqq", "onnx/portable", "native", "float"):
        (root / folder).mkdir(parents=True)
    for folder, method in (("gptq", "gptq"), ("hqq", "hqq"), ("native", "qalora")):
        config = {"quantization_config": {"quant_method": method}}
        (root / folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (root / "mlx").mkdir()
    sizes = {"bits": 4, "group_size": 32}
    config = {"quantization": sizes, "quantization_config": sizes}
    (root / "mlx" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (root / "float" / "config.json").write_text("{}", encoding="utf-8")
    (root / "gguf" / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    for folder in ("onnx", "onnx/portable"):
        (root / folder / "model.onnx").write_bytes(b"")
    (root / "onnx" / "config.json").write_text("{}", encoding="utf-8")
    (root / "README.md").write_text("a card", encoding="utf-8")
    return root


def found(*paths: Path, relative_to: Path | None = None) -> list[tuple[str, str]]:
    return [(artifact.name, artifact.kind) for artifact in recognize(paths, relative_to)]


def test_each_alone(dist: Path) -> None:
    assert found(dist / "gptq") == [("gptq", "gptq")]
    assert found(dist / "gguf") == [("gguf/model.gguf", "gguf")]
    assert found(dist / "gguf" / "model.gguf") == [("gguf/model.gguf", "gguf")]
    assert found(dist / "onnx") == [("onnx", "onnx"), ("onnx/portable", "onnx")]
    assert found(dist / "onnx" / "portable" / "model.onnx") == [("portable", "onnx")]
    assert found(dist / "hqq") == [("hqq", "hqq")]
    assert found(dist / "mlx") == [("mlx", "mlx")]
    assert found(dist / "native") == [("native", "qalora")]
    assert found(dist / "float") == [("float", "huggingface")]


def test_a_folder_stands_for_all_in_it(dist: Path) -> None:
    kinds = [kind for _, kind in found(dist)]
    assert kinds == ["huggingface", "gguf", "gptq", "hqq", "mlx", "qalora", "onnx", "onnx"]


def test_names_relative_to_a_folder(dist: Path) -> None:
    names = [name for name, _ in found(dist / "gguf", dist / "onnx", relative_to=dist)]
    assert names == ["gguf/model.gguf", "onnx", "onnx/portable"]


def test_names_are_distinct(dist: Path) -> None:
    assert [name for name, _ in found(dist / "gptq", dist / "gptq")] == ["gptq", "gptq (2)"]


@pytest.mark.parametrize("name", ["none", "README.md", "empty"])
def test_what_is_none_is_refused(dist: Path, name: str) -> None:
    (dist / "empty").mkdir()
    with pytest.raises(InputError, match="expected a GGUF or ONNX file, a model folder, or a folder of them"):
        recognize([dist / name])


@pytest.mark.parametrize("place", ["onnx", "onnx/portable", "onnx/model.onnx"])
def test_an_onnx_decoder_may_be_the_reference(place: str, made) -> None:
    report = verify(made("onnx", "base").parent / place, [made("gguf", "base")], level="weights")
    assert report.passed() and report.artifacts[0].weights.total.codes > 0, report.failure()
