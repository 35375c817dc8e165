"""A delta that lies: every number, path and digest is checked, one sentence says so, and nothing is left behind."""

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qalora.delta import apply_delta, write_delta
from qalora.delta.coding import pack
from qalora.delta.records import SCHEMA, TILE, parse_index
from qalora.errors import FormatError, InputError
from qalora.releasing.checksums import write_sums

Content = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, one and delta: a file of weights with an operation of each kind, and a small one."""
    root = tmp_path_factory.mktemp("untrusted")
    rng = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(100, 200, generator=rng), "b": torch.randn(50, 100, generator=rng).half()}
    for name, moved in (("base", 0.0), ("one", 0.01)):
        (root / name / "mlx").mkdir(parents=True)
        tensors = {"a": weights["a"], "b": weights["b"] + moved, name: torch.ones(8)}
        save_file(tensors, root / name / "mlx" / "model.safetensors")
        (root / name / "mlx" / "config.json").write_text(f'{{"it": "{name}"}}', encoding="utf-8")
    write_delta(root / "base", root / "one", root / "delta")
    return root


def content_of(place: Path) -> Content:
    found: Content = json.loads((place / "delta" / "delta.json").read_text("utf-8"))
    return found


def test_the_example_has_every_operation(place: Path) -> None:
    assert {op["op"] for op in content_of(place)["files"][1]["ops"]} == {"copy", "data", "patch"}


def weights_of(content: Content) -> Content:
    found: Content = content["files"][1]
    return found


def op_of(content: Content, kind: str) -> Content:
    found: Content = next(op for op in weights_of(content)["ops"] if op["op"] == kind)
    return found


def put(place: str, key: str, value: Any) -> Callable[[Content], None]:
    """A change of one value: `place` is "", "file", "base" or an operation's kind."""

    def change(content: Content) -> None:
        at = {"": content, "file": weights_of(content), "base": weights_of(content)["base"]}
        (at[place] if place in at else op_of(content, place))[key] = value

    return change


def twice(content: Content) -> None:
    content["files"].append(copy.deepcopy(content["files"][0]))


def in_capitals(content: Content) -> None:
    content["files"].append({**content["files"][0], "path": content["files"][0]["path"].upper()})


def below_a_file(content: Content) -> None:
    content["files"].append({**content["files"][0], "path": content["files"][0]["path"] + "/x"})


def without_base(content: Content) -> None:
    weights_of(content)["base"] = None


def without_an_operation(content: Content) -> None:
    del weights_of(content)["ops"][0]


def without_a_key(content: Content) -> None:
    del op_of(content, "patch")["columns"]


def too_large(content: Content) -> None:
    op_of(content, "data")["bytes"] = TILE + 1


def bare(content: Content) -> None:
    content["files"] = weights_of(content)


