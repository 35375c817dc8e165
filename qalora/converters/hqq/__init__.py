"""HQQ folders, in the layout that transformers 4 saves and hqq's own layers load; read and written.

config.json         transformers' config, and under quantization_config
                    {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits", "group_size", ...}, ...},
                     "skip_modules": ["lm_head"]}
model.safetensors   <module>.W_q, .scale, .zero and the small tensors of `qalora.formats.hqq`, the other tensors as they
                    are; metadata "qalora.tensors": what each tensor was (`qalora.converters.specs`)
tokenizer and other companion files

transformers 5.23 refuses every HQQ model ("not available yet"); hqq 0.2.8's HQQLinear takes these tensors as they are.
"""

from qalora.converters.format import Format, exact, late, quantized_by
from qalora.converters.hqq.running import openings, usage

__all__ = ["FORMAT", "plan", "read", "write"]

plan = late("qalora.converters.hqq.planner", "plan")
read = late("qalora.converters.hqq.reader", "read")
write = late("qalora.converters.hqq.writer", "write")

FORMAT = Format(
    name="hqq",
    kind="HQQ",
    runs="hqq's layers",
    plan=plan,
    write=write,
    read=read,
    by_config=quantized_by("hqq"),
    end=".W_q",
    runtimes=("hqq",),
    rounding=exact,
    usage=usage,
    openings=openings,
)
