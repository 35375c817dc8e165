"""Releases of a tiny model in all formats: what is in the folder, what blocks it, and what the commands say."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard

from qalora.adapter import read_adapter, write_adapter
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.demo import smollm2_file
from qalora.errors import FormatError, ProofError
from qalora.quantization import quantize
from qalora.releasing.checksums import check_sums
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.package import plan_release, release
from qalora.testing import byte_tokenizer, random_adapter, tiny_llama

TARGETS = ("gptq", "onnx", "gguf")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/qalora, adapter and other, for the commands."""
    root = tmp_path_factory.mktemp("release")
    tiny_llama(root / "float", tokenizer=byte_tokenizer())
    model = quantize(load(root / "float"), bits=4, group_size=32)
    export(model, ["qalora"], root / "base")
    (root / "base" / "qalora" / "LICENSE").write_text("free as air", encoding="utf-8")
    write_adapter(random_adapter(model, seed=1), root / "adapter")
    write_adapter(random_adapter(model, seed=2), root / "other")
    return root


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def released(place: Path) -> tuple[Path, Result]:
    out = place / "dist"
    words: list[object] = ["release", place / "base" / "qalora", "--adapter", place / "adapter", "-o", out]
    for target in TARGETS:
        words += ["--to", target]
    return out, run(*words, "--max-tokens", 64, "--generate", 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries that it runs
def test_it_is_all_there_and_proven(released: tuple[Path, Result]) -> None:
    out, result = released
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} >= {*TARGETS, "README.md", "report.json", "SHA256SUMS"}
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["schema"] == "qalora.parity/1"
    assert report["passed"] is True
    assert {artifact["name"].split("/")[0] for artifact in report["artifacts"]} == set(TARGETS)
    for artifact in report["artifacts"]:
        assert artifact["weights"]["codes_differ"] == 0
        assert artifact["weights"]["codes"] > 0
        assert artifact["runs"], "it ran in its own runtime"
    exact = [run for artifact in report["artifacts"] for run in artifact["runs"] if run["kind"] == "onnxruntime"]
    assert len(exact) == 2
    assert all(run["lost"] < 1e-4 for run in exact)
    assert "codes" in result.stdout
    assert str(out.parent) not in (out / "report.json").read_text("utf-8")


@pytest.mark.slow
def test_checksums_are_those_of_sha256sum(released: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = released
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_sums(out)
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "README.md").write_text("other", encoding="utf-8")
    with pytest.raises(FormatError, match=r"README\.md: changed"):
        check_sums(copy)
    shutil.copyfile(out / "README.md", copy / "README.md")
    (copy / "more").write_text("x", encoding="utf-8")
    with pytest.raises(FormatError, match="not listed"):
        check_sums(copy)


