"""GGUF files against gguf-py, in both directions, and headers that lie."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from qalora.errors import FormatError
from qalora.formats.gguf import (
    Metadata,
    Value,
    ValueType,
    create,
    metadata_bytes,
    parse_metadata,
    plan_layout,
    read_header,
)

ENTRIES = {
    "general.architecture": Value.text("llama"),
    "a.u8": Value(type=ValueType.UINT8, value=255),
    "a.i8": Value(type=ValueType.INT8, value=-128),
    "a.u16": Value(type=ValueType.UINT16, value=65535),
    "a.i16": Value(type=ValueType.INT16, value=-3),
    "a.u32": Value.uint32(1 << 31),
    "a.i32": Value(type=ValueType.INT32, value=-7),
    "a.f32": Value.float32(0.5),
    "a.bool": Value(type=ValueType.BOOL, value=True),
    "a.u64": Value(type=ValueType.UINT64, value=1 << 63),
    "a.i64": Value(type=ValueType.INT64, value=-(1 << 62)),
    "a.f64": Value(type=ValueType.FLOAT64, value=1e300),
    "a.text": Value.text("Ünï\n"),
    "a.words": Value(type=ValueType.ARRAY, element=ValueType.STRING, value=("a", "", "ß")),
    "a.numbers": Value(type=ValueType.ARRAY, element=ValueType.INT32, value=(1, -2, 3)),
    "a.empty": Value(type=ValueType.ARRAY, element=ValueType.FLOAT32, value=()),
}
TENSORS = [("one", (3, 64), "Q4_1"), ("two", (5,), "F32"), ("three", (2, 3, 32), "Q8_0"), ("four", (7, 3), "F16")]


def write(path: Path, alignment: int | None = None) -> dict[str, bytes]:
    """A file with random bytes in every tensor; gives them."""
    entries = dict(ENTRIES)
    if alignment is not None:
        entries["general.alignment"] = Value.uint32(alignment)
    layout = plan_layout(Metadata(entries=entries), TENSORS)
    rng = np.random.default_rng(0)
    data = {name: rng.bytes(info.nbytes) for name, info in layout.tensors.items()}
    with create(path, layout) as file:
        for name in reversed(data):
            file.write(layout.tensors[name].offset, data[name])
    assert path.stat().st_size == layout.size
    return data


@pytest.mark.parametrize("alignment", [None, 8, 4096])
def test_gguf_py_reads_what_we_write(tmp_path: Path, alignment: int | None) -> None:
    data = write(tmp_path / "a.gguf", alignment)
    reader = GGUFReader(tmp_path / "a.gguf")
    for key, value in ENTRIES.items():
        found = reader.fields[key].contents()
        assert found == (list(value.value) if value.type is ValueType.ARRAY else value.value), key
        assert reader.fields[key].types[0] == value.type
    assert [tensor.name for tensor in reader.tensors] == [name for name, _, _ in TENSORS]
    for tensor, (name, shape, kind) in zip(reader.tensors, TENSORS, strict=True):
        assert tensor.tensor_type.name == kind
        assert tuple(tensor.shape[::-1]) == shape
        assert tensor.data.tobytes() == data[name]


def test_we_read_what_gguf_py_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_array("a.words", ["x", "ß"])
    weights = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    writer.add_tensor("w", weights)
    writer.add_tensor("h", weights.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_header(path)
    assert file.metadata.get("a.number") == 7
    assert file.metadata.get("a.words") == ("x", "ß")
    info = file.tensors["w"]
    assert (info.shape, info.type, info.nbytes) == ((4, 32), "F32", 512)
    assert path.read_bytes()[info.offset : info.offset + 512] == weights.tobytes()
    assert file.tensors["h"].type == "F16"


def test_metadata_alone_goes_there_and_back(tmp_path: Path) -> None:
    data = metadata_bytes(Metadata(entries=ENTRIES))
    (tmp_path / "m.gguf").write_bytes(data)
    assert parse_metadata(tmp_path / "m.gguf").entries == ENTRIES
    assert metadata_bytes(parse_metadata(tmp_path / "m.gguf")) == data


def entry(key: bytes, kind: int, body: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + body


def file_of(*entries: bytes, tensors: bytes = b"", count: int = 0, version: int = 3, tail: int = 4096) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, count, len(entries))
    return head + b"".join(entries) + tensors + bytes(tail)


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return struct.pack(f"<Q{len(name)}sI{len(shape)}QIQ", len(name), name, len(shape), *shape, kind, offset)


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "another file": (b"PK\x03\x04" + bytes(100), "GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "version 1": (file_of(version=1), "version"),
    "entries without end": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata entries"),
    "tensors without end": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
    "key longer than the file": (file_of(struct.pack("<Q", 1 << 40)), "bytes"),
    "string longer than the file": (file_of(entry(b"a", 8, struct.pack("<Q", 1 << 50))), "bytes"),
    "array longer than the file": (file_of(entry(b"a", 9, struct.pack("<IQ", 4, 1 << 61))), "an array of at most"),
    "array in an array": (file_of(entry(b"a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 0))), "nested|array"),
    "unknown value type": (file_of(entry(b"a", 13, b"")), "type"),
    "a key twice": (file_of(entry(b"a", 0, b"\1"), entry(b"a", 0, b"\2")), "appears twice"),
    "alignment 0": (file_of(entry(b"general.alignment", 4, struct.pack("<I", 0))), "alignment"),
    "alignment 24": (file_of(entry(b"general.alignment", 4, struct.pack("<I", 24))), "alignment"),
    "alignment of text": (file_of(entry(b"general.alignment", 8, struct.pack("<Q1s", 1, b"8"))), "alignment"),
    "no dimensions": (file_of(tensors=tensor(b"t", ()), count=1), "dimensions"),
    "five dimensions": (file_of(tensors=tensor(b"t", (1,) * 5), count=1), "dimensions"),
    "unknown tensor type": (file_of(tensors=tensor(b"t", (4,), kind=200), count=1), "type"),
    "overflowing product": (file_of(tensors=tensor(b"t", (1 << 33, 1 << 33)), count=1), "size"),
    "rows that are no blocks": (file_of(tensors=tensor(b"t", (33,), kind=2), count=1), "t"),
    "beyond the end": (
        file_of(tensors=tensor(b"t", (4,), offset=1 << 40), count=1),
        "truncated or its header is wrong",
    ),
    "crooked offset": (file_of(tensors=tensor(b"t", (4,), offset=4), count=1), "multiple of 32"),
    "overlap": (file_of(tensors=tensor(b"t", (64,)) + tensor(b"u", (8,), offset=32), count=2), "overlap"),
    "a tensor twice": (file_of(tensors=tensor(b"t", (4,)) + tensor(b"t", (4,), offset=32), count=2), "appears twice"),
}


@pytest.mark.parametrize("kind", LIES)
def test_headers_that_lie(kind: str, tmp_path: Path) -> None:
    data, words = LIES[kind]
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=words) as caught:
        read_header(tmp_path / "a.gguf")
    assert "a.gguf" in str(caught.value)


@pytest.mark.parametrize("keep", [3, 23, 60, 200, 500, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    write(tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    cut = data[:keep] if keep > 0 else data[: read_header(tmp_path / "a.gguf").tensors["four"].offset + 40]
    (tmp_path / "a.gguf").write_bytes(cut)
    with pytest.raises(FormatError, match=r"a\.gguf"):
        read_header(tmp_path / "a.gguf")


def test_the_same_bytes_at_every_run(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
