"""Which models llama.cpp would compute otherwise, by what its loader of their architecture takes for granted.

Source: llama.cpp, src/llama-model.cpp. Each family's record of it (`gguf`) is held by tests that run the library.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from qalora.converters.decoder import FULL, LOCAL, Decoder, check_activation
from qalora.converters.families import Family
from qalora.converters.rope import check_rope, two_tables
from qalora.converters.settings import ATTENTION_SCALE, EMBEDDING_SCALE, LOGIT_DIVISOR, RESIDUAL_SCALE
from qalora.errors import InputError, shown

__all__ = [
    "LOG_MULTIPLIER",
    "SCALES",
    "TEMPERATURE",
    "check_keys",
    "check_tensors",
    "clipped_window",
    "context_notes",
    "reads_bias",
    "refuse",
]


READ = (
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
)
"""Keys of any architecture that `configs` reads."""

TEMPERATURE, LOG_MULTIPLIER = "attention.temperature_scale", "rope.scaling.yarn_log_multiplier"

SCALES = {
    EMBEDDING_SCALE: "embedding_scale",
    RESIDUAL_SCALE: "residual_scale",
    ATTENTION_SCALE: "attention.scale",
    LOGIT_DIVISOR: "logit_scale",
}
"""Keys of factors, where a loader reads them, by transformers' keys."""

IDLE = ("pooling_type", "rope.scaling.finetuned", "tensor_data_layout")
"""Keys that change no logits."""


def check_keys(keys: Mapping[str, Any], family: Family, where: object) -> None:
    """Refuse a key of the architecture that is none of those that are read: llama.cpp may compute with it.

    keys  all of a file, with their values; one that is 0, false or empty switches nothing on
    """
    loader, prefix = family.gguf, f"{family.gguf.architecture}."
    read = {*READ, *IDLE}
    read |= {"attention.sliding_window_pattern"} if loader.window is not None else set()
    read |= {"attn_logit_softcapping"} if loader.capped else set()
    read |= {"final_logit_softcapping"} if loader.logits else set()
    read |= {"rope.freq_base_swa"} if loader.local else set()
    read |= set(SCALES.values()) if loader.scaled else set()
    read |= {TEMPERATURE, LOG_MULTIPLIER} if loader.tempered else set()
    read |= {"rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"} if "yarn" in loader.ropes else set()
    for key, value in keys.items():
        if key.startswith(prefix) and key.removeprefix(prefix) not in read and value:
            raise InputError(
                f"{where}: {key}",
                expected=f"no such key, or 0, in a {family.model_type}",
                got=shown(value),
                todo="it may change what llama.cpp computes, and is not understood here",
            )


def _loader_scale(decoder: Decoder) -> float:
    big = len(decoder.layers) == decoder.family.gguf.big
    squared = decoder.hidden // decoder.heads if big else decoder.head_size
    return 1 / math.sqrt(squared)