@pytest.mark.slow
def test_the_card_is_one(released: tuple[Path, Result]) -> None:
    out, _ = released
    card = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "transformers"
    assert {"qa-lora", "gptq", "onnx", "gguf"} <= set(card.data.tags or [])
    assert "4-bit codes in groups of 32" in card.text
    (gguf,) = (out / "gguf").glob("*.gguf")
    assert f"llama-cli -m gguf/{gguf.name}" in card.text
    for name in ("gptq", "onnx", "onnx/portable", "gguf"):
        assert f"| `{name}" in card.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_verify_again_from_the_folder(place: Path, released: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = released
    words = ["verify", place / "base" / "qalora", out, "--max-tokens", 32, "--generate", 4]
    good = run(*words, "--adapter", place / "adapter", "--report", tmp_path / "report.json")
    assert good.exit_code == 0, good.output
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["passed"] is True
    bad = run(*words, "--adapter", place / "other", "--level", "weights")
    assert bad.exit_code == 1
    assert ": minima " in bad.stderr.strip().splitlines()[-1]


def test_a_failed_gate_leaves_the_report_and_nothing_else(place: Path, tmp_path: Path) -> None:
    """Artefacts of one adapter are verified against another."""
    base = load(place / "base" / "qalora")
    one, other = (read_adapter(place / name, base) for name in ("adapter", "other"))
    options = ReleaseOptions(targets=("gguf",), level="weights")
    planned = plan_release(base, options, tmp_path / "dist", adapter=one)
    with pytest.raises(ProofError, match=r"dist was not written: gguf/.*minima"):
        release(replace(planned, adapter=other), tmp_path / "dist")
    assert [path.name for path in tmp_path.iterdir()] == ["dist.report.json"]
    assert json.loads((tmp_path / "dist.report.json").read_text("utf-8"))["passed"] is False


@pytest.mark.parametrize("allowed", [False, True])
def test_a_runtime_that_is_missing_is_not_proven(
    place: Path, tmp_path: Path, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    absent = {"xllamacpp", "llama_cpp"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    words: list[Any] = ["release", place / "base" / "qalora", "--to", "gguf", "-o", tmp_path / "dist"]
    result = run(*words, "--max-tokens", 16, *(["--allow-unproven"] if allowed else []))
    assert result.exit_code == (0 if allowed else 1), result.output
    assert (tmp_path / "dist").exists() == allowed
    assert "pip install 'qalora[llama-cpp]'" in " ".join(result.output.split())


def test_the_same_bytes_at_every_run(place: Path, tmp_path: Path) -> None:
    base = load(place / "base" / "qalora")
    for name in ("a", "b"):
        options = ReleaseOptions(targets=("gguf", "onnx"), level="weights")
        release(plan_release(base, options, tmp_path / name), tmp_path / name)
    sums = [(tmp_path / name / "SHA256SUMS").read_bytes() for name in ("a", "b")]
    assert sums[0] == sums[1]


def test_licences_travel_along(place: Path, tmp_path: Path) -> None:
    base = load(place / "base" / "qalora")
    held = replace(base, files={**base.files, "LICENSE": place / "base" / "qalora" / "LICENSE"})
    options = ReleaseOptions(targets=("gguf",), level="weights")
    release(plan_release(held, options, tmp_path / "dist"), tmp_path / "dist")
    assert (tmp_path / "dist" / "LICENSE").read_text("utf-8") == "free as air"


def test_names_that_are_not_utf_8(place: Path, tmp_path: Path) -> None:
    """Written with the byte's number; the check makes the same texts again."""
    base, out = tmp_path / os.fsdecode(b"mod\xffel"), tmp_path / os.fsdecode(b"dist\xff")
    shutil.copytree(place / "base" / "qalora", base)
    result = run("release", base, "-o", out, "--to", "gguf", "--max-tokens", 64, "--generate", 8)
    assert result.exit_code == 0, result.output
    assert r"<h1>Parity with mod\udcffel</h1>" in (out / "report.html").read_text("utf-8")
    checked = run("check", out)
    assert checked.exit_code == 0, checked.output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_model_in_every_runtime(smollm2_release: Path) -> None:
    """Every gate; llama.cpp's best tokens by the gate that is derived for them, on few tokens."""
    report = json.loads((smollm2_release / "dist" / "report.json").read_text("utf-8"))
    runs = proven_exactly(report, smollm2_release / "adapter")
    kinds = ["gptqmodel", "onnxruntime", "onnxruntime-genai", "onnxruntime", "llama.cpp", "mlx"]
    assert [run_["kind"] for run_ in runs] == kinds
    (llama,) = (run_ for run_ in runs if run_["kind"] == "llama.cpp")
    assert {gate["gate"]: gate["status"] for gate in llama["gates"]}["top-1"] == "pass"


def proven_exactly(report: Any, adapter: Path) -> list[Any]:
    """What a report of the real model has to say of every artefact; its runs."""
    assert report["passed"] is True
    log = json.loads((adapter / "training.json").read_text("utf-8"))
    assert log["held_out"][-1]["loss"] < log["held_out"][0]["loss"]
    runs = []
    for artifact in report["artifacts"]:
        assert artifact["weights"]["codes_differ"] == 0
        assert artifact["weights"]["min_beyond"] == 0
        for run_ in artifact["runs"]:
            assert run_["generations"][0]["tokens"]
            if run_["kind"] in ("onnxruntime", "mlx"):
                assert run_["logits"]["max"] < 3e-4
                assert run_["lost"] < 1e-4
            runs.append(run_)
    return runs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_demo(place: Path, tmp_path: Path) -> None:
    """On a tiny model; and what it says to do next does it: every byte is made again."""
    base = place / "base" / "qalora"
    to = [word for name in ("gptq", "onnx", "gguf", "mlx") for word in ("--to", name)]
    result = run("demo", "-o", tmp_path / "demo", "--model", base, "--max-steps", 6, *to)
    assert result.exit_code == 0, result.output
    dist = tmp_path / "demo" / "dist"
    report = json.loads((dist / "report.json").read_text("utf-8"))
    assert report["passed"] is True
    assert {artifact["name"].split("/")[0] for artifact in report["artifacts"]} == {"gptq", "onnx", "gguf", "mlx"}
    log = json.loads((tmp_path / "demo" / "adapter" / "training.json").read_text("utf-8"))
    assert log["held_out"][-1]["loss"] < log["held_out"][0]["loss"]
    assert result.stdout.count(" continues: ") == sum(len(artifact["runs"]) for artifact in report["artifacts"])
    assert (dist / "report.html").is_file()
    (line,) = (line.split() for line in result.stdout.splitlines() if line.startswith("   qalora check"))
    assert_made_again(run(*line[1:], "--no-open", "--json"))


def assert_made_again(checked: Result) -> None:
    assert checked.exit_code == 0, checked.output
    again = json.loads(checked.stdout)["stages"][-1]
    assert again == {"question": "made again", "skipped": None, "findings": [], "notes": []}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_demo_on_the_real_model(tmp_path: Path) -> None:
    """A few steps instead of sixty; every gate, in every runtime."""
    targets = [word for name in ("gptq", "onnx", "gguf", "mlx") for word in ("--to", name)]
    result = run("demo", "-o", tmp_path / "demo", "--max-steps", 6, *targets)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "demo" / "dist" / "report.json").read_text("utf-8"))
    runs = proven_exactly(report, tmp_path / "demo" / "adapter")
    assert all(run_["logits"]["top1"] >= 0.97 for run_ in runs if run_["kind"] == "llama.cpp")
    shutil.copytree(tmp_path / "demo" / "dist", tmp_path / "elsewhere")
    words = ["check", tmp_path / "elsewhere", "--base", smollm2_file(), "--no-open"]
    assert_made_again(run(*words, "--text", tmp_path / "demo" / "held-out.txt", "--json"))
