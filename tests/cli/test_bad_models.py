"""Models that are damaged, to every command that takes one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bad_input import (
    FIRST,
    Damage,
    again,
    config,
    cut,
    header,
    link_outside,
    nested,
    nothing,
    patch,
    pickle,
    refused,
    shard_outside,
    tensor,
    without,
)
from qalora.converters import load
from qalora.converters.exports import export
from qalora.quantization import quantize

MODELS: list[tuple[str, Damage, str, str]] = [
    ("missing", nothing, "%absent", "no such file or folder"),
    ("empty folder", lambda root: (root / "empty").mkdir(), "@empty", "expected a model folder with config.json"),
    ("a text file", nothing, "@data.txt", "expected a GGUF or ONNX file or a model folder"),
    ("config is no JSON", cut("float/config.json", 20), "@float", "config.json: expected JSON"),
    ("unknown family", config("float/config.json", model_type="mamba"), "@float", "model_type: expected one of llama"),
    ("layers missing", config("float/config.json", num_hidden_layers=3), "@float", "model.layers.1.self_attn.q_proj"),
    ("layers absurd", config("float/config.json", num_hidden_layers=-1), "@float", "num_hidden_layers"),
    ("safetensors cut", cut("float/model.safetensors", -9), "@float", "truncated"),
    ("safetensors tiny", cut("float/model.safetensors", 5), "@float", "expected a safetensors file, got 5 bytes"),
    ("header length lies", patch("float/model.safetensors", 0, b"\xff" * 8), "@float", "expected a header of at most"),
    (
        "gap",
        header("float/model.safetensors", lambda h: h.pop("model.layers.0.mlp.up_proj.weight")),
        "@float",
        "gap before tensor",
    ),
    (
        "overflowing product",
        header("float/model.safetensors", lambda h: h["model.norm.weight"].update(shape=[1 << 62, 1 << 62])),
        "@float",
        "the header is wrong",
    ),
    (
        "overlap",
        header(
            "float/model.safetensors",
            lambda h: h["model.norm.weight"].update(
                data_offsets=h["model.layers.0.input_layernorm.weight"]["data_offsets"]
            ),
        ),
        "@float",
        "before tensor",
    ),
    (
        "NaN",
        tensor("float/model.safetensors", f"{FIRST}.weight", lambda t: t * torch.nan),
        "@float",
        f"{FIRST}.weight",
    ),
    ("index outside", shard_outside, "@float", "a plain name inside the folder"),
    ("link outside", link_outside, "@float", "a file inside the model's folder"),
    ("pickle", pickle, "@float", "pickled weights run code"),
    (
        "unknown quantization",
        config("float/config.json", quantization_config={"quant_method": "mine"}),
        "@float",
        "mine",
    ),
]

QUANTIZED: list[tuple[str, Damage, str, str]] = [
    ("qalora cut", cut("qalora/model.safetensors", -1), "@qalora", "truncated"),
    (
        "a group size that does not fit",
        config(
            "qalora/config.json",
            quantization_config={"quant_method": "qalora", "version": 1, "bits": 4, "group_size": 16},
        ),
        "@qalora",
        "codes: expected torch.uint8",
    ),
    (
        "a newer version",
        config("qalora/config.json", quantization_config={"quant_method": "qalora", "version": 9}),
        "@qalora",
        "update qalora",
    ),
    (
        "infinite scale",
        tensor("qalora/model.safetensors", f"{FIRST}.scale", lambda t: t / 0),
        "@qalora",
        f"{FIRST}.weight: scale: expected finite values",
    ),
    (
        "wrong shape",
        tensor("qalora/model.safetensors", f"{FIRST}.min", lambda t: t[1:]),
        "@qalora",
        f"{FIRST}.min: expected torch.float16",
    ),
    ("gptq cut", cut("gptq/model.safetensors", -1), "@gptq", "truncated"),
    (
        "gptq wrong shape",
        tensor("gptq/model.safetensors", f"{FIRST}.qzeros", lambda t: t[:, 1:]),
        "@gptq",
        f"{FIRST}",
    ),
    ("mlx cut", cut("mlx/model.safetensors", -1), "@mlx", "truncated"),
    (
        "mlx wrong shape",
        tensor("mlx/model.safetensors", f"{FIRST}.biases", lambda t: t[:, 1:]),
        "@mlx",
        f"{FIRST}.biases: expected [64, 2], got [64, 1]",
    ),
    (
        "mlx wrong words",
        tensor("mlx/model.safetensors", f"{FIRST}.weight", lambda t: t.view(torch.int32)),
        "@mlx",
        f"{FIRST}.weight: expected a matrix of torch.uint32, got torch.int32",
    ),
    ("mlx no biases", without("mlx/model.safetensors", f"{FIRST}.biases"), "@mlx", f"missing tensor {FIRST}.biases"),
    (
        "mlx infinite scale",
        tensor("mlx/model.safetensors", f"{FIRST}.scales", lambda t: t / 0),
        "@mlx",
        f"{FIRST}.weight: scale: expected finite values",
    ),
    (
        "mlx other width",
        config("mlx/config.json", quantization={"bits": 3, "group_size": 32}, quantization_config=None),
        "@mlx",
        "expected 12 words a row for 4 groups of 32 at 3 bits, got [64, 16]",
    ),
    (
        "mlx other mode",
        config(
            "mlx/config.json",
            quantization={"bits": 4, "group_size": 32, "mode": "mxfp4"},
            quantization_config=None,
        ),
        "@mlx",
        "quantization.mode: expected affine, got 'mxfp4'",
    ),
    (
        "mlx metadata of another model",
        header(
            "mlx/model.safetensors",
            lambda h: h["__metadata__"].update({"qalora.tensors": '{"a": [4, 32, "real", "float16", "float16"]}'}),
        ),
        "@mlx",
        "qalora.tensors: expected tensors of the file, got 'a.weight'",
    ),
    ("hqq cut", cut("hqq/model.safetensors", -1), "@hqq", "truncated"),
    (
        "hqq other width",
        tensor("hqq/model.safetensors", f"{FIRST}.nbits", lambda t: t - 2),
        "@hqq",
        f"{FIRST}.W_q: expected torch.uint8 [32, 32], got torch.uint8 [64, 32]",
    ),
    ("gguf cut", cut("gguf/model.gguf", -40), "@gguf/model.gguf", "model.gguf"),
    ("gguf tiny", cut("gguf/model.gguf", 20), "@gguf/model.gguf", "model.gguf"),
    ("gguf version", patch("gguf/model.gguf", 4, b"\x09\0\0\0"), "@gguf/model.gguf", "version"),
    ("gguf tensor count", patch("gguf/model.gguf", 8, b"\xff" * 8), "@gguf/model.gguf", "model.gguf"),
    ("gguf key twice", again("gguf/model.gguf", 24, 8 + 20 + 4 + 8 + 5), "@gguf/model.gguf", "appears twice"),
    ("gguf nested arrays", nested, "@gguf/model.gguf", "nested array"),
    ("gguf key count", patch("gguf/model.gguf", 16, b"\xff" * 8), "@gguf/model.gguf", "model.gguf"),
]


@pytest.mark.parametrize(("damage", "model", "sentence"), [row[1:] for row in MODELS], ids=[row[0] for row in MODELS])
def test_quantize(place: Path, damage: Damage, model: str, sentence: str) -> None:
    damage(place / "in")
    refused(place, f"quantize {model} -o %out/deep", sentence)


@pytest.mark.parametrize(
    ("damage", "model", "sentence"),
    [row[1:] for row in MODELS + QUANTIZED if row[0] != "NaN"],
    ids=[row[0] for row in MODELS + QUANTIZED if row[0] != "NaN"],
)
def test_every_command_that_takes_a_model(place: Path, damage: Damage, model: str, sentence: str) -> None:
    damage(place / "in")
    for line in (
        f"train {model} --data @data.txt -o %out/deep --max-steps 1",
        f"fold {model} @adapter -o %out/deep",
        f"export {model} --to gguf -o %out/deep",
        f"verify {model} @gptq --level weights",
        f"release {model} --adapter @adapter --to gguf -o %out/deep",
    ):
        refused(place, line, sentence)


def test_an_act_order_checkpoint_cannot_be_folded(place: Path) -> None:
    from dataclasses import replace

    model = quantize(load(place / "in" / "float"), bits=4, group_size=32, zeros="integer")
    name = f"{FIRST}.weight"
    lazy = model.tensors[name]
    assert lazy.spec is not None
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(torch.int32) // 32
    shuffled = replace(
        lazy,
        spec=replace(lazy.spec, act_order=True),
        read=lambda start, stop: replace(lazy.read(start, stop), g_idx=order),
    )
    export(replace(model, tensors={**model.tensors, name: shuffled}), ["qalora"], place / "acts")
    refused(place, "fold %acts/qalora @adapter -o %out", "act-order")
    refused(place, "export %acts/qalora --to gguf -o %out", "act-order")
