"""Tensors that a config does not announce, and announced ones that are not there; the format's owner decides.

transformers passes over what it has no place for, with a warning, and makes up what is missing; mlx-lm loads neither.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalora import export
from qalora.converters import load
from qalora.converters.torch_module import build
from qalora.errors import InputError
from qalora.quantization import quantize
from qalora.testing import tiny_model

TOKENS = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3))
RNG = torch.Generator().manual_seed(5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of a tiny model of a family, with an end token, made once."""
    folders: dict[str, Path] = {}

    def get(family: str, **config: Any) -> Path:
        key = json.dumps([family, config])
        if key not in folders:
            folders[key] = tiny_model(
                tmp_path_factory.mktemp("made") / family, family, config={"eos_token_id": 2, **config}
            )
        return folders[key]

    return get


def with_tensors(source: Path, folder: Path, more: dict[str, torch.Tensor], gone: str | None = None) -> Path:
    """A copy of a folder with more tensors, or without one."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if name != gone}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def by_transformers(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad():
        return module(input_ids=TOKENS[None], use_cache=False).logits[0]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG)


LAYER = "model.layers.0"
MORE: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
    "a bias of queries": ("llama", {f"{LAYER}.self_attn.q_proj.bias": random(64)}),
    "biases of the attention": (
        "qwen3",
        {f"{LAYER}.self_attn.{name}_proj.bias": random(size) for name, size in {"q": 128, "k": 64, "o": 64}.items()},
    ),
    "biases in a mistral": ("mistral", {f"{LAYER}.self_attn.v_proj.bias": random(32)}),
    "a bias of the MLP": ("llama", {f"{LAYER}.mlp.down_proj.bias": random(64)}),
    "a bias of the attention's output in a qwen2": ("qwen2", {f"{LAYER}.self_attn.o_proj.bias": random(64)}),
    "a bias of a norm": ("gemma2", {f"{LAYER}.input_layernorm.bias": random(64), "model.norm.bias": random(64)}),
    "norms of queries and keys": (
        "llama",
        {f"{LAYER}.self_attn.{name}_norm.weight": 1 + random(16) for name in "qk"},
    ),
    "a bias of fused projections": ("phi3", {f"{LAYER}.self_attn.qkv_proj.bias": random(256)}),
    "one layer more": ("llama", {"model.layers.2.self_attn.q_proj.weight": random(64, 64)}),
    "a bias of the output layer": ("smollm3", {"lm_head.bias": random(256)}),
    "an output layer beside a tied one": ("llama", {"lm_head.weight": random(256, 64)}),
    "rotary frequencies": ("llama", {f"{LAYER}.self_attn.rotary_emb.inv_freq": random(8).abs()}),
    "another name": ("gemma3_text", {f"{LAYER}.self_attn.v_norm.weight": random(32), "score.weight": random(2, 64)}),
}

QUIET = ("rotary frequencies",)
"""What has no note: config.json determines it."""


@pytest.mark.parametrize("case", MORE)
def test_what_is_not_announced_counts_as_in_transformers(
    case: str, made: Callable[..., Path], tmp_path: Path, by_decoder: Callable[..., torch.Tensor]
) -> None:
    family, more = MORE[case]
    folder = with_tensors(made(family), tmp_path / "model", more)
    wanted, model = by_transformers(folder), load(folder)
    largest = float(wanted.abs().max())
    assert float((by_decoder(model, TOKENS) - wanted).abs().max()) < 2.0**-14 * largest
    with torch.no_grad():
        got = build(model)(input_ids=TOKENS[None]).logits[0].double()
    assert float((got - wanted).abs().max()) < 2.0**-14 * largest
    said = [note for note in model.notes if next(iter(more)) in note or "output layer of its own" in note]
    assert bool(said) != (case in QUIET)
    export(model, "onnx", tmp_path / "out")  # what has no place in a graph would be refused


@pytest.mark.parametrize(
    ("family", "config", "name"),
    [
        ("llama", {"attention_bias": True}, f"{LAYER}.self_attn.o_proj.bias"),
        ("llama", {"mlp_bias": True}, "model.layers.1.mlp.up_proj.bias"),
        ("qwen2", {}, f"{LAYER}.self_attn.k_proj.bias"),
        ("qwen3", {"attention_bias": True}, f"{LAYER}.self_attn.q_proj.bias"),
        ("qwen3", {}, f"{LAYER}.self_attn.k_norm.weight"),
        ("gemma2", {}, f"{LAYER}.pre_feedforward_layernorm.weight"),
        ("mistral", {}, "model.norm.weight"),
        ("phi3", {}, "model.embed_tokens.weight"),
        ("llama", {"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_what_is_announced_and_missing_is_refused(
    family: str, config: dict[str, Any], name: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = with_tensors(made(family, **config), tmp_path / "model", {}, gone=name)
    with pytest.raises(InputError, match=f"missing tensor {name}, which config.json requires"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 250}, r"shape \[250, 64\], as config\.json says, got shape \[256, 64\]"),
        ({"num_key_value_heads": 1}, r"k_proj\.weight: expected shape \[16, 64\]"),
        ({"head_dim": 8}, r"k_proj\.weight: expected shape \[16, 64\]"),
        ({"intermediate_size": 96}, r"mlp\..*_proj\.weight: expected shape"),
    ],
)
def test_shapes_that_config_denies_are_refused(
    change: dict[str, Any], words: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = with_tensors(made("llama"), tmp_path / "model", {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=words):
        load(folder)


@pytest.fixture(scope="module")
def quantized(made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of a tiny Llama in integers: its own folder, GPTQ and MLX."""
    place, model = tmp_path_factory.mktemp("quantized"), quantize(load(made("llama")), bits=4, group_size=32)
    for target in ("qalora", "gptq", "mlx"):
        export(model, target, place, allow_loss={"zeros"} if target == "gptq" else set())
    return place


@pytest.mark.parametrize("target", ["qalora", "gptq"])
@pytest.mark.parametrize("zero", [False, True])
def test_biases_in_integer_folders(quantized: Path, tmp_path: Path, target: str, zero: bool) -> None:
    """Passed over, as transformers does; those of zeros that old GPTQ tools write are not worth a note."""
    names = [f"{LAYER}.self_attn.q_proj.bias", f"{LAYER}.mlp.gate_proj.bias"]
    more = {name: torch.full((size,), float(not zero)) for name, size in zip(names, (64, 128), strict=True)}
    model, plain = load(with_tensors(quantized / target, tmp_path / "model", more)), load(quantized / target)
    assert set(model.tensors) == set(plain.tensors)
    assert any(names[0] in note for note in model.notes) == (target == "qalora" or not zero)


def test_mlx_lm_loads_no_other_tensors(quantized: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    more = {f"{LAYER}.self_attn.q_proj.bias": torch.ones(64)}
    folder = with_tensors(quantized / "mlx", tmp_path / "model", more)
    with pytest.raises(ValueError, match=r"q_proj\.bias"):
        load_model(folder)
    with pytest.raises(InputError, match=r"unknown tensor .*q_proj\.bias, which config\.json does not announce"):
        load(folder)
