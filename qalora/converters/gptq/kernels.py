"""What GPTQ kernels round in a folder."""

from __future__ import annotations

from pathlib import Path

from qalora.converters.format import Rounding
from qalora.converters.huggingface import read_config, stored_tensors

__all__ = ["has_head_in_words", "rounding"]


def rounding(folder: Path) -> Rounding:
    """Weights to float16, the LoRA beside them too, and the output layer where it is in words."""
    return Rounding(
        kind="lora" if (folder / "adapter_config.json").exists() else "weights",
        zeros="symmetric" if _is_symmetric(folder) else "nearest",
        head=has_head_in_words(folder),
    )


def has_head_in_words(folder: Path) -> bool:
    """Whether a GPTQ folder's output layer is in words."""
    return "lm_head.qweight" in stored_tensors(folder)


def _is_symmetric(folder: Path) -> bool:
    """Whether a GPTQ folder says that its zeros are the middle everywhere."""
    return bool((read_config(folder).get("quantization_config") or {}).get("sym"))
