"""A decoder's numbers as GGUF metadata, and back; what llama.cpp's loader of an architecture takes for granted.

What GGUF has no key for travels in keys of ours: `qalora.model_type` names the family where several share an
architecture (Mistral's is "llama" too), `qalora.config` is a JSON object of transformers' keys in CARRIED.
Sources: ggml-org/ggml, docs/gguf.md; gguf-py, constants.py; llama.cpp, src/llama-model.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qalora.converters.decoder import FULL, LOCAL, Decoder, check_activation
from qalora.converters.families import FAMILIES, Family
from qalora.converters.rope import ORIGINAL, Rope, check_rope, llama3_factors, rope_of, two_tables
from qalora.errors import FormatError, InputError
from qalora.formats.gguf import Metadata, Value, ValueType

__all__ = ["check_biases", "config_of", "context_notes", "factor_tensors", "family_of_metadata", "hyperparameters"]

MODEL_TYPE, CONFIG = "qalora.model_type", "qalora.config"

CARRIED = (
    "max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "rope_parameters",
)
"""The keys that `qalora.config` may have."""

FREQS = "rope_freqs.weight"
LONGROPE = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """What llama.cpp does for an architecture.

    ropes     transformers' rope kinds that it computes
    window    it keeps to attention.sliding_window, in all layers but every n-th; None: it has no window
    capped    it caps scores, always
    big       the number of layers at which it scales scores by hidden/heads in place of the head size
    unrotated every n-th layer has no rotary positions
    biases    the linear modules whose biases it reads
    """

    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    window: int | None = None
    capped: bool = False
    big: int | None = None
    unrotated: int | None = None
    biases: tuple[str, ...] = ()


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OTHERS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

LOADERS: dict[str, Loader] = {
    "llama": Loader(ropes=("default", "linear", "yarn", "llama3"), biases=(*_QKV, *_OTHERS)),
    "qwen2": Loader(biases=_QKV),
    "qwen3": Loader(biases=_QKV),
    "gemma2": Loader(window=2, capped=True, big=46),
    "gemma3": Loader(window=6, big=62),
    "smollm3": Loader(unrotated=4),
    "phi3": Loader(ropes=("default", "longrope")),
}


def family_of_metadata(metadata: Metadata, where: object) -> Family:
    """The family of general.architecture, or the one of it that wrote the file; InputError names those there are."""
    architecture = metadata.get("general.architecture")
    fitting = [family for family in FAMILIES.values() if family.gguf == architecture]
    for family in fitting:
        if family.model_type == metadata.get(MODEL_TYPE, fitting[0].model_type):
            return family
    known = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES.values()))
    got = repr(architecture)
    if fitting:
        known = ", ".join(family.model_type for family in fitting)
        raise FormatError(f"{where}: {MODEL_TYPE}", expected=f"one of {known}", got=repr(metadata.get(MODEL_TYPE))[:60])
    experts = metadata.get(f"{architecture}.expert_count")
    todo = "a mixture of experts: its experts are not read yet" if experts else "see the README"
    raise InputError(f"{where}: general.architecture", expected=f"one of {known}", got=got, todo=todo)


def _loader_scale(decoder: Decoder, loader: Loader) -> float:
    big = len(decoder.layers) == loader.big
    squared = decoder.hidden // decoder.heads if big else decoder.head_size
    return 1 / math.sqrt(squared)


def _refuse(decoder: Decoder, where: object) -> None:
    """Refuse what llama.cpp would compute otherwise."""
    family, loader = decoder.family, LOADERS[decoder.family.gguf]
    where, layers = f"gguf: {where}", decoder.layers
    check_activation(decoder, where)
    for kind, rope in decoder.ropes.items():
        known = loader.ropes if kind == FULL else ("default",)
        if rope.kind not in known:
            raise InputError(
                f"{where}: rope_type",
                expected=" or ".join(known),
                got=repr(rope.kind),
                todo="use gptq",
            )
        check_rope(rope, decoder.head_size, where)
        if rope.kind == "yarn" and (rope.numbers.get("truncate") is False or "mscale" in rope.numbers):
            raise InputError(f"{where}: yarn", expected="no truncate or mscale", got=str(dict(rope.numbers))[:90])
    if not math.isclose(decoder.scale, _loader_scale(decoder, loader), rel_tol=1e-6):
        wanted = round(_loader_scale(decoder, loader) ** -2)
        got = f"{decoder.scale**-2:g}"
        raise InputError(f"{where}: query_pre_attn_scalar", expected=f"{wanted}, which {family.gguf} has", got=got)
    if (decoder.softcap is not None) != loader.capped:
        expected = f"{'a number' if loader.capped else 'none'}, as {family.gguf} has it"
        raise InputError(f"{where}: attn_logit_softcapping", expected=expected, got=str(decoder.softcap))
    for n, layer in enumerate(layers):
        if loader.window is not None and (layer.window is None) != ((n + 1) % loader.window == 0):
            expected = f"a window in all layers but every {loader.window}th"
            raise InputError(f"{where}: layer_types", expected=expected, got=f"{layer.window} in layer {n}")
        if (layer.rope is None) != (loader.unrotated is not None and (n + 1) % loader.unrotated == 0):
            expected = f"layers without rotary positions at every {loader.unrotated}th"
            raise InputError(f"{where}: no_rope_layers", expected=expected, got=f"another kind of layer at {n}")


def check_biases(names: Iterable[str], family: Family, where: object) -> None:
    """Refuse a bias, among the tensors of a model, that llama.cpp's loader does not take."""
    known = LOADERS[family.gguf].biases
    for name in names:
        if name.endswith(".bias") and not name.endswith(tuple(f".{module}.bias" for module in known)):
            raise InputError(
                f"gguf: {where}: {name}: llama.cpp reads no such bias of a {family.gguf}",
                todo="export it to onnx or gptq",
            )


