"""Numbers that a config says twice, or not at all: transformers' own logits of the same folder are the oracle.

CASES are changes of a config.json, tried on a tiny model of every family. Where transformers computes something, the
decoder that is read computes the same, from the config as it was and from the one that goes into exports; or the folder
is refused by name. Where transformers refuses it, it is refused.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qalora.converters import load
from qalora.converters.families import FAMILIES
from qalora.errors import InputError
from qalora.testing import tiny_model

Change = dict[str, Any]
GONE = object()
"""Takes a key out of a config."""

TOKENS = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(3))

SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64}
SMALL = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5}
OWN: dict[str, Change] = {
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 5},
    "gemma2": SMALL,
    "gemma3_text": SMALL,
    "phi3": {"sliding_window": 5, "hidden_size": 64},
    "olmo3": {"sliding_window": 5},
    **{family: {"head_dim": 16} for family in ("seed_oss", "hunyuan_v1_dense", "ernie4_5", "glm4", "ministral3")},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of a tiny model, made once; a copy of it with another config is at hand with `changed`."""
    folders: dict[str, Path] = {}

    def get(family: str, **config: Any) -> Path:
        key = json.dumps([family, config])
        if key not in folders:
            place = tmp_path_factory.mktemp("places") / family
            folders[key] = tiny_model(place, family, config={**SIZES, **OWN.get(family, {}), **config})
        return folders[key]

    return get


