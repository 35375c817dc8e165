"""auto-round folders: GPTQ's words or AWQ's, as `packing_format` says, under settings of their own; read.

config.json         transformers' config, and under quantization_config bits, group_size, packing_format, extra_config
model.safetensors   the words of `qalora.formats.gptq` or `qalora.formats.awq`; the other tensors as they are
tokenizer and other companion files

What auto-round writes as "llm_compressor" says that it is compressed-tensors, and as "auto_gptq" and "auto_awq" that it
is GPTQ and AWQ: it is read as those.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora.converters.format import Layout, exact, late, quantized_by

__all__ = ["LAYOUT", "read"]

read = late("qalora.converters.auto_round.reader", "read")


def _by_config(folder: Path, config: Mapping[str, Any]) -> bool:
    """By its method, or as the first versions called it."""
    return any(quantized_by(method)(folder, config) for method in ("auto-round", "intel/auto-round"))


LAYOUT = Layout(
    name="auto-round",
    kind="auto-round",
    read=read,
    read_as=lambda path, said: read(path, checkpoint_format=said),
    by_config=_by_config,
    runtimes=("torch",),
    rounding=exact,
    findings=late("qalora.inspection.gptq", "auto_round_findings"),
    memory=lambda path: 8,  # dequantized, in float32: at least 8 times the bytes of 4-bit codes
)
