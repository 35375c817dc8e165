"""The parts of a delta: differences of columns, copies that are found, tensors that are found, tiles."""

import filecmp
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qalora.delta import apply_delta, write_delta
from qalora.delta.chunks import CHUNK, find_copies
from qalora.delta.coding import changed_columns, pack, pack_columns, unpack, unpack_columns
from qalora.delta.matching import match_files
from qalora.delta.records import TILE, Copy, Data, Patch
from qalora.delta.regions import tensor_regions
from qalora.errors import FormatError
from qalora.formats.gguf import Metadata, create, plan_layout


@given(
    block=st.integers(1, 24),
    blocks=st.integers(1, 40),
    touched=st.sets(st.integers(0, 23), max_size=12),
    seed=st.integers(0, 1 << 20),
)
@settings(deadline=None, max_examples=150)
def test_columns_come_back(block: int, blocks: int, touched: set[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, (blocks, block), dtype=np.uint8)
    new = old.copy()
    for column in touched:
        if column < block:
            new[:, column] = rng.integers(0, 256, blocks, dtype=np.uint8)
    columns = changed_columns(old, new)
    inside = {byte for start, stop in columns for byte in range(start, stop)}
    assert inside == {byte for byte in range(block) if (old[:, byte] != new[:, byte]).any()}
    if columns:
        assert np.array_equal(unpack_columns(old, columns, pack_columns(old, new, columns), "here"), new)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_difference_is_what_the_loop_says(width: int) -> None:
    """The stream, byte for byte, against integers of Python's."""
    rng = np.random.default_rng(width)
    old = rng.integers(0, 256, (50, width), dtype=np.uint8)
    new = rng.integers(0, 256, (50, width), dtype=np.uint8)
    expected = []
    for before, after in zip(old, new, strict=True):
        bits = 8 * width
        step = (int.from_bytes(after, "little") - int.from_bytes(before, "little")) % (1 << bits)
        step -= (1 << bits) if step >> (bits - 1) else 0
        expected.append((2 * step if step >= 0 else -2 * step - 1).to_bytes(width, "little"))
    planes = b"".join(bytes(value[byte] for value in expected) for byte in range(width))
    assert unpack(pack_columns(old, new, ((0, width),)), 50 * width, "here") == planes


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"no stream",
        pack(b"12345")[:-1],
        pack(b"123456"),
        pack(b"1234"),
        pack(b"12345") + b"x",
        pack(bytes(1 << 24)),
    ],
)
def test_a_stream_of_another_size_is_refused(packed: bytes) -> None:
    with pytest.raises(FormatError, match=r"expected a zlib stream"):
        unpack(packed, 5, "here")


