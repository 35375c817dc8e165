"""Work shared by processes, on this machine and by Ray: the same bytes as of one process, also where a process dies."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qalora
from qalora.adapter import write_adapter
from qalora.calibration import quantize_calibrated
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.engines import Engine, engine_of, pieces_of
from qalora.engines.local import DEATHS
from qalora.errors import EngineError, InputError
from qalora.formats.files import OutputFile
from qalora.formats.share import Share
from qalora.options.engine import Sharing
from qalora.parity import verify
from qalora.quantization import QuantizeOptions, quantize
from qalora.testing import random_adapter
from targets import OF_REAL_ZEROS


@pytest.fixture(scope="module", params=["local", "ray"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with engine_of(Sharing(jobs=2, engine=request.param)) as made:
        assert made is not None
        yield made


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    place = tmp_path_factory.mktemp("base") / "qalora"
    quantize(load(tiny), bits=4, group_size=32).save(place)
    return load(place)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def dies_once(model: Checkpoint, marker: Path) -> Checkpoint:
    """The model, one of whose tensors kills the process that reads it first."""
    name = model.linears[-1]
    read = model.tensors[name].read

    def once(start: int, stop: int) -> object:
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(start, stop)

    return replace(model, tensors={**model.tensors, name: replace(model.tensors[name], read=once)})


@pytest.mark.slow
def test_exports_have_the_bytes_of_one_process_though_a_process_dies(
    engine: Engine, base: Checkpoint, tmp_path: Path
) -> None:
    adapter = random_adapter(base, pool_size=None, seed=1, a_size=0.05, b_size=0.05, scaling=2.0)
    options = ExportOptions(max_shard_size=100_000, split_max_size=100_000)
    for out, model, workers in (
        ("one", base, None),
        ("two", dies_once(base, tmp_path / "died"), engine),
    ):
        export(model, OF_REAL_ZEROS, tmp_path / out, options, adapter=adapter, engine=workers)
    assert (tmp_path / "died").exists()
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


@pytest.mark.slow
def test_quantizing_and_proving_give_what_one_process_gives(engine: Engine, tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    float_options = {"bits": 3, "group_size": 32, "method": "hqq"}
    export(quantize(model, **float_options), ["qalora"], tmp_path / "one")
    export(quantize(model, **float_options), ["qalora"], tmp_path / "two", engine=engine)
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    made = load(tmp_path / "one" / "qalora")
    adapter = random_adapter(made, pool_size=None, seed=1, a_size=0.05, b_size=0.05, scaling=2.0)
    export(made, ["gguf"], tmp_path, adapter=adapter)
    reports = [
        verify(made, [tmp_path / "gguf"], adapter=adapter, level="weights", engine=workers).to_json()
        for workers in (None, engine)
    ]
    assert reports[0] == reports[1]
    assert reports[0]["artifacts"][0]["weights"]["tensors"] > 0


@pytest.mark.slow
def test_layers_of_one_input_are_quantized_apart_and_read_from_their_file(
    engine: Engine, tiny: Path, tmp_path: Path
) -> None:
    windows = torch.arange(64).reshape(2, 32)

    def made(keep: Path | None, workers: Engine | None = None) -> Checkpoint:
        options = QuantizeOptions(bits=4, group_size=32, method="gptq")
        return quantize_calibrated(load(tiny), windows, options, keep=keep, engine=workers)

    export(made(None), ["gguf"], tmp_path / "one")
    export(made(tmp_path / "kept", engine), ["gguf"], tmp_path / "two", engine=engine)
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_a_nameless_file_cannot_be_shared(tiny: Path, tmp_path: Path) -> None:
    windows = torch.arange(64).reshape(2, 32)
    model = quantize_calibrated(load(tiny), windows, QuantizeOptions(bits=4, group_size=32, method="gptq"))
    with engine_of(Sharing(jobs=2)) as engine, pytest.raises(InputError, match="save it first"):
        export(model, ["gguf"], tmp_path, engine=engine)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_wrong_is_said_as_by_one_process(engine: Engine) -> None:
    def refuse(piece: int) -> int:
        from qalora.errors import FormatError

        raise FormatError(f"tensor {piece}", expected="numbers", got="none", field="model")

    with pytest.raises(InputError, match=r"^tensor 7: expected numbers, got none$") as caught:
        list(engine.map(refuse, [7]))
    assert type(caught.value).__name__ == "FormatError"
    assert (caught.value.field, caught.value.got) == ("model", "none")


@pytest.mark.slow
def test_work_that_kills_every_process_is_given_up(engine: Engine) -> None:
    def die(piece: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(EngineError, match=r"died|gave a piece of the work up"):
        list(engine.map(die, [1]))


@pytest.mark.slow
def test_processes_end_with_the_one_that_began_them(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, time
from qalora.engines.local import processes

def sleep(piece):
    import os, pathlib, time
    (pathlib.Path({str(tmp_path)!r}) / str(os.getpid())).touch()
    time.sleep(600)

with processes(2) as engine:
    list(engine.map(sleep, [1, 2]))
"""
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        _until(lambda: len(list(tmp_path.iterdir())) == 2)
        process.kill()
    _until(lambda: not any(Path(f"/proc/{path.name}").exists() for path in tmp_path.iterdir()))


def _until(reached: Callable[[], bool]) -> None:
    """Wait at most a minute."""
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_the_command_line_shares_work(tiny: Path, tmp_path: Path) -> None:
    def run(*words: object) -> None:
        line = [sys.executable, "-m", "qalora", *map(str, words)]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("quantize", tiny, "-o", "base", "--jobs", 2)
    quantize(load(tiny), bits=4, group_size=32).save(tmp_path / "one")
    assert digests(tmp_path / "base") == digests(tmp_path / "one")
    base = load(tmp_path / "base")
    adapter = random_adapter(base, pool_size=None, seed=1, a_size=0.05, b_size=0.05, scaling=2.0)
    write_adapter(adapter, tmp_path / "adapter")
    run("export", "base", "--adapter", "adapter", "--to", "gguf", "-o", "dist", "--jobs", 2)
    export(base, ["gguf"], tmp_path / "expected", adapter=adapter)
    assert digests(tmp_path / "dist") == digests(tmp_path / "expected")
    run("verify", "base", "dist", "--adapter", "adapter", "--level", "weights", "--jobs", 2)


def test_pieces_are_runs_of_names_of_about_the_same_size() -> None:
    sizes = {str(n): 10 + n % 3 for n in range(100)}
    pieces = pieces_of(sizes, 2)
    assert [name for names in pieces for name in names] == list(sizes)
    assert 16 <= len(pieces) <= 20
    assert pieces_of({"a": 1}, 8) == [("a",)]
    assert pieces_of({}, 2) == []


def test_every_byte_of_a_shared_file_is_counted(tmp_path: Path) -> None:
    frame, part = Share(()), Share(["a"], frame=False)
    assert not frame.writes("a")
    assert part.writes("a")
    assert not part.writes("b")
    with OutputFile(tmp_path / "x", 4, frame) as file:
        file.write(0, b"12")
    with pytest.raises(ValueError, match="expected 4 bytes written, got 2"):
        frame.check()
    with OutputFile(tmp_path / "x", 4, part) as file:
        file.write(2, b"34")
    frame.add(part.written)
    frame.check()
    assert (tmp_path / "x").read_bytes() == b"1234"
    with pytest.raises(qalora.QaloraError, match="expected the file of 5 bytes"):
        OutputFile(tmp_path / "x", 5, part)
    assert DEATHS > 1
