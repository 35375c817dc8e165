"""A config in which every number has one place, as transformers reads it; and what it says beside that, as notes.

A config.json often says a number twice: a rope_scaling that a model card tells to add beside the rope_parameters that
transformers 5 wrote, a theta beside both, keys that only the class of another family reads. docs/config_keys.md has
what each reader makes of them. What transformers passes over is passed over here, and said; the config that goes on
says what counts in the places where others look for it, so that an export has nothing stale in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qalora.converters.families import LAYER_KINDS, SOME, Family, family_of, reads
from qalora.converters.rope import ALPHA, LOCAL_THETA, ORIGINAL, PLACES, SHARE, WITH_ORIGINAL
from qalora.converters.settings import check_config, settings_of

__all__ = ["tidied"]

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "rms_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rms_norm_epsilon", "rms_eps"),
    "hidden_act": ("hidden_activation", "activation_function"),
    "hidden_activation": ("hidden_act", "activation_function"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads", "n_head_kv", "multi_query_group_num"),
    "head_dim": ("head_size", "kv_channels", "attention_head_dim", "head_dimension"),
    "hidden_size": ("d_model", "n_embd", "n_embed"),
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length"),
    "rope_theta": ("rotary_emb_base", "rope_base", "rotary_base", "rope_freq_base"),
    SHARE: ("rotary_pct", "rotary_percentage", "rope_pct"),
    "vocab_size": ("padded_vocab_size", "n_vocab"),
}
"""Names that other classes have for a number, which the families' do not read."""

MULTIPLIERS = (
    "attention_multiplier",
    "attn_scale",
    "dim_model_base",
    "embedding_multiplier",
    "logit_scale",
    "logits_scaling",
    "mup_width_multiplier",
    "residual_multiplier",
    "scale_depth",
    "scale_emb",
)
"""Factors of other classes, which the families' do not have; one that a family has is in SOME."""


OF_WINDOWS = ("max_window_layers", "sliding_window", "use_sliding_window")
"""Keys that say nothing where no window is used."""


