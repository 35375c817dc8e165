"""Bills of materials: of a real release, held against CycloneDX's own strict schema; and what they say."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qalora.converters import load
from qalora.errors import FormatError, MissingLibraryError
from qalora.formats.output import json_bytes
from qalora.formats.record_json import decode
from qalora.quantization import quantize
from qalora.releasing.checksums import check_sums
from qalora.releasing.digests import file_digest
from qalora.releasing.manifest import read_manifest
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.package import plan_release, release
from qalora.releasing.records import Manifest
from qalora.releasing.sbom import sbom_bytes, validate_sbom
from qalora.testing import byte_tokenizer, tiny_llama

Json = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sbom")
    tiny_llama(root / "float", tokenizer=byte_tokenizer())
    model = quantize(load(root / "float"), bits=4, group_size=32)
    options = ReleaseOptions(targets=("gguf", "onnx"), level="weights")
    release(plan_release(model, options, root / "dist"), root / "dist")
    return root / "dist"


@pytest.fixture
def manifest(folder: Path) -> Json:
    found: Json = json.loads((folder / "manifest.json").read_text("utf-8"))
    digest = "sha256:" + 64 * "a"
    found["adapter"] = {"digest": digest, "convention": "peft", "minima": None, "layers": {}, "saved": {}}
    found["versions"] |= {
        "transformers + gptqmodel": "5.23.0 + 7.6.0",
        "llama.cpp": "xllamacpp 2026.10.11549",
        "mlx-lm": "0.32.2, mlx 0.32.4",
        "torch": "2.13.0+cpu",
    }
    found["options"]["card"] = {"base_model": "some/base", "license": "Apache-2.0", "datasets": ["some/data"]}
    return found


def bom_of(manifest: Json) -> bytes:
    """That of a manifest's JSON."""
    return sbom_bytes(decode(Manifest, manifest, "manifest.json"))


def test_a_release_has_one_that_is_valid(folder: Path) -> None:
    content = (folder / "sbom.cdx.json").read_bytes()
    validate_sbom(content)
    check_sums(folder)
    assert content == sbom_bytes(read_manifest(folder))
    bom = json.loads(content)
    assert "timestamp" not in bom["metadata"]
    assert bom["metadata"]["component"]["type"] == "machine-learning-model"
    files = {part["name"]: part for part in bom["components"] if part["type"] == "file"}
    assert set(files) == {
        path.relative_to(folder).as_posix() for at in ("gguf", "onnx") for path in (folder / at).rglob("*.*")
    } | {"gguf/Modelfile"}
    for name, part in files.items():
        assert part["hashes"] == [{"alg": "SHA-256", "content": file_digest(folder / name).removeprefix("sha256:")}]


def test_everything_that_a_manifest_can_say(manifest: Json) -> None:
    manifest["created"] = "2026-01-02T03:04:05Z"
    content = bom_of(manifest)
    validate_sbom(content)
    bom = json.loads(content)
    parts = {part["bom-ref"]: part for part in bom["components"]}
    assert bom["metadata"]["timestamp"] == "2026-01-02T03:04:05Z"
    assert parts["base"]["externalReferences"][0]["url"] == "https://huggingface.co/some/base"
    assert parts["base"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    purls = {part["purl"] for part in parts.values() if "purl" in part}
    assert purls >= {
        "pkg:pypi/transformers@5.23.0",
        "pkg:pypi/gptqmodel@7.6.0",
        "pkg:pypi/xllamacpp@2026.10.11549",
        "pkg:pypi/mlx-lm@0.32.2",
        "pkg:pypi/mlx@0.32.4",
        "pkg:pypi/torch@2.13.0%2Bcpu",
    }
    made = {row["ref"]: row["dependsOn"] for row in bom["dependencies"]}
    assert set(made) == {"model", *parts}
    assert made["file:onnx/model.onnx"] == ["adapter", "base"]
    assert set(made["model"]) == set(parts)
    card = bom["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["datasets"] == [{"type": "dataset", "name": "some/data"}]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "gate: codes", "value": "pass", "slice": "onnx"} in metrics


def test_the_serial_number_is_the_contents(manifest: Json) -> None:
    first, again = (json.loads(bom_of(manifest)) for _ in range(2))
    assert first == again
    manifest["artifacts"][0]["bytes"] += 1
    other = json.loads(bom_of(manifest))
    assert other["serialNumber"] != first["serialNumber"]


@pytest.mark.parametrize("name", ["x" * 5000, "a\nb\x00 \u200b", "", "--- # <b>"])
def test_odd_names_are_valid_too(manifest: Json, name: str) -> None:
    manifest["name"] = manifest["base"]["name"] = name
    manifest["base"]["license"], manifest["options"]["card"] = "a licence of its own", {}
    manifest["versions"]["a b/c"] = "1 2"
    validate_sbom(bom_of(manifest))


def test_tensors_of_another_form(manifest: Json) -> None:
    manifest["base"]["tensors"]["x"] = {"bits": "4", "group_size": None}
    with pytest.raises(FormatError, match=r"base\.tensors\.x\.shape: this key is missing"):
        bom_of(manifest)


@pytest.mark.parametrize(
    "change",
    [
        lambda bom: bom.update(bomFormat="SPDX"),
        lambda bom: bom["components"][0].update(type="thing"),
        lambda bom: bom["components"][-1].update(unknown=1),
        lambda bom: bom.update(serialNumber="urn:uuid:1"),
    ],
)
def test_what_is_none_is_refused(manifest: Json, change: Any) -> None:
    bom = json.loads(bom_of(manifest))
    change(bom)
    with pytest.raises(FormatError, match=r"sbom\.cdx\.json: expected a bill of materials"):
        validate_sbom(json_bytes(bom))


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_what_is_no_json(content: bytes) -> None:
    with pytest.raises(FormatError, match=r"sbom\.cdx\.json"):
        validate_sbom(content)


def test_without_the_library(manifest: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written all the same; checking it is one sentence."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cyclonedx"]:
        monkeypatch.delitem(sys.modules, name)
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "qalora.releasing.sbom.find_spec", lambda name, *rest: None if name == "cyclonedx" else find(name, *rest)
    )
    with pytest.raises(MissingLibraryError, match=r"cyclonedx-python-lib, which is not installed.*qalora\[sbom\]"):
        validate_sbom(bom_of(manifest))
