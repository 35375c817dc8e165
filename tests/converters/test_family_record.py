"""The record of a family: what its files hold together, and layers that differ in what they hold."""

from dataclasses import replace

from qalora.converters.families import FAMILIES, SOME, LayerParts
from qalora.converters.families.record import LINEARS, NORMS
from qalora.converters.gguf.names import gguf_names
from qalora.converters.settings import layer_parts


def test_families_of_an_architecture_share_what_llama_cpp_takes_for_granted() -> None:
    by_architecture = {family.gguf.architecture: family.gguf for family in FAMILIES.values()}
    assert all(by_architecture[family.gguf.architecture] == family.gguf for family in FAMILIES.values())


def test_a_model_of_text_and_images_has_one_decoder() -> None:
    wrappers = [name for family in FAMILIES.values() for name in family.wrappers]
    assert len(set(wrappers)) == len(wrappers)
    assert not set(wrappers) & set(FAMILIES)


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
