"""A small valid example of everything that qalora reads, the files of it that are damaged, and what reads all of it.

tests/test_fuzz.py damages them a few times with fixed seeds, tools/fuzz for hours by what the code does with them.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import helper, numpy_helper
from onnx import save as save_onnx
from safetensors.torch import save_file
from torch import Tensor

from qalora.adapter import read_adapter, to_plain_lora, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load, loras, onnx, target
from qalora.converters.exports import export, save
from qalora.converters.gguf.lora import read_lora, write_lora
from qalora.converters.plan import ExportOptions
from qalora.delta import apply_delta, write_delta
from qalora.delta.records import DATA, INDEX
from qalora.errors import InputError
from qalora.formats import compressed_tensors, gptq
from qalora.formats.awq import ORDER
from qalora.inspection import inspect
from qalora.options.words import TARGETS
from qalora.pipeline.recipe import read_recipe
from qalora.quantization import quantize
from qalora.releasing.check import check_release
from qalora.releasing.checksums import SUMS, write_sums
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.package import plan_release, release
from qalora.tensor import GroupQuantTensor, integer_zeros, pack_codes
from qalora.testing import byte_tokenizer, random_adapter, small_tokenizer, tiny_llama
from qalora.training.data import join_documents, read_documents
from qalora.training.documents import Account
from targets import OF_REAL_ZEROS

VERSION1 = Path(__file__).parents[1] / "converters" / "onnx_version1.tar.xz"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A folder that can be read.

    read     reads all of a copy of the folder, or refuses it
    inspect  what of it `inspect` takes: "" for the folder, None for nothing
    mend     what somebody who means harm does after a change of the file of this name: checksums, for instance
    """

    folder: Path
    read: Callable[[Path], object]
    inspect: str | None = None
    mend: Callable[[Path, str], object] = lambda folder, name: None

    def inspected(self, folder: Path) -> None:
        """Damage that can be read is a warning or nothing; and the JSON has no NaN."""
        if self.inspect is not None:
            json.dumps(inspect(folder / self.inspect).to_json(), allow_nan=False)


def read_all(model: Checkpoint) -> None:
    """Every tensor, and what an export would make of the model: config and specs are believed there."""
    for lazy in model.tensors.values():
        lazy.load()
    for name in TARGETS:
        try:
            target(name).plan(model, ExportOptions())
        except InputError as error:
            assert "\n" not in str(error)


def _read_model(folder: Path) -> None:
    read_all(load(folder))


def _read_gguf(folder: Path) -> None:
    read_all(load(folder / "model.gguf"))


def _read_onnx(folder: Path) -> None:
    read_all(onnx.read(folder))


def _read_adapter(folder: Path) -> None:
    read_adapter(folder, convention="paper")


SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}

