"""torchao folders of `IntxUnpackedToInt8Tensor`, as transformers saves and opens them: a byte for each code.

config.json         transformers' config; under quantization_config a TorchAoConfig, which decides nothing when read
model.safetensors   <module>._weight_qdata, ._weight_scale and ._weight_zero_point, the other tensors as they are; in
                    the metadata of the file what describes each weight (`qalora.formats.torchao`), and in a folder of
                    ours "qalora.tensors": what each tensor was (`qalora.converters.specs`)
tokenizer and other companion files
"""

from qalora.converters.format import Format, exact, late, quantized_by
from qalora.converters.torchao.running import openings, usage

__all__ = ["FORMAT", "plan", "read", "write"]

plan = late("qalora.converters.torchao.planner", "plan")
read = late("qalora.converters.torchao.reader", "read")
write = late("qalora.converters.torchao.writer", "write")

FORMAT = Format(
    name="torchao",
    kind="torchao",
    runs="transformers with torchao",
    plan=plan,
    write=write,
    read=read,
    by_config=quantized_by("torchao"),
    end="._weight_qdata",
    runtimes=("torchao",),
    rounding=exact,
    memory=lambda path: 2,  # a byte for each code, and a layer's weights in float32 while it is computed
    usage=usage,
    openings=openings,
    library="transformers",
)
