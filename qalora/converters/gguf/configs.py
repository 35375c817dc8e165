"""Transformers' config from GGUF metadata: the inverse of `qalora.converters.gguf.hyperparameters`."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qalora.converters.families import FAMILIES, LAYER_KINDS, Family
from qalora.converters.gguf.hyperparameters import CARRIED, CONFIG, FREQS, LONGROPE, MODEL_TYPE, yarn_attention
from qalora.converters.gguf.loaders import LOG_MULTIPLIER, SCALES, TEMPERATURE, check_keys
from qalora.converters.rope import BETA, ORIGINAL, SHARE, llama3_factors, rope_of
from qalora.converters.settings import ATTENTION_SCALE
from qalora.errors import FormatError, InputError, shown
from qalora.formats.gguf import Metadata

__all__ = ["config_notes", "config_of", "family_of_metadata"]


def family_of_metadata(metadata: Metadata, where: object) -> Family:
    """The family of general.architecture, or the one of it that wrote the file; InputError names those there are."""
    architecture = metadata.get("general.architecture")
    fitting = [family for family in FAMILIES.values() if family.gguf.architecture == architecture]
    if any(family.gguf.unclipped for family in fitting):  # a window tells which one
        window = bool(metadata.get(f"{architecture}.attention.sliding_window"))
        fitting = [family for family in fitting if (family.windows != "none") == window]
    experts = metadata.get(f"{architecture}.expert_count")
    for family in () if experts else fitting:
        if family.model_type == metadata.get(MODEL_TYPE, fitting[0].model_type):
            return family
    known = ", ".join(dict.fromkeys(family.gguf.architecture for family in FAMILIES.values()))
    got = shown(architecture)
    if fitting and not experts:
        known = ", ".join(family.model_type for family in fitting)
        raise FormatError(f"{where}: {MODEL_TYPE}", expected=f"one of {known}", got=shown(metadata.get(MODEL_TYPE)))
    todo = "a mixture of experts: its experts are not read yet" if experts else "see the README"
    raise InputError(f"{where}: general.architecture", expected=f"one of {known}", got=got, todo=todo)


def config_of(
    metadata: Metadata,
    family: Family,
    where: object,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Transformers' config from a file's metadata, as llama.cpp reads it.

    shapes   of all tensors of the file, by GGUF's names
    factors  the tensors of `factor_tensors` that the file has

    Raises FormatError for a key that is missing or absurd, InputError for one that is not understood.
    """
    check_keys({key: metadata.get(key) for key in metadata.entries}, family, where)
    read = _Numbers(metadata, family.gguf.architecture, where)
    heads, hidden = read.count("attention.head_count"), read.count("embedding_length")
    size = read.count("attention.key_length", max(1, hidden // heads))
    vocab_size = shapes["token_embd.weight"][0]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        family.inner_key: read.count("feed_forward_length"),
        "num_hidden_layers": read.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.count("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": read.count("context_length"),
        "rms_norm_eps": float(read("attention.layer_norm_rms_epsilon")),
        family.activation_key: family.activation,
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope_of(read, family.gguf.ropes, factors, size),
    }
    for key, modules in family.biased.items():
        config[key] = any(f".{name}.bias" in tensor for tensor in shapes for name in _gguf_names(family, modules))
    if heads % config["num_key_value_heads"] or config["head_dim"] % 2:
        raise FormatError(f"{where}", expected="key-value heads that divide the heads, and an even head size")
    for key, ours in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        known = isinstance(token, int) and 0 <= token < vocab_size
        config[ours] = token if known else None  # transformers' classes have numbers of their own for what is not said
    _check_sizes(read, family, config)
    carried = _carried_by(metadata, where)
    if family.local_rope:  # it is in the object of its kind of layer
        carried.pop("rope_parameters", None)
    return config | _of_the_family(read, family, config) | carried


def config_notes(metadata: Metadata, family: Family, where: Path) -> tuple[str, ...]:
    """What a file says that llama.cpp passes over, for what it says elsewhere or for good."""
    values = {
        key: metadata.get(f"{family.gguf.architecture}.{key}") for key in (*OVERRULED, "attention.sliding_window")
    }
    notes = []
    if None not in (values["rope.scaling.factor"], values["rope.scale_linear"]):
        both = f"rope.scale_linear {values['rope.scale_linear']!r:.40}"
        notes.append(f"{both}: rope.scaling.factor counts, {values['rope.scaling.factor']!r:.40}")
    factor = values["rope.scaling.factor"] or values["rope.scale_linear"]
    if values["rope.scaling.type"] is None and factor not in (None, 0.0, 1.0):
        notes.append(f"a rotary factor {factor!r:.40} and no type of it: linear counts")
    if values["rope.scaling.type"] == "none" and factor not in (None, 0.0, 1.0):
        notes.append(f"a rotary factor {factor!r:.40} that its rope.scaling.type, none, switches off")
    window = values["attention.sliding_window"]
    if family.gguf.window is None and window and CONFIG not in metadata.entries:
        notes.append(f"a sliding window of {window!r:.40}, which its {family.gguf.architecture} has not")
    return tuple(f"{where.name}: llama.cpp's reading of it counts: it has {note}" for note in notes)


OVERRULED = ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.type")


def _gguf_names(family: Family, modules: Collection[str]) -> list[str]:
    return [gguf for module, gguf in family.linears if module in modules]


def _check_sizes(read: _Numbers, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse heads of several sizes, and what makes of the decoder another one."""
    size, heads = config["head_dim"], config["num_attention_heads"]
    expected = {"attention.value_length": (size, max(1, config["hidden_size"] // heads), "the head size")}
    if SHARE not in family.defaults:
        expected["rope.dimension_count"] = (size, size, "the head size")
    for key, (value, default, what) in expected.items():
        if read(key, default) != value:
            raise FormatError(f"{read.where}: {key}", expected=f"{value}, {what}", got=str(read(key, default)))
    tokens, rows = read.metadata.get("tokenizer.ggml.tokens"), config["vocab_size"]
    count = len(tokens) if isinstance(tokens, list) else read.count("vocab_size", rows)
    if count != rows:
        what = f"{read.where}: token_embd.weight"
        raise FormatError(what, expected=f"{count} rows, one for each token", got=str(rows))
    if family.gguf.switched and read.metadata.get(f"{read.prefix}.rope.scaling.finetuned", True) is not True:
        what = f"{read.where}: {read.prefix}.rope.scaling.finetuned"
        raise InputError(what, expected="true: rotary positions", got="false")
    if read.metadata.get(f"{read.prefix}.attention.causal", True) is not True:
        raise InputError(f"{read.where}: {read.prefix}.attention.causal", expected="true: a decoder", got="false")


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Reads positive numbers of an architecture."""

    metadata: Metadata
    prefix: str
    where: object

    def __call__(self, key: str, default: float | None = None) -> Any:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 31:
            raise FormatError(f"{self.where}: {self.prefix}.{key}", expected="a positive number", got=shown(value))
        return value

    def count(self, key: str, default: float | None = None) -> int:
        """A positive integer."""
        value = self(key, default)
        if not isinstance(value, int):
            raise FormatError(f"{self.where}: {self.prefix}.{key}", expected="a positive integer", got=shown(value))
        return value

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return f"{self.prefix}.{key}" in self.metadata.entries


def _of_the_family(read: _Numbers, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """What only some families have, and what llama.cpp takes for granted of them."""
    settings: dict[str, Any] = dict(family.only)
    loader = family.gguf
    if family.windows != "none":
        settings["sliding_window"] = None
    if family.windows == "none" and "layer_types" in family.defaults:
        settings["layer_types"] = [LAYER_KINDS[0]] * config["num_hidden_layers"]
    if loader.window is not None and family.windows != "none":
        settings["sliding_window"] = read.count("attention.sliding_window", loader.default)
        period = read.count("attention.sliding_window_pattern", loader.window)
        if period < 2:
            raise InputError(f"{read.where}: attention.sliding_window_pattern", expected="2 or more", got=str(period))
        count = range(1, config["num_hidden_layers"] + 1)
        settings["layer_types"] = [LAYER_KINDS[bool(n % period)] for n in count]
    if "query_pre_attn_scalar" in family.defaults:
        big = config["num_hidden_layers"] == loader.big
        hidden_share = config["hidden_size"] // config["num_attention_heads"]
        settings["query_pre_attn_scalar"] = hidden_share if big else config["head_dim"]
    for key, capped in (("attn_logit_softcapping", loader.capped), ("final_logit_softcapping", loader.logits)):
        default = family.defaults.get(key)
        if key in family.defaults:
            has_cap = capped and (read.has(key) or default is not None)
            settings[key] = float(read(key, default)) if has_cap else None
    if SHARE in family.defaults:
        rotated = read.count("rope.dimension_count", config["head_dim"])
        settings[SHARE] = rotated / config["head_dim"]
    if ORIGINAL in family.defaults:
        settings[ORIGINAL] = config["rope_parameters"].get(ORIGINAL, config["max_position_embeddings"])
    if loader.scaled:
        usual = {ATTENTION_SCALE: config["head_dim"] ** -0.5}
        settings |= {key: float(read(name, usual.get(key, 1.0))) for key, name in SCALES.items()}
    if family.local_rope:
        theta = float(read("rope.freq_base_swa", 10000.0)) if loader.local else config["rope_parameters"]["rope_theta"]
        local = {"rope_type": "default", "rope_theta": theta}
        settings["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return settings


def _carried_by(metadata: Metadata, where: object) -> dict[str, Any]:
    text = metadata.get(CONFIG)
    if text is None:
        return {}
    try:
        content = json.loads(text) if isinstance(text, str) and len(text) < 1 << 20 else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or set(content) - set(CARRIED):
        raise FormatError(f"{where}: {CONFIG}", expected=f"a JSON object of {', '.join(CARRIED)}", got=shown(text))
    return content


def _rope_of(read: _Numbers, known: tuple[str, ...], factors: Mapping[str, Tensor], size: int) -> dict[str, Any]:
    """Rotary positions, of a kind that is known.

    llama.cpp takes linear where no type is said; it applies factor and attn_factor beside lists of factors too.
    """
    kind, factor = _scaling_of(read)
    times = float(read("rope.scaling.attn_factor", 1.0))
    plain = {"rope_type": "default", "rope_theta": float(read("rope.freq_base", 10000.0))}
    for names, rope in (({FREQS}, "llama3"), (set(LONGROPE.values()), "longrope")):
        there = names & set(factors)
        if there and (rope not in known or there != names or factor != 1):
            got = f"{', '.join(sorted(there))}, and a factor of {factor:g}"
            raise InputError(f"{read.where}: rotary factors", expected=f"those of {' or '.join(known)} alone", got=got)
    if set(LONGROPE.values()) <= set(factors):
        return _longrope_of(read, plain, factors)
    if kind == "yarn" and factor != 1 and kind in known:
        return _as_carried(read, {**plain, "rope_type": "yarn", **_yarn_of(read, factor)})
    divided = "yarn" if kind == "yarn" else "linear"
    if times != 1 or (factor != 1 and divided not in known):
        got = f"{kind}, factor {factor:g}, attn_factor {times:g}"
        raise InputError(f"{read.where}: {read.prefix}.rope.scaling", expected=f"one of {', '.join(known)}", got=got)
    if FREQS in factors:
        return _llama3_of(read, plain, factors[FREQS], size)
    return plain if factor == 1 else {**plain, "rope_type": "linear", "factor": factor}


def _scaling_of(read: _Numbers) -> tuple[str, float]:
    """The kind of scaling, and what positions are divided by: 1 where the kind is none, whatever the factor."""
    kind = read.metadata.get(f"{read.prefix}.rope.scaling.type", "linear")
    if kind not in SCALINGS:
        raise InputError(f"{read.where}: rope.scaling.type", expected=" or ".join(SCALINGS), got=shown(kind))
    factor = read.metadata.get(f"{read.prefix}.rope.scaling.factor")
    if factor is None:  # its name in 2023
        factor = read.metadata.get(f"{read.prefix}.rope.scale_linear", 0.0)
    if not isinstance(factor, float) or not 0 <= factor < 1 << 31:
        what = f"{read.where}: {read.prefix}.rope.scaling.factor"
        raise FormatError(what, expected="a real number from 0", got=shown(factor))
    return str(kind), 1.0 if kind == "none" or factor == 0 else factor


SCALINGS = ("none", "linear", "yarn", "longrope")
"""What llama.cpp knows as rope.scaling.type; longrope divides positions as linear does, beside its lists."""


def _as_carried(read: _Numbers, rope: dict[str, Any]) -> dict[str, Any]:
    """The numbers that the file carries in full, if float32 makes of them what its keys say."""
    carried = _carried_by(read.metadata, read.where).get("rope_parameters")
    if carried is None:
        return rope
    full = rope_of({"rope_parameters": carried}, read.where).parameters()
    same = full.keys() == rope.keys() and all(
        math.isclose(value, rope[key], rel_tol=1e-6) if isinstance(value, float) else value == rope[key]
        for key, value in full.items()
    )
    if not same:
        raise FormatError(f"{read.where}: {CONFIG}: rope_parameters", expected=str(rope), got=str(full))
    return full


def _yarn_of(read: _Numbers, factor: float) -> dict[str, Any]:
    original = read.count("rope.scaling.original_context_length", read("context_length"))
    numbers: dict[str, Any] = {"factor": factor, ORIGINAL: original}
    for key in ("beta_fast", "beta_slow"):
        if read.has(f"rope.scaling.yarn_{key}"):
            numbers[key] = float(read(f"rope.scaling.yarn_{key}"))
    if read.has("rope.scaling.attn_factor"):
        numbers["attention_factor"] = float(read("rope.scaling.attn_factor")) * yarn_attention(factor)
    if read.has(LOG_MULTIPLIER):
        if read(LOG_MULTIPLIER) != 1:
            raise InputError(f"{read.where}: {LOG_MULTIPLIER}", expected="1", got=shown(read(LOG_MULTIPLIER)))
        numbers |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    if read.has(TEMPERATURE):
        numbers[BETA] = float(read(TEMPERATURE))
    return numbers


def _longrope_of(read: _Numbers, plain: dict[str, Any], factors: Mapping[str, Tensor]) -> dict[str, Any]:
    lists = {key: factors[name].tolist() for key, name in LONGROPE.items()}
    original = read.count("rope.scaling.original_context_length", read("context_length"))
    positions = _carried_by(read.metadata, read.where).get("max_position_embeddings", read("context_length"))
    numbers = {**plain, "rope_type": "longrope", ORIGINAL: original, **lists}
    attention = float(read("rope.scaling.attn_factor", 1.0))
    usual = rope_of({"rope_parameters": numbers}, read.where).attention_factor(positions)
    return numbers if math.isclose(attention, usual, rel_tol=1e-6) else {**numbers, "attention_factor": attention}


def _llama3_of(read: _Numbers, plain: dict[str, Any], factors: Tensor, size: int) -> dict[str, Any]:
    """The numbers that give these factors: those the file carries, or those of Llama 3.1 and later."""
    carried = _carried_by(read.metadata, read.where).get("rope_parameters")
    published = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
    parameters = carried if isinstance(carried, dict) else {**plain, "rope_type": "llama3", **published}
    rope = rope_of({"rope_parameters": parameters}, read.where)
    if rope.kind == "llama3" and factors.numel() == size // 2:
        expected = llama3_factors(rope, size)
        if bool(((factors.double() - expected).abs() <= 1e-5 * expected).all()):
            return rope.parameters()
    raise InputError(
        f"{read.where}: {FREQS}", expected="the factors of Llama 3.1", got=f"factors up to {float(factors.max()):g}"
    )