def changed(source: Path, folder: Path, change: Change) -> Path:
    """The model of `source` with other keys in its config.json."""
    folder.mkdir()
    (folder / "model.safetensors").hardlink_to(source / "model.safetensors")
    config = {**json.loads((source / "config.json").read_text()), **change}
    config = {key: value for key, value in config.items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_transformers(config: Change, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Float64 logits of transformers' class of this config with these tensors; whatever it raises."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    module = AutoModelForCausalLM.from_config(settings, dtype=torch.float64, attn_implementation="eager").eval()
    missing, _ = module.load_state_dict(tensors, strict=False)  # what it does not have is passed over
    if set(missing) - ({"lm_head.weight"} if settings.tie_word_embeddings else set()):
        raise LookupError(f"made up: {missing}")
    module.tie_weights()
    with torch.no_grad():
        return module(input_ids=TOKENS, use_cache=False).logits[0]


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """transformers computes norms, softmax and angles in float32 in a float64 model too: a few hundred roundings of
    2^-24 on the way to a logit, less than 2^-14 of the largest; the changes tried here change 2^-7 and more."""
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert error < 2.0**-14, f"off by {error:.2g} of the largest logit"


THETA = 10000.0


def scaling(kind: str = "linear", **numbers: Any) -> Change:
    return {"rope_type": kind, "factor": 4.0, **numbers}


LONG = {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

CASES: dict[str, Change] = {
    "nothing": {},
    "rope_scaling beside": {"rope_scaling": scaling()},
    "rope_scaling with a theta beside": {"rope_scaling": scaling(rope_theta=500.0)},
    "rope_scaling of yarn beside": {"rope_scaling": scaling("yarn", original_max_position_embeddings=16)},
    "rope_scaling of llama3, spelled type": {"rope_scaling": {"type": "llama3", "factor": 8.0, **LLAMA3}},
    "rope_scaling of the default kind beside a scaled one": {
        "rope_scaling": {"rope_type": "default"},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": THETA},
    },
    "an empty rope_scaling": {"rope_scaling": {}, "rope_parameters": scaling(rope_theta=500.0)},
    "type alone": {"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": THETA}},
    "rope_scaling, type alone": {"rope_parameters": GONE, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "type and rope_type": {"rope_parameters": {"type": "linear", "rope_type": "default", "factor": 4.0}},
    "rope_type and type": {"rope_parameters": {"type": "default", "rope_type": "linear", "factor": 4.0}},
    "a factor without a type": {"rope_parameters": {"factor": 4.0, "rope_theta": THETA}},
    "rope_theta beside": {"rope_theta": 300.0},
    "rope_theta beside an object without": {"rope_theta": 300.0, "rope_parameters": {"rope_type": "default"}},
    "rope_theta beside rope_scaling": {"rope_theta": 300.0, "rope_parameters": GONE, "rope_scaling": scaling()},
    "no theta": {"rope_parameters": GONE},
    "no theta but another class's": {"rope_parameters": GONE, "rotary_emb_base": 300.0, "rope_base": 300.0},
    "rope_local_base_freq": {"rope_local_base_freq": 50.0},
    "rope_local_base_freq, no object": {"rope_local_base_freq": 50.0, "rope_theta": 300.0, "rope_parameters": GONE},
    "by kinds of layers": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    },
    "by kinds of layers, and rope_scaling": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        "rope_scaling": scaling(),
    },
    "by kinds of layers, one missing": {"rope_parameters": {"full_attention": {"rope_theta": 300.0}}},
    "by kinds of layers, numbers beside them": {
        "rope_parameters": {"full_attention": {"rope_type": "default"}, "rope_theta": 300.0, **scaling()}
    },
    "original context beside": {
        "rope_parameters": scaling("llama3", **LLAMA3, original_max_position_embeddings=16, rope_theta=100.0),
        "original_max_position_embeddings": 32,
    },
    "original context beside, yarn": {
        "rope_parameters": scaling("yarn", original_max_position_embeddings=16, rope_theta=100.0),
        "original_max_position_embeddings": 48,
    },
    "no original context": {"rope_parameters": scaling("yarn", rope_theta=100.0)},
    "half of a head rotated": {"partial_rotary_factor": 0.5},
    "half of a head rotated, beside": {
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 1.0},
        "partial_rotary_factor": 0.5,
    },
    "half of a head rotated, in the object": {
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5},
    },
    "half of a head rotated, in rope_scaling": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    },
    "rotary_pct": {"rotary_pct": 0.5},
    "longrope, two original contexts": {
        "rope_parameters": {**LONG, "original_max_position_embeddings": 32, "rope_theta": THETA},
        "original_max_position_embeddings": 16,
    },
    "longrope, no original context": {"rope_parameters": {**LONG, "rope_theta": THETA}},
    "longrope by its old name": {"rope_scaling": {**LONG, "rope_type": "su", "original_max_position_embeddings": 16}},
    "longrope with a factor": {
        "rope_parameters": {**LONG, "factor": 3.0, "original_max_position_embeddings": 16, "rope_theta": THETA},
    },
    "dynamic beside": {"rope_scaling": scaling("dynamic")},
    "a kind that is none": {"rope_scaling": scaling("mrope")},
    "a factor as text": {"rope_scaling": scaling(factor="4")},
    "a theta as text": {"rope_theta": "300", "rope_parameters": GONE},
    "a theta of null": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": None}},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 100},
    "caps": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5},
    "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "a window": {"sliding_window": 3},
    "a window that is not used": {"sliding_window": 3, "use_sliding_window": False},
    "a window that is used": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},
    "no window": {"sliding_window": None},
    "a window in no layer": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 9},
    "layer_types": {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 3,
        "use_sliding_window": True,
        "num_hidden_layers": 2,
    },
    "layer_types, and a window that is not used": {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 3,
        "use_sliding_window": False,
        "num_hidden_layers": 2,
    },
    "layer_types of another kind": {"layer_types": ["chunked_attention"] * 2, "num_hidden_layers": 2},
    "sliding_window_pattern": {"sliding_window_pattern": 3, "layer_types": GONE},
    "_sliding_window_pattern": {"_sliding_window_pattern": 3, "layer_types": GONE},
    "sliding_window_pattern beside layer_types": {"sliding_window_pattern": 1},
    "no_rope_layers": {"no_rope_layers": [0, 1, 1, 1, 1, 1]},
    "no_rope_layer_interval": {"no_rope_layer_interval": 2, "no_rope_layers": GONE},
    "no_rope_layer_interval beside no_rope_layers": {"no_rope_layer_interval": 1, "no_rope_layers": [1, 0, 1, 1]},
    "no heads of keys": {"num_key_value_heads": GONE},
    "no heads of keys, as null": {"num_key_value_heads": None},
    "other names of the heads of keys": {"num_kv_heads": 4, "n_head_kv": 4},
    "no head size": {"head_dim": GONE},
    "no head size, as null": {"head_dim": None},
    "half the head size": {"head_dim": 8},
    "a head size of 0": {"head_dim": 0},
    "other names of the head size": {"head_size": 8, "kv_channels": 8},
    "heads of keys as 0": {"num_key_value_heads": 0},
    "a window of 0": {"sliding_window": 0},
    "a longer list of layer_types": {"layer_types": ["full_attention"] * 9},
    "an epsilon as text": {"rms_norm_eps": "1e-5"},
    "an epsilon of 0": {"rms_norm_eps": 0},
    "no epsilon": {"rms_norm_eps": GONE, "layer_norm_eps": 0.1, "norm_eps": 0.1},
    "another name of the epsilon": {"rms_norm_eps": 0.01, "layer_norm_epsilon": 0.1},
    "hidden_act": {"hidden_act": "relu"},
    "hidden_activation": {"hidden_activation": "relu"},
    "no activation": {"hidden_act": GONE, "hidden_activation": GONE},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "qkv_bias": {"qkv_bias": True, "use_bias": True},
    "is_causal": {"is_causal": False},
    "use_bidirectional_attention": {"use_bidirectional_attention": True},
    "per_layer_config": {"per_layer_config": {"0": {"rms_norm_eps": 0.5}}},
    "factors of other families": {"attention_multiplier": 0.3, "residual_multiplier": 0.3, "logits_scaling": 3.0},
    "untied, and no output layer": {"tie_word_embeddings": False},
    "tied or not is not said": {"tie_word_embeddings": GONE},
    "fewer layers": {"num_hidden_layers": 1, "layer_types": GONE, "no_rope_layers": GONE},
    "another vocabulary": {"vocab_size": 60},
    "a longer context": {"max_position_embeddings": 128},
    "a text_config": {"text_config": {"hidden_size": 16}},
}

