"""Quantizations that are not read, by name: they hold no integer groups of the kind that a fold can be written into.

Methods are those of transformers 5.23 (utils/quantization_config.py: QuantizationMethod), and of vLLM's and NVIDIA's
tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora.errors import FormatError

__all__ = ["TENSORS", "unread"]

_NVFP4 = "NVFP4, floats of 4 bits"
_FP8 = "FP8, floats of 8 bits"
_CODEBOOK = "entries of a codebook"

METHODS: dict[str, str] = {
    "aqlm": f"AQLM, {_CODEBOOK}",
    "bitnet": "BitNet, weights of three values with one scale for all",
    "eetq": "EETQ, integers in the order of a GPU's kernel",
    "exl2": "EXL2, integers whose scales are quantized too",
    "exl3": "EXL3, paths through a trellis",
    "fbgemm_fp8": _FP8,
    "fouroversix": _NVFP4,
    "fp8": _FP8,
    "fp_quant": "FP-Quant, floats of 4 bits in rotated weights",
    "gemma": "weights in transformers' layout for Gemma",
    "gguf": "GGUF's blocks, which no folder holds",
    "higgs": "HIGGS, points of a lattice",
    "metal": "weights in the order of Metal's kernels",
    "modelopt": "ModelOpt's FP8 or NVFP4, floats of few bits",
    "mxfp4": "MXFP4, floats of 4 bits",
    "mxfp8": "MXFP8, floats of 8 bits",
    "nvfp4": _NVFP4,
    "quanto": "quanto, tensors of its own",
    "quark": "Quark, tensors of its own",
    "quip": "QuIP, points of a lattice",
    "sinq": "SINQ, integers with scales for rows and for columns",
    "spqr": "SpQR, integers whose scales are quantized too, and floats between them",
    "vptq": f"VPTQ, {_CODEBOOK}",
}
"""What a method holds, by its name in quantization_config."""

TENSORS: dict[str, str] = {
    ".weight.absmax": "bitsandbytes' weights of 4 bits",
    ".SCB": "bitsandbytes' integers with outliers",
    ".weight_scale_2": _NVFP4,
    "_proj_blocks": METHODS["mxfp4"],
    ".weight_scale_inv": _FP8,
    ".weight_scale": _FP8,
}
"""The same by the ends of tensors' names, for a config that says nothing; the first that is there counts."""


def unread(folder: Path, settings: Mapping[str, Any]) -> FormatError | None:
    """The refusal of a known method by what it holds; None for one that is not known."""
    method = settings.get("quant_method")
    held = _bitsandbytes(settings) if method == "bitsandbytes" else METHODS.get(str(method))
    if held is None:
        return None
    return FormatError(
        f"{folder}: quantization_config: {held}, which is not read here",
        todo="start from the float model, or from its GPTQ, AWQ or GGUF version",
    )


def _bitsandbytes(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        kind = "FP4" if settings.get("bnb_4bit_quant_type") == "fp4" else "NF4"
        return f"bitsandbytes' {kind}, {_CODEBOOK}"
    return "bitsandbytes' LLM.int8(), integers with outliers in floats"