def refuse(decoder: Decoder, where: object) -> None:
    """Refuse what llama.cpp would compute otherwise."""
    loader, where = decoder.family.gguf, f"gguf: {where}"
    check_activation(decoder, where)
    for kind, rope in decoder.ropes.items():
        known = loader.ropes if kind == FULL else ("default",)
        if rope.kind not in known:
            raise InputError(
                f"{where}: rope_type",
                expected=" or ".join(known),
                got=shown(rope.kind),
                todo="use gptq" if rope.kind == "dynamic" else "export it to onnx or gptq",
            )
        check_rope(rope, decoder.head_size, where)
        mscales = {key: rope.numbers[key] for key in ("mscale", "mscale_all_dim") if key in rope.numbers}
        if rope.kind == "yarn" and loader.tempered and (set(mscales.values()) != {1} or len(mscales) != 2):
            raise InputError(f"{where}: yarn", expected="mscale and mscale_all_dim of 1", got=str(mscales)[:90])
        if rope.kind == "yarn" and (
            rope.numbers.get("truncate") is False or ("mscale" in mscales and not loader.tempered)
        ):
            raise InputError(f"{where}: yarn", expected="no truncate or mscale", got=str(dict(rope.numbers))[:90])
    if LOCAL in decoder.ropes and not loader.local and decoder.ropes[LOCAL].theta != decoder.ropes[FULL].theta:
        expected = f"{decoder.ropes[FULL].theta:g} in layers with a window too, as {loader.architecture} has it"
        raise InputError(f"{where}: rope_theta", expected=expected, got=f"{decoder.ropes[LOCAL].theta:g}")
    if not loader.scaled and not math.isclose(decoder.scale, _loader_scale(decoder), rel_tol=1e-6):
        expected = f"{round(_loader_scale(decoder) ** -2)}, which {loader.architecture} has"
        raise InputError(f"{where}: query_pre_attn_scalar", expected=expected, got=f"{decoder.scale**-2:g}")
    if (decoder.softcap is not None) != loader.capped:
        expected = f"{'a number' if loader.capped else 'none'}, as {loader.architecture} has it"
        raise InputError(f"{where}: attn_logit_softcapping", expected=expected, got=str(decoder.softcap))
    windowless = loader.unclipped and all(layer.window is None for layer in decoder.layers)
    for n, layer in enumerate(decoder.layers):
        if loader.window is not None and not windowless and (layer.window is None) != ((n + 1) % loader.window == 0):
            expected = f"a window in all layers but every {loader.window}th"
            raise InputError(f"{where}: layer_types", expected=expected, got=f"{layer.window} in layer {n}")
        if (layer.rope is None) != (loader.unrotated is not None and (n + 1) % loader.unrotated == 0):
            expected = f"layers without rotary positions at every {loader.unrotated}th"
            raise InputError(
                f"{where}: no_rope_layers",
                expected=expected,
                got=f"layer {n} {'without' if layer.rope is None else 'with'} rotary positions",
            )


def check_tensors(names: Collection[str], family: Family, where: object) -> None:
    """Refuse a tensor of a model that llama.cpp's loader does not take; `where` begins with what the model is for."""
    loader = family.gguf
    for name in names:
        if not reads_bias(name, family):
            raise InputError(
                f"{where}: {name}: llama.cpp reads no such bias of a {loader.architecture}",
                todo="export it to onnx or gptq",
            )
    if loader.untied and "lm_head.weight" not in names:
        raise InputError(
            f"{where}: llama.cpp wants an output layer in a {loader.architecture}, and here it is the embedding",
            todo="export it to onnx or gptq",
        )
    if loader.tied and "lm_head.weight" in names:
        raise InputError(
            f"{where}: lm_head.weight: llama.cpp ties the output layer of a {loader.architecture} to the embedding",
            todo="export it to onnx or gptq",
        )


def reads_bias(name: str, family: Family) -> bool:
    """Whether llama.cpp reads a bias, by transformers' name; true of a tensor that is none."""
    modules = family.gguf.biases
    return not name.endswith(".bias") or name.endswith(tuple(f".{module}.bias" for module in modules))


def clipped_window(decoder: Decoder) -> int | None:
    """The window of a decoder that llama.cpp knows no window of, if its context is longer."""
    windows = [layer.window for layer in decoder.layers if layer.window is not None]
    if decoder.family.gguf.window is not None or not windows or min(windows) >= decoder.positions:
        return None
    return min(windows)


def context_notes(decoder: Decoder) -> tuple[str, ...]:
    """What a user should know of contexts that llama.cpp computes otherwise."""
    window, rope, notes = clipped_window(decoder), decoder.ropes[FULL], []
    name = decoder.family.gguf.architecture
    if window is not None:
        notes.append(
            f"gguf: llama.cpp has no sliding window for {name}: the file's context_length is the window, {window}, up "
            "to which it computes the same"
        )
    if two_tables(rope, decoder.positions):
        notes.append(
            "gguf: llama.cpp chooses between the two rotary scalings by the size of its context, not by the length of "
            f"the text: run it with a context of {rope.original} or less for texts that fit"
        )
    return tuple(notes)