def _clipped(decoder: Decoder) -> int | None:
    """The window of a decoder that llama.cpp knows no window of, if its context is longer."""
    windows = [layer.window for layer in decoder.layers if layer.window is not None]
    if LOADERS[decoder.family.gguf].window is not None or not windows or min(windows) >= decoder.positions:
        return None
    return min(windows)


def context_notes(decoder: Decoder) -> tuple[str, ...]:
    """What a user should know of contexts that llama.cpp computes otherwise."""
    window, rope, notes = _clipped(decoder), decoder.ropes[FULL], []
    if window is not None:
        notes.append(
            f"gguf: llama.cpp has no sliding window for {decoder.family.gguf}: the file's context_length is the "
            f"window, {window}, up to which it computes the same"
        )
    if two_tables(rope, decoder.positions):
        notes.append(
            "gguf: llama.cpp chooses between the two rotary scalings by the size of its context, not by the length of "
            f"the text: run it with a context of {rope.original} or less for texts that fit"
        )
    return tuple(notes)


def hyperparameters(decoder: Decoder, settings: Mapping[str, Any], where: object) -> dict[str, Value]:
    """The metadata of the architecture. `settings` is the config with the family's defaults.

    InputError for what GGUF cannot say, or llama.cpp would compute otherwise.
    """
    _refuse(decoder, where)
    prefix, size, heads = decoder.family.gguf, decoder.head_size, decoder.heads
    clipped = _clipped(decoder)
    integers = {
        "block_count": len(decoder.layers),
        "context_length": clipped or decoder.positions,
        "embedding_length": decoder.hidden,
        "feed_forward_length": decoder.intermediate,
        "attention.head_count": heads,
        "attention.head_count_kv": decoder.kv_heads,
        "vocab_size": decoder.vocabulary,
        "rope.dimension_count": decoder.ropes[FULL].size(size),
    }
    if size * heads != decoder.hidden or decoder.family.gguf != "llama":
        integers |= {"attention.key_length": size, "attention.value_length": size}
    floats = {
        "rope.freq_base": decoder.ropes[FULL].theta,
        "attention.layer_norm_rms_epsilon": decoder.epsilon,
    }
    windows = [layer.window for layer in decoder.layers if layer.window is not None]
    if windows and LOADERS[prefix].window is not None:
        integers["attention.sliding_window"] = windows[0]
    if LOCAL in decoder.ropes:
        floats["rope.freq_base_swa"] = decoder.ropes[LOCAL].theta
    for key, cap in (("attn", decoder.softcap), ("final", decoder.logit_softcap)):
        if cap is not None:
            floats[f"{key}_logit_softcapping"] = cap
    entries = {key: _integer(value) for key, value in integers.items()}
    entries |= {key: _real(value) for key, value in floats.items()}
    entries |= _scaling(decoder.ropes[FULL], decoder.positions)
    return {f"{prefix}.{key}": value for key, value in entries.items()} | _carried(decoder, settings)


def _integer(value: int) -> Value:
    return Value(type=ValueType.UINT32, value=int(value))


def _real(value: float) -> Value:
    return Value(type=ValueType.FLOAT32, value=float(value))


def _text(value: str) -> Value:
    return Value(type=ValueType.STRING, value=value)


