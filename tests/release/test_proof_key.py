"""The key of a kept proof: every package of every runtime that runs is in it, by the record that owns the runtimes."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qalora.converters import layouts
from qalora.converters.plan import ExportOptions
from qalora.parity.artifacts import may_run
from qalora.parity.runtimes import RUNTIMES
from qalora.pipeline import steps
from qalora.pipeline.cached import proof_step, proof_versions
from qalora.pipeline.steps import MAKERS, versions
from qalora.releasing.options import ReleaseOptions
from targets import OF_REAL_ZEROS

CACHES = (steps._packages, steps._version, steps._required)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages that Python finds first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for one in CACHES:
        one.cache_clear()


def install(site: Path, name: str, number: str, *, holds: str, requires: str = "") -> None:
    """What pip leaves of a package: its metadata, and the top-level module that it holds."""
    for old in site.glob(f"{name}-*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    place = site / f"{name}-{number}.dist-info"
    place.mkdir()
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    text = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {number}\n{needs}"
    (place / "METADATA").write_text(text, encoding="utf-8")
    (place / "top_level.txt").write_text(f"{holds}\n", encoding="utf-8")
    for one in CACHES:
        one.cache_clear()


def key(target: str) -> str | None:
    options = {**ReleaseOptions(targets=(target,), export=ExportOptions()).to_json(), "memory": None, "device": "cpu"}
    return proof_step(options, {"model": "sha256:1"}).key


PACKAGES = [
    ("gguf", "xllamacpp", "xllamacpp"),
    ("gguf", "llama_cpp_python", "llama_cpp"),
    ("mlx", "mlx_metal", "mlx"),
    ("mlx", "mlx_cuda_13", "mlx"),
    ("mlx", "mlx_lm", "mlx_lm"),
    ("onnx", "onnxruntime_directml", "onnxruntime"),
    ("onnx", "onnxruntime_genai_cuda", "onnxruntime_genai"),
    ("onnx", "onnx", "onnx"),
    ("openvino", "openvino", "openvino"),
    ("openvino", "openvino_genai", "openvino_genai"),
    ("openvino", "openvino_tokenizers", "openvino_tokenizers"),
    ("gptq", "gptqmodel", "gptqmodel"),
    ("gptq", "peft", "peft"),
    ("hqq", "hqq", "hqq"),
    ("torchao", "torchao", "torchao"),
    ("mnn", "mnn", "MNN"),
    ("qalora", "torch", "torch"),
]


@pytest.mark.parametrize(("target", "package", "holds"), PACKAGES, ids=[package for _, package, _ in PACKAGES])
def test_a_runtime_of_another_version_is_another_proof(site: Path, target: str, package: str, holds: str) -> None:
    """Also of a package that nobody listed, which holds part of the same module."""
    install(site, package, "1.0", holds=holds)
    other = "mlx" if target == "gguf" else "gguf"
    before, of_other = key(target), key(other)
    install(site, package, "1.1", holds=holds)
    assert key(target) != before
    bases = {kind for one in layouts() for kind in one.runtimes}  # what the base may run in
    shared = {*MAKERS, *(name for kind in {*may_run(other), *bases} for name in RUNTIMES[kind].imports)}
    assert (key(other) == of_other) == (holds not in shared)


def test_what_a_runtime_requires_counts_too(site: Path) -> None:
    install(site, "kernels_of_it", "1.0", holds="kernels_of_it")
    install(site, "xllamacpp", "1.0", holds="xllamacpp", requires="kernels.of-it>=1; sys_platform != 'none'")
    before = key("gguf")
    install(site, "kernels_of_it", "1.1", holds="kernels_of_it")
    assert key("gguf") != before
    assert proof_versions(["gguf"])["kernels-of-it"] == "1.1"


def test_an_extra_that_nobody_asked_for_does_not_count(site: Path) -> None:
    install(site, "style_of_it", "1.0", holds="style_of_it")
    install(site, "xllamacpp", "1.0", holds="xllamacpp", requires='style-of-it; extra == "dev"')
    assert "style-of-it" not in proof_versions(["gguf"])


def test_python_counts() -> None:
    """Its help texts are what is computed on where no text is given."""
    assert versions([])["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize("kind", RUNTIMES)
def test_the_record_has_every_import_of_a_runtime(kind: str) -> None:
    parts = RUNTIMES[kind]
    spec = importlib.util.find_spec(parts.module)
    assert spec is not None
    assert spec.origin is not None
    found: set[str] = set()
    own = [Path(spec.origin), *([Path(spec.origin).with_name("llamacpp_abi.py")] if kind == "llama.cpp" else [])]
    for node in (node for path in own for node in ast.walk(ast.parse(path.read_text("utf-8")))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    assert found - {"qalora", *sys.stdlib_module_names, *MAKERS} <= set(parts.imports)


def test_what_runs_is_in_the_key_of_each_target() -> None:
    for target in OF_REAL_ZEROS:
        found = proof_versions([target])
        assert {"torch", "transformers", "numpy", "qalora", "python"} <= set(found)
    assert "onnxruntime-genai-cuda" not in proof_versions(["gguf"])
    assert "onnxruntime-genai-cuda" in proof_versions(["gguf", "onnx"])


def test_the_base_may_be_of_any_format_and_runs_too() -> None:
    assert {"mlx", "xllamacpp", "gptqmodel", "hqq"} <= set(proof_versions(["onnx"]))