_CONFIG = ("config.json", "generation_config.json")
_MODEL = ("model.safetensors", *_CONFIG)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_GRAPH = ("model.onnx", "config.json")
FILES: dict[str, tuple[str, ...]] = {
    "float": _MODEL,
    "qalora": _MODEL,
    "sharded": ("model.safetensors.index.json", "model-00001-of-00002.safetensors"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    "gptq": (*_MODEL, *_ADAPTER),
    "gptq-integer": _MODEL,
    "gguf": ("model.gguf",),
    "gguf-narrow": ("model.gguf",),
    "gguf-tokenizer": ("model.gguf",),
    "onnx": (*_GRAPH, "generation_config.json"),
    "onnx-portable": _GRAPH,
    "onnx-version1": _GRAPH,
    "foreign": ("model.onnx", "genai_config.json"),
    "openvino": ("openvino_model.xml", "config.json", "generation_config.json"),
    "transformersjs": ("onnx/model_q4.onnx", "config.json", "generation_config.json"),
    "mlx": _MODEL,
    "hqq": _MODEL,
    "compressed-tensors": _MODEL,
    "awq": _MODEL,
    "auto-round": _MODEL,
    "torchao": _MODEL,
    "mnn": ("llm.mnn", "llm_config.json", "config.json", "generation_config.json"),
    "torchao-foreign": _MODEL,
    "adapter": (*_ADAPTER, "qalora_adapter.json"),
    "peft": _ADAPTER,
    "lora": ("lora.gguf",),
    "onnx-adapter": ("lora.onnx_adapter",),
    "recipe": ("recipe.toml",),
    "data": ("rows.jsonl", "list.json", "text.txt"),
    "release": ("manifest.json", "report.json", "README.md", SUMS),
    "delta": (INDEX, DATA, SUMS),
}
"""The files that are damaged of each example, by its name."""


def models(root: Path) -> dict[str, Example]:
    """Models of every layout."""
    tiny_llama(root / "float", config={**SHAPE, **HEADS, "tie_word_embeddings": False})
    model = quantize(load(root / "float"), bits=4, group_size=32)
    export(model, OF_REAL_ZEROS, root)
    narrow = quantize(load(root / "float"), bits=3, group_size=32)
    export(narrow, ["gguf"], root / "narrow")
    save(model, root / "sharded", max_shard_size=10_000)
    tokenizer = small_tokenizer(size=300)
    tiny_llama(root / "speaking", config={**SHAPE, **HEADS, "vocab_size": len(tokenizer)}, tokenizer=tokenizer)
    export(quantize(load(root / "speaking"), bits=4, group_size=32), ["qalora", "gguf"], root / "tokenizer")
    for place in (root / "gguf", root / "narrow" / "gguf", root / "tokenizer" / "gguf"):
        next(place.glob("*.gguf")).rename(place / "model.gguf")
    whole = quantize(load(root / "float"), bits=4, group_size=32, zeros="integer")
    export(whole, ["gptq"], root / "integer")
    _write_as_others_do(root / "foreign")
    _write_compressed(whole, root / "compressed")
    _write_awq(whole, root / "awq")
    _write_auto_round(whole, root / "auto-round")
    _write_torchao(whole, root / "torchao-foreign")
    with tarfile.open(VERSION1) as archive:
        archive.extractall(root / "version1", filter="data")
    earlier = root / "version1" / "real4" / "onnx"
    return {
        "float": Example(folder=root / "float", read=_read_model, inspect=""),
        "qalora": Example(folder=root / "qalora", read=_read_model, inspect=""),
        "sharded": Example(folder=root / "sharded", read=_read_model, inspect=""),
        "tokenizer": Example(folder=root / "tokenizer" / "qalora", read=_read_model, inspect=""),
        "gptq": Example(folder=root / "gptq", read=_read_model, inspect=""),
        "gptq-integer": Example(folder=root / "integer" / "gptq", read=_read_model, inspect=""),
        "gguf": Example(folder=root / "gguf", read=_read_gguf, inspect="model.gguf"),
        "gguf-narrow": Example(folder=root / "narrow" / "gguf", read=_read_gguf, inspect="model.gguf"),
        "gguf-tokenizer": Example(folder=root / "tokenizer" / "gguf", read=_read_gguf, inspect="model.gguf"),
        "onnx": Example(folder=root / "onnx", read=_read_onnx, inspect="model.onnx"),
        "onnx-portable": Example(folder=root / "onnx" / "portable", read=_read_onnx, inspect="model.onnx"),
        "onnx-version1": Example(folder=earlier, read=_read_onnx, inspect="model.onnx"),
        "foreign": Example(folder=root / "foreign", read=_read_onnx, inspect="model.onnx"),
        "openvino": Example(folder=root / "openvino", read=_read_model, inspect=""),
        "transformersjs": Example(folder=root / "transformersjs", read=_read_model, inspect=""),
        "mlx": Example(folder=root / "mlx", read=_read_model, inspect=""),
        "hqq": Example(folder=root / "hqq", read=_read_model, inspect=""),
        "compressed-tensors": Example(folder=root / "compressed", read=_read_model, inspect=""),
        "awq": Example(folder=root / "awq", read=_read_model, inspect=""),
        "auto-round": Example(folder=root / "auto-round", read=_read_model, inspect=""),
        "torchao": Example(folder=root / "torchao", read=_read_model, inspect=""),
        "mnn": Example(folder=root / "mnn", read=_read_model, inspect=""),
        "torchao-foreign": Example(folder=root / "torchao-foreign", read=_read_model, inspect=""),
    }


def _write_packed(
    model: Checkpoint,
    folder: Path,
    settings: dict[str, Any],
    words: Callable[[GroupQuantTensor, Tensor], dict[str, Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """A folder whose linear layers are tensors that `words` makes of their codes and zero points."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, lazy in model.tensors.items():
        tensor = lazy.load()
        if isinstance(tensor, Tensor):
            tensors[name] = tensor
            continue
        zero = integer_zeros(tensor)
        assert zero is not None
        tensors |= {f"{name.removesuffix('weight')}{part}": made for part, made in words(tensor, zero).items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt", **(metadata or {})})
    config = {**model.config, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(model.files["generation_config.json"], folder)


def _write_compressed(model: Checkpoint, folder: Path) -> None:
    def words(tensor: GroupQuantTensor, zero: Tensor) -> dict[str, Tensor]:
        return {
            "weight_packed": compressed_tensors.pack_rows(tensor.packed),
            "weight_scale": tensor.scale.half(),
            "weight_zero_point": compressed_tensors.pack_zeros(zero, tensor.bits),
            "weight_shape": torch.tensor(tensor.shape),
        }

    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear", "re:.*mlp"], "weights": weights, "input_activations": None}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    _write_packed(model, folder, {**said, "ignore": ["lm_head"]}, words)


def _write_awq(model: Checkpoint, folder: Path) -> None:
    def packed(codes: Tensor) -> Tensor:
        """Rows of 4-bit codes in AWQ's order of columns."""
        return pack_codes(codes.reshape(len(codes), -1, 8)[:, :, list(ORDER)].flatten(1), 4).view(torch.int32)

    def words(tensor: GroupQuantTensor, zero: Tensor) -> dict[str, Tensor]:
        return {"qweight": packed(tensor.codes().t()), "qzeros": packed(zero.t()), "scales": tensor.scale.half().t()}

    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    _write_packed(model, folder, {**said, "modules_to_not_convert": ["lm_head", "model.norm.*"]}, words)


def _write_auto_round(model: Checkpoint, folder: Path) -> None:
    def words(tensor: GroupQuantTensor, zero: Tensor) -> dict[str, Tensor]:
        zeros = gptq.pack_qzeros(zero, tensor.bits, "gptq_v2")
        return {"qweight": gptq.pack_qweight(tensor.packed), "qzeros": zeros, "scales": tensor.scale.half().t()}

    said = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "packing_format": "auto_round"}
    extra = {"model.layers.0.mlp.up_proj": {"group_size": 32}, ".*lm_head.*": {"bits": 16}, ".*k_proj": {"bits": 4}}
    _write_packed(model, folder, {**said, "data_type": "int", "extra_config": extra}, words)


def _write_torchao(model: Checkpoint, folder: Path) -> None:
    def words(tensor: GroupQuantTensor, zero: Tensor) -> dict[str, Tensor]:
        codes = (tensor.codes().to(torch.int16) - 8).to(torch.int8)
        zeros = (zero.to(torch.int16) - 8).to(torch.int8)
        return {"_weight_qdata": codes, "_weight_scale": tensor.scale, "_weight_zero_point": zeros}

    target = {"_type": "torch.dtype", "_data": "int4"}
    data = {"target_dtype": target, "block_size": [1, 32], "activation_quantization": None}
    text = json.dumps({"_type": "IntxUnpackedToInt8Tensor", "_data": data})
    _write_packed(model, folder, {"quant_method": "torchao"}, words, dict.fromkeys(model.linears, text))


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


def adapters(root: Path, model: Checkpoint) -> dict[str, Example]:
    """Adapters of every kind, of a model."""
    adapter = random_adapter(model, rank=2, a_size=1.0, b_size=1.0, minima=None)
    write_adapter(adapter, root / "adapter")
    write_adapter(to_plain_lora(adapter), root / "peft")
    (root / "peft" / "qalora_adapter.json").unlink()
    for name in ("lora", "onnx-adapter"):
        (root / name).mkdir()
    write_lora(adapter, model, root / "lora" / "lora.gguf")
    slots = loras()["onnx-adapter"]
    slots.write(adapter, None, root / "onnx-adapter" / "lora.onnx_adapter")
    return {
        "adapter": Example(folder=root / "adapter", read=_read_adapter, inspect=""),
        "peft": Example(folder=root / "peft", read=lambda folder: read_adapter(folder, model)),
        "lora": Example(
            folder=root / "lora",
            read=lambda folder: read_lora(folder / "lora.gguf", model),
            inspect="lora.gguf",
        ),
        "onnx-adapter": Example(
            folder=root / "onnx-adapter",
            read=lambda folder: list(slots.content(folder / "lora.onnx_adapter").matrices),
            inspect="lora.onnx_adapter",
        ),
    }


RECIPE = """[base]
model = "float"

[quantize]
bits = 4
group-size = 32
zeros = "integer"

[train]
data = "text.jsonl"
max-steps = 2
learning-rate = 1e-3

[export]
to = ["gguf", "onnx"]

[verify]
level = "logits"
max-tokens = 20

[release]
output = "dist"
"""

ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]},
    {"prompt": "Say yes.", "completion": "Yes."},
    {"text": "Ünïcode, and a long word."},
    {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
)


def texts(root: Path) -> dict[str, Example]:
    """Recipes and training data."""
    for name in ("recipe", "data"):
        (root / name).mkdir()
    (root / "recipe" / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    tiny_llama(root / "recipe" / "float", config={**SHAPE, **HEADS})
    (root / "recipe" / "text.jsonl").write_text(json.dumps(ROWS[-1]), encoding="utf-8")
    (root / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (root / "data" / "list.json").write_text(json.dumps(list(ROWS)), encoding="utf-8")
    (root / "data" / "text.txt").write_text("A text.\nOf two lines.\n", encoding="utf-8")
    return {
        "recipe": Example(
            folder=root / "recipe",
            read=lambda folder: read_recipe(folder / "recipe.toml"),
        ),
        "data": Example(folder=root / "data", read=_read_data),
    }


@cache
def _tokenizer() -> Any:
    return small_tokenizer()


def _read_data(folder: Path) -> None:
    """Each file by itself: one that is refused keeps no other from being read."""
    refused = []
    for path in sorted(folder.iterdir()):
        try:
            account = Account()
            join_documents(read_documents(str(path), _tokenizer(), account), _tokenizer(), account)
        except InputError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def deltas(root: Path) -> dict[str, Example]:
    """A delta of two folders with an operation of each kind."""
    rng = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(100, 40, generator=rng), "b": torch.randn(50, 40, generator=rng).half()}
    for name, moved in (("old", 0.0), ("new", 0.01)):
        (root / name).mkdir()
        save_file({**weights, "b": weights["b"] + moved, name: torch.ones(8)}, root / name / "model.safetensors")
        (root / name / "config.json").write_text(f'{{"it": "{name}"}}', encoding="utf-8")
    write_delta(root / "old", root / "new", root / "delta")

    def apply(folder: Path) -> None:
        apply_delta(folder, root / "old", folder.with_name("made"), force=True)

    return {"delta": Example(folder=root / "delta", read=apply, mend=_sums_that_fit)}


def _sums_that_fit(folder: Path, name: str) -> None:
    if name != SUMS:
        write_sums(folder)


def releases(root: Path) -> dict[str, Example]:
    """A release of a GGUF and an MLX artefact."""
    tiny_llama(root / "source", config={**SHAPE, **HEADS, "vocab_size": 257}, tokenizer=byte_tokenizer())
    export(quantize(load(root / "source"), bits=4, group_size=32), ["qalora"], root / "base")
    base = load(root / "base" / "qalora")
    options = ReleaseOptions(targets=("gguf", "mlx"), level="weights")
    release(plan_release(base, options, root / "release", adapter=random_adapter(base, seed=1)), root / "release")
    return {
        "release": Example(folder=root / "release", read=lambda folder: check_release(folder, open_artifacts=False))
    }


def examples(root: Path) -> dict[str, Example]:
    """All of them, made below `root`."""
    found = models(root)
    return {**found, **adapters(root, load(root / "qalora")), **texts(root), **deltas(root), **releases(root)}
