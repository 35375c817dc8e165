"""Our safetensors against the package's, in both directions."""

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from qalora.errors import FormatError
from qalora.formats.files import InputFile
from qalora.formats.safetensors import (
    DTYPES,
    SafetensorsWriter,
    plan_layout,
    read_header,
    read_tensor,
    shards,
)


def _tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    made = {str(n): torch.randint(0, 2, (3, n), generator=rng).to(t) for n, t in enumerate(DTYPES.values())}
    return {**made, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "é": torch.arange(7)}


def test_what_the_package_writes_we_read(tmp_path: Path) -> None:
    tensors = _tensors()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    layout = read_header(path)
    assert layout.metadata == {"format": "pt"}
    assert set(layout.entries) == set(tensors)
    with InputFile(path) as file:
        for name, tensor in tensors.items():
            got = read_tensor(file, layout.entries[name])
            assert got.dtype == tensor.dtype
            assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert torch.equal(read_tensor(file, layout.entries["é"], 2, 5), torch.tensor([2, 3, 4]))


def test_what_we_write_the_package_reads(tmp_path: Path) -> None:
    tensors = _tensors()
    path = tmp_path / "model.safetensors"
    layout = plan_layout([(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], {"format": "pt", "a": "b"})
    with SafetensorsWriter(path, layout) as writer:
        for name in reversed(tensors):  # any order
            writer.write(name, tensors[name])
    assert path.stat().st_size == layout.size
    read = safetensors.torch.load_file(path)
    assert {name: t.dtype for name, t in read.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(read[name].float(), tensors[name].float()) for name in tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}


def test_a_tensor_can_come_in_tiles(tmp_path: Path) -> None:
    tensor = torch.randn(10, 6)
    layout = plan_layout([("x", torch.float32, (10, 6))])
    with SafetensorsWriter(tmp_path / "a", layout) as writer:
        for row in (8, 4, 0):
            writer.write("x", tensor[row : row + 4], row)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a")["x"], tensor)


def test_what_is_not_as_planned_is_a_bug(tmp_path: Path) -> None:
    layout = plan_layout([("x", torch.float32, (10, 6))])
    unwritten = pytest.raises(ValueError, match=f"expected {layout.size} bytes written, got {layout.size - 240}")
    with unwritten, SafetensorsWriter(tmp_path / "a", layout):
        pass
    with SafetensorsWriter(tmp_path / "b", layout) as writer:
        for bad in (torch.zeros(10, 6).half(), torch.zeros(10, 5), torch.zeros(11, 6)):
            with pytest.raises(ValueError, match=r"x: expected torch.float32"):
                writer.write("x", bad)
        writer.write("x", torch.zeros(10, 6))


def _file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _entry(begin: int, end: int, shape: list[object] | None = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "sentence"),
    [
        (b"", b"", "header in JSON"),
        (b"[]", b"", "JSON object"),
        (b"{}", b"x", "truncated or padded"),
        (b'{"a":' * 50_000, b"", "header in JSON, got lists or objects nested too deeply"),
        (b'{"a":' + b"1" * 5000 + b"}", b"", "header in JSON, got an integer of too many digits"),
        (b'{"a":"\xff"}', b"", "header in JSON, got bytes that are not UTF-8"),
        (b'{"a":1,"a":1}', b"", "a key appears twice"),
        ({"a": 1}, b"", "dtype, shape and data_offsets"),
        ({"a": _entry(0, 4)}, b"", "truncated or padded"),
        ({"a": _entry(0, 4), "b": _entry(0, 4)}, bytes(8), "overlap before tensor"),
        ({"a": _entry(0, 4), "b": _entry(8, 12)}, bytes(12), "gap before tensor 'b'"),
        ({"a": _entry(0, 8)}, bytes(8), "the header is wrong"),
        ({"a": _entry(4, 0)}, bytes(4), "the header is wrong"),
        ({"a": _entry(0, 4, [-1])}, bytes(4), "none negative"),
        ({"a": _entry(0, 4, [1.0])}, bytes(4), "whole numbers"),
        ({"a": _entry(0, 4, [True])}, bytes(4), "whole numbers"),
        ({"a": _entry(0, 0, [1 << 62, 1 << 62, 4])}, b"", "the header is wrong"),
        ({"a": _entry(0, 4, [1] * 9)}, bytes(4), "expected at most 8 dimensions, got 9"),
        ({"a": _entry(0, 4, [(1 << 63) - 1] * 100_000)}, bytes(4), "expected at most 8 dimensions, got 100000"),
        ({"a": _entry(0, 4, dtype="Q4")}, bytes(4), "a dtype among BOOL"),
        ({"a": _entry(0, 4, dtype=["F32"])}, bytes(4), "a dtype among BOOL"),
        ({"__metadata__": {"a": 1}}, b"", "strings only"),
    ],
)
def test_files_that_lie_are_refused(tmp_path: Path, header: object, data: bytes, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence):
        read_header(_file(tmp_path / "a.safetensors", header, data))


@pytest.mark.parametrize("length", [1, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(FormatError, match="truncated or no safetensors file"):
        read_header(_file(tmp_path / "a", b"", length=length))
    (tmp_path / "b").write_bytes(b"1234567")
    with pytest.raises(FormatError, match="expected a safetensors file, got 7 bytes"):
        read_header(tmp_path / "b")


def test_shards_are_found_and_kept_inside(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file({"a": torch.ones(1)}, folder / "m-1.safetensors")
    safetensors.torch.save_file({"b": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"

    def names(**names: str) -> dict[str, Path]:
        index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")
        return shards(folder)

    assert names(a="m-1.safetensors") == {"a": folder / "m-1.safetensors"}
    for outside in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "a/../../outside.safetensors",
        "",
        "\ud800",
    ):
        with pytest.raises(FormatError, match="a plain name inside the folder"):
            names(b=outside)
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(FormatError, match="a file inside the model's folder"):
        names(b="link.safetensors")
    with pytest.raises(FormatError, match="missing tensor 'b' in m-1"):
        names(b="m-1.safetensors")
    with pytest.raises(FormatError, match="expected a header in JSON, got an integer of too many digits"):
        index.write_text('{"weight_map": {}, "x": ' + "1" * 5000 + "}", encoding="utf-8")
        shards(folder)
    with pytest.raises(FormatError, match="a weight_map"):
        index.write_text("{}", encoding="utf-8")
        shards(folder)


def test_a_hub_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    safetensors.torch.save_file({"a": torch.ones(1)}, repo / "blobs" / "123")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/123"))
    assert list(shards(snapshot)) == ["a"]
