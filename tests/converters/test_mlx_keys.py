"""MLX folders that others made, with configs that say a number twice or not at all: mlx-lm's own logits are the oracle.

CASES are changes of a config.json, tried on a tiny model of a family whose folder has no metadata of ours. Tokens stay
within the windows, which mlx-lm has not.
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
from qalora.converters.decoder import decoder_of
from qalora.errors import InputError
from qalora.parity.runtimes import open_runtime
from qalora.quantization import quantize
from qalora.testing import tiny_model

Change = dict[str, Any]
GONE = object()
TOKENS = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(3))

Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Gives the float folder of a tiny model of a family, and an MLX folder of ours, made once."""
    folders: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in folders:
            place = tmp_path_factory.mktemp("mlx") / family
            source = tiny_model(place, family, config={"eos_token_id": 2})
            export(quantize(load(source), bits=4, group_size=32), "mlx", place)
            folders[family] = source, place / "mlx"
        return folders[family]

    return get


def foreign(source: Path, ours: Path, folder: Path, change: Change) -> Path:
    """As mlx-lm's convert writes it: the config of the float model, and no metadata of ours."""
    folder.mkdir()
    save_file(load_file(ours / "model.safetensors"), folder / "model.safetensors", metadata={"format": "mlx"})
    config = {**json.loads((source / "config.json").read_text()), **change}
    config["quantization"] = json.loads((ours / "config.json").read_text())["quantization"]
    config = {key: value for key, value in config.items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


CLOSE = 2.0**-14
"""mlx-lm sums in float32, what a key that is read otherwise changes is 2^-7 and more."""


def scaling(kind: str = "linear", **numbers: Any) -> Change:
    return {"rope_type": kind, "factor": 4.0, **numbers}


LONG = {"short_factor": [1.0] * 8, "long_factor": [1.5] * 8, "original_max_position_embeddings": 64}
PHI3 = {key: [value[0]] * 16 if isinstance(value, list) else value for key, value in LONG.items()}
BOTH = {"rope_theta": 300.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}

CASES: dict[str, tuple[str, Change]] = {
    "as transformers writes it": ("llama", {}),
    "rope_parameters alone": ("llama", {"rope_parameters": scaling(rope_theta=500.0)}),
    "rope_parameters alone in a qwen2": ("qwen2", {"rope_parameters": scaling(rope_theta=500.0)}),
    "rope_parameters alone in a qwen3": ("qwen3", {"rope_parameters": scaling(rope_theta=500.0)}),
    "rope_scaling beside": ("llama", {"rope_theta": 1e4, "rope_scaling": scaling()}),
    "rope_scaling beside, in a qwen3": ("qwen3", {"rope_scaling": scaling()}),
    "rope_scaling beside, in a gemma2": ("gemma2", {"rope_scaling": scaling()}),
    "rope_scaling beside, in a gemma3": ("gemma3_text", {"rope_scaling": scaling()}),
    "two thetas": ("llama", BOTH),
    "two thetas in a qwen2": ("qwen2", BOTH),
    "two thetas in a qwen3": ("qwen3", BOTH),
    "two thetas in a smollm3": ("smollm3", BOTH),
    "a theta in rope_scaling": ("mistral", {"rope_scaling": scaling(rope_theta=300.0)}),
    "type and rope_type": ("llama", {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}}),
    "a factor without a type": ("llama", {"rope_scaling": {"factor": 4.0}}),
    "llama3 with defaults": ("llama", {"rope_scaling": scaling("llama3")}),
    "yarn": ("llama", {"rope_scaling": scaling("yarn", original_max_position_embeddings=64)}),
    "yarn with defaults": ("qwen2", {"rope_scaling": scaling("yarn")}),
    "yarn with an attention_factor": ("llama", {"rope_scaling": scaling("yarn", attention_factor=3.0)}),
    "yarn with one mscale": ("llama", {"rope_scaling": scaling("yarn", mscale=4.0)}),
    "yarn with two": ("qwen3", {"rope_scaling": scaling("yarn", mscale=4.0, mscale_all_dim=0.5), "rope_theta": 1e4}),
    "yarn that is not truncated": ("llama", {"rope_scaling": scaling("yarn", truncate=False)}),
    "longrope in a llama": ("llama", {"rope_scaling": {"type": "longrope", **LONG}}),
    "longrope with an attention_factor": (
        "llama",
        {"rope_scaling": {"type": "longrope", "attention_factor": 3.0, "factor": 2.0, **LONG}},
    ),
    "longrope with two original contexts": (
        "llama",
        {"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 16},
    ),
    "longrope in a phi3": ("phi3", {"rope_scaling": {"type": "longrope", **PHI3}}),
    "longrope in a phi3 with two original contexts": (
        "phi3",
        {"rope_scaling": {"type": "su", **PHI3}, "original_max_position_embeddings": 128},
    ),
    "half of a head rotated, in the object": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "half of a head rotated, beside": ("phi3", {"partial_rotary_factor": 0.5}),
    "another activation": ("llama", {"hidden_act": "relu"}),
    "another activation in a gemma2": ("gemma2", {"hidden_activation": "relu", "hidden_act": "relu"}),
    "no caps in a gemma2": ("gemma2", {"attn_logit_softcapping": GONE, "final_logit_softcapping": GONE}),
    "no scale of scores in a gemma2": ("gemma2", {"query_pre_attn_scalar": GONE}),
    "a cap of logits in a gemma3": ("gemma3_text", {"final_logit_softcapping": 0.5}),
    "a base of windows in a gemma3": ("gemma3_text", {"rope_local_base_freq": 50.0}),
    "a pattern of windows in a gemma3": ("gemma3_text", {"sliding_window_pattern": 2}),
    "a window in a llama": ("llama", {"sliding_window": 3}),
    "a head size in a qwen2": ("qwen2", {"head_dim": 8}),
    "layers without positions": ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
    "biases that a qwen3 has not": ("qwen3", {"attention_bias": True}),
    "tied or not is not said": ("llama", {"tie_word_embeddings": GONE}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_others_is_read_as_mlx_lm_reads_it(
    case: str, made: Made, tmp_path: Path, by_decoder: Callable[..., torch.Tensor]
) -> None:
    family, change = CASES[case]
    folder = foreign(*made(family), tmp_path / "model", change)
    wanted = open_runtime("mlx", folder).logits(TOKENS.tolist()).double()
    assert distance(by_decoder(load(folder), TOKENS), wanted) < CLOSE


REFUSED: dict[str, tuple[str, Change, str]] = {
    "another order of pairs": ("llama", {"rope_traditional": True}, "rope_traditional: expected false"),
    "another order of pairs in a gemma2": ("gemma2", {"rope_traditional": True}, "rope_traditional: expected false"),
    "windows in a llama": (
        "llama",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3},
        "layer_types: expected full_attention alone in a llama",
    ),
    "linear in a phi3": (
        "phi3",
        {"rope_scaling": {"type": "linear", "long_factor": [1.0] * 16, "factor": 4.0}},
        "rope_type: expected default or longrope in a phi3",
    ),
    "untied, and no output layer": (
        "llama",
        {"tie_word_embeddings": False},
        "missing tensor lm_head.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_of_others_is_refused_by_name(case: str, made: Made, tmp_path: Path) -> None:
    family, change, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        load(foreign(*made(family), tmp_path / "model", change))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quantization_counts_beside_another_copy_of_it(
    made: Made, tmp_path: Path, by_decoder: Callable[..., torch.Tensor]
) -> None:
    folder = foreign(*made("llama"), tmp_path / "model", {"quantization_config": {"group_size": 64, "bits": 8}})
    wanted, model = open_runtime("mlx", folder).logits(TOKENS.tolist()).double(), load(folder)
    assert distance(by_decoder(model, TOKENS), wanted) < CLOSE
    assert any("quantization counts, as in mlx-lm" in note for note in model.notes)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", {"rope_parameters": scaling(rope_theta=500.0)}, "rope.factor: None instead of 4.0"),
        ("llama", BOTH, "rope.rope_theta: 300.0 instead of 500000.0"),
        ("mistral", {}, "mlx-lm has no sliding window for mistral: it is right up to 12 tokens"),
        ("gemma2", {"query_pre_attn_scalar": GONE}, "attention scale: 0.0833"),
    ],
)
def test_what_counts_in_mlx_lm_is_noted(family: str, change: Change, words: str, made: Made, tmp_path: Path) -> None:
    assert any(words in note for note in load(foreign(*made(family), tmp_path / "model", change)).notes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_theta": 300.0}, {"rope_parameters": scaling()}, {}],
)
def test_a_folder_of_ours_that_was_edited_is_read_as_mlx_lm_reads_it(
    change: Change, made: Made, tmp_path: Path, by_decoder: Callable[..., torch.Tensor]
) -> None:
    """Its numbers stand in it for both, transformers and mlx-lm; an edit of one of them is seen."""
    _, ours = made("llama")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").hardlink_to(ours / "model.safetensors")
    config = {**json.loads((ours / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(config))
    wanted, model = open_runtime("mlx", folder).logits(TOKENS.tolist()).double(), load(folder)
    assert distance(by_decoder(model, TOKENS), wanted) < CLOSE
    assert any("mlx-lm's reading of config.json counts" in note for note in model.notes) == bool(change)
    assert bool(change) == (decoder_of(model.config, "here") != decoder_of(load(ours).config, "here")) or (
        "rope_parameters" in change
    )
