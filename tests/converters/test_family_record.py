"""The record of a family: what its files hold together, and layers that differ in what they hold."""

from dataclasses import replace
from typing import Any

import pytest

from qalora.adapter.keys import PEFT, plain_name
from qalora.converters.decoder import decoder_of
from qalora.converters.families import FAMILIES, SOME, VARIANTS, LayerParts
from qalora.converters.families.record import LINEARS, NORMS
from qalora.converters.families.wrappers import WRAPPERS, WrapperKind
from qalora.converters.gguf.configs import config_of, family_of_metadata
from qalora.converters.gguf.hyperparameters import MODEL_TYPE, hyperparameters
from qalora.converters.gguf.names import gguf_names
from qalora.converters.settings import check_config, layer_parts, settings_of
from qalora.errors import InputError
from qalora.formats.gguf import Metadata, Value, ValueType


def test_families_of_an_architecture_share_what_llama_cpp_takes_for_granted() -> None:
    by_architecture = {family.gguf.architecture: family.gguf for family in FAMILIES.values()}
    assert all(by_architecture[family.gguf.architecture] == family.gguf for family in FAMILIES.values())


def test_a_model_of_text_and_images_has_a_decoder_of_a_family() -> None:
    assert not set(WRAPPERS) & set(FAMILIES)
    decoders = [one for kind in WRAPPERS.values() for one in kind.decoders]
    assert {one.family for one in decoders} <= set(FAMILIES)
    assert len({one.model_type for one in decoders}) == len(decoders)


@pytest.mark.parametrize("kind", WRAPPERS.values(), ids=WRAPPERS)
def test_the_places_of_a_decoder_are_known_in_names_of_adapters(kind: WrapperKind) -> None:
    """On disk, and where transformers' class has it: PEFT names modules so."""
    module = "layers.0.self_attn.q_proj"
    for begin in (f"{kind.inside}.", *(place[0] for place in kind.places)):
        assert plain_name(f"{PEFT}{begin}{module}") == f"model.{module}"


def test_a_key_is_read_where_a_family_has_it() -> None:
    assert {"sliding_window", "attention_bias", "query_pre_attn_scalar"} <= set(SOME)
    assert not {"rope_theta", "head_dim", "rms_norm_eps"} & set(SOME)


def test_layers_that_hold_something_else() -> None:
    """By layer_types: here every second layer has no MLP."""
    whole = LayerParts(types=("full_attention",), linears=LINEARS, norms=NORMS)
    short = LayerParts(types=("sliding_attention",), linears=LINEARS[:4], norms=NORMS[:1])
    family = replace(FAMILIES["qwen2"], layers=(whole, short))
    settings = {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    assert layer_parts(family, settings) == (whole, short, whole)
    assert (family.linears, family.norms) == (LINEARS, NORMS)
    assert gguf_names(family, 3) == gguf_names(FAMILIES["qwen2"], 3)
    assert layer_parts(FAMILIES["qwen2"], settings) == FAMILIES["qwen2"].layers * 3


def architecture_entries(**more: Value) -> Metadata:
    entries = {"general.architecture": Value.text("olmo2"), **{f"olmo2.{key}": value for key, value in more.items()}}
    return Metadata(entries=entries)


def test_a_window_tells_olmo_3_from_olmo_2() -> None:
    """They have one architecture in GGUF, and other programs write no model_type."""
    windowed = architecture_entries(**{"attention.sliding_window": Value.uint32(4096)})
    assert family_of_metadata(windowed, "here") is FAMILIES["olmo3"]
    assert family_of_metadata(architecture_entries(), "here") is FAMILIES["olmo2"]
    lying = windowed.with_entries({MODEL_TYPE: Value.text("olmo2")})
    with pytest.raises(InputError, match=r"qalora\.model_type: expected one of olmo3, got 'olmo2'"):
        family_of_metadata(lying, "here")


def test_a_variant_is_no_family_and_has_one() -> None:
    assert not set(VARIANTS) & set(FAMILIES)
    for variant in VARIANTS.values():
        modules = {name for name, _ in FAMILIES[variant.family].linears}
        assert {name for parts in variant.modules.values() for name in parts} <= modules


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "exaone4"}, "sliding_window: expected null, since no other exaone4 is read here, got 4096"),
        ({"model_type": "granite", "residual_multiplier": None}, "residual_multiplier: expected a number above 0"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling: expected a number above 0"),
        (
            {"model_type": "ministral3", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters: expected a llama_4_scaling_beta in a ministral3, got none",
        ),
        ({"model_type": "ministral3", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "expected yarn in a"),
        (
            {"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "alpha": -1.0}},
            "alpha: expected a number above 0",
        ),
    ],
)
def test_what_a_family_does_not_take_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_config({**SIZES, **config}, "here")


def test_a_granite_file_without_rotary_positions_is_refused() -> None:
    """llama.cpp switches them off where a file of this architecture says that it was not tuned for them."""
    config = {**SIZES, "model_type": "granite"}
    decoder = decoder_of(config, "here")
    entries = hyperparameters(decoder, settings_of(config, "here"), "here")
    off = {"granite.rope.scaling.finetuned": Value(type=ValueType.BOOL, value=False)}
    metadata = Metadata(entries={**entries, **off})
    shapes = {"token_embd.weight": (64, 64)}
    with pytest.raises(InputError, match=r"granite\.rope\.scaling\.finetuned: expected true: rotary positions"):
        config_of(metadata, decoder.family, "here", shapes=shapes, factors={})
