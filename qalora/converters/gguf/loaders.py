"""What llama.cpp's loader of an architecture takes for granted, and which models it would therefore compute otherwise.

Source: llama.cpp, src/llama-model.cpp. Each line of LOADERS is held by a test that runs the library.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from qalora.converters.decoder import FULL, Decoder, check_activation
from qalora.converters.families import Family
from qalora.converters.rope import check_rope, two_tables
from qalora.errors import InputError

__all__ = ["LOADERS", "Loader", "check_tensors", "clipped_window", "context_notes", "refuse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """What llama.cpp does for an architecture.

    ropes     transformers' rope kinds that it computes
    window    it keeps to attention.sliding_window, in all layers but every n-th; None: it has no window
    capped    it caps scores, always
    big       the number of layers at which it scales scores by hidden/heads in place of the head size
    unrotated every n-th layer has no rotary positions
    biases    the linear modules whose biases it reads
    tied      the output layer is always the embedding
    """

    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    window: int | None = None
    capped: bool = False
    big: int | None = None
    unrotated: int | None = None
    biases: tuple[str, ...] = ()
    tied: bool = False


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OTHERS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

LOADERS: dict[str, Loader] = {
    "llama": Loader(ropes=("default", "linear", "yarn", "llama3"), biases=(*_QKV, *_OTHERS)),
    "qwen2": Loader(biases=_QKV),
    "qwen3": Loader(biases=_QKV),
    "gemma2": Loader(ropes=("default", "linear"), window=2, capped=True, big=46, tied=True),
    "gemma3": Loader(ropes=("default", "linear"), window=6, big=62),
    "smollm3": Loader(unrotated=4),
    "phi3": Loader(ropes=("default", "longrope")),
}


def _loader_scale(decoder: Decoder, loader: Loader) -> float:
    big = len(decoder.layers) == loader.big
    squared = decoder.hidden // decoder.heads if big else decoder.head_size
    return 1 / math.sqrt(squared)


def refuse(decoder: Decoder, where: object) -> None:
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
                todo="use gptq" if rope.kind == "dynamic" else "export it to onnx or gptq",
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


def check_tensors(names: Collection[str], family: Family, where: object) -> None:
    """Refuse a tensor of a model that llama.cpp's loader does not take."""
    loader = LOADERS[family.gguf]
    for name in names:
        if name.endswith(".bias") and not name.endswith(tuple(f".{module}.bias" for module in loader.biases)):
            raise InputError(
                f"gguf: {where}: {name}: llama.cpp reads no such bias of a {family.gguf}",
                todo="export it to onnx or gptq",
            )
    if loader.tied and "lm_head.weight" in names:
        raise InputError(
            f"gguf: {where}: lm_head.weight: llama.cpp ties the output layer of a {family.gguf} to the embedding",
            todo="export it to onnx or gptq",
        )


def clipped_window(decoder: Decoder) -> int | None:
    """The window of a decoder that llama.cpp knows no window of, if its context is longer."""
    windows = [layer.window for layer in decoder.layers if layer.window is not None]
    if LOADERS[decoder.family.gguf].window is not None or not windows or min(windows) >= decoder.positions:
        return None
    return min(windows)


def context_notes(decoder: Decoder) -> tuple[str, ...]:
    """What a user should know of contexts that llama.cpp computes otherwise."""
    window, rope, notes = clipped_window(decoder), decoder.ropes[FULL], []
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
