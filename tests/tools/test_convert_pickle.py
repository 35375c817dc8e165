"""tools/convert_pickle.py: an adapter's pickle becomes safetensors; a hostile one becomes a sentence."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

TOOL = Path(__file__).parents[2] / "tools" / "convert_pickle.py"


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)


def _refused(path: Path, sentence: str) -> None:
    before = set(path.parent.iterdir())
    done = _run(path)
    assert done.returncode == 2, done
    assert sentence in done.stderr
    assert done.stderr.startswith("convert_pickle: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert set(path.parent.iterdir()) == before


class _Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
def test_the_tensors_come_out_as_they_are(tmp_path: Path, legacy: bool) -> None:
    names = [f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight" for part in "AB"]
    tensors = collections.OrderedDict({names[0]: torch.randn(4, 6), names[1]: torch.randn(8, 4).half().t()})
    path = tmp_path / "adapter_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    done = _run(tmp_path)
    assert done.returncode == 0, done
    got = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert set(got) == set(names)
    for name in names:
        assert got[name].dtype == tensors[name].dtype
        assert torch.equal(got[name], tensors[name])
    assert "exists already" in _run(path).stderr
    assert _run(path, "--force").returncode == 0


@pytest.mark.slow
def test_a_pickle_that_runs_code_does_not(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": _Hostile(tmp_path / "made")}, path)
    _refused(path, "it is not a table of tensors")
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(2)], "expected a table of tensors by name, got list"),
        ({"a": 1}, "'a': expected a dense tensor, got int"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "'a': expected one of float32"),
        ({"a": torch.zeros(1).expand(1 << 30)}, "tensors no larger than the file"),
        ({"a": torch.ones(4, 4).to_sparse()}, "expected a dense tensor"),
    ],
    ids=["list", "number", "integers", "expanded", "sparse"],
)
def test_what_is_no_table_of_float_tensors_is_refused(tmp_path: Path, content: object, sentence: str) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save(content, path)
    _refused(path, sentence)


def test_files_that_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    _refused(tmp_path / "missing.bin", "expected a pickle such as adapter_model.bin, got nothing")
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    _refused(path, "expected members stored as torch.save stores them")


@pytest.mark.slow
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.randn(64, 64)}, path)
    whole = path.read_bytes()
    for data in (b"", b"not a pickle", whole[:-100], whole[:5000]):
        path.write_bytes(data)
        _refused(path, str(path))