@given(
    pieces=st.lists(st.tuples(st.booleans(), st.integers(0, 9000), st.integers(1, 3000)), max_size=8),
    seed=st.integers(0, 1000),
    flat=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_copies_are_copies(pieces: list[tuple[bool, int, int]], seed: int, flat: bool) -> None:
    """Whatever was put together from the old bytes and new ones: each copy is equal, and most of the old is found."""
    rng = np.random.default_rng(seed)
    old = np.zeros(10_000, np.uint8) if flat else rng.integers(0, 256, 10_000, dtype=np.uint8)
    parts = [
        old[at : at + count] if kept else rng.integers(0, 256, count, dtype=np.uint8) for kept, at, count in pieces
    ]
    new = np.concatenate([np.zeros(0, np.uint8), *parts])
    done = found = 0
    for here, there, count in find_copies(old, new):
        assert here >= done
        assert there >= 0
        assert np.array_equal(new[here : here + count], old[there : there + count])
        assert count >= CHUNK
        done, found = here + count, found + count
    wanted = sum(len(part) for (kept, _, _), part in zip(pieces, parts, strict=True) if kept and len(part) >= 2 * CHUNK)
    assert found >= wanted or flat


def test_copies_over_the_edges_of_windows() -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(0, 256, (2 << 20) + 77, dtype=np.uint8)
    new = np.concatenate((rng.integers(0, 256, 1001, dtype=np.uint8), old[5000:], old[:300]))
    places = [(here, there) for here, there, _ in find_copies(old, new)]
    assert places == [(1001, 5000), (1001 + len(old) - 5000, 0)]
    assert list(find_copies(old[:100], new)) == []
    assert list(find_copies(old, new[:50])) == []


def test_files_are_matched_by_path_then_by_likeness() -> None:
    base = ["gguf/Smol-Q4_1.gguf", "gguf/Smol-F16.gguf", "mlx/config.json", "mlx/model.safetensors", "README.md"]
    release = ["gguf/Smol-QALoRA-Q4_1.gguf", "mlx/config.json", "adapter/adapter_model.safetensors", "NOTICE"]
    assert match_files(base, release) == {
        "gguf/Smol-QALoRA-Q4_1.gguf": "gguf/Smol-Q4_1.gguf",
        "mlx/config.json": "mlx/config.json",
        "adapter/adapter_model.safetensors": None,
        "NOTICE": None,
    }


def test_a_file_that_no_reader_reads_is_bytes(tmp_path: Path) -> None:
    for name in ("a.gguf", "a.safetensors", "a.data", "a.bin"):
        (tmp_path / name).write_bytes(b"GGUF, it says" * 10)
        assert tensor_regions(tmp_path / name) == []


def test_a_tensor_larger_than_a_tile_that_moved(tmp_path: Path) -> None:
    """Tiles bound every operation; a tensor is found by its name wherever it stands; what follows is copied on."""
    values = torch.arange(TILE * 5 // 4, dtype=torch.int64).view(torch.float16)
    changed = values.clone()
    changed[TILE // 2 : TILE // 2 + 1000] = 1
    for folder, tensors in (
        ("base", {"a": torch.ones(700), "w": values, "z": torch.zeros(9)}),
        ("one", {"first": torch.zeros(1000, dtype=torch.float64), "w": changed, "z": torch.zeros(9)}),
    ):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    written = write_delta(tmp_path / "base", tmp_path / "one", tmp_path / "delta")
    (file,) = written.files
    assert all(op.nbytes <= TILE for op in file.ops if not isinstance(op, Copy))
    assert [op.columns for op in file.ops if isinstance(op, Patch)] == [((0, 2),)]
    assert sum(op.nbytes for op in file.ops if isinstance(op, Data)) < 10_000
    assert written.nbytes < 30_000
    apply_delta(tmp_path / "delta", tmp_path / "base", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors"
    ).read_bytes()


def test_a_large_text_that_grew_in_the_middle(tmp_path: Path) -> None:
    """tokenizer.json with an entry more: found piece by piece."""
    words = {f"token {number}": number for number in range(30_000)}
    for folder, added in (("base", {}), ("one", {"a word of its own": 30_000})):
        (tmp_path / folder).mkdir()
        text = json.dumps({**dict(list(words.items())[:10_000]), **added, **words})
        (tmp_path / folder / "tokenizer.json").write_text(text, encoding="utf-8")
    written = write_delta(tmp_path / "base", tmp_path / "one", tmp_path / "delta")
    assert written.nbytes < 2000
    apply_delta(tmp_path / "delta", tmp_path / "base", tmp_path / "out")
    assert filecmp.cmp(tmp_path / "out" / "tokenizer.json", tmp_path / "one" / "tokenizer.json", shallow=False)


def test_a_file_of_fragments_is_shipped_whole(tmp_path: Path) -> None:
    """Thousands of short copies would make an index that is too large to read."""
    rng = np.random.default_rng(0)
    old = rng.integers(0, 256, (5000, 300), dtype=np.uint8)
    new = np.concatenate((old, rng.integers(0, 256, (5000, 50), dtype=np.uint8)), axis=1)
    for folder, content in (("base", old), ("one", new)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text("same " * 9000, encoding="utf-8")
        (tmp_path / folder / "a.bin").write_bytes(content.tobytes())
    written = write_delta(tmp_path / "base", tmp_path / "one", tmp_path / "delta")
    assert [len(file.ops) for file in written.files] == [1, 1]
    apply_delta(tmp_path / "delta", tmp_path / "base", tmp_path / "out")
    assert filecmp.cmp(tmp_path / "out" / "a.bin", tmp_path / "one" / "a.bin", shallow=False)


def test_blocks_that_change_in_many_places(tmp_path: Path) -> None:
    """Q6_K blocks of 210 bytes, every other one changed, and tensors with padding between them: still one patch."""
    rng = np.random.default_rng(0)
    old = rng.integers(0, 256, (300, 210), dtype=np.uint8)
    new = old.copy()
    new[:, ::2] ^= 1
    tensors = [("a", (300, 256), "Q6_K"), ("b", (3,), "F32"), ("c", (5,), "F32")]
    for folder, content in (("base", old), ("one", new)):
        layout = plan_layout(Metadata(entries={}), tensors)
        (tmp_path / folder).mkdir()
        with create(tmp_path / folder / "model.gguf", layout) as file:
            file.write(layout.tensors["a"].offset, content.tobytes())
            file.write(layout.tensors["b"].offset, b"\1" * 12)
            file.write(layout.tensors["c"].offset, b"\2" * 20)
    (file_of,) = write_delta(tmp_path / "base", tmp_path / "one", tmp_path / "delta").files
    assert [op.columns for op in file_of.ops if isinstance(op, Patch)] == [((0, 209),)]
    apply_delta(tmp_path / "delta", tmp_path / "base", tmp_path / "out")
    assert filecmp.cmp(tmp_path / "out" / "model.gguf", tmp_path / "one" / "model.gguf", shallow=False)


def test_empty_files(tmp_path: Path) -> None:
    for folder in ("base", "one"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "empty.txt").touch()
        (tmp_path / folder / "same.txt").write_text("same " * 9000, encoding="utf-8")
    write_delta(tmp_path / "base", tmp_path / "one", tmp_path / "delta")
    apply_delta(tmp_path / "delta", tmp_path / "base", tmp_path / "out")
    assert (tmp_path / "out" / "empty.txt").read_bytes() == b""
