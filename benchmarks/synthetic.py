"""Write a synthetic Llama of a real model's shape, a layer at a time: random codes, or random floats.

python benchmarks/synthetic.py FOLDER [--shape SHAPE] [--layers N] [--bits 4] [--group-size 32] [--floats]

1b, 8b and 70b are the shapes of Llama 3.2 1B, 3.1 8B and 3.1 70B. Floats are bfloat16, normal with a deviation of its
own for each row, as trained weights have; they come with SmolLM2's tokenizer, whose tokens are among the vocabulary's
128,256.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import load, native
from qalora.converters.families import FAMILIES
from qalora.converters.plan import ExportOptions
from qalora.converters.settings import linear_names
from qalora.converters.tokenizer import write_tokenizer
from qalora.demo import smollm2_file
from qalora.formats.output import new_folder, write_json
from qalora.formats.share import Share
from qalora.tensor import GroupQuantTensor, QuantSpec, packed_row_bytes

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 16},
    "least": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def config_of(shape: str, layers: int | None, vocabulary: int | None = None) -> dict[str, Any]:
    """A Llama config of a shape, with 8 key-value heads, and a vocabulary of 128,256 where the shape has none."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SHAPES[shape],
    }
    config["vocab_size"] = vocabulary or config["vocab_size"]
    return {**config, "num_hidden_layers": layers or config["num_hidden_layers"]}


def _shape(name: str, config: dict[str, Any]) -> tuple[int, int]:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    module = name.split(".")[-2]
    rows = {"k_proj": narrow, "v_proj": narrow, "gate_proj": wide, "up_proj": wide}.get(module, hidden)
    return rows, wide if module == "down_proj" else hidden


def _quantized(
    name: str, shape: tuple[int, int], bits: int, group_size: int, zeros: Literal["real", "integer"]
) -> LazyTensor:
    spec = QuantSpec(
        bits=bits,
        group_size=group_size,
        zeros=zeros,
        scale_dtype=torch.float16,
        min_dtype=torch.float16 if zeros == "real" else torch.float32,
    )

    def read(start: int, stop: int) -> GroupQuantTensor:
        rng = torch.Generator().manual_seed(hash((name, start)) % (1 << 31))
        rows = stop - start
        packed = torch.randint(0, 256, (rows, packed_row_bytes(shape[1], bits)), generator=rng, dtype=torch.uint8)
        scale = (torch.rand(rows, shape[1] // group_size, generator=rng) * 0.01 + 1e-3).half().float()
        zero = torch.rand(scale.shape, generator=rng) * ((1 << bits) - 1)  # anywhere among the codes
        minimum = (-scale * zero).half().float() if zeros == "real" else -scale * zero.round()
        return GroupQuantTensor(packed=packed, scale=scale, min=minimum, bits=bits, group_size=group_size)

    return LazyTensor(name=name, shape=shape, spec=spec, by_rows=True, read=read)


def _float(name: str, shape: tuple[int, ...], make: Callable[..., torch.Tensor]) -> LazyTensor:
    return LazyTensor(
        name=name,
        shape=shape,
        dtype=torch.bfloat16,
        by_rows=True,
        read=lambda start, stop: make(stop - start, *shape[1:]).to(torch.bfloat16),
    )


def synthetic(
    shape: str,
    *,
    layers: int | None = None,
    bits: int = 4,
    group_size: int = 32,
    zeros: Literal["real", "integer"] = "real",
    vocabulary: int | None = None,
) -> Checkpoint:
    """The model, lazily: each layer is made when it is read."""
    config = config_of(shape, layers, vocabulary)
    linears = linear_names(config, shape)
    tensors = {name: _quantized(name, _shape(name, config), bits, group_size, zeros) for name in linears}
    _add_others(tensors, config, torch.randn)
    return Checkpoint(path=Path(shape), layout="qalora", config=config, tensors=tensors, linears=linears)


def floats(shape: str, *, layers: int | None = None) -> Checkpoint:
    """The float model, lazily."""
    config = {**config_of(shape, layers), "dtype": "bfloat16"}
    linears = linear_names(config, shape)
    tensors = {name: _float(name, _shape(name, config), _weights) for name in linears}
    _add_others(tensors, config, _weights)
    return Checkpoint(path=Path(shape), layout="huggingface", config=config, tensors=tensors, linears=linears)


def _weights(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) * (torch.rand(rows, 1) * 0.03 + 0.01)


def _add_others(tensors: dict[str, LazyTensor], config: dict[str, Any], make: Callable[..., torch.Tensor]) -> None:
    """Embedding, output layer and norms."""
    hidden = config["hidden_size"]
    tables = ["model.embed_tokens.weight"] + ([] if config["tie_word_embeddings"] else ["lm_head.weight"])
    for name in tables:
        tensors[name] = _float(name, (config["vocab_size"], hidden), make)
    norms = [
        f"model.layers.{n}.{norm}.weight"
        for n in range(config["num_hidden_layers"])
        for norm, _ in FAMILIES["llama"].norms
    ]
    for name in [*norms, "model.norm.weight"]:
        tensors[name] = _float(name, (hidden,), torch.ones)


def write_hollow(model: Checkpoint, folder: Path) -> None:
    """Write the files of a model with holes in place of its tensors: what reads headers only cannot tell."""
    with new_folder(folder) as work:
        plan = native.plan(model, ExportOptions())
        for name, layout in plan.layout.files.items():
            with (work / name).open("wb") as file:
                file.write(layout.prefix)
                file.truncate(layout.size)
        if plan.layout.index:
            (work / plan.layout.index_name).write_bytes(plan.layout.index)
        write_json(work / "config.json", model.config if model.layout == "huggingface" else plan.config)
        write_tokenizer(load(smollm2_file()), work)


def write_floats(model: Checkpoint, folder: Path) -> None:
    """Write a float model as transformers does, with SmolLM2's tokenizer, unless it is there already."""
    if folder.exists():
        return
    with new_folder(folder) as work:
        plan = native.plan(model, ExportOptions())
        native.write(plan, model, work, lambda name, nbytes: None, Share())
        write_json(work / "config.json", model.config)
        write_tokenizer(load(smollm2_file()), work)


def write(model: Checkpoint, folder: Path) -> None:
    """Write the model as our own folder, unless it is there already."""
    if folder.exists():
        return
    with new_folder(folder) as work:
        native.write(native.plan(model, ExportOptions()), model, work, lambda name, nbytes: None, Share())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--floats", action="store_true")
    given = parser.parse_args()
    if given.floats:
        write_floats(floats(given.shape, layers=given.layers), given.folder)
    else:
        write(synthetic(given.shape, layers=given.layers, bits=given.bits, group_size=given.group_size), given.folder)
