"""A file of tensors that outlives its run: only whole records of the same key, dtype and shape are taken from it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qalora.calibration.tensor_file import TensorFile
from qalora.checkpoint import LazyTensor
from qalora.errors import InputError
from qalora.testing import lazily, random_tensor

TENSOR = random_tensor(4, 32, bits=4, group_size=16, zeros="real", seed=1)
DATA = b"".join(part.numpy().tobytes() for part in (TENSOR.packed, TENSOR.scale, TENSOR.min))
PARTS = [["uint8", 4, 16], ["float32", 4, 2], ["float32", 4, 2]]
RECORD = {"name": "a", "bits": 4, "group_size": 16, "parts": PARTS, "sha256": hashlib.sha256(DATA).hexdigest()}


def made(path: Path, record: bytes, data: bytes = DATA) -> TensorFile:
    """What is known of a file with one record."""
    path.write_bytes(json.dumps({"key": "k"}).encode() + b"\n" + record + b"\n" + data)
    return TensorFile(path, "k", {"a": source()})


def source() -> LazyTensor:
    return lazily("a", TENSOR, zeros="real")


def changed(**fields: Any) -> bytes:
    return json.dumps({**RECORD, **fields}).encode()


def test_a_whole_record_is_taken(tmp_path: Path) -> None:
    file = made(tmp_path / "file", changed())
    assert "a" in file and file.tensor("a").packed.equal(TENSOR.packed)


OTHERS = {
    "another name": changed(name="b"),
    "another width": changed(bits=8),
    "groups of another size": changed(group_size=32),
    "groups of 0": changed(group_size=0),
    "another shape": changed(parts=[["uint8", 8, 8], *PARTS[1:]]),
    "below 0": changed(parts=[["uint8", -4, -16], *PARTS[1:]]),
    "less than nothing": changed(parts=[["uint8", -1, 1 << 40], *PARTS[1:]]),
    "more than any file": changed(parts=[["uint8", 1 << 60, 1 << 60], *PARTS[1:]]),
    "infinite": changed(parts=[["uint8", float("inf"), 16], *PARTS[1:]]),
    "another dtype": changed(parts=[["float16", 4, 8], *PARTS[1:]]),
    "words": changed(bits="four"),
    "lists in lists": b'{"name": ' + b"[" * 60_000,
    "no parts": changed(parts=None),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_is_dropped(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    file = made(path, OTHERS[kind])
    assert "a" not in file and "b" not in file
    assert path.read_bytes() == b'{"key": "k"}\n'
    file.put("a", TENSOR)
    assert TensorFile(path, "k", {"a": source()}).tensor("a").packed.equal(TENSOR.packed)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("mine", encoding="utf-8")
    (tmp_path / "file").symlink_to(tmp_path / "letters")
    with pytest.raises(InputError, match="file: expected a file of its own, got a link"):
        TensorFile(tmp_path / "file", "k", {"a": source()})
    assert (tmp_path / "letters").read_text(encoding="utf-8") == "mine"
