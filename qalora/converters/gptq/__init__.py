"""GPTQ folders: read as anybody wrote them, written so that every loader reads them alike.

config.json, quantize_config.json    bits, group_size, sym, desc_act, checkpoint_format
model.safetensors, or its shards     the words of `qalora.formats.gptq`, and the other tensors as they are
adapter_config.json, adapter_model.safetensors
                                     what integer zero points cannot hold, as a PEFT LoRA (`beside`)
README.md                            what that adapter is, and how to load both
tokenizer and other companion files
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.format import Format, late, quantized_by
from qalora.converters.gptq.kernels import rounding
from qalora.converters.gptq.running import openings, usage
from qalora.converters.plan import ExportOptions

__all__ = ["FORMAT", "plan", "read", "ships_adapter", "write"]

plan = late("qalora.converters.gptq.planner", "plan")
read = late("qalora.converters.gptq.reader", "read")
ships_adapter = late("qalora.converters.gptq.planner", "ships_adapter")
write = late("qalora.converters.gptq.writer", "write")


def _by_config(folder: Path, config: Mapping[str, Any]) -> bool:
    """By the method, or by the file that older folders have instead, which names none."""
    older = not isinstance(config.get("quantization"), dict) and (folder / "quantize_config.json").exists()
    return quantized_by("gptq")(folder, config) or (config.get("quantization_config") is None and older)


def _ships(model: Checkpoint, options: ExportOptions) -> bool:
    return options.gptq_form == "auto" and ships_adapter(model)


FORMAT = Format(
    name="gptq",
    kind="GPTQ",
    runs="transformers with GPTQModel",
    plan=plan,
    write=write,
    read=read,
    read_as=lambda path, said: read(path, checkpoint_format=said),
    by_config=_by_config,
    end=".qweight",
    unannounced="quantize_config.json, which came with the model, is missing: put it beside config.json",
    runtimes=("gptqmodel",),
    rounding=rounding,
    residual=True,
    ships=_ships,
    findings=late("qalora.inspection.gptq", "findings"),
    usage=usage,
    openings=openings,
    library="transformers",
    carries=lambda wrapper: True,
)