def _scaling(rope: Rope, positions: int) -> dict[str, Value]:
    """The keys below rope.scaling; llama3's and longrope's factors are tensors, which name no type."""
    entries: dict[str, Value] = {}
    if rope.kind in ("linear", "yarn"):
        entries |= {"type": _text(rope.kind), "factor": _real(rope.numbers["factor"])}
    if rope.kind in ("yarn", "longrope"):
        entries["original_context_length"] = _integer(rope.original)
    if rope.kind == "longrope":
        entries["attn_factor"] = _real(rope.attention_factor(positions))
    if rope.kind == "yarn":
        entries["yarn_beta_fast"] = _real(rope.numbers["beta_fast"])
        entries["yarn_beta_slow"] = _real(rope.numbers["beta_slow"])
        factor = rope.numbers.get("attention_factor")
        if factor is not None:  # llama.cpp multiplies what it computes from the factor with this
            entries["attn_factor"] = _real(factor / _yarn_attention(rope.numbers["factor"]))
    return {f"rope.scaling.{key}": value for key, value in entries.items()}


def _yarn_attention(factor: float) -> float:
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _carried(decoder: Decoder, settings: Mapping[str, Any]) -> dict[str, Value]:
    """Our own keys, where GGUF's do not say all."""
    kept: dict[str, Any] = {}
    if _clipped(decoder) is not None:
        kept = {key: settings[key] for key in CARRIED if key in settings and key != "rope_parameters"}
    rope = decoder.ropes[FULL]
    if rope.kind == "llama3" or (rope.kind == "yarn" and "attention_factor" in rope.numbers):
        kept["rope_parameters"] = rope.parameters()
    entries = {}
    if decoder.family.model_type != decoder.family.gguf:
        entries[MODEL_TYPE] = _text(decoder.family.model_type)
    if kept:
        entries[CONFIG] = _text(json.dumps(kept, sort_keys=True))
    return entries


