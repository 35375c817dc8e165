"""GPTQ folders: read as anybody wrote them, written so that every loader reads them alike.

config.json, quantize_config.json    bits, group_size, sym, desc_act, checkpoint_format
model.safetensors, or its shards     the words of `qalora.formats.gptq`, and the other tensors as they are
adapter_config.json, adapter_model.safetensors
                                     what integer zero points cannot hold, as a PEFT LoRA (`beside`)
README.md                            what that adapter is, and how to load both
tokenizer and other companion files
"""

from qalora.converters.gptq.planner import plan, ships_adapter
from qalora.converters.gptq.reader import read
from qalora.converters.gptq.writer import write

__all__ = ["plan", "read", "ships_adapter", "write"]
