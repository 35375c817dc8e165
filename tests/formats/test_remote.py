"""Models at a URL: what is asked for is read, and no more; what cannot be had is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import qalora
from folders import same_files
from qalora.converters import load
from qalora.converters.exports import export, plan_folder
from qalora.engines import engine_of
from qalora.errors import FormatError, InputError
from qalora.options.engine import Sharing
from qalora.quantization import quantize
from qalora.testing import assert_same_model


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Iterator[list[int]]:
    """memory://model with a copy of the tiny model; gives the lengths of what is read of its weights."""
    system = fsspec.filesystem("memory")
    system.put(str(tiny), "/model", recursive=True)
    lengths: list[int] = []
    cat = system.cat_file

    def watched(path: str, start: int | None = None, end: int | None = None, **more: object) -> bytes:
        if path.endswith(".safetensors"):
            assert start is not None
            assert end is not None
            lengths.append(end - start)
        data: bytes = cat(path, start=start, end=end, **more)
        return data

    monkeypatch.setattr(system, "cat_file", watched)
    yield lengths
    system.rm("/model", recursive=True)


def test_a_plan_reads_headers_and_an_export_each_tensor_once(reads: list[int], tiny: Path, tmp_path: Path) -> None:
    model = load("memory://model")
    plan = plan_folder(quantize(model, bits=4, group_size=32), max_shard_size=1 << 30)
    weights = (tiny / "model.safetensors").stat().st_size
    assert plan.nbytes > 0
    assert sum(reads) < weights / 4
    header = sum(reads)
    export(quantize(model, bits=4, group_size=32), ["qalora"], tmp_path)
    assert sum(reads) - header <= weights
    assert_same_model(load(tmp_path / "qalora"), quantize(load(tiny), bits=4, group_size=32))


def test_other_processes_read_it_too(tiny: Path, tmp_path: Path) -> None:
    model = quantize(load(tiny.as_uri()), bits=4, group_size=32)
    export(model, ["gguf"], tmp_path / "one")
    with engine_of(Sharing(jobs=2)) as engine:
        export(model, ["gguf"], tmp_path / "two", engine=engine)
    assert same_files(tmp_path / "one", tmp_path / "two")
    export(load(tiny), ["gguf"], tmp_path)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    assert_same_model(load(file.as_uri()), load(file))


def test_it_has_the_sizes_of_its_files(reads: list[int], tiny: Path) -> None:
    report, here = qalora.inspect("memory://model"), qalora.inspect(tiny)
    assert report.to_json()["bytes"] == here.to_json()["bytes"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://nothing", "memory://nothing: no such file or folder"),
        ("abc://x", "abc://x: it cannot be opened .*abc"),
        ("memory://model/model.bin", "no such file or folder"),
    ],
)
def test_what_is_not_there(url: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(url)


def test_a_file_that_shrank(reads: list[int]) -> None:
    model = load("memory://model")
    system = fsspec.filesystem("memory")
    system.pipe_file("/model/model.safetensors", b"short")
    with pytest.raises(FormatError, match=r"expected .* bytes from .* on, got"):
        model.tensors[model.linears[0]].load()
