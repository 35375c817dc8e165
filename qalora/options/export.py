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
        "safetensors: split the weights into files of at most this size, such as 200MB.",
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

    name: str | None = option(None, "Model name in file names and metadata. Default: the name of the source.")
    allow_loss: frozenset[str] = option(
        frozenset(),
        f"Accept that the export loses this: {', '.join(LOSSES)}.",
        metavar="LOSS",
        example="minima",
        known=LOSSES.keys,
    )
    gptq_form: Literal["auto", "nearest", "eight-bit", "round"] = option(
        "auto",
        "GPTQ: how to store real zero points. nearest: rounded, the rest in a LoRA beside it. eight-bit: in finer "
        "codes. round: rounded, the rest is lost.",
        target="gptq",
        expert=True,
    )
    gguf_form: Literal["auto", "wide"] = option(
        "auto", "wide: store integer zero points exactly, in Q8_0 blocks.", target="gguf", expert=True
    )
    accuracy_level: int = option(
        0,
        "accuracy_level of ONNX Runtime's MatMulNBits. 4: int8 activations, which are faster and less exact.",
        low=0,
        high=4,
        target="onnx",
        expert=True,
    )
    onnx_graphs: Literal["both", "fast", "portable"] = option(
        "both",
        "Graphs to write. fast: for ONNX Runtime. portable: standard operators only. Both use the same data file.",
        target="onnx",
        expert=True,
    )
    onnx_embedding: Literal["auto", "float32", "quantized"] = option(
        "auto",
        "auto: store a tied embedding as codes, if the base has them. float32: larger, faster prompts, slower steps.",
        target="onnx",
        expert=True,
    )
    openvino_precision: Literal["float32", "fast"] = option(
        "float32",
        "OpenVINO: the precision that the model asks for. fast: the runtime's own, such as bfloat16 and a cache of 8 "
        "bits.",
        target="openvino",
        expert=True,
    )
    compressed_scales: Literal["float16", "float32"] = option(
        "float16",
        "compressed-tensors: data type of the scales, in which weights are decoded. float32: exactly those of the "
        "model.",
        target="compressed-tensors",
        expert=True,
    )
    max_shard_size: int = shard_size()
    split_max_size: int | None = option(
        None,
        "GGUF: split the model into files of at most this size, as gguf-split does. llama.cpp opens the first one.",
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
        help=f"Format to write: {', '.join(TARGETS)} (a qalora folder).",
        spelled="to",
        metavar="FORMAT",
        example="gguf",
    )
    minima: Minima | None = option(
        None,
        "Data type that the folded minima are rounded to. Default: as in the adapter's training, or float16.",
        expert=True,
    )
