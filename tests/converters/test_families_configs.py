"""What configs and GGUF metadata say of a family, against transformers' classes and gguf-py's tables; refusals."""

import contextlib
import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from qalora.converters.config_places import tidied
from qalora.converters.decoder import decoder_of
from qalora.converters.essentials import essentials
from qalora.converters.families import FAMILIES, family_of
from qalora.converters.families.wrappers import WRAPPERS
from qalora.converters.gguf.configs import config_of, family_of_metadata
from qalora.converters.gguf.hyperparameters import FREQS, factor_tensors, hyperparameters
from qalora.converters.gguf.names import gguf_names
from qalora.converters.onnx.decoder import check_decoder
from qalora.converters.settings import bias_names, check_config, settings_of
from qalora.converters.wrapping import text_settings
from qalora.errors import InputError
from qalora.formats.gguf import Metadata, Value
from tests.support.published_configs import PUBLISHED as LATER


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_gguf_names_are_those_of_gguf_py(family: Any) -> None:
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf.architecture)
    table = gguf.get_tensor_name_map(arch, 4)
    for name, ours in gguf_names(family, 4).items():
        if name == "lm_head.weight" and family.gguf.tied:
            continue
        assert table.get_name(name, try_suffixes=(".weight", ".bias")) == ours


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_defaults_are_those_of_transformers(family: Any) -> None:
    """A config that says its sizes only is understood as transformers' own class understands it."""
    from transformers import AutoConfig

    sizes = {
        "model_type": family.model_type,
        "hidden_size": 512,
        "intermediate_size": 256,
        "num_hidden_layers": 30,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 8192,
    }
    whole = AutoConfig.for_model(**sizes).to_dict()
    assert essentials(sizes) == essentials(whole)
    assert settings_of(sizes, "here")["rms_norm_eps"] == whole["rms_norm_eps"]
    assert whole["architectures"] is None
    assert family.architecture.endswith("ForCausalLM")


PUBLISHED: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "vocab_size": 152064,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "gemma-2-27b": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-4b's text": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_hidden_layers": 34,
        "num_key_value_heads": 4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
    },
    "Phi-3.5-mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1.08] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "vocab_size": 32064,
    },
    **LATER,
}
"""What these models' config.json says of what changes the logits, as earlier versions of transformers wrote it."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_older_configs_are_understood_as_transformers_does(name: str) -> None:
    from transformers import AutoConfig

    config = PUBLISHED[name]
    assert essentials(config) == essentials(AutoConfig.for_model(**copy.deepcopy(config)).to_dict())


SMOLLM3 = {
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 5e6,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
"""SmolLM3-3B's config.json, which has a key that its class does not read."""


@pytest.mark.parametrize("name", [*PUBLISHED, "SmolLM3-3B"])
def test_published_configs_have_no_notes(name: str) -> None:
    assert tidied(PUBLISHED.get(name, SMOLLM3), Path(name))[1] == ()


def test_a_text_config_that_says_what_differs_only() -> None:
    """gemma-3-4b's config.json as it is published: most sizes are those of transformers' class."""
    from transformers import AutoConfig

    text_config = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text_config}
    found, _ = text_settings(config, WRAPPERS["gemma3"], Path("gemma-3-4b"))
    whole = AutoConfig.for_model(**copy.deepcopy(config))
    assert essentials(found) == essentials(whole.text_config.to_dict())
    assert found["eos_token_id"] == [1, 106]
    assert found["architectures"] == ["Gemma3ForCausalLM"]


