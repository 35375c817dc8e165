"""The config of a decoder graph that others made: what config.json or genai_config.json says, and what the graph does.

onnxruntime-genai's builder leaves no config.json. Sizes then come from genai_config.json; what the graph itself holds
comes from the graph: heads from its attention nodes, eps from its norms, the activation from its node, the rope base
from the tables of cosines and sines. Where both speak, the graph is right: it is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qalora.converters.families import FAMILIES
from qalora.converters.huggingface import read_config
from qalora.errors import FormatError, InputError
from qalora.formats.onnx import Stored, read_stored

__all__ = ["config_of", "rope_of", "whole_attribute"]

GENAI = "genai_config.json"
NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")
ATTENTION = ("GroupQueryAttention", "MultiHeadAttention")
ACTIVATIONS = {"Sigmoid": "silu", "Swish": "silu", "Gelu": "gelu", "FastGelu": "gelu_pytorch_tanh"}

RELATIVE = {"FLOAT": 2.0**-20, "FLOAT16": 2.0**-10}
"""How far an angle of a rope table may be from its formula: float32's power and sine are off by some ULP of 2^-24,
float16 tables by half of 2^-10."""

DIGITS = 9


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """A node's integer or real attribute."""
    for found in node.attribute:
        if found.name == name:
            return found.f if found.type == found.FLOAT else found.i
    return default


def whole_attribute(file: Path, node: Any, name: str, default: Any = None) -> Any:
    """A node's integer attribute; FormatError for a real one."""
    value = attribute(node, name, default)
    if isinstance(value, float):
        raise FormatError(f"{file}: {node.name}: {name}", expected="a whole number", got=f"a real one, {value}")
    return value


def config_of(file: Path, nodes: Sequence[Any], stored: Mapping[str, Stored]) -> dict[str, Any]:
    """transformers' config of a graph, but for what its linear layers tell (intermediate_size, biases).

    Raises InputError where neither config is beside the graph, where its attention or rope is none that is read here.
    """
    folder = file.parent
    known = (folder / "config.json").exists()
    if known:
        config = read_config(folder)
        config.pop("quantization_config", None)
    elif (folder / GENAI).exists():
        config = _from_genai(folder / GENAI, read_config(folder, GENAI))
    else:
        raise InputError(
            f"{file} was not written by qalora, and needs config.json or {GENAI} in its folder",
            todo="copy one of them there",
        )
    attention = next((node for node in nodes if node.op_type in ATTENTION), None)
    if attention is not None:
        config |= _heads(file, attention)
    epsilons = {round_float32(attribute(node, "epsilon", 1e-5)) for node in nodes if node.op_type in NORMS}
    if len(epsilons) > 1:
        raise InputError(f"{file}: its norms", expected="one epsilon", got=", ".join(map(str, sorted(epsilons))))
    if epsilons:
        config["rms_norm_eps"] = epsilons.pop()
    act = next((node.op_type for node in nodes if "/act_fn/" in node.name), None)
    if act in ACTIVATIONS:
        config["hidden_act"] = ACTIVATIONS[act]
    rope = rope_of(stored.get("cos_cache"), stored.get("sin_cache"))
    if rope is not None:
        config = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
        config["rope_parameters"] = rope
    elif not known:
        raise InputError(
            f"{file}: its rope tables are missing, or scaled in a way that is not read from a graph",
            todo="put the model's config.json beside it",
        )
    return config


def _from_genai(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    model = content.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        raise FormatError(str(path), expected="model.decoder", got="none")
    kinds = {family.architecture.split("For")[0].lower(): family.model_type for family in FAMILIES.values()}
    kind = model.get("type")
    config = {
        "model_type": kinds.get(kind, kind) if isinstance(kind, str) else kind,
        "hidden_size": decoder.get("hidden_size"),
        "num_hidden_layers": decoder.get("num_hidden_layers"),
        "num_attention_heads": decoder.get("num_attention_heads"),
        "num_key_value_heads": decoder.get("num_key_value_heads"),
        "head_dim": decoder.get("head_size"),
        "vocab_size": model.get("vocab_size"),
        "max_position_embeddings": model.get("context_length"),
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in model:
            config[key] = model[key]
    return config


def _heads(file: Path, node: Any) -> dict[str, Any]:
    heads = whole_attribute(file, node, "num_heads")
    kv_heads = whole_attribute(file, node, "kv_num_heads", heads)
    if whole_attribute(file, node, "local_window_size", -1) > 0:
        raise InputError(f"{file}: {node.name}", expected="attention over the whole context", got="a sliding window")
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads}


def rope_of(cos: Stored | None, sin: Stored | None) -> dict[str, Any] | None:
    """rope_parameters of tables [positions, head_dim/2]; None where they are not there, or follow another formula.

    The angle at position 1 is inv_freq: theta^(-2j/head_dim), divided by a factor where positions are scaled linearly.
    theta and factor are the shortest decimals that give every angle to within its type's rounding.
    """
    if cos is None or sin is None or cos.shape != sin.shape or len(cos.shape) != 2 or cos.shape[0] < 2:
        return None
    if cos.dtype != sin.dtype or cos.dtype not in RELATIVE or not 2 <= cos.shape[1] <= 1 << 12:
        return None
    x, y = read_stored(cos, 1, 2)[0].double(), read_stored(sin, 1, 2)[0].double()
    angles, half = torch.atan2(y, x), cos.shape[1]
    if not bool((torch.hypot(x, y) - 1).abs().max() < 2.0**-9) or not bool((angles > 0).all()):
        return None
    first, last = float(angles[0]), float(angles[-1])
    estimate = (last / first) ** (-half / (half - 1))
    exponents = -torch.arange(half, dtype=torch.float64) / half
    slack = RELATIVE[cos.dtype] * angles + (2.0**-24 if cos.dtype == "FLOAT16" else 0.0)
    for factor in _decimals(1 / first):
        for theta in _decimals(estimate):
            if bool(((theta**exponents / factor - angles).abs() <= slack).all()):
                scaled = {"rope_type": "linear", "factor": factor}
                return {"rope_theta": theta, **({"rope_type": "default"} if factor == 1 else scaled)}
    return None


def _decimals(value: float) -> list[float]:
    """The value to 1, 2, ... significant digits."""
    if not math.isfinite(value):
        return []
    return [float(f"{value:.{digits}e}") for digits in range(DIGITS)]


def round_float32(value: float) -> float:
    """A float32 attribute as the shortest decimal that it stands for."""
    single = torch.tensor(value, dtype=torch.float32)
    for digits in range(DIGITS):
        short = float(f"{value:.{digits}e}")
        if torch.tensor(short, dtype=torch.float32) == single:
            return short
    return float(value)