def factor_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The factors of rotary frequencies that GGUF holds as tensors, float32 [rotated elements / 2], by its name."""
    rope = decoder.ropes[FULL]
    if rope.kind == "llama3":
        return {FREQS: llama3_factors(rope, rope.size(decoder.head_size)).float()}
    if rope.kind == "longrope":
        return {name: torch.tensor(rope.numbers[key], dtype=torch.float32) for key, name in LONGROPE.items()}
    return {}


def config_of(
    metadata: Metadata,
    family: Family,
    where: object,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Transformers' config from a file's metadata; FormatError for a key that is missing or absurd.

    shapes   of all tensors of the file, by GGUF's names
    factors  the tensors of `factor_tensors` that the file has
    """
    read = _Numbers(metadata, family.gguf, where)
    heads, hidden = int(read("attention.head_count")), int(read("embedding_length"))
    size = int(read("attention.key_length", max(1, hidden // heads)))
    vocab_size = shapes["token_embd.weight"][0]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": int(read("feed_forward_length")),
        "num_hidden_layers": int(read("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(read("attention.head_count_kv", heads)),
        "head_dim": size,
        "max_position_embeddings": int(read("context_length")),
        "rms_norm_eps": float(read("attention.layer_norm_rms_epsilon")),
        family.activation_key: family.activation,
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope_of(read, factors, size),
    }
    if "blk.0.attn_q.bias" in shapes and not family.biases:
        config["attention_bias"] = True
    if "blk.0.ffn_gate.bias" in shapes:
        config["mlp_bias"] = True
    if heads % config["num_key_value_heads"] or config["head_dim"] % 2:
        raise FormatError(f"{where}", expected="key-value heads that divide the heads, and an even head size")
    for key, ours in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and 0 <= token < vocab_size:
            config[ours] = token
    return config | _of_the_family(read, family, config) | _carried_by(metadata, where)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Reads positive numbers of an architecture."""

    metadata: Metadata
    prefix: str
    where: object

    def __call__(self, key: str, default: float | None = None) -> Any:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 31:
            raise FormatError(f"{self.where}: {self.prefix}.{key}", expected="a positive number", got=repr(value))
        return value

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return f"{self.prefix}.{key}" in self.metadata.entries


def _of_the_family(read: _Numbers, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """What only some families have, and what llama.cpp takes for granted of them."""
    found: dict[str, Any] = {}
    if family.windows != "none":
        windowed = read.has("attention.sliding_window")
        found["sliding_window"] = int(read("attention.sliding_window")) if windowed else None
    if "query_pre_attn_scalar" in family.defaults:
        big = config["num_hidden_layers"] == LOADERS[family.gguf].big
        hidden_share = config["hidden_size"] // config["num_attention_heads"]
        found["query_pre_attn_scalar"] = hidden_share if big else config["head_dim"]
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            default = family.defaults.get(key)
            found[key] = float(read(key, default)) if read.has(key) or default is not None else None
    if "partial_rotary_factor" in family.defaults:
        rotated = int(read("rope.dimension_count", config["head_dim"]))
        found["partial_rotary_factor"] = rotated / config["head_dim"]
        found[ORIGINAL] = config["rope_parameters"].get(ORIGINAL, config["max_position_embeddings"])
    elif read.has("rope.dimension_count") and read("rope.dimension_count") != config["head_dim"]:
        expected = f"{config['head_dim']}, the head size"
        raise FormatError(
            f"{read.where}: rope.dimension_count", expected=expected, got=str(read("rope.dimension_count"))
        )
    if family.local_rope:
        local = {"rope_type": "default", "rope_theta": float(read("rope.freq_base_swa", 10000.0))}
        found["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return found


def _carried_by(metadata: Metadata, where: object) -> dict[str, Any]:
    given = metadata.get(CONFIG)
    if given is None:
        return {}
    try:
        kept = json.loads(given) if isinstance(given, str) and len(given) < 1 << 20 else None
    except (ValueError, RecursionError):
        kept = None
    if not isinstance(kept, dict) or set(kept) - set(CARRIED):
        raise FormatError(f"{where}: {CONFIG}", expected=f"a JSON object of {', '.join(CARRIED)}", got=repr(given)[:60])
    return kept


def _rope_of(read: _Numbers, factors: Mapping[str, Tensor], size: int) -> dict[str, Any]:
    scaling = read.metadata.get(f"{read.prefix}.rope.scaling.type", "none")
    factor = read.metadata.get(f"{read.prefix}.rope.scaling.factor")
    plain = {"rope_type": "default", "rope_theta": float(read("rope.freq_base", 10000.0))}
    if FREQS in factors:
        return _llama3_of(read, plain, factors[FREQS], size)
    if set(LONGROPE.values()) <= set(factors):
        return _longrope_of(read, plain, factors)
    if scaling == "none" or factor in (None, 1.0):
        return plain
    if scaling == "linear" and isinstance(factor, float) and factor > 0:
        return {**plain, "rope_type": "linear", "factor": factor}
    if scaling == "yarn" and isinstance(factor, float) and factor > 0:
        return _as_carried(read, {**plain, "rope_type": "yarn", **_yarn_of(read, factor)})
    got = f"{scaling!r}, factor {factor!r}"
    raise InputError(f"{read.where}: rope.scaling.type", expected="none, linear or yarn", got=got)


def _as_carried(read: _Numbers, found: dict[str, Any]) -> dict[str, Any]:
    """The numbers that the file carries in full, if float32 makes of them what its keys say."""
    carried = _carried_by(read.metadata, read.where).get("rope_parameters")
    if carried is None:
        return found
    given = rope_of({"rope_parameters": carried}, read.where).parameters()
    same = given.keys() == found.keys() and all(
        math.isclose(value, found[key], rel_tol=1e-6) if isinstance(value, float) else value == found[key]
        for key, value in given.items()
    )
    if not same:
        raise FormatError(f"{read.where}: {CONFIG}: rope_parameters", expected=str(found), got=str(given))
    return given


def _yarn_of(read: _Numbers, factor: float) -> dict[str, Any]:
    found: dict[str, Any] = {"factor": factor, ORIGINAL: int(read("rope.scaling.original_context_length"))}
    for key in ("beta_fast", "beta_slow"):
        if read.has(f"rope.scaling.yarn_{key}"):
            found[key] = float(read(f"rope.scaling.yarn_{key}"))
    if read.has("rope.scaling.attn_factor"):
        found["attention_factor"] = float(read("rope.scaling.attn_factor")) * _yarn_attention(factor)
    return found


def _longrope_of(read: _Numbers, plain: dict[str, Any], factors: Mapping[str, Tensor]) -> dict[str, Any]:
    lists = {key: factors[name].tolist() for key, name in LONGROPE.items()}
    original = int(read("rope.scaling.original_context_length"))
    positions = _carried_by(read.metadata, read.where).get("max_position_embeddings", read("context_length"))
    found = {**plain, "rope_type": "longrope", ORIGINAL: original, **lists}
    given = float(read("rope.scaling.attn_factor", 1.0))
    usual = rope_of({"rope_parameters": found}, read.where).attention_factor(positions)
    return found if math.isclose(given, usual, rel_tol=1e-6) else {**found, "attention_factor": given}


def _llama3_of(read: _Numbers, plain: dict[str, Any], factors: Tensor, size: int) -> dict[str, Any]:
    """The numbers that give these factors: those the file carries, or those of Llama 3.1 and later."""
    carried = _carried_by(read.metadata, read.where).get("rope_parameters")
    published = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
    given = carried if isinstance(carried, dict) else {**plain, "rope_type": "llama3", **published}
    rope = rope_of({"rope_parameters": given}, read.where)
    if rope.kind == "llama3" and factors.numel() == size // 2:
        expected = llama3_factors(rope, size)
        if bool(((factors.double() - expected).abs() <= 1e-5 * expected).all()):
            return rope.parameters()
    raise InputError(f"{read.where}: {FREQS}", expected="the factors of Llama 3.1", got="others")
