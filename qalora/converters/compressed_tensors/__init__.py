"""compressed-tensors folders, which llm-compressor writes for vLLM ("pack-quantized"): read, and written.

config.json         transformers' config, and under quantization_config which module is quantized how (`scheme`)
model.safetensors   the words of `qalora.formats.compressed_tensors`, or its shards; the other tensors as they are
adapter_config.json, adapter_model.safetensors
                    an adapter over integer zero points, as a plain PEFT LoRA (`qalora.converters.gptq.beside`)
tokenizer and other companion files
"""

from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.converters.compressed_tensors.running import openings, usage
from qalora.converters.format import EXACT, Format, Rounding, late, quantized_by
from qalora.converters.plan import ExportOptions

__all__ = ["FORMAT", "plan", "read", "write"]

plan = late("qalora.converters.compressed_tensors.planner", "plan")
read = late("qalora.converters.compressed_tensors.reader", "read")
write = late("qalora.converters.compressed_tensors.writer", "write")
ships_adapter = late("qalora.converters.gptq.planner", "ships_adapter")


def _ships(model: Checkpoint, options: ExportOptions) -> bool:
    return bool(ships_adapter(model))


def _rounding(folder: Path) -> Rounding:
    """The library computes scale * (code - zero) in the type of the scales."""
    narrow = late("qalora.converters.compressed_tensors.reader", "float16_scales")(folder)
    return Rounding(kind="weights", head="lm_head" in narrow) if narrow else EXACT


FORMAT = Format(
    name="compressed-tensors",
    kind="compressed-tensors",
    runs="transformers with compressed-tensors",
    plan=plan,
    write=write,
    read=read,
    by_config=quantized_by("compressed-tensors"),
    end=".weight_packed",
    runtimes=("compressed-tensors",),
    rounding=_rounding,
    ships=_ships,
    memory=lambda path: 8,  # dequantized, in float32: at least 8 times the bytes of 4-bit codes
    usage=usage,
    openings=openings,
    library="transformers",
)
