"""Bad input, to every command: one sentence, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from bad_input import FIRST, Damage, config, cut, onnx_outside, refused
from qalora.cli import main


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (onnx_outside, "a plain name inside the folder"),
        (cut("onnx/portable/model.onnx.data", -5000), "of model.onnx.data, got a file of"),
        (cut("onnx/model.onnx", 100), "expected an ONNX model"),
        (lambda root: (root / "onnx" / "portable" / "model.onnx.data").unlink(), "model.onnx.data"),
        (config("onnx/config.json", hidden_size=-1), "hidden_size"),
        (cut("gguf/model.gguf", -40), "truncated"),
        (cut("gptq/model.safetensors", -1), "truncated"),
        (cut("mlx/model.safetensors", -1), "truncated"),
        (cut("hqq/model.safetensors", -1), "truncated"),
    ],
)
def test_artefacts(place: Path, damage: Damage, sentence: str) -> None:
    """All artefacts of a folder are read before one is run, so a damaged one is bad input and no failed gate."""
    damage(place / "in")
    refused(place, "verify @qalora @gptq @gguf @onnx @mlx @hqq", sentence)


def test_a_tokenizer_that_transformers_does_not_take(place: Path) -> None:
    """Wherever a command needs it: to train, to calibrate, to compare it, and for a text to run on."""
    for form in ("float", "qalora"):
        (place / "in" / form / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    sentence = ": its tokenizer cannot be loaded (AttributeError: 'list' object has no attribute 'get')"
    for line in (
        "train @qalora --data @data.txt -o %out/deep --max-steps 1",
        "quantize @float --calibration @data.txt --method gptq -o %out/deep",
        "verify @qalora @gptq --level weights",
        "verify @gptq @qalora --level weights",
        "verify @qalora @gptq --level logits",
    ):
        refused(place, line, sentence)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("quantize @float -o %exists", "exists already"),
        ("quantize @float -o %exists --force", "does not look like an earlier output"),
        ("quantize @float -o %in/data.txt", "exists already"),
        ("quantize @float -o %out --bits 7", "--bits: expected one of 2, 3, 4, 5, 6, 8, auto, got 7"),
        (
            "quantize @float -o %out --group-size 48",
            f"{FIRST}.weight: group_size: expected a divisor of in = 64, got 48",
        ),
        ("quantize @float -o %out --group-size many", "expected an integer >= 1, or row"),
        ("quantize @qalora -o %out", "--requantize"),
        ("quantize @float", "Missing option '-o'"),
        ("train @float --data @data.txt -o %out", "qalora quantize"),
        ("train @qalora --data %absent.txt -o %out", "absent.txt"),
        ("train @qalora --data @data.txt -o %exists", "exists"),
        ("train @qalora --data @data.txt -o %out --rank 0", "rank"),
        ("train @qalora --data @data.txt -o %out --pool-size 48", "48"),
        ("fold @float @adapter -o %out", "qalora quantize"),
        ("fold @qalora @adapter -o %exists", "exists already"),
        ("export @qalora --to gguf -o %in/data.txt", "data.txt"),
        ("export @qalora --to pickle -o %out", "expected one of gptq, gguf, onnx, openvino"),
        ("export @qalora --to gptq --gptq-form round -o %out", "--allow-loss zeros"),
        ("export @qalora --to gguf -o %in", "exists already"),
        ("quantize @float -o @float --force", "apart from what is read"),
        ("quantize @float -o /proc/nowhere/out", "/proc/nowhere"),
        ("adapter convert @adapter --to peft -o @adapter --force", "apart from what is read"),
        ("fold @qalora @adapter -o @adapter --force", "apart from what is read"),
        ("export @qalora --to gguf --allow-loss nonsense -o %out", "one of zeros, minima, scales, eight-bit, residual"),
        (
            "release @qalora --to gguf --allow-loss nonsense -o %out",
            "one of zeros, minima, scales, eight-bit, residual",
        ),
        ("export @qalora --to mlx --max-shard-size 5XB -o %out", "a size such as 200MB, 5GB or 4GiB, got '5XB'"),
        ("quantize @float -o %out --max-shard-size 0GB", "a size such as 200MB"),
        ("fold @qalora @adapter -o %out --max-shard-size 5iB", "a size such as 200MB"),
        ("verify @qalora %absent", "absent"),
        ("verify @qalora @gguf --level weights --report @float/config.json", "exists already"),
        ("verify @qalora @float/config.json", "config.json"),
        ("inspect %absent", "no such file or folder"),
        ("inspect @adapter --base %absent", "no such file or folder"),
        ("inspect @data.txt", "expected a GGUF or ONNX file or a model folder"),
        ("export @qalora --to gguf --lora-slots @adapter -o %out", "--lora-slots: expected onnx among the formats"),
        ("export @qalora --to onnx --lora-slots %absent -o %out", "absent"),
        ("export @qalora --to onnx --lora-slots @other_adapter -o %out", "--lora-slots: model.layers.1"),
        ("adapter convert @adapter --to gguf-lora -o %out", "give --base MODEL"),
        ("adapter convert @adapter --to gguf-lora --base @qalora -o @data.txt", "exists already"),
        (
            "adapter convert @other_adapter --to gguf-lora --base @qalora -o %out",
            "the adapter belongs to a different model",
        ),
        ("adapter convert @adapter --to onnx-adapter -o %exists", "exists already"),
        ("release @qalora --to gguf -o %exists", "exists already"),
        ("adapter convert %absent --to peft -o %out", "absent"),
        ("adapter convert @adapter --to peft -o %exists", "exists"),
        ("demo -o %exists", "exists already"),
        ("nonsense", "No such command"),
    ],
)
def test_lines_that_cannot_be(place: Path, line: str, sentence: str) -> None:
    refused(place, line, sentence)


@pytest.mark.parametrize(
    "line",
    [
        "quantize @float -o %out",
        "fold @qalora @adapter -o %out",
        "export @qalora --to gptq -o %out",
        "export @qalora --to gguf -o %out",
        "export @qalora --to onnx -o %out",
        "export @qalora --to mlx -o %out",
        "export @qalora --to gptq --max-shard-size 10kB -o %out",
        "export @qalora --to hqq -o %out",
        "release @qalora --adapter @adapter --to gguf -o %out",
        "adapter convert @adapter --to peft -o %out",
        "adapter convert @adapter --to gguf-lora --base @qalora -o %out",
        "adapter convert @adapter --to onnx-adapter --base @qalora -o %out",
    ],
)
def test_no_space_left(place: Path, line: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2000, hard)
    )  # a real limit of the operating system: writes fail with EFBIG
    try:
        refused(place, line, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_paths_that_are_not_utf_8(place: Path) -> None:
    """They are shown, and written into reports, with the byte's number."""
    import os
    from xml.dom import minidom

    odd = place / os.fsdecode(b"mod\xffel")
    shutil.copytree(place / "in" / "qalora", odd)
    shown = CliRunner().invoke(main, ["inspect", str(odd), "--quick"])
    assert shown.exit_code == 0, repr(shown.exception)
    assert r"mod\udcffel" in shown.stdout
    told = CliRunner().invoke(main, ["inspect", str(odd), "--quick", "--json"])
    assert told.exit_code == 0, repr(told.exception)
    assert json.loads(told.stdout)["path"] == str(odd)
    files = {kind: place / f"report.{kind}" for kind in ("json", "html", "xml")}
    words = [word for file in files.values() for word in ("--report", str(file))]
    proven = CliRunner().invoke(main, ["verify", str(place / "in" / "qalora"), str(odd), "--level", "weights", *words])
    assert proven.exit_code == 0, repr(proven.exception)
    assert json.loads(files["json"].read_text("utf-8"))["artifacts"][0]["name"] == odd.name
    assert r"mod\udcffel" in files["html"].read_text("utf-8")
    assert minidom.parseString(files["xml"].read_bytes())
    missing = CliRunner().invoke(main, ["inspect", str(odd / "absent")])
    assert missing.exit_code == 2
    assert r"mod\udcffel" in missing.stderr
