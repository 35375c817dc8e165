"""How a family's tensors are named and ordered in GGUF, and its hyper-parameters, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qalora.converters.families import FAMILIES, Family
from qalora.errors import FormatError, InputError
from qalora.formats.gguf import Metadata, Value, ValueType

__all__ = ["config_of", "family_of_metadata", "gguf_names", "head_count", "hyperparameters", "rows_from", "rows_to"]


def gguf_names(family: Family, layers: int) -> dict[str, str]:
    """GGUF's name of every tensor that a model of this family may have, by transformers' name."""
    names = dict(family.outer)
    for n in range(layers):
        for module, gguf in (*family.linears, *family.norms):
            names[f"model.layers.{n}.{module}.weight"] = f"blk.{n}.{gguf}.weight"
            names[f"model.layers.{n}.{module}.bias"] = f"blk.{n}.{gguf}.bias"
    return names


def head_count(family: Family, config: Mapping[str, Any], name: str) -> int | None:
    """The heads by which GGUF reorders the rows of a tensor, or None where it does not."""
    if not any(name.endswith(f".{module}.weight") or name.endswith(f".{module}.bias") for module in family.permuted):
        return None
    heads = int(config["num_attention_heads"])
    return int(config.get("num_key_value_heads") or heads) if ".k_proj." in name else heads


def rows_to(rows: int, heads: int) -> Tensor:
    """GGUF's row r is transformers' row rows_to[r]: within each head, [2, d/2] becomes [d/2, 2]."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def rows_from(rows: int, heads: int) -> Tensor:
    """Transformers' row r is GGUF's row rows_from[r]; the inverse of `rows_to`."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def family_of_metadata(metadata: Metadata, where: object) -> Family:
    """The family of general.architecture; InputError names those there are."""
    architecture = metadata.get("general.architecture")
    for family in FAMILIES.values():
        if family.gguf == architecture:
            return family
    known = ", ".join(family.gguf for family in FAMILIES.values())
    raise InputError(f"{where}: general.architecture", expected=f"one of {known}", got=repr(architecture))


def config_of(metadata: Metadata, family: Family, where: object, *, tied: bool, vocab_size: int) -> dict[str, Any]:
    """Transformers' config from a file's metadata; FormatError for a key that is missing or absurd."""

    def number(key: str, default: float | None = None) -> Any:
        value = metadata.get(f"{family.gguf}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 31:
            raise FormatError(f"{where}: {family.gguf}.{key}", expected="a positive number", got=repr(value))
        return value

    heads, hidden = int(number("attention.head_count")), int(number("embedding_length"))
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": int(number("feed_forward_length")),
        "num_hidden_layers": int(number("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(number("attention.head_count_kv", heads)),
        "head_dim": int(number("attention.key_length", number("rope.dimension_count", max(1, hidden // heads)))),
        "max_position_embeddings": int(number("context_length")),
        "rms_norm_eps": float(number("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "rope_parameters": _rope_of(metadata, family, where, float(number("rope.freq_base", 10000.0))),
    }
    if heads % config["num_key_value_heads"] or config["head_dim"] % 2:
        raise FormatError(f"{where}", expected="key-value heads that divide the heads, and an even head size")
    for key, ours in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and 0 <= token < vocab_size:
            config[ours] = token
    return config


def _rope_of(metadata: Metadata, family: Family, where: object, theta: float) -> dict[str, Any]:
    scaling = metadata.get(f"{family.gguf}.rope.scaling.type", "none")
    factor = metadata.get(f"{family.gguf}.rope.scaling.factor")
    if scaling == "none" or factor in (None, 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear" and isinstance(factor, float) and factor > 0:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise InputError(f"{where}: rope.scaling.type", expected="none or linear", got=f"{scaling!r}, factor {factor!r}")


def hyperparameters(config: Mapping[str, Any], family: Family, where: object) -> dict[str, Value]:
    """The architecture's metadata from transformers' config; InputError for a rope scaling that GGUF cannot say."""
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    prefix = family.gguf
    integers = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "vocab_size": config["vocab_size"],
        "rope.dimension_count": size,
    }
    if size * heads != int(config["hidden_size"]):
        integers |= {"attention.key_length": size, "attention.value_length": size}
    floats = {
        "rope.freq_base": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", 1e-6),
    }
    entries = {f"{prefix}.{key}": Value(type=ValueType.UINT32, value=int(value)) for key, value in integers.items()}
    entries |= {f"{prefix}.{key}": Value(type=ValueType.FLOAT32, value=float(v)) for key, v in floats.items()}
    if kind == "linear":
        entries[f"{prefix}.rope.scaling.type"] = Value(type=ValueType.STRING, value="linear")
        entries[f"{prefix}.rope.scaling.factor"] = Value(type=ValueType.FLOAT32, value=float(rope["factor"]))
    elif kind != "default":
        raise InputError(
            f"gguf: {where}: rope_type", expected="default or linear", got=repr(kind), todo="export it to onnx or gptq"
        )
    return entries