CHANGES: dict[str, tuple[Callable[[Content], None], str]] = {
    "schema": (put("", "schema", "qalora.delta/2"), "schema: expected qalora.delta/1"),
    "another key": (put("", "run", "rm"), r"delta\.json: run: unknown key"),
    "no list": (bare, "expected a list"),
    "climbing path": (put("file", "path", "../out.bin"), "expected a plain path"),
    "climbing inside": (put("file", "path", "mlx/../../out.bin"), "expected a plain path"),
    "absolute path": (put("file", "path", "/tmp/out.bin"), "expected a plain path"),
    "backslash": (put("file", "path", "..\\out.bin"), "expected a plain path"),
    "a name that no file can have": (put("file", "path", f"mlx/{'x' * 256}"), "expected a plain path"),
    "longer form": (put("file", "path", "mlx//model.safetensors"), "expected a plain path"),
    "empty path": (put("file", "path", ""), "expected a plain path"),
    "no text": (put("file", "path", 7), r"files\[1\]\.path: expected text, got 7"),
    "zero byte": (put("file", "path", "mlx/a\0b"), "expected a plain path"),
    "surrogate": (put("file", "path", "mlx/a\ud800"), "expected a plain path"),
    "endless path": (put("file", "path", "x/" * 3000 + "x"), "expected a plain path"),
    "climbing base": (put("base", "path", "../../etc/passwd"), r"base\.path: expected a plain path"),
    "path twice": (twice, "appears twice"),
    "path twice but for case": (in_capitals, "appears twice"),
    "file and folder": (below_a_file, "is a file and a folder"),
    "base absent": (without_base, "expected bytes of a base file of 0"),
    "size": (put("file", "bytes", 5), "ops: expected 5 bytes together"),
    "negative size": (put("file", "bytes", -1), "expected a whole number"),
    "huge size": (put("file", "bytes", 1 << 70), "expected a whole number"),
    "fraction": (put("file", "bytes", 1.5), "expected a whole number"),
    "truth": (put("copy", "bytes", True), "expected a whole number"),
    "digest": (put("file", "sha256", "AB" * 32), "expected 64 hexadecimal digits"),
    "base digest": (put("base", "sha256", None), r"base\.sha256: expected text, got null"),
    "smaller base": (put("base", "bytes", 100), "expected bytes of a base file of 100"),
    "operation": (put("copy", "op", "exec"), r"op: expected copy or data or patch, got 'exec'"),
    "operation of another kind": (put("copy", "op", "data"), r"ops\[\d\]\.at: unknown key"),
    "operation missing": (without_an_operation, "bytes together"),
    "key missing": (without_a_key, r"ops\[\d\]\.columns: this key is missing"),
    "copy beyond the end": (put("copy", "at", 1 << 40), "expected bytes of a base file"),
    "patch beyond the end": (put("patch", "at", 1 << 40), "expected bytes of a base file"),
    "nothing packed": (put("data", "packed", 0), "expected a whole number of at least 1"),
    "more packed": (put("patch", "packed", 1 << 30), "data.bin: expected"),
    "too large": (too_large, f"expected at most {TILE} bytes"),
    "blocks": (put("patch", "blocks", 1 << 40), f"expected at most {TILE} bytes"),
    "block": (put("patch", "block", 0), "expected a whole number of at least 1"),
    "columns outside": (put("patch", "columns", [[0, 3]]), "expected ascending"),
    "columns backwards": (put("patch", "columns", [[1, 1]]), "expected ascending"),
    "columns that overlap": (put("patch", "columns", [[0, 2], [1, 2]]), "expected ascending"),
    "columns none": (put("patch", "columns", []), "columns: expected 1 to 64, got 0"),
    "columns many": (put("patch", "columns", [[0, 1]] * 65), "columns: expected 1 to 64, got 65"),
    "columns of three": (put("patch", "columns", [[0, 1, 2]]), r"columns\[0\]: expected 2 values, got 3"),
    "columns no pairs": (put("patch", "columns", [0, 2]), r"columns\[0\]: expected a list, got 0"),
    "fewer columns": (put("patch", "columns", [[0, 1]]), "expected a zlib stream"),
    "another place": (put("patch", "at", 0), "expected sha256"),
    "another result": (put("file", "sha256", "0" * 64), "expected sha256 0000"),
    "another base": (put("base", "sha256", "0" * 64), "this delta was made over another base"),
}


def planted(place: Path, folder: Path, content: bytes) -> Path:
    """The delta with other content of delta.json, and right checksums."""
    shutil.copytree(place / "delta", folder)
    (folder / "delta.json").write_bytes(content)
    write_sums(folder)
    return folder


def assert_refused(delta: Path, base: Path, message: str, folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError, match=message):
        apply_delta(delta, base, folder / "out" / "deep")
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_value_is_refused(place: Path, tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    content = content_of(place)
    change(content)
    delta = planted(place, tmp_path / "delta", json.dumps(content).encode())
    assert_refused(delta, place / "base", message, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"files": [], "schema": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b'{"files": [], "files": [], "schema": "qalora.delta/1"}', "a key appears twice"),
        (b"[]", "expected an object"),
        (b'{"files": [null], "schema": "qalora.delta/1"}', r"delta\.json: files\[0\]: expected an object, got null"),
    ],
)
def test_what_is_no_index_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_index(content, "delta.json")


