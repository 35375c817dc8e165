"""tools/convert_pickle.py: an adapter's pickle becomes safetensors; a hostile one becomes a sentence."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from forks import Forks

TOOL = Path(__file__).parents[2] / "tools" / "convert_pickle.py"


Second = Callable[[Path], tuple[subprocess.CompletedProcess[str], Path]]


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


@pytest.fixture
def second(light_forks: Forks, tmp_path: Path) -> Second:
    """The tool's second process alone, which `_run` starts: what it says, and what it writes."""
    work = tmp_path / "work" / "adapter_model.safetensors"
    work.parent.mkdir()

    def run(path: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
        return light_forks.run(TOOL, path, "--child", work), work

    return run


def _refused_by(second: Second, path: Path, sentence: str) -> None:
    done, work = second(path)
    assert done.returncode == 2, done
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not work.exists()


class _Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def _saved(path: Path, *, legacy: bool) -> dict[str, torch.Tensor]:
    names = [f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight" for part in "AB"]
    tensors = collections.OrderedDict({names[0]: torch.randn(4, 6), names[1]: torch.randn(8, 4).half().t()})
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    return tensors


def _same(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    got = safetensors.torch.load_file(path)
    assert set(got) == set(tensors)
    for name in tensors:
        assert got[name].dtype == tensors[name].dtype
        assert torch.equal(got[name], tensors[name])


@pytest.mark.slow
def test_the_tensors_come_out_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    tensors = _saved(path, legacy=False)
    done = _run(tmp_path)
    assert done.returncode == 0, done
    _same(tmp_path / "adapter_model.safetensors", tensors)
    assert "exists already" in _run(path).stderr
    tensors = _saved(path, legacy=True)
    assert _run(path, "--force").returncode == 0
    _same(tmp_path / "adapter_model.safetensors", tensors)


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
def test_what_is_no_table_of_float_tensors_is_refused(
    tmp_path: Path, second: Second, content: object, sentence: str
) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save(content, path)
    _refused_by(second, path, sentence)


def test_files_that_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    _refused(tmp_path / "missing.bin", "expected a pickle such as adapter_model.bin, got nothing")
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    _refused(path, "expected members stored as torch.save stores them")


@pytest.mark.slow
def test_damaged_files_are_refused(tmp_path: Path, second: Second) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.randn(64, 64)}, path)
    whole = path.read_bytes()
    for data in (b"", b"not a pickle", whole[:-100], whole[:5000]):
        path.write_bytes(data)
        _refused_by(second, path, str(path))
    _refused(path, str(path))
