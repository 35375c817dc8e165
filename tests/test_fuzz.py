"""Seeded fuzzing of every reader: whatever the bytes, either the file is read or one InputError says why not.

Each case is a small valid model; one of its files is mutated, blindly (bytes flipped, cut, doubled, overwritten with
extreme numbers) or by structure (a JSON value replaced by another, a key dropped or renamed), and everything in it is
read. Each file has 150 rounds to be read in and 50 to be inspected in, and twenty times as many under `long`.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper
from onnx import save as save_onnx

from qalora.adapter import read_adapter, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load, onnx, target
from qalora.converters.exports import export
from qalora.converters.gguf.lora import read_lora, write_lora
from qalora.converters.plan import ExportOptions
from qalora.errors import InputError
from qalora.inspection import inspect
from qalora.quantization import quantize
from qalora.testing import random_adapter, tiny_llama


def rounds(count: int) -> pytest.MarkDecorator:
    """Seeds from 0, `count` of them; as `long`, those after them, up to twenty times as many."""
    more = pytest.param(range(count, 20 * count), marks=pytest.mark.long, id="more")
    return pytest.mark.parametrize("seeds", [pytest.param(range(count), id="few"), more])


SMALL = (0, 1, 2, 3, 7, 8, 31, 32, 255, 256, 1 << 16)
EXTREMES = (*SMALL, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
VALUES = (None, True, 0, -1, 3, 1e308, 1 << 62, "", "gptq", "x" * 1000, [], [1, 2], {}, {"a": 1}, [[[]]], "../../x")


@dataclass(frozen=True)
class Case:
    """A valid model below `folder`, one of its files to mutate, and how all of it is read."""

    folder: Path
    file: str
    read: Callable[[Path], object]


def _read_all(model: Checkpoint) -> None:
    """Every tensor, and what an export would make of the model: config and specs are believed there."""
    for lazy in model.tensors.values():
        lazy.load()
    for name in ("qalora", "gptq", "gguf", "onnx", "mlx", "hqq"):
        try:
            target(name).plan(model, ExportOptions())
        except InputError as error:
            assert "\n" not in str(error)


def _read_model(folder: Path) -> None:
    _read_all(load(folder))


def _read_gguf(folder: Path) -> None:
    _read_all(load(folder / "model.gguf"))


def _read_onnx(folder: Path) -> None:
    _read_all(onnx.read(folder))


def _read_adapter(folder: Path) -> None:
    read_adapter(folder, convention="paper")


def _write_as_others_do(folder: Path) -> None:
    """A decoder's nodes and weights as onnxruntime-genai's builder names them: one layer, hidden size 32."""
    rng = np.random.default_rng(0)
    size = {"bits": 4, "block_size": 16, "K": 32, "N": 32}
    norms = ("0.input_layernorm", "0.post_attention_layernorm", "1.final_norm_layernorm")
    weights = {f"model.layers.{norm}.weight": np.ones(32, np.float32) for norm in norms}
    weights |= {"embedding": np.ones((40, 32), np.float32), "lm_head": np.ones((32, 40), np.float32)}
    angles = np.outer(np.arange(4), 1e4 ** (-np.arange(0, 16, 2, dtype=np.float32) / 16))
    weights |= {"cos_cache": np.cos(angles).astype(np.float32), "sin_cache": np.sin(angles).astype(np.float32)}
    nodes = [
        ("Gather", "/model/embed_tokens/Gather", ["embedding", "input_ids"], {}),
        ("GroupQueryAttention", "/model/layers.0/attn/GroupQueryAttention", ["x"], {"num_heads": 2, "kv_num_heads": 1}),
        ("SkipSimplifiedLayerNormalization", "/model/layers.0/norm", ["x"], {"epsilon": 1e-6}),
        ("MatMul", "/lm_head/MatMul", ["x", "lm_head"], {}),
    ]
    for place, rows in (("attn/qkv", 64), ("attn/o", 32), ("mlp/gate", 32), ("mlp/up", 32), ("mlp/down", 32)):
        weights[f"{place}.q"] = rng.integers(0, 256, (rows, 2, 8), dtype=np.uint8)
        weights[f"{place}.s"] = np.ones((rows, 2), np.float32)
        weights[f"{place}.z"] = rng.integers(0, 256, rows, dtype=np.uint8)
        inputs = ["x", f"{place}.q", f"{place}.s", f"{place}.z"]
        nodes.append(("MatMulNBits", f"/model/layers.0/{place}_proj/MatMulNBits", inputs, {**size, "N": rows}))
    made = [helper.make_node(kind, inputs, ["y"], name, **more) for kind, name, inputs, more in nodes]
    kept = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    folder.mkdir()
    save_onnx(helper.make_model(helper.make_graph(made, "g", [], [], kept)), folder / "model.onnx")
    decoder = {"hidden_size": 32, "num_hidden_layers": 1, "head_size": 16}
    model = {"type": "llama", "context_length": 4, "vocab_size": 40, "decoder": decoder}
    (folder / "genai_config.json").write_text(json.dumps({"model": model}), encoding="utf-8")


def _inspect(path: Path) -> None:
    """Damage that can be read is a warning or nothing; and the JSON has no NaN."""
    json.dumps(inspect(path).to_json(), allow_nan=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """One small valid model for each reader."""
    root = tmp_path_factory.mktemp("fuzz")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tiny_llama(root / "float", config={**shape, **heads, "tie_word_embeddings": False})
    model = quantize(load(root / "float"), bits=4, group_size=32)
    export(model, ["qalora", "gptq", "gguf", "onnx", "mlx", "hqq"], root)
    next((root / "gguf").glob("*.gguf")).rename(root / "gguf" / "model.gguf")
    export(quantize(load(root / "float"), bits=3, group_size=32), ["gguf"], root / "narrow")
    next((root / "narrow" / "gguf").glob("*.gguf")).rename(root / "narrow" / "gguf" / "model.gguf")
    whole = quantize(load(root / "float"), bits=4, group_size=32, zeros="integer")
    export(whole, ["gptq"], root / "integer")
    _write_as_others_do(root / "foreign")
    adapter = random_adapter(model, rank=2, a_size=1.0, b_size=1.0, minima=None)
    write_adapter(adapter, root / "adapter")
    (root / "lora").mkdir()
    write_lora(adapter, model, root / "lora" / "lora.gguf")
    return {
        "float": (root / "float", _read_model),
        "qalora": (root / "qalora", _read_model),
        "gptq": (root / "gptq", _read_model),
        "gptq-integer": (root / "integer" / "gptq", _read_model),
        "gguf": (root / "gguf", _read_gguf),
        "gguf-narrow": (root / "narrow" / "gguf", _read_gguf),
        "onnx": (root / "onnx", _read_onnx),
        "foreign": (root / "foreign", _read_onnx),
        "mlx": (root / "mlx", _read_model),
        "hqq": (root / "hqq", _read_model),
        "adapter": (root / "adapter", _read_adapter),
        "lora": (root / "lora", lambda folder: read_lora(folder / "lora.gguf", model)),
    }


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        # headers stand at the beginning: that is where most of the damage goes
        at = rng.randrange(min(len(out), rng.choice((16, 256, 4096, 1 << 30)))) if out else 0
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 3:
            out[at:at] = out[at : at + rng.choice((1, 8, 64))]
        elif kind == 4:
            out[at : at + 4] = struct.pack("<I", rng.choice(EXTREMES) & 0xFFFFFFFF)
        else:
            out[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
    return bytes(out)


def _mutate_json(value: object, rng: random.Random) -> object:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        rest = {k: v for k, v in value.items() if k != key}
        if kind == 0:
            return rest
        if kind == 1:
            return {**rest, key + "x": value[key]}
        return {**value, key: _mutate_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _mutate_json(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def _mutate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_text(json.dumps(_mutate_json(json.loads(data), rng)), encoding="utf-8")
    elif path.suffix == ".safetensors" and rng.random() < 0.5:
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(_mutate_json(json.loads(data[8 : 8 + length]), rng)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    else:
        path.write_bytes(_mutate_bytes(data, rng))


FILES = [
    ("float", "config.json"),
    ("float", "model.safetensors"),
    ("qalora", "config.json"),
    ("qalora", "model.safetensors"),
    ("gptq", "config.json"),
    ("gptq", "model.safetensors"),
    ("gptq", "adapter_config.json"),
    ("gptq", "adapter_model.safetensors"),
    ("gptq-integer", "config.json"),
    ("gptq-integer", "model.safetensors"),
    ("gguf", "model.gguf"),
    ("gguf-narrow", "model.gguf"),
    ("onnx", "model.onnx"),
    ("onnx", "config.json"),
    ("foreign", "model.onnx"),
    ("foreign", "genai_config.json"),
    ("mlx", "config.json"),
    ("mlx", "model.safetensors"),
    ("hqq", "config.json"),
    ("hqq", "model.safetensors"),
    ("adapter", "adapter_config.json"),
    ("adapter", "adapter_model.safetensors"),
    ("lora", "lora.gguf"),
]


@rounds(150)
@pytest.mark.parametrize(("kind", "name"), FILES, ids=["/".join(file) for file in FILES])
def test_damage_is_one_sentence(
    kind: str, name: str, seeds: range, models: dict[str, tuple[Path, Callable[[Path], object]]], tmp_path: Path
) -> None:
    source, read = models[kind]
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    read(folder)
    good = (folder / name).read_bytes()
    refused = 0
    for seed in seeds:
        (folder / name).write_bytes(good)
        _mutate(folder / name, random.Random(seed))
        try:
            read(folder)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error), f"seed {seed}: {error}"
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
    assert refused > len(seeds) // 10  # the mutations do damage


@rounds(50)
@pytest.mark.parametrize(("kind", "name"), FILES, ids=["/".join(file) for file in FILES])
def test_inspect_of_damage_is_a_report_or_one_sentence(
    kind: str, name: str, seeds: range, models: dict[str, tuple[Path, Callable[[Path], object]]], tmp_path: Path
) -> None:
    source, _ = models[kind]
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    place = (
        folder / name if kind in ("gguf", "lora") else folder / "model.onnx" if kind in ("onnx", "foreign") else folder
    )
    good = (folder / name).read_bytes()
    for seed in seeds:
        (folder / name).write_bytes(good)
        _mutate(folder / name, random.Random(seed))
        try:
            _inspect(place)
        except InputError as error:
            assert "\n" not in str(error), f"seed {seed}: {error}"
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
