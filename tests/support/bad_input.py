"""Lines of commands that are to be refused, and files that are damaged in one place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from click.testing import CliRunner, Result

from error_page import on_the_page
from qalora.cli import main
from said import besides_data


def run(place: Path, line: str) -> Result:
    words = [word.replace("@", f"{place}/in/").replace("%", f"{place}/") for word in line.split()]
    return CliRunner().invoke(main, words)


def tree(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*")}


def refused(place: Path, line: str, sentence: str) -> None:
    before = tree(place)
    result = run(place, line)
    assert result.exit_code == 2, f"{line}: {result.exit_code} {result.output} {result.exception!r}"
    message = [line for line in result.stderr.strip().splitlines() if not line.endswith(" ...")]  # stages
    assert sentence in message[-1], result.stderr
    assert message[-1].startswith(("qalora: ", "Error: "))
    assert message[-1].startswith("Error: ") or len(besides_data(message)) == 1
    assert tree(place) == before
    on_the_page(message[-1], place)


Damage = Callable[[Path], object]


def cut(name: str, keep: int) -> Damage:
    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[:keep])

    return damage


def patch(name: str, at: int, new: bytes) -> Damage:
    def damage(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        data[at : at + len(new)] = new
        (root / name).write_bytes(data)

    return damage


def header(name: str, change: Callable[[dict[str, dict[str, object]]], object]) -> Damage:
    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (root / name).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def config(name: str, **changes: object) -> Damage:
    def damage(root: Path) -> None:
        config = json.loads((root / name).read_text(encoding="utf-8"))
        (root / name).write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return damage


def tensor(name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(root: Path) -> None:
        tensors = safetensors.torch.load_file(root / name)
        tensors[key] = change(tensors[key]).contiguous()
        safetensors.torch.save_file(tensors, root / name)

    return damage


def without(name: str, key: str) -> Damage:
    def damage(root: Path) -> None:
        tensors = safetensors.torch.load_file(root / name)
        del tensors[key]
        safetensors.torch.save_file(tensors, root / name)

    return damage


def shard_outside(root: Path) -> None:
    shutil.move(root / "float" / "model.safetensors", root / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (root / "float" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def link_outside(root: Path) -> None:
    shutil.move(root / "float" / "model.safetensors", root / "outside.safetensors")
    (root / "float" / "model.safetensors").symlink_to(root / "outside.safetensors")


def pickle(root: Path) -> None:
    (root / "float" / "model.safetensors").unlink()
    (root / "float" / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def pickled_adapter(root: Path) -> None:
    (root / "adapter" / "adapter_model.safetensors").unlink()
    (root / "adapter" / "adapter_model.bin").write_bytes(b"\x80\x02.")


def nothing(root: Path) -> None:
    pass


def again(name: str, at: int, length: int) -> Damage:
    """The first metadata entry of a GGUF file, once more; its count one higher."""

    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        count = int.from_bytes(data[16:24], "little") + 1
        head = data[:16] + count.to_bytes(8, "little") + data[24:at]
        (root / name).write_bytes(head + data[at : at + length] + data[at:])

    return damage


def nested(root: Path) -> None:
    """The first metadata entry becomes an array of arrays."""
    data = (root / "gguf" / "model.gguf").read_bytes()
    key = data[24 : 24 + 8 + 20]
    array = (9).to_bytes(4, "little") + (9).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little")
    (root / "gguf" / "model.gguf").write_bytes(data[:24] + key + array + data[24:])


def onnx_outside(root: Path) -> None:
    import onnx

    model = onnx.load(root / "onnx" / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../data.txt"
    (root / "onnx" / "model.onnx").write_bytes(model.SerializeToString())


FIRST = "model.layers.0.self_attn.q_proj"
