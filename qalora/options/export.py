"""What a user may choose when a model is exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qalora.options.fields import Options, option
from qalora.options.words import LOSSES, SHARD_SIZE, TARGETS, Minima

__all__ = ["Export", "Folded", "Writing", "shard_size"]


def shard_size() -> Any:
    """The option that every record of safetensors has."""
    return option(
        SHARD_SIZE,
        "safetensors: split a model that holds more into files of at most this, such as 200MB.",
        size=True,
        low=1,
        metavar="SIZE",
        expert=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded(Options):
    """How a folder of ours is written."""

    max_shard_size: int = shard_size()


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing(Options):
    """How weights are written; each format reads what concerns it."""

    name: str | None = option(None, "The model's name in file names and metadata; the source's own by default.")
    allow_loss: frozenset[str] = option(
        frozenset(),
        f"Accept a loss by name: {', '.join(LOSSES)}.",
        metavar="LOSS",
        example="minima",
        known=LOSSES.keys,
    )
    gptq_form: Literal["auto", "nearest", "eight-bit", "round"] = option(
        "auto", "How GPTQ holds real zero points.", target="gptq", expert=True
    )
    gguf_form: Literal["auto", "wide"] = option(
        "auto", "wide: integer zero points exactly, in Q8_0.", target="gguf", expert=True
    )
    accuracy_level: int = option(
        0,
        "ONNX Runtime's MatMulNBits: 4 computes with int8 activations, faster and less exact.",
        low=0,
        high=4,
        target="onnx",
        expert=True,
    )
    onnx_graphs: Literal["both", "fast", "portable"] = option(
        "both",
        "fast: for ONNX Runtime. portable: of standard operators. Both read the same data file.",
        target="onnx",
        expert=True,
    )
    onnx_embedding: Literal["auto", "float32", "quantized"] = option(
        "auto",
        "auto: the codes of a tied embedding, where the base has them; float32: larger, faster prompts, slower steps.",
        target="onnx",
        expert=True,
    )
    max_shard_size: int = shard_size()
    split_max_size: int | None = option(
        None,
        "GGUF: split it into files of at most this, as gguf-split does; llama.cpp is given the first.",
        size=True,
        low=1,
        metavar="SIZE",
        example="4GB",
        target="gguf",
        expert=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Export(Writing):
    """The formats, and how the weights are folded and written in them."""

    targets: tuple[str, ...] = option(
        help=f"{', '.join(TARGETS)} (our own folder).",
        spelled="to",
        metavar="FORMAT",
        example="gguf",
    )
    minima: Minima | None = option(
        None,
        "What the folded minima are rounded to; what the adapter was trained with, or float16, by default.",
        expert=True,
    )