REFUSED: dict[str, str] = {
    "half of a head rotated": "partial_rotary_factor: expected none in a",
    "half of a head rotated, beside": "partial_rotary_factor: expected none in a",
    "half of a head rotated, in the object": "partial_rotary_factor: expected none in a",
    "half of a head rotated, in rope_scaling": "partial_rotary_factor: expected none in a",
    "dynamic beside": "rope_type: expected .*, got 'dynamic'",
    "a head size of 0": "head_dim: expected a whole number from 1",
    "a window of 0": "sliding_window: expected a whole number from 1",
    "by kinds of layers": "rope_parameters: expected one object, for layers that all have the same positions",
    "by kinds of layers, and rope_scaling": "rope_parameters: expected one object",
    "by kinds of layers, one missing": "rope_parameters: expected one object",
    "by kinds of layers, numbers beside them": "rope_parameters: expected one object",
    "attention_bias": r"missing tensor .*_proj\.bias, which config\.json requires",
    "mlp_bias": r"missing tensor .*_proj\.bias, which config\.json requires",
    "is_causal": "is_causal: expected a decoder, which looks back only",
    "use_bidirectional_attention": "use_bidirectional_attention: expected a decoder",
    "per_layer_config": "per_layer_config: expected layers that are alike",
    "layer_types, and a window that is not used": "layer_types: expected sliding_window and use_sliding_window for its",
    "a text_config": "text_config: expected none in a model of text alone",
}
"""Cases that may be refused where transformers computes something, and what the refusal says."""


OF_FAMILIES = {
    "exaone4": "sliding_window: expected null, since no other exaone4 is read here",
    "ministral3": "rope_type: expected yarn in a ministral3|a llama_4_scaling_beta in a ministral3",
}
"""What is refused of a family wherever it stands."""

PLAIN = ("no head size, as null", "a theta of null", "a longer list of layer_types")
"""Cases that transformers does not take in some families, and whose meaning is plain."""


PAIRS = [
    pytest.param(case, family, marks=[pytest.mark.long] if (n + m) % (2 if m < 8 else 6) else [])
    for n, case in enumerate(CASES)
    for m, family in enumerate(FAMILIES)
]
"""Each case with every other one of the first eight families and every sixth of the rest; in long runs with all."""


@pytest.mark.parametrize(("case", "family"), PAIRS)
def test_one_number_in_two_places(
    family: str, case: str, made: Callable[..., Path], tmp_path: Path, by_decoder: Callable[..., torch.Tensor]
) -> None:
    source = made(family)
    folder = changed(source, tmp_path / "model", CASES[case])
    config = json.loads((folder / "config.json").read_text())
    try:
        wanted = by_transformers(config, load_file(folder / "model.safetensors"))
    except Exception:  # whatever a config makes it raise
        no_list = family == "exaone4" and CASES[case].get("layer_types") is GONE  # it divides by a pattern of 0 then
        if case in PLAIN or no_list:
            return
        with pytest.raises(InputError):
            by_decoder(load(folder), TOKENS[0])
        return
    try:
        model = load(folder)
        got = by_decoder(model, TOKENS[0])
    except InputError as error:
        allowed = f"{REFUSED.get(case, 'not to be refused')}|{OF_FAMILIES.get(family, 'not to be refused')}"
        assert re.search(allowed, str(error)), str(error)
        return
    assert_same(got, wanted)
    assert_same(by_transformers(dict(model.config), load_file(folder / "model.safetensors")), wanted)
