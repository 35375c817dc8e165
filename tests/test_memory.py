"""A file that asks for 2^60 of anything is refused before anything of that size is made, by every reader.

All cases run in one process. Its addresses are limited to what it has once each example was read, when every module
is imported, and 512 MiB: ten thousand times what an example holds, and 2^-31 of what is asked for. A reader that made
room for it first would raise MemoryError or torch's RuntimeError, and neither is an InputError.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qalora.converters import load
from qalora.errors import InputError
from readable import Example, adapters, deltas, models, texts

ROOM = 512 << 20
HUGE = 1 << 60

Change = Callable[[bytes], bytes]


def in_json(*path: str | int) -> Change:
    """The value at a place of a JSON file becomes HUGE."""

    def change(data: bytes) -> bytes:
        content = json.loads(data)
        _put(content, path)
        return json.dumps(content).encode()

    return change


def in_header(*path: str | int) -> Change:
    """The same in the header of safetensors."""

    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = in_json(*path)(data[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    return change


def _put(content: Any, path: tuple[str | int, ...]) -> None:
    for step in path[:-1]:
        content = content[step]
    content[path[-1]] = HUGE


def at(place: int, size: int = 8) -> Change:
    """A number of so many bytes becomes HUGE, or the largest that it can be."""

    def change(data: bytes) -> bytes:
        number = min(HUGE, (1 << 8 * size) - 1)
        return data[:place] + number.to_bytes(size, "little") + data[place + size :]

    return change


def behind(words: str, size: int = 8, skip: int = 0) -> Change:
    """The same for the number behind a text of a GGUF file."""

    def change(data: bytes) -> bytes:
        return at(data.index(words.encode()) + len(words) + skip, size)(data)

    return change


def in_graph(change: Callable[[Any], object]) -> Change:
    """A change of an ONNX file's graph."""

    def changed(data: bytes) -> bytes:
        from onnx import ModelProto

        model = ModelProto()
        model.ParseFromString(data)
        change(model.graph)
        return bytes(model.SerializeToString())

    return changed


def dims(graph: Any) -> None:
    graph.initializer[0].dims[0] = HUGE


def every_attribute(graph: Any) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == attribute.INT:
                attribute.i = HUGE


def outside(key: str) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        (first, *_) = (entry for one in graph.initializer for entry in one.external_data if entry.key == key)
        first.value = str(HUGE)

    return change


CONFIG = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings"),
)
Q = "model.layers.0.self_attn.q_proj"


def cases() -> Iterator[tuple[str, str, str, Change]]:
    """An example, the file of it, what asks for much, and how."""
    for kind in (
        "float",
        "qalora",
        "gptq",
        "onnx",
        "onnx-portable",
        "onnx-version1",
        "openvino",
        "transformersjs",
        "mlx",
        "hqq",
        "torchao",
        "mnn",
    ):
        for key in CONFIG:
            yield kind, "config.json", key, in_json(key)
    for kind, place in {
        "qalora": ("quantization_config", "group_size"),
        "hqq": ("quantization_config", "quant_config", "weight_quant_params", "group_size"),
        "gptq": ("quantization_config", "group_size"),
        "gptq-integer": ("quantization_config", "bits"),
        "mlx": ("quantization", "group_size"),
    }.items():
        yield kind, "config.json", "/".join(place), in_json(*place)
    for kind in ("float", "gptq", "mlx", "hqq", "qalora"):
        yield kind, "model.safetensors", "the header's length", at(0)
        for part, name in (("shape", "a size"), ("data_offsets", "an offset")):
            yield kind, "model.safetensors", name, in_header("model.norm.weight", part, 0)
    yield "sharded", "model.safetensors.index.json", "total_size", in_json("metadata", "total_size")
    for kind, name in (("gguf", "model.gguf"), ("gguf-narrow", "model.gguf"), ("lora", "lora.gguf")):
        yield kind, name, "tensors", at(8)
        yield kind, name, "entries", at(16)
        yield kind, name, "the length of a key", at(24)
        yield kind, name, "the length of a text", behind("general.architecture", skip=4)
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length"):
        yield "gguf", "model.gguf", key, behind(f"llama.{key}", 4, skip=4)
    yield "gguf", "model.gguf", "a size of a tensor", behind("output_norm.weight", skip=4)
    yield "gguf", "model.gguf", "the offset of a tensor", behind("output_norm.weight", skip=16)
    for kind in ("onnx", "onnx-portable", "onnx-version1", "foreign"):
        yield kind, "model.onnx", "a size", in_graph(dims)
        yield kind, "model.onnx", "attributes", in_graph(every_attribute)
    for key in ("offset", "length"):
        yield "onnx", "model.onnx", key, in_graph(outside(key))
    for key in ("hidden_size", "num_hidden_layers", "head_size"):
        yield "foreign", "genai_config.json", key, in_json("model", "decoder", key)
    for key in ("context_length", "vocab_size"):
        yield "foreign", "genai_config.json", key, in_json("model", key)
    for kind in ("adapter", "peft"):
        yield kind, "adapter_config.json", "r", in_json("r")
        yield kind, "adapter_model.safetensors", "the header's length", at(0)
    yield "adapter", "qalora_adapter.json", "pool_size", in_json("layers", Q, "pool_size")
    yield "onnx-adapter", "lora.onnx_adapter", "an offset", at(0)
    yield "delta", "delta.json", "bytes of a file", in_json("files", 0, "bytes")
    for key in ("bytes", "packed"):
        yield "delta", "delta.json", f"{key} of an operation", in_json("files", 0, "ops", 0, key)


CASES = {f"{kind}/{name}: {what}": (kind, name, change) for kind, name, what, change in cases()}


UNUSED = {
    "hqq/config.json: quantization_config/quant_config/weight_quant_params/group_size",
    "gptq/config.json: quantization_config/group_size",
    "sharded/model.safetensors.index.json: total_size",
    "onnx/model.onnx: attributes",
    "onnx-portable/model.onnx: attributes",
    "onnx-version1/model.onnx: attributes",
    "foreign/genai_config.json: vocab_size",
}
"""Numbers that decide nothing: the shapes of the tensors say the same, and a group may be longer than a row."""


def outcomes(root: Path) -> Iterator[tuple[str, str]]:
    """What becomes of each case: "read", "refused", or the error that is none of ours."""
    found = models(root)
    found |= {**adapters(root, load(root / "qalora")), **texts(root), **deltas(root)}
    for example in found.values():
        example.read(example.folder)
        example.inspected(example.folder)
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
    most = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for name, (kind, file, change) in CASES.items():
        folder = root / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(found[kind].folder, folder)
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        found[kind].mend(folder, file)
        yield name, _outcome(found[kind], folder)


def _outcome(example: Example, folder: Path) -> str:
    outcome = "read"
    for step in (example.read, example.inspected):
        try:
            step(folder)
        except InputError:
            outcome = "refused"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return outcome


@pytest.fixture(scope="module")
def became(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if not Path("/proc/self/statm").exists():
        pytest.skip("no system that says how many addresses a process has")
    words = [sys.executable, __file__, str(tmp_path_factory.mktemp("memory"))]
    support = [str(Path(__file__).with_name("support")), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(support)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_asks_for_more_than_there_is_costs_nothing(case: str, became: dict[str, str]) -> None:
    assert became[case] == ("read" if case in UNUSED else "refused")


if __name__ == "__main__":
    sys.stdout.write(f"\n{json.dumps(dict(outcomes(Path(sys.argv[1]))))}\n")