@pytest.mark.parametrize("name", ["delta.json", "data.bin", "SHA256SUMS"])
def test_an_edited_file_is_refused_by_the_sums(place: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(place / "delta", tmp_path / "delta")
    content = bytearray((tmp_path / "delta" / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / "delta" / name).write_bytes(content)
    assert_refused(tmp_path / "delta", place / "base", "changed since SHA256SUMS was written|expected", tmp_path)


@pytest.mark.parametrize("name", ["delta.json", "data.bin", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["absent", "a link", "cut"])
def test_a_file_that_is_not_there(place: Path, tmp_path: Path, name: str, how: str) -> None:
    shutil.copytree(place / "delta", tmp_path / "delta")
    file = tmp_path / "delta" / name
    content = file.read_bytes()
    file.unlink()
    if how == "a link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    assert_refused(tmp_path / "delta", place / "base", "expected|No such file|changed since", tmp_path)


def test_a_base_file_that_links_elsewhere(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    weights = tmp_path / "base" / "mlx" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(place / "base" / "mlx" / "model.safetensors")
    assert_refused(place / "delta", tmp_path / "base", "expected a file inside the model's folder", tmp_path)


def test_a_stream_that_unpacks_to_more(place: Path, tmp_path: Path) -> None:
    """A small stream of many bytes: no more of them are made than the operation says."""
    content = content_of(place)
    bomb = pack(np.zeros(1 << 26, np.uint8))
    small = content["files"][0]
    rest = (place / "delta" / "data.bin").read_bytes()[small["ops"][0]["packed"] :]
    small["ops"][0]["packed"] = len(bomb)
    delta = planted(place, tmp_path / "delta", json.dumps(content).encode())
    (delta / "data.bin").write_bytes(bomb + rest)
    write_sums(delta)
    assert_refused(delta, place / "base", "expected a zlib stream of", tmp_path)


def test_more_than_the_disk_holds(tmp_path: Path) -> None:
    """A few megabytes of delta that copy the base's one file until no disk is large enough."""
    size = 64 << 20
    for name in ("base", "delta"):
        (tmp_path / name).mkdir()
    with (tmp_path / "base" / "a.bin").open("wb") as file:
        file.truncate(size)
    digest = hashlib.sha256(bytes(size)).hexdigest()
    times = shutil.disk_usage(tmp_path).free // size + 1000
    ops = [{"op": "copy", "at": 0, "bytes": size}] * times
    base = {"path": "a.bin", "bytes": size, "sha256": digest}
    files = [{"path": "a.bin", "bytes": size * times, "sha256": digest, "base": base, "ops": ops}]
    (tmp_path / "delta" / "delta.json").write_text(json.dumps({"schema": SCHEMA, "files": files}), encoding="utf-8")
    (tmp_path / "delta" / "data.bin").touch()
    write_sums(tmp_path / "delta")
    assert_refused(tmp_path / "delta", tmp_path / "base", "expected room for", tmp_path)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=20), st.lists(st.integers(), max_size=3))


@given(seed=st.integers(0, 1 << 30), value=VALUES)
@settings(deadline=None, max_examples=int(os.environ.get("QALORA_FUZZ_ROUNDS", "150")))
def test_any_value_in_any_place(place: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, value: Any) -> None:
    """One value of delta.json replaced by any other: refused, with nothing left, or each file has its digest."""
    folder = tmp_path_factory.mktemp("fuzz")
    content = content_of(place)
    rng = random.Random(seed)
    at: Any = content
    while True:
        key = rng.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.1:
            break
        at = at[key]
    at[key] = value
    delta = planted(place, folder / "delta", json.dumps(content).encode())
    try:
        apply_delta(delta, place / "base", folder / "out")
    except InputError:
        assert [path.name for path in folder.iterdir()] == ["delta"]
        return
    for file in parse_index((delta / "delta.json").read_bytes(), ""):
        assert hashlib.sha256((folder / "out" / file.path).read_bytes()).hexdigest() == file.sha256


@given(seed=st.integers(0, 1 << 30))
@example(seed=15049159)  # the last bits of a compressed stream, which mean nothing
@settings(deadline=None, max_examples=40)
def test_any_byte_of_the_data(place: Path, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    delta = planted(place, folder / "delta", (place / "delta" / "delta.json").read_bytes())
    data = bytearray((delta / "data.bin").read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 1 << seed % 8
    (delta / "data.bin").write_bytes(data)
    write_sums(delta)
    try:
        apply_delta(delta, place / "base", folder / "out")
    except FormatError:
        assert [path.name for path in folder.iterdir()] == ["delta"]
    else:
        for name in ("config.json", "model.safetensors"):
            assert (folder / "out" / "mlx" / name).read_bytes() == (place / "one" / "mlx" / name).read_bytes()