def test_null_says_nothing_where_it_cannot() -> None:
    config = PUBLISHED["gemma-3-4b's text"]
    nulls = {"hidden_activation": None, "rms_norm_eps": None, "original_max_position_embeddings": None}
    nulls |= {"sliding_window_pattern": None}
    assert essentials({**config, **nulls}) == essentials(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_a_place_in_gguf(name: str) -> None:
    """What llama.cpp takes for granted of an architecture is what its models have, and comes back from the metadata."""
    config = PUBLISHED[name]
    decoder = decoder_of(config, name)
    entries = hyperparameters(decoder, settings_of(config, name), name)
    metadata = Metadata(entries={**entries, "general.architecture": Value.text(decoder.family.gguf.architecture)})
    assert family_of_metadata(metadata, name) is decoder.family
    names = gguf_names(decoder.family, len(decoder.layers))
    shapes = {"token_embd.weight": (decoder.vocabulary, decoder.hidden)}
    shapes |= {names[bias]: (0,) for bias in bias_names(config, name)}
    again = config_of(metadata, decoder.family, name, shapes=shapes, factors=factor_tensors(decoder))
    assert essentials(again) == essentials(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_metadata_keys_are_those_of_gguf_py(name: str) -> None:
    parts = [part for part in vars(gguf.Keys).values() if isinstance(part, type)]
    known = {key for part in parts for key in vars(part).values() if isinstance(key, str)}
    decoder = decoder_of(PUBLISHED[name], name)
    prefix = f"{decoder.family.gguf.architecture}."
    for key in hyperparameters(decoder, settings_of(PUBLISHED[name], name), name):
        if not key.startswith("qalora."):
            assert key.replace(prefix, "{arch}.") in known, key


def test_llama_3_1_factors_that_name_no_numbers_are_recognised() -> None:
    """A file that another program wrote has the factors and nothing else."""
    config = PUBLISHED["Llama-3.2-1B"]
    decoder = decoder_of(config, "here")
    entries = hyperparameters(decoder, settings_of(config, "here"), "here")
    metadata = Metadata(entries={key: value for key, value in entries.items() if not key.startswith("qalora")})
    shapes = {"token_embd.weight": (decoder.vocabulary, decoder.hidden)}
    factors = factor_tensors(decoder)
    again = config_of(metadata, decoder.family, "here", shapes=shapes, factors=factors)
    assert essentials(again) == essentials(config)
    with pytest.raises(InputError, match=r"rope_freqs\.weight: expected the factors of Llama 3\.1, got factors up to"):
        config_of(metadata, decoder.family, "here", shapes=shapes, factors={FREQS: factors[FREQS] + 0.5})


def test_a_gguf_file_of_experts_is_refused() -> None:
    entries = {"general.architecture": Value.text("llama"), "llama.expert_count": Value.uint32(8)}
    with pytest.raises(InputError, match=r"got 'llama'; a mixture of experts"):
        family_of_metadata(Metadata(entries=entries), "here")


def metadata_of(family: str, **changes: str) -> tuple[Metadata, dict[str, tuple[int, ...]], dict[str, torch.Tensor]]:
    """The metadata of a small model, with keys of ours changed; and its shapes and factors."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), 64)
    config = {"model_type": family, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    config |= rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.9)
    if family == "mistral":
        config["sliding_window"] = 12
    decoder = decoder_of(config, "here")
    entries = {
        **hyperparameters(decoder, settings_of(config, "here"), "here"),
        "general.architecture": Value.text("llama"),
    }
    entries |= {f"qalora.{key}": Value.text(value) for key, value in changes.items()}
    return Metadata(entries=entries), {"token_embd.weight": (64, 64)}, factor_tensors(decoder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("config", "[", r"qalora\.config: expected a JSON object of max_position_embeddings"),
        ("config", "[" * 100_000, r"qalora\.config: expected a JSON object"),
        ("config", '{"hidden_size": 4}', r"qalora\.config: expected a JSON object of max_position_embeddings"),
        ("config", json.dumps(rope("yarn", factor=5.0, original_max_position_embeddings=16)), "expected .*'factor': 4"),
        ("config", '{"rope_parameters": 7}', "rope_parameters: expected an object with rope_type"),
        ("model_type", "gemma2", r"qalora\.model_type: expected one of llama, mistral, got 'gemma2'"),
    ],
)
def test_keys_of_ours_that_lie_are_refused(key: str, value: str, words: str) -> None:
    metadata, shapes, factors = metadata_of("mistral", **{key: value})
    with pytest.raises(InputError, match=words):
        config_of(metadata, family_of_metadata(metadata, "here"), "here", shapes=shapes, factors=factors)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": -1.0}}, "factor: expected a number above 0, got -1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "expected a low_freq_factor for llama3 scaling"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": "x", "long_factor": []}}, "a list of numbers"),
        ({"rope_parameters": {"full_attention": 3, "sliding_attention": {}}}, "expected an object for full_attention"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": 2.0, "long_factor": [1.0]}},
            "a list of numbers",
        ),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected at most 1"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: expected none in a gemma3_text, got 0\.5"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a number above 0"),
        ({"final_logit_softcapping": "x"}, "final_logit_softcapping: expected a number above 0"),
        ({"sliding_window": "x"}, "sliding_window: expected a whole number"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected a list with an entry for each layer"),
        (
            {"model_type": "smollm3", "no_rope_layers": 7},
            "no_rope_layers: expected a list with an entry for each layer",
        ),
        (
            {"model_type": "qwen2", "num_key_value_heads": 4, "max_window_layers": "x"},
            "max_window_layers: expected a whole number",
        ),
        ({"use_bidirectional_attention": True}, "expected a decoder, which looks back only"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), 64)
    config = {"model_type": "gemma3_text", "num_hidden_layers": 2, "num_attention_heads": 4, **sizes, **changes}
    with pytest.raises(InputError, match=words):
        check_config(config, "here")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, "a mixture of experts"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts"),
        ({"model_type": "llava", "text_config": {}}, "save its text part as a model of its own"),
        ({"model_type": "mamba"}, "see the README"),
        (
            {"model_type": "gemma3", "vision_config": {}},
            r"got 'gemma3'; its decoder is read .* config\.json has text_conf",
        ),
    ],
)
def test_what_is_no_family_here_is_refused_with_what_is_missing(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        family_of(config, "here")


ABSURD: tuple[Any, ...] = (
    None,
    0,
    -1,
    1.5,
    1e300,
    1 << 40,
    "x",
    [],
    {},
    [1, 2],
    {"a": 1},
    True,
    math.nan,
    math.inf,
    [{}] * 40,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_damaged_configs_raise_input_errors_only(name: str) -> None:
    """A thousand configs of each older family, two hundred of the others, with up to three values replaced, through all
    that reads them."""
    rng = random.Random(1)
    more = [*{key for family in FAMILIES.values() for key in family.defaults}, "rope_parameters", "layer_types"]
    for _ in range(200 if name in LATER else 1000):
        config = copy.deepcopy(PUBLISHED[name])
        for _ in range(rng.choice((1, 1, 2, 3))):
            key = rng.choice([*config, *more])
            inner = config.get(key)
            if isinstance(inner, dict) and inner and rng.random() < 0.7:
                inner[rng.choice(list(inner))] = copy.deepcopy(rng.choice(ABSURD))
            else:
                config[key] = copy.deepcopy(rng.choice(ABSURD))
        with contextlib.suppress(InputError):
            check_config(config, "here")
            decoder = decoder_of(config, "here")
            essentials(config)
            with contextlib.suppress(InputError):
                check_decoder(decoder, "here")
            hyperparameters(decoder, settings_of(config, "here"), "here")
            factor_tensors(decoder)