def tidied(config: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config without what transformers passes over, and a note of it. `where` is the model's folder or file.

    What says a number once is left as it is. Raises InputError for what `check_config` refuses.
    """
    check_config(config, where)
    family, settings = family_of(config, where), settings_of(config, where)
    tidy, notes = {key: value for key, value in config.items() if key != "head_dim" or value is not None}, []
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    quiet = () if windowed else OF_WINDOWS
    unread = [key for key in SOME if key in config and key not in quiet and _is_lost(key, config[key], family)]
    if unread:
        tidy = {key: value for key, value in tidy.items() if key not in unread}
        notes.append(f"{_values_text(config, unread)}: no {family.model_type} of transformers reads that")
    joined = settings["rope_parameters"]
    over = [] if _stretched(config, family) else list(_passed_over(config, joined, family))
    if over:
        tidy = _with_rope(tidy, joined)
        notes.append(f"{', '.join(over)}, which is passed over: rotary positions are {_short(joined)}")
    if config.get("dtype") is not None and config.get("torch_dtype") not in (None, config["dtype"]):
        del tidy["torch_dtype"]
        notes.append(f"{_values_text(config, ['torch_dtype'])}: dtype counts, {config['dtype']!r:.60}")
    factors = [key for key in MULTIPLIERS if key not in SOME and _matters(config.get(key))]
    others = [*_other_names(config, settings, family), *factors]
    if others:
        notes.append(f"{_values_text(config, others)}: no {family.model_type} of transformers reads that")
    return tidy, tuple(f"{where.name}: config.json has {note}" for note in notes)


def _stretched(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the config says a rope with an alpha, which is another one in the settings."""
    stated = config.get("rope_scaling") or config.get("rope_parameters")
    return ALPHA in family.rope_keys and isinstance(stated, Mapping) and bool(stated.get(ALPHA))


def _is_lost(key: str, value: object, family: Family) -> bool:
    """Whether a key of SOME says something, and the family's class does not read it."""
    if key in family.fixed:
        return value is not None and value != family.fixed[key]
    plain = key == "layer_types" and isinstance(value, list) and all(kind == LAYER_KINDS[0] for kind in value)
    return not reads(family, key) and bool(value) and not plain and key != LOCAL_THETA


def _passed_over(config: Mapping[str, Any], joined: Mapping[str, Any], family: Family) -> Iterator[str]:
    """What a config says of rotary positions and `joined`, its rope_parameters, does not: "rope_scaling.factor 4.0"."""
    by_layer = joined if family.local_rope else dict.fromkeys(LAYER_KINDS, joined)
    full, local = (by_layer[kind] for kind in LAYER_KINDS)
    quiet = () if full["rope_type"] in WITH_ORIGINAL else (ORIGINAL,)
    objects: list[tuple[str, Any, Mapping[str, Any]]] = [("rope_scaling", config.get("rope_scaling"), full)]
    parameters = config.get("rope_parameters")
    if family.local_rope and isinstance(parameters, Mapping):
        objects += [(f"rope_parameters.{kind}", parameters.get(kind), by_layer[kind]) for kind in LAYER_KINDS]
        objects.append(("rope_parameters", {k: v for k, v in parameters.items() if k not in LAYER_KINDS}, {}))
    else:
        objects.append(("rope_parameters", parameters, full))
    for place, content, counts in objects:
        for key, value in _items(content):
            key, value = ("rope_type", family.rope_aliases.get(str(value), value)) if key in _TYPE else (key, value)
            if value is None or key in quiet:
                continue
            if counts.get(key, _NEUTRAL.get(key)) != value:
                yield f"{place}.{key} {value!r:.60}"
    beside = {
        "rope_theta": full["rope_theta"],
        LOCAL_THETA: local["rope_theta"] if family.local_rope else None,
        SHARE: full.get(SHARE, _NEUTRAL[SHARE]),
        ORIGINAL: full.get(ORIGINAL),
    }
    for key, value in beside.items():
        if config.get(key) is not None and key not in quiet and config[key] != value:
            yield f"{key} {config[key]!r:.60}"


def _items(content: object) -> Iterator[tuple[str, Any]]:
    yield from content.items() if isinstance(content, Mapping) else ()


_TYPE = ("type", "rope_type")
_NEUTRAL = {SHARE: 1.0, "rope_type": "default", "factor": 1.0}
"""What a number that is not there stands for."""


def _with_rope(config: Mapping[str, Any], joined: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `joined` as rope_parameters; the keys beside it that were there say the same, for others."""
    changed = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")}
    full = joined.get(LAYER_KINDS[0], joined)
    says = {"rope_theta": full["rope_theta"], SHARE: full.get(SHARE), ORIGINAL: full.get(ORIGINAL)}
    says[LOCAL_THETA] = joined.get(LAYER_KINDS[1], {}).get("rope_theta")
    for key, value in says.items():
        if key in changed and value is not None:
            changed[key] = value
        elif key in changed and key in PLACES:
            del changed[key]
    return {**changed, "rope_parameters": dict(joined)}


def _other_names(config: Mapping[str, Any], settings: Mapping[str, Any], family: Family) -> Iterator[str]:
    rope = settings["rope_parameters"]
    full = rope.get(LAYER_KINDS[0], rope)
    share, size = full.get(SHARE, _NEUTRAL[SHARE]), settings["hidden_size"] // settings["num_attention_heads"]
    usual = {"rope_theta": full["rope_theta"], SHARE: share, "head_dim": size}
    for name, others in OTHER_NAMES.items():
        counts = settings.get(name) or usual.get(name)
        if name in ("hidden_act", "hidden_activation") and name != family.activation_key:
            continue
        yield from (key for key in others if counts is not None and _matters(config.get(key)) and config[key] != counts)


def _matters(value: object) -> bool:
    """Whether a factor or a size is one that could change something."""
    return value is not None and value is not False and value not in (0, 1)


def _values_text(config: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} {config[key]!r:.60}" for key in keys)


def _short(joined: Mapping[str, Any]) -> str:
    text = repr(dict(joined))
    return text if len(text) <= 200 else f"{text[:200]}..."
